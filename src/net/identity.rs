//! What follows from a net id and an offset: interface names, MACs, uids.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{InstanceOffset, TenantNetId};

/// What every tenant bridge's name begins with; the ruleset treats all such interfaces as tenants'.
pub const BRIDGE_PREFIX: &str = "br-tenant-";

/// The users of a node's VMMs, each of which is also a group: one for each instance there can be, and one for each machine that builds
/// or is thrown away.
///
/// ```text
///  first      + 2^22        + 2^23    + 0x90_0000                            + 2^28
///  builders   throw-away    trials    instances: net id * 65536 + offset     |
/// ```
///
/// They follow from what they are for, so that none is two machines' at once, and none is used again while an instance is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct UidRange(u32);

impl UidRange {
    /// Where the range begins on a node that was not told: beyond those that distributions, containers (systemd: up to 0x6fff_ffff, of
    /// which the last few are used here) and people have. The last is 0x7fff_ffff, still positive as a signed number.
    const DEFAULT_FIRST: u32 = 0x6f70_0000;
    /// Processes and threads have numbers below this (`PID_MAX_LIMIT` of the kernel).
    const PIDS: u32 = 1 << 22;
    const INSTANCES: u32 = 0x90_0000;
    /// How many there are.
    pub const SIZE: u32 = Self::INSTANCES + (1 << 28);

    /// The user of an instance's VMM.
    pub fn instance(self, net_id: TenantNetId, offset: InstanceOffset) -> u32 {
        self.0 + Self::INSTANCES + u32::from(net_id.get()) * 65_536 + u32::from(offset.0)
    }

    /// The user of the machine that a thread builds in.
    pub fn builder(self, thread: u32) -> u32 {
        self.0 + thread % Self::PIDS
    }

    /// The user of the machine that a process throws away at its end.
    pub fn throwaway(self, process: u32) -> u32 {
        self.0 + Self::PIDS + process % Self::PIDS
    }

    /// The user of a machine that only tries whether guests boot.
    pub fn trial(self) -> u32 {
        self.0 + 2 * Self::PIDS
    }
}

impl Default for UidRange {
    fn default() -> Self {
        Self(Self::DEFAULT_FIRST)
    }
}

impl From<UidRange> for u32 {
    fn from(range: UidRange) -> Self {
        range.0
    }
}

impl TryFrom<u32> for UidRange {
    type Error = String;

    /// Errors when users of the host, `nobody` or no user at all would be among them.
    fn try_from(first: u32) -> Result<Self, String> {
        const LAST_FIRST: u32 = u32::MAX - UidRange::SIZE;
        if (65_536..=LAST_FIRST).contains(&first) {
            return Ok(Self(first));
        }
        Err(format!("{first} is not between 65536 and {LAST_FIRST}: {} users follow it, and none may be one of the host's own", Self::SIZE))
    }
}

impl FromStr for UidRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<u32>().map_err(|_| format!("{text:?} is not the number of a user"))?.try_into()
    }
}

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
        assert_eq!(instance_mac(last.0, last.1).to_string(), "02:6d:0f:ff:ff:ff");
        assert_eq!(bridge_mac(net_id(5)).to_string(), "02:62:00:05:00:00");
        assert_eq!((builder_tap_name(last.0).as_str(), builder_mac(last.0).to_string().as_str()), ("tn4095b", "02:6c:0f:ff:00:00"));
    }

    #[test]
    fn uids_are_in_their_range_and_none_is_somebody_elses() {
        let range = UidRange::default();
        assert_eq!(u32::from(range), 1_869_611_008, "as the help of --first-uid says");
        assert_eq!(range.instance(TenantNetId::MAX, InstanceOffset(u16::MAX)), 0x7fff_ffff);
        assert_eq!(range.instance(net_id(0), InstanceOffset(0)), 0x7000_0000);
        let most = UidRange::PIDS - 1;
        let ends = [range.builder(0), range.builder(most), range.throwaway(0), range.throwaway(most), range.trial(), 0x7000_0000];
        assert!(ends.is_sorted_by(|one, next| one < next) && ends[0] == u32::from(range), "{ends:x?}");
        let last: UidRange = (u32::MAX - UidRange::SIZE).try_into().unwrap();
        assert_eq!(last.instance(TenantNetId::MAX, InstanceOffset(u16::MAX)), u32::MAX - 1, "the last number is no user");
        assert_eq!("65536".parse::<UidRange>().map(u32::from), Ok(65_536));
        for wrong in ["0", "65534", "65535", "4294967295", "-1", "root"] {
            assert!(wrong.parse::<UidRange>().is_err(), "{wrong}");
        }
        assert!(serde_json::from_str::<UidRange>("0").is_err());
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
            let range = UidRange::default();
            let uids: HashSet<_> = places.iter().map(|&(id, offset)| range.instance(net_id(id), InstanceOffset(offset))).collect();
            prop_assert_eq!((macs.len(), uids.len()), (places.len(), places.len()));
            prop_assert!(macs.iter().all(|mac| mac.0[0] & 0b11 == 0b10));
        }
    }
}
