//! PURE: what a tenant uses, and what its quotas leave room for.
//!
//! The planner asks before it plans a step, and the lifecycle asks again before the effect.

use std::collections::BTreeMap;

use mvm_types::{PoolId, TenantId};

use super::instance::{InstanceDoc, StateName};
use super::pool::InstanceResources;
use super::tenant::Quotas;

/// What the instances of a tenant use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Virtual CPUs of running and warm instances.
    pub vcpus: u64,
    /// Memory of running and warm instances, in MiB.
    pub mem_mib: u64,
    /// Running instances.
    pub running: u64,
    /// Warm instances.
    pub warm: u64,
    /// Data disks of all instances, in MiB.
    pub disk_mib: u64,
    /// Instances in any state, by pool.
    pub instances: BTreeMap<PoolId, u64>,
}

/// What an instance counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counted {
    /// A running instance.
    Running,
    /// A warm instance.
    Warm,
    /// One that is up only on its way to sleep: it needs CPUs and memory, and serves nobody.
    Passing,
    /// None of these.
    Down,
}

impl Counted {
    /// What an instance counts as that is in a state, or is about to be, on its way to another one.
    pub fn on_the_way(state: StateName, goal: Option<StateName>) -> Self {
        match (state, goal) {
            (StateName::Running, Some(StateName::Warm)) => Counted::Warm,
            (StateName::Running, Some(StateName::Sleeping)) => Counted::Passing,
            (state, _) => state.into(),
        }
    }
}

impl From<StateName> for Counted {
    fn from(state: StateName) -> Self {
        match state {
            StateName::Running => Counted::Running,
            StateName::Warm => Counted::Warm,
            _ => Counted::Down,
        }
    }
}

/// Tells what an instance counts as.
///
/// While a change of state is under way an instance counts as what it becomes, unless that is less: room is taken before the
/// effect and given back after it.
pub fn counts_as(doc: &InstanceDoc) -> Counted {
    let state = match &doc.transition {
        Some(transition) if matches!(transition.to, StateName::Running | StateName::Warm) => transition.to,
        _ => doc.state.name(),
    };
    Counted::on_the_way(state, doc.passing_to)
}

impl Usage {
    /// Adds up the instances of a tenant.
    pub fn of<'a>(instances: impl IntoIterator<Item = &'a InstanceDoc>) -> Self {
        let mut usage = Self::default();
        for doc in instances {
            usage.add_instance(&doc.pool_id, doc.blueprint.resources.data_disk_mib);
            usage.enter(counts_as(doc), &doc.blueprint.resources);
        }
        usage
    }

    /// Counts a new instance.
    pub fn add_instance(&mut self, pool: &PoolId, disk_mib: u64) {
        *self.instances.entry(pool.clone()).or_default() += 1;
        self.disk_mib += disk_mib;
    }

    /// Counts an instance no more.
    pub fn remove_instance(&mut self, pool: &PoolId, disk_mib: u64) {
        if let Some(count) = self.instances.get_mut(pool) {
            *count = count.saturating_sub(1);
        }
        self.disk_mib = self.disk_mib.saturating_sub(disk_mib);
    }

    /// Counts an instance as something.
    pub fn enter(&mut self, counted: impl Into<Counted>, resources: &InstanceResources) {
        match counted.into() {
            Counted::Running => self.running += 1,
            Counted::Warm => self.warm += 1,
            Counted::Passing => {}
            Counted::Down => return,
        }
        self.vcpus += u64::from(resources.vcpus);
        self.mem_mib += u64::from(resources.mem_mib);
    }

    /// Counts an instance as that no more.
    pub fn leave(&mut self, counted: impl Into<Counted>, resources: &InstanceResources) {
        match counted.into() {
            Counted::Running => self.running = self.running.saturating_sub(1),
            Counted::Warm => self.warm = self.warm.saturating_sub(1),
            Counted::Passing => {}
            Counted::Down => return,
        }
        self.vcpus = self.vcpus.saturating_sub(u64::from(resources.vcpus));
        self.mem_mib = self.mem_mib.saturating_sub(u64::from(resources.mem_mib));
    }
}

/// A quota that leaves no room.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{tenant} would have {would_be} {unit}, and its quota {quota} is {limit}")]
pub struct QuotaExceeded {
    /// The tenant.
    pub tenant: TenantId,
    /// The quota's name in the desired-state document.
    pub quota: &'static str,
    /// What the usage would be.
    pub would_be: u64,
    /// What is counted.
    pub unit: &'static str,
    /// The quota.
    pub limit: u64,
}

impl Quotas {
    /// Checks a usage that would come about, in all that can be exceeded by it.
    ///
    /// `before` is the usage now: what a quota that was lowered already exceeds is no reason to refuse what does not add to it.
    pub fn check(&self, tenant: &TenantId, before: &Usage, after: &Usage) -> Result<(), QuotaExceeded> {
        const MIB_PER_GIB: u64 = 1024;
        let limits = [
            ("max_vcpus", "virtual CPUs", before.vcpus, after.vcpus, self.max_vcpus.map(u64::from)),
            ("max_mem_mib", "MiB of memory", before.mem_mib, after.mem_mib, self.max_mem_mib),
            ("max_running", "running instances", before.running, after.running, self.max_running.map(u64::from)),
            ("max_warm", "warm instances", before.warm, after.warm, self.max_warm.map(u64::from)),
            (
                "max_disk_gib",
                "GiB of data disks",
                before.disk_mib.div_ceil(MIB_PER_GIB),
                after.disk_mib.div_ceil(MIB_PER_GIB),
                self.max_disk_gib,
            ),
        ];
        let exceeded = |quota, unit, would_be, limit| QuotaExceeded { tenant: tenant.clone(), quota, would_be, unit, limit };
        for (quota, unit, now, would_be, limit) in limits {
            if let Some(limit) = limit.filter(|limit| would_be > *limit && would_be > now) {
                return Err(exceeded(quota, unit, would_be, limit));
            }
        }
        if let Some(limit) = self.max_instances_per_pool.map(u64::from) {
            for (pool, would_be) in &after.instances {
                if *would_be > limit && *would_be > before.instances.get(pool).copied().unwrap_or(0) {
                    return Err(exceeded("max_instances_per_pool", "instances in one pool", *would_be, limit));
                }
            }
        }
        Ok(())
    }

    /// Checks the number of pools that a tenant would have.
    pub fn check_pools(&self, tenant: &TenantId, would_be: usize) -> Result<(), QuotaExceeded> {
        match self.max_pools.map(u64::from) {
            Some(limit) if would_be as u64 > limit => {
                Err(QuotaExceeded { tenant: tenant.clone(), quota: "max_pools", would_be: would_be as u64, unit: "pools", limit })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_quota_refuses_what_adds_and_allows_what_does_not() {
        let tenant: TenantId = "acme".parse().unwrap();
        let pool: PoolId = "web".parse().unwrap();
        let resources = InstanceResources { vcpus: 2, mem_mib: 512, data_disk_mib: 1500, ..InstanceResources::default() };
        let mut one = Usage::default();
        one.add_instance(&pool, resources.data_disk_mib);
        one.enter(StateName::Running, &resources);
        let mut two = one.clone();
        two.add_instance(&pool, resources.data_disk_mib);
        two.enter(StateName::Running, &resources);
        let limits = [
            (Quotas { max_vcpus: Some(3), ..Quotas::default() }, "acme would have 4 virtual CPUs, and its quota max_vcpus is 3"),
            (
                Quotas { max_mem_mib: Some(1023), ..Quotas::default() },
                "acme would have 1024 MiB of memory, and its quota max_mem_mib is 1023",
            ),
            (Quotas { max_running: Some(1), ..Quotas::default() }, "acme would have 2 running instances, and its quota max_running is 1"),
            (Quotas { max_disk_gib: Some(2), ..Quotas::default() }, "acme would have 3 GiB of data disks, and its quota max_disk_gib is 2"),
            (
                Quotas { max_instances_per_pool: Some(1), ..Quotas::default() },
                "acme would have 2 instances in one pool, and its quota max_instances_per_pool is 1",
            ),
        ];
        for (quotas, expected) in limits {
            assert_eq!(quotas.check(&tenant, &one, &two).unwrap_err().to_string(), expected);
            assert_eq!(quotas.check(&tenant, &two, &two), Ok(()));
            assert_eq!(quotas.check(&tenant, &Usage::default(), &Usage::default()), Ok(()));
        }
        let mut warm = Usage::default();
        warm.enter(StateName::Warm, &resources);
        let quotas = Quotas { max_warm: Some(0), ..Quotas::default() };
        assert_eq!(
            quotas.check(&tenant, &Usage::default(), &warm).unwrap_err().to_string(),
            "acme would have 1 warm instances, and its quota max_warm is 0"
        );
        assert!(Quotas { max_pools: Some(1), ..Quotas::default() }.check_pools(&tenant, 2).is_err());
    }
}
