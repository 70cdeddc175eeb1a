//! PURE: addresses, names and rules of the tenants' networks.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// The network of one tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantNetwork {
    /// 0..=4095, given by whoever coordinates the cluster, never reused.
    pub net_id: u16,
    /// Its subnet; the first address is the gateway's (the bridge's), instances have the third and those after it.
    pub subnet: Ipv4Net,
}

/// The network identity of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceNetwork {
    /// Its tenant's network.
    pub tenant: TenantNetwork,
    /// Its place in the subnet: 0 is the third address.
    pub offset: u32,
    /// Whether it forwards for its tenant.
    pub forwards: bool,
}

impl InstanceNetwork {
    /// Returns the instance's address.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.tenant.subnet.network()).wrapping_add(3 + self.offset))
    }
}

/// Every tenant with every instance: what the rules are rendered from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// The tenants, in the order of their net ids.
    pub tenants: Vec<(TenantNetwork, Vec<InstanceNetwork>)>,
}
