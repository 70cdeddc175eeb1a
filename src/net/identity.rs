//! What follows from a net id and an offset: interface names, MACs, uids.

use std::fmt;

use super::{InstanceOffset, TenantNetId};

/// What every tenant bridge's name begins with; the ruleset treats all such interfaces as tenants'.
pub const BRIDGE_PREFIX: &str = "br-tenant-";

/// The first uid of instances; the last is 0x7fff_ffff, still positive as a signed number and far from 65534 (`nobody`).
const FIRST_UID: u32 = 0x7000_0000;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Names a tenant's bridge: `br-tenant-<net id>`, at most 14 of the 15 bytes that Linux allows.
pub fn bridge_name(net_id: TenantNetId) -> String {
    format!("{BRIDGE_PREFIX}{net_id}")
}

/// Names an instance's TAP: `tn<net id>i<offset>`, at most 12 bytes.
pub fn tap_name(net_id: TenantNetId, offset: InstanceOffset) -> String {
    format!("tn{net_id}i{offset}")
}

/// Names the TAP of the microVM that builds for a tenant: `tn<net id>b`.
pub fn builder_tap_name(net_id: TenantNetId) -> String {
    format!("tn{net_id}b")
}

/// Reads the net id out of a bridge's name; `None` when the name is not one that [`bridge_name`] makes.
pub fn parse_bridge_name(name: &str) -> Option<TenantNetId> {
    let net_id = TenantNetId::try_from(plain_number(name.strip_prefix(BRIDGE_PREFIX)?)?).ok()?;
    Some(net_id)
}

/// Reads net id and offset out of a TAP's name; `None` when the name is not one that [`tap_name`] makes.
pub fn parse_tap_name(name: &str) -> Option<(TenantNetId, InstanceOffset)> {
    let (net_id, offset) = name.strip_prefix("tn")?.split_once('i')?;
    let net_id = TenantNetId::try_from(plain_number(net_id)?).ok()?;
    Some((net_id, InstanceOffset(u16::try_from(plain_number(offset)?).ok()?)))
}

/// Reads a number as it is printed: no sign, no leading zero.
fn plain_number(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// Derives an instance's MAC: locally administered, unicast, `02:6d`, the net id, the offset.
pub fn instance_mac(net_id: TenantNetId, offset: InstanceOffset) -> Mac {
    let ([a, b], [c, d]) = (net_id.get().to_be_bytes(), offset.0.to_be_bytes());
    Mac([0x02, 0x6d, a, b, c, d])
}

/// Derives a bridge's MAC, `02:62`, the net id, zero: guests that were asleep still have it in their tables.
pub fn bridge_mac(net_id: TenantNetId) -> Mac {
    let [a, b] = net_id.get().to_be_bytes();
    Mac([0x02, 0x62, a, b, 0, 0])
}

/// Derives the MAC of the microVM that builds for a tenant: `02:6c`, the net id, zero.
pub fn builder_mac(net_id: TenantNetId) -> Mac {
    let [a, b] = net_id.get().to_be_bytes();
    Mac([0x02, 0x6c, a, b, 0, 0])
}

/// Derives the uid, which is also the gid, that an instance's VMM runs as.
pub fn instance_uid(net_id: TenantNetId, offset: InstanceOffset) -> u32 {
    FIRST_UID + u32::from(net_id.get()) * 65_536 + u32::from(offset.0)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn net_id(given: u16) -> TenantNetId {
        TenantNetId::try_from(u64::from(given)).unwrap()
    }

    #[test]
    fn the_extremes() {
        let last = (TenantNetId::MAX, InstanceOffset(u16::MAX));
        assert_eq!(bridge_name(last.0), "br-tenant-4095");
        assert_eq!(tap_name(last.0, last.1), "tn4095i65535");
        assert_eq!(instance_uid(last.0, last.1), 0x7fff_ffff);
        assert_eq!(instance_uid(net_id(0), InstanceOffset(0)), 0x7000_0000);
        assert_eq!(instance_mac(last.0, last.1).to_string(), "02:6d:0f:ff:ff:ff");
        assert_eq!(bridge_mac(net_id(5)).to_string(), "02:62:00:05:00:00");
        assert_eq!((builder_tap_name(last.0).as_str(), builder_mac(last.0).to_string().as_str()), ("tn4095b", "02:6c:0f:ff:00:00"));
    }

    #[test]
    fn others_names_are_not_ours() {
        for name in ["br-tenant-", "br-tenant-05", "br-tenant-4096", "br-tenant-+5", "br-tenant-5x", "br-5", "br0", ""] {
            assert_eq!(parse_bridge_name(name), None, "{name}");
        }
        for name in ["tn1i", "tni1", "tn1", "tn01i1", "tn1i01", "tn4096i1", "tn1i65536", "tn1b", "tap0", "tn1i1i1", ""] {
            assert_eq!(parse_tap_name(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_fit_and_come_back(id in 0u16..=4095, offset: u16) {
            let (id, offset) = (net_id(id), InstanceOffset(offset));
            prop_assert!(bridge_name(id).len() <= 15 && tap_name(id, offset).len() <= 15);
            prop_assert_eq!(parse_bridge_name(&bridge_name(id)), Some(id));
            prop_assert_eq!(parse_tap_name(&tap_name(id, offset)), Some((id, offset)));
        }

        #[test]
        fn different_instances_share_nothing(places in prop::collection::hash_set((0u16..=4095, any::<u16>()), 2..50)) {
            let macs: HashSet<_> = places.iter().map(|&(id, offset)| instance_mac(net_id(id), InstanceOffset(offset))).collect();
            let uids: HashSet<_> = places.iter().map(|&(id, offset)| instance_uid(net_id(id), InstanceOffset(offset))).collect();
            prop_assert_eq!((macs.len(), uids.len()), (places.len(), places.len()));
            prop_assert!(macs.iter().all(|mac| mac.0[0] & 0b11 == 0b10));
        }
    }
}
