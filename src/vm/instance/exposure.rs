//! Which ports of the host lead to which instances.

use mvm_types::TenantId;

use super::config::InstanceDoc;
use super::state::StateName;
use crate::net::{Exposed, TenantNetwork};
use crate::vm::error::LifecycleError;
use crate::vm::node::Node;
use crate::vm::pool::{Exposure, PoolDoc};

/// The ports that a pool exposes, each leading to those of its instances that run; none for a pool of which none does.
pub fn exposed<'a>(pool: &PoolDoc, network: &TenantNetwork, instances: impl Iterator<Item = &'a InstanceDoc>) -> Vec<Exposed> {
    if pool.spec.expose.is_empty() {
        return Vec::new();
    }
    let mut running: Vec<&InstanceDoc> = instances.filter(|doc| doc.state.name() == StateName::Running).collect();
    running.sort_by_key(|doc| doc.offset);
    if running.is_empty() {
        return Vec::new();
    }
    let expose = |one: &Exposure| Exposed {
        protocol: one.protocol,
        host_port: one.on_host(),
        port: one.port,
        bridge: network.bridge(),
        targets: running.iter().map(|doc| doc.address).collect(),
    };
    pool.spec.expose.iter().map(expose).collect()
}

impl Node {
    /// The ports that the pools of a tenant expose.
    pub(crate) fn exposed(
        &self,
        tenant: &TenantId,
        network: &TenantNetwork,
        instances: &[InstanceDoc],
    ) -> Result<Vec<Exposed>, LifecycleError> {
        let mut all = Vec::new();
        for pool in self.pool_dirs(tenant)? {
            // One whose document was moved aside exposes nothing until it is back.
            if let Ok(pool) = self.pool(&pool) {
                let of_pool = instances.iter().filter(|doc| doc.pool_id == pool.spec.pool_id);
                all.extend(exposed(&pool, network, of_pool));
            }
        }
        Ok(all)
    }
}
