//! What quotas and the node's memory leave room for while a plan is made.

use std::collections::BTreeMap;

use mvm_types::{PoolId, TenantId};

use crate::agent::observe::Observed;
use crate::vm::instance::StateName;
use crate::vm::pool::InstanceResources;
use crate::vm::tenant::Quotas;
use crate::vm::usage::Usage;

/// The usage of every tenant and of the node, as it will be after the steps planned so far.
#[derive(Clone)]
pub(super) struct NodeRoom {
    capacity_mib: u64,
    /// What a virtual machine takes besides its guest's memory.
    overhead_mib: u64,
    used_mib: u64,
    tenants: BTreeMap<TenantId, Usage>,
}

/// A change whose room is asked for.
pub(super) struct Ask<'a> {
    pub tenant: &'a TenantId,
    pub quotas: &'a Quotas,
    pub pool: &'a PoolId,
    pub resources: &'a InstanceResources,
}

impl NodeRoom {
    pub(super) fn of(observed: &Observed) -> Self {
        let orphans = observed.orphans.iter().map(|(id, orphan)| (id.clone(), Usage::of(&orphan.instances)));
        let tenants: BTreeMap<_, _> =
            observed.tenants.iter().map(|(id, tenant)| (id.clone(), Usage::of(tenant.instances()))).chain(orphans).collect();
        let overhead_mib = u64::from(observed.overhead_mib);
        let used_mib = tenants.values().map(|usage| on_the_node(usage, overhead_mib)).sum();
        Self { capacity_mib: observed.capacity_mib, overhead_mib, used_mib, tenants }
    }

    /// Gives back what an instance used in a state.
    pub(super) fn give_back(&mut self, tenant: &TenantId, state: StateName, resources: &InstanceResources) {
        let usage = self.tenants.entry(tenant.clone()).or_default();
        let before = on_the_node(usage, self.overhead_mib);
        usage.leave(state, resources);
        self.used_mib = self.used_mib.saturating_sub(before - on_the_node(usage, self.overhead_mib));
    }

    /// Counts an instance no more.
    pub(super) fn remove(&mut self, tenant: &TenantId, pool: &PoolId, resources: &InstanceResources) {
        self.tenants.entry(tenant.clone()).or_default().remove_instance(pool, resources.data_disk_mib);
    }

    /// Takes the room that an instance needs that takes none now, if there is any.
    ///
    /// `new` is whether the instance is yet to be made. A goal that is neither Running nor Warm needs the memory and the CPUs only
    /// on the way, and gives them back.
    ///
    /// # Errors
    /// Which quota or capacity leaves no room, in words.
    pub(super) fn take(&mut self, ask: &Ask<'_>, new: bool, goal: StateName) -> Result<(), String> {
        let before = self.tenants.entry(ask.tenant.clone()).or_default();
        let mut after = before.clone();
        if new {
            after.add_instance(ask.pool, ask.resources.data_disk_mib);
        }
        let mut peak = after.clone();
        let mut passing_mib = 0;
        match goal {
            StateName::Running | StateName::Warm => {
                after.enter(goal, ask.resources);
                peak = after.clone();
            }
            // On its way it takes CPUs and memory, but serves nobody: it is no running instance.
            _ => {
                peak.vcpus += u64::from(ask.resources.vcpus);
                peak.mem_mib += u64::from(ask.resources.mem_mib);
                passing_mib = self.overhead_mib;
            }
        }
        ask.quotas.check(ask.tenant, before, &peak).map_err(|error| error.to_string())?;
        let others = self.used_mib.saturating_sub(on_the_node(before, self.overhead_mib));
        let node_peak = others + on_the_node(&peak, self.overhead_mib) + passing_mib;
        if node_peak > self.capacity_mib && peak.mem_mib > before.mem_mib {
            return Err(format!("guests would need {node_peak} MiB of memory, and this node has {} for them", self.capacity_mib));
        }
        self.used_mib = others + on_the_node(&after, self.overhead_mib);
        *before = after;
        Ok(())
    }
}

/// What a tenant's machines need of the node, in MiB.
fn on_the_node(usage: &Usage, overhead_mib: u64) -> u64 {
    usage.mem_mib + (usage.running + usage.warm) * overhead_mib
}
