//! PURE: addresses, interface names, MACs and the text of the nftables ruleset.
//!
//! Everything a tenant's network consists of follows from three numbers that the desired state gives: the tenant's
//! [`TenantNetId`], its [`Subnet`], and each instance's [`InstanceOffset`]. Names, MACs, addresses and uids are derived
//! from them, so they are the same after a sleep, after a restart of the host, and on any node.
//!
//! ```text
//! 10.240.5.0/24   .0 network   .1 bridge br-tenant-5   .2 builder   .3 offset 0 (TAP tn5i0) …   .255 broadcast
//! ```

mod address;
mod identity;
mod ruleset;

pub use address::{CLUSTER_RANGE, InstanceOffset, NetError, Subnet, TenantNetId, find_overlap};
pub use identity::{
    BRIDGE_PREFIX, Mac, UidRange, bridge_mac, bridge_name, builder_mac, builder_tap_name, instance_mac, parse_bridge_name, parse_tap_name,
    tap_name,
};
pub use ruleset::{BuilderNetwork, Exposed, InstanceNetwork, Place, Protocol, Ruleset, TenantNetwork};
