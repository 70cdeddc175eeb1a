//! The tenant's document.

use mvm_types::TenantId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::infra::clock::Moment;
use crate::net::{Place, Subnet, TenantNetId, TenantNetwork};
use crate::store::Document;

/// The tenant's network, given by whoever coordinates the cluster; fixed for the tenant's life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// The tenant's network id, 0 to 4095; never given to another tenant again.
    pub tenant_net_id: TenantNetId,
    /// The tenant's subnet inside 10.240.0.0/12, e.g. `10.240.1.0/24`.
    pub ipv4_subnet: Subnet,
}

impl NetworkSpec {
    /// Returns the network noun of [`crate::net`].
    pub fn network(&self) -> TenantNetwork {
        TenantNetwork { net_id: self.tenant_net_id, subnet: self.ipv4_subnet }
    }

    /// Checks that a tenant whose document is gone gets the network back that its instances are in.
    ///
    /// # Errors
    /// The field, and why not.
    pub fn check_return(&self, tenant: &TenantId, remains: &Remains) -> Result<(), (&'static str, String)> {
        let at_home = |place: &Place| place.net_id == self.tenant_net_id && self.ipv4_subnet.instance(place.offset) == Ok(place.address);
        match remains.places.iter().find(|place| !at_home(place)) {
            Some(Place { net_id, offset, address }) => Err((
                "network",
                format!(
                    "a tenant's network is fixed for its life, and {tenant} has an instance {address} (the one at offset {offset}) in net id {net_id}"
                ),
            )),
            None => Ok(()),
        }
    }

    /// Checks that a network takes nothing that belongs to another tenant, whose document is gone.
    ///
    /// # Errors
    /// The field, and why not.
    pub fn check_beside(&self, other: &TenantId, remains: &Remains) -> Result<(), (&'static str, String)> {
        let gone = format!("tenant {other}, whose document is gone");
        if let Some(place) = remains.places.iter().find(|place| place.net_id == self.tenant_net_id) {
            return Err(("network.tenant_net_id", format!("{} belongs to {gone}", place.net_id)));
        }
        if let Some(place) = remains.places.iter().find(|place| self.ipv4_subnet.contains(place.address)) {
            return Err(("network.ipv4_subnet", format!("{} holds the address {} of {gone}", self.ipv4_subnet, place.address)));
        }
        match &remains.unknown {
            Some(why) => Err(("network", format!("whether it is apart from that of {gone}, is not known: {why}"))),
            None => Ok(()),
        }
    }
}

/// What is known of the network of a tenant whose document is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// Where its instances are.
    pub places: Vec<Place>,
    /// Why that is not known of all of them, where it is so.
    pub unknown: Option<String>,
}

/// What a tenant may use at most; what is left out is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Quotas {
    /// Virtual CPUs of all running and warm instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// Memory of all running and warm instances, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_mem_mib: Option<u64>,
    /// Running instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_running: Option<u32>,
    /// Warm instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_warm: Option<u32>,
    /// Pools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_pools: Option<u32>,
    /// Instances in any state in one pool.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_instances_per_pool: Option<u32>,
    /// Data disks of all instances, in GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_disk_gib: Option<u64>,
}

/// `tenants/<t>/tenant.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantDoc {
    /// The document's version.
    pub version: u32,
    /// The tenant.
    pub tenant_id: TenantId,
    /// Its network.
    pub network: NetworkSpec,
    /// Its quotas.
    pub quotas: Quotas,
    /// Counts changes of the tenant's secrets; a drive built earlier has older ones.
    pub secrets_epoch: u64,
    /// When it was made.
    pub created: Moment,
}

impl Document for TenantDoc {
    const KIND: &'static str = "tenant";
    const VERSION: u32 = 1;
    fn version(&self) -> u32 {
        self.version
    }
}
