//! PURE: from what is desired and what is there to what to do.
//!
//! ```text
//! plan(Desired, Observed, now, options) -> Plan { steps with edges, deferred with reasons, when to look again }
//! ```
//!
//! Within a tenant, in this order:
//!
//! 1. the tenant's and the pools' documents, and images that are missing;
//! 2. whatever goes down, in the reverse order of the pools (workers before their gateway);
//! 3. new instances are written down, bridges and rules are made to fit;
//! 4. whatever comes up, in the order of the pools, each behind the gate of what it waits for: a gate opens when the pool has its
//!    wanted number of *ready* instances.
//!
//! A tenant or a pool whose document is gone gets a new one, alone: what it has is seen by the next pass, which leaves it as it is.
//!
//! What is half-done (a change of state that was cut off, a virtual machine that died) is recovered first, alone; the next pass
//! plans the pool from firm ground.

mod assign;
mod check;
mod room;
mod step;
mod tenant;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mvm_types::{ProfileName, Role, TenantId};

pub use check::check_against;
pub use step::{Action, Deferred, Edge, Need, Plan, Step, Target};

use crate::agent::desired::DesiredState;
use crate::agent::observe::Observed;
use crate::infra::clock::Moment;
use crate::infra::failure::Failure;
use crate::vm::pool::{BUILTIN, PoolSpec};
use room::NodeRoom;

/// How a failure that waits for its next try is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// It waits.
    WhenDue,
    /// It is tried now: somebody asked.
    Now,
    /// It stays as it is, also when it is due: nothing is tried, somebody only wants to know what waits for it.
    Never,
}

/// Plans one pass.
///
/// Guarantees: no edge points forward; a pool's first step up comes after the gates of the pools it waits for; no gateway goes down
/// before the pools that wait for it; no step exceeds a quota when the ones before it went well.
///
/// Assumes that `desired` has been validated and checked against `observed` ([`check_against`]).
pub fn plan(desired: &DesiredState, observed: &Observed, now: &Moment, retry: Retry) -> Plan {
    let mut planner = Planner {
        observed,
        now,
        retry,
        room: NodeRoom::of(observed),
        plan: Plan::default(),
        adopted: Vec::new(),
        network: false,
        builds: BTreeMap::new(),
        failed_builds: failed_builds(observed),
    };
    for tenant in desired.tenants.iter().filter(|tenant| observed.orphans.contains_key(&tenant.tenant_id)) {
        planner.adopt(tenant);
    }
    let named: BTreeSet<&TenantId> = desired.tenants.iter().map(|tenant| &tenant.tenant_id).collect();
    if desired.prune_unknown_tenants {
        for (id, tenant) in observed.tenants.iter().filter(|(id, _)| !named.contains(id)) {
            planner.destroy_tenant(id, tenant);
        }
    }
    let mut tenants: Vec<_> = desired.tenants.iter().collect();
    tenants.sort_by_key(|tenant| &tenant.tenant_id);
    for tenant in tenants {
        planner.tenant(tenant, desired.prune_unknown_pools);
    }
    planner.network_alone();
    planner.plan
}

/// The plan in the making.
struct Planner<'a> {
    observed: &'a Observed,
    now: &'a Moment,
    retry: Retry,
    room: NodeRoom,
    plan: Plan,
    /// The steps that write down tenants anew whose document is gone.
    adopted: Vec<Edge>,
    /// Whether a step makes bridges and rules fit already.
    network: bool,
    /// The last step that builds what several pools share.
    builds: BTreeMap<SharedBuild, usize>,
    /// The latest failures of what several pools share.
    failed_builds: BTreeMap<SharedBuild, &'a Failure>,
}

/// What pools have in common that are made from the same image of a flake.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct SharedBuild {
    flake_ref: String,
    role: Role,
    profile: ProfileName,
}

impl SharedBuild {
    /// Nothing for the built-in image, which is there in no time.
    fn of(spec: &PoolSpec) -> Option<SharedBuild> {
        let shared = || SharedBuild { flake_ref: spec.flake_ref.clone(), role: spec.role, profile: spec.profile.clone() };
        (spec.flake_ref != BUILTIN).then(shared)
    }
}

fn failed_builds(observed: &Observed) -> BTreeMap<SharedBuild, &Failure> {
    let mut failed: BTreeMap<SharedBuild, &Failure> = BTreeMap::new();
    for pool in observed.tenants.values().flat_map(|tenant| tenant.pools.values()) {
        let (Some(failure), Some(shared)) = (&pool.doc.failure, SharedBuild::of(&pool.doc.spec)) else { continue };
        let later = failed.get(&shared).is_none_or(|known| known.next_try.wall_ms < failure.next_try.wall_ms);
        if later {
            failed.insert(shared, failure);
        }
    }
    failed
}

impl Planner<'_> {
    /// Adds a step and returns its index.
    fn step(&mut self, action: Action, why: impl Into<String>, after: Vec<Edge>) -> usize {
        debug_assert!(after.iter().all(|edge| edge.step < self.plan.steps.len()));
        self.plan.steps.push(Step { action, why: why.into(), after });
        self.plan.steps.len() - 1
    }

    /// Records what is not done now.
    fn defer(&mut self, object: impl ToString, what: impl Into<String>, why: impl Into<String>, wait: Option<Duration>) {
        if let Some(wait) = wait {
            self.plan.look_again = Some(self.plan.look_again.map_or(wait, |sooner| sooner.min(wait)));
        }
        let in_ms = wait.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
        self.plan.deferred.push(Deferred { object: object.to_string(), what: what.into(), why: why.into(), in_ms });
    }

    /// Plans to make bridges and rules fit when nothing else needed it and they do not: after a reboot of the host, say.
    fn network_alone(&mut self) {
        if self.network {
            return;
        }
        let there = &self.observed.network.bridges;
        let wanted: BTreeSet<String> = self.observed.tenants.values().map(|tenant| tenant.doc.network.network().bridge()).collect();
        let list = |names: Vec<&String>| names.into_iter().cloned().collect::<Vec<_>>().join(", ");
        let missing = list(wanted.difference(there).collect());
        let kept = self.observed.kept_bridges();
        let left_over = list(there.difference(&wanted).filter(|name| !kept.contains(*name)).collect());
        let why = if !missing.is_empty() {
            format!("missing: {missing}")
        } else if !left_over.is_empty() {
            format!("left over: {left_over}")
        } else if !self.observed.unfinished.is_empty() {
            format!("never finished, and removed: {}", self.observed.unfinished.join(", "))
        } else if !self.observed.network.loose.is_empty() {
            format!("ports of no bridge: {}", list(self.observed.network.loose.iter().collect()))
        } else if self.observed.network.ruleset != self.observed.ruleset_hash() {
            "the rules that are loaded are not those that the documents give".to_owned()
        } else if !wanted.is_empty() && !self.observed.network.forwards {
            "the host does not forward".to_owned()
        } else {
            return;
        };
        self.step(Action::ApplyNetwork, why, Vec::new());
    }
}

/// An edge that requires success.
fn needs(step: usize) -> Edge {
    Edge { step, need: Need::Success }
}

/// An edge that requires only an end.
fn follows(step: usize) -> Edge {
    Edge { step, need: Need::End }
}
