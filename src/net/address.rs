//! Net ids, subnets and the place of an instance in its subnet.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The range that all tenants' subnets lie in, on every node of a cluster.
pub const CLUSTER_RANGE: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 240, 0, 0), 12);

const LARGEST_NET_ID: u16 = 4095;
const WIDEST_PREFIX: u8 = 16;
const NARROWEST_PREFIX: u8 = 29;

/// Why a net id, a subnet or an offset is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The net id is above the largest.
    #[error("tenant net id {given} is out of range; allowed are 0 to {LARGEST_NET_ID}")]
    NetId {
        /// The number.
        given: u64,
    },
    /// Not `a.b.c.d/n`.
    #[error("{given:?} is not an IPv4 subnet; one looks like 10.240.5.0/24")]
    Syntax {
        /// The string, shortened.
        given: String,
    },
    /// The prefix length is not one a tenant may have.
    #[error("subnet {given} has prefix length /{prefix}; allowed are /{WIDEST_PREFIX} to /{NARROWEST_PREFIX}")]
    Prefix {
        /// The subnet as given.
        given: String,
        /// Its prefix length.
        prefix: u8,
    },
    /// Bits behind the prefix are set.
    #[error("subnet {given} has host bits set; the subnet of that address is {meant}")]
    HostBits {
        /// The subnet as given.
        given: String,
        /// The same with the host bits cleared.
        meant: String,
    },
    /// Not inside the cluster range.
    #[error("subnet {given} is outside of 10.240.0.0/12, where all tenants' subnets lie")]
    OutOfRange {
        /// The subnet as given.
        given: String,
    },
    /// The subnet has no room for that instance.
    #[error("subnet {subnet} has room for {capacity} instances; offset {offset} is beyond")]
    Full {
        /// The subnet.
        subnet: Subnet,
        /// How many instances it holds.
        capacity: u32,
        /// The offset asked for.
        offset: u16,
    },
}

/// A tenant's network number, 0 to 4095: given by the coordinator, never used again for another tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct TenantNetId(u16);

impl TenantNetId {
    /// The largest net id.
    pub const MAX: Self = Self(LARGEST_NET_ID);

    /// Returns the number.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for TenantNetId {
    type Error = NetError;
    fn try_from(given: u64) -> Result<Self, NetError> {
        match u16::try_from(given) {
            Ok(id) if id <= LARGEST_NET_ID => Ok(Self(id)),
            _ => Err(NetError::NetId { given }),
        }
    }
}

impl From<TenantNetId> for u64 {
    fn from(id: TenantNetId) -> u64 {
        id.0.into()
    }
}

impl fmt::Display for TenantNetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl JsonSchema for TenantNetId {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "TenantNetId".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "integer", "minimum": 0, "maximum": LARGEST_NET_ID })
    }
}

/// The place of an instance in its tenant's subnet, counted from 0, which is the subnet's third usable address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct InstanceOffset(pub u16);

impl fmt::Display for InstanceOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A tenant's IPv4 subnet: inside 10.240.0.0/12, /16 to /29, no host bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

/// Addresses before the first instance: the network's own, the gateway, and the builder's.
const FIRST_INSTANCE: u32 = 3;

impl Subnet {
    /// Makes a subnet of a network address and a prefix length.
    pub fn new(network: Ipv4Addr, prefix: u8) -> Result<Self, NetError> {
        let given = || format!("{network}/{prefix}");
        if !(WIDEST_PREFIX..=NARROWEST_PREFIX).contains(&prefix) {
            return Err(NetError::Prefix { given: given(), prefix });
        }
        let bits = network.to_bits();
        let masked = bits & mask(prefix);
        if masked != bits {
            return Err(NetError::HostBits { given: given(), meant: format!("{}/{prefix}", Ipv4Addr::from_bits(masked)) });
        }
        let (range, range_prefix) = CLUSTER_RANGE;
        if bits & mask(range_prefix) != range.to_bits() {
            return Err(NetError::OutOfRange { given: given() });
        }
        Ok(Self { network: bits, prefix })
    }

    /// Returns the network's own address.
    pub fn network(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network)
    }

    /// Returns the prefix length, 16 to 29.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns the bridge's address, which is the instances' gateway: the first usable one.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network + 1)
    }

    /// Returns the address of the microVM that builds for the tenant: the second usable one.
    pub fn builder(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network + 2)
    }

    /// Returns the broadcast address.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network | !mask(self.prefix))
    }

    /// Returns how many instances have an address: all addresses but network, gateway, builder and broadcast.
    pub fn capacity(self) -> u32 {
        (1 << (32 - u32::from(self.prefix))) - FIRST_INSTANCE - 1
    }

    /// Returns the address of the instance at an offset.
    ///
    /// Errors when the subnet is too small for it.
    pub fn instance(self, offset: InstanceOffset) -> Result<Ipv4Addr, NetError> {
        let capacity = self.capacity();
        if u32::from(offset.0) >= capacity {
            return Err(NetError::Full { subnet: self, capacity, offset: offset.0 });
        }
        Ok(Ipv4Addr::from_bits(self.network + FIRST_INSTANCE + u32::from(offset.0)))
    }

    /// Whether an address is one of the subnet's, its network and broadcast addresses included.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.network
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        let shared = mask(self.prefix.min(other.prefix));
        self.network & shared == other.network & shared
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX << (32 - u32::from(prefix))
}

impl FromStr for Subnet {
    type Err = NetError;
    fn from_str(given: &str) -> Result<Self, NetError> {
        let syntax = || NetError::Syntax { given: given.chars().take(40).collect() };
        let (network, prefix) = given.split_once('/').ok_or_else(syntax)?;
        // `u8::from_str` takes "+8" and "08"; a subnet is written in one way only.
        let plain = prefix.len() <= 2 && !prefix.starts_with('0') && prefix.bytes().all(|b| b.is_ascii_digit());
        if !plain {
            return Err(syntax());
        }
        Self::new(network.parse().map_err(|_| syntax())?, prefix.parse().map_err(|_| syntax())?)
    }
}

impl TryFrom<String> for Subnet {
    type Error = NetError;
    fn try_from(given: String) -> Result<Self, NetError> {
        given.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network(), self.prefix)
    }
}

impl JsonSchema for Subnet {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Subnet".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": r"^10\.2(4[0-9]|5[0-5])\.[0-9]{1,3}\.[0-9]{1,3}/(1[6-9]|2[0-9])$",
            "description": "an IPv4 subnet inside 10.240.0.0/12, /16 to /29, host bits zero"
        })
    }
}

/// Finds two subnets of a list that overlap, by their positions in it; `n log n`.
pub fn find_overlap(subnets: &[Subnet]) -> Option<(usize, usize)> {
    let mut order: Vec<usize> = (0..subnets.len()).collect();
    order.sort_by_key(|&index| (subnets[index].network, subnets[index].prefix, index));
    // Two prefixes either nest or are apart, so in this order the first overlap is between neighbours.
    order.windows(2).find_map(|pair| {
        let (a, b) = (pair[0], pair[1]);
        subnets[a].overlaps(subnets[b]).then_some((a.min(b), a.max(b)))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_subnet_is_laid_out_as_documented() {
        let subnet: Subnet = "10.240.5.0/24".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 240, 5, 1));
        assert_eq!(subnet.builder(), Ipv4Addr::new(10, 240, 5, 2));
        assert_eq!(subnet.instance(InstanceOffset(0)).unwrap(), Ipv4Addr::new(10, 240, 5, 3));
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(10, 240, 5, 255));
        assert_eq!(subnet.capacity(), 252);
        assert_eq!("10.240.5.0/29".parse::<Subnet>().unwrap().capacity(), 4);
        assert_eq!("10.240.0.0/16".parse::<Subnet>().unwrap().capacity(), 65_532);
        let error = subnet.instance(InstanceOffset(252)).unwrap_err();
        assert_eq!(error.to_string(), "subnet 10.240.5.0/24 has room for 252 instances; offset 252 is beyond");
    }

    #[test]
    fn malformed_subnets_are_refused() {
        for given in [
            "",
            "/",
            "10.240.5.0",
            "10.240.5.0/",
            "/24",
            "10.240.5.0/024",
            "10.240.5.0/+24",
            "10.240.5.0/24/24",
            "10.240.5/24",
            "010.240.5.0/24",
            "10.240.5.0/24 ",
            " 10.240.5.0/24",
            "10.240.5.0/-1",
            "10.240.5.0/0",
            "10.240.5.0/15",
            "10.240.5.0/30",
            "10.240.5.0/99",
            "10.240.5.1/24",
            "10.239.0.0/24",
            "11.0.0.0/24",
            "192.168.0.0/24",
            "fd00::/64",
            "10.240.5.0/24\0",
            "..",
            &"1".repeat(10_000),
        ] {
            let error = given.parse::<Subnet>().expect_err(given).to_string();
            assert!(error.len() < 200, "{error}");
        }
        assert_eq!(
            "10.240.5.7/24".parse::<Subnet>().unwrap_err().to_string(),
            "subnet 10.240.5.7/24 has host bits set; the subnet of that address is 10.240.5.0/24"
        );
    }

    #[test]
    fn net_ids_have_a_range() {
        assert_eq!(TenantNetId::try_from(4095).unwrap(), TenantNetId::MAX);
        for given in [4096, 65_536, 70_000, u64::MAX] {
            assert!(TenantNetId::try_from(given).is_err(), "{given}");
        }
    }

    pub(crate) fn any_subnet() -> impl Strategy<Value = Subnet> {
        (16u8..=29, 0u32..1 << 20).prop_map(|(prefix, bits)| {
            let network = (CLUSTER_RANGE.0.to_bits() | bits) & mask(prefix);
            Subnet::new(Ipv4Addr::from_bits(network), prefix).unwrap()
        })
    }

    proptest! {
        #[test]
        fn subnets_come_back(subnet in any_subnet()) {
            prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
        }

        #[test]
        fn parsing_never_panics(given in "\\PC{0,30}") {
            if let Ok(subnet) = given.parse::<Subnet>() {
                prop_assert_eq!(subnet.to_string(), given);
            }
        }

        #[test]
        fn instances_lie_inside_and_are_no_special_address(subnet in any_subnet(), offset: u16) {
            match subnet.instance(InstanceOffset(offset)) {
                Ok(address) => {
                    prop_assert!(subnet.contains(address));
                    prop_assert!(address > subnet.builder() && address < subnet.broadcast());
                }
                Err(_) => prop_assert!(u32::from(offset) >= subnet.capacity()),
            }
        }

        #[test]
        fn overlap_is_symmetric_and_means_a_shared_address(a in any_subnet(), b in any_subnet()) {
            let shared = a.contains(b.network()) || b.contains(a.network());
            prop_assert_eq!(a.overlaps(b), shared);
            prop_assert_eq!(b.overlaps(a), shared);
        }

        #[test]
        fn the_quick_overlap_search_agrees_with_the_plain_one(subnets in prop::collection::vec(any_subnet(), 0..40)) {
            let plain = (0..subnets.len()).any(|a| (0..a).any(|b| subnets[a].overlaps(subnets[b])));
            let found = find_overlap(&subnets);
            prop_assert_eq!(found.is_some(), plain);
            if let Some((a, b)) = found {
                prop_assert!(a < b && subnets[a].overlaps(subnets[b]));
            }
        }
    }
}
