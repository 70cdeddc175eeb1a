//! The tenant's document.

use mvm_types::TenantId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::infra::clock::Moment;
use crate::net::{Subnet, TenantNetId, TenantNetwork};
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
