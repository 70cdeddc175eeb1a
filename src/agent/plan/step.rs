//! A plan as data.

use std::fmt;
use std::time::Duration;

use mvm_types::{InstanceAddress, PoolAddress, TenantId};
use serde::Serialize;

use crate::vm::instance::{StateName, Verb};
use crate::vm::pool::PoolSpec;
use crate::vm::tenant::{NetworkSpec, Quotas};

/// What to do, in an order given by the edges between the steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps; every edge points to an earlier one.
    pub steps: Vec<Step>,
    /// What is not done now, and why.
    pub deferred: Vec<Deferred>,
    /// When the plan may look different although nothing has changed.
    pub look_again: Option<Duration>,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What to do.
    pub action: Action,
    /// Why.
    pub why: String,
    /// What has to come before.
    pub after: Vec<Edge>,
}

/// A step that has to come before another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    /// The index of the earlier step.
    pub step: usize,
    /// What is required of it.
    pub need: Need,
}

/// What is required of an earlier step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// That it went well; otherwise the later step is held back.
    Success,
    /// That it is over.
    End,
}

/// An instance that is there, or the n-th that the plan makes in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// One that is there.
    Existing(InstanceAddress),
    /// One that an earlier step makes.
    New {
        /// In this pool.
        pool: PoolAddress,
        /// Counted from 0.
        ordinal: u32,
    },
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Existing(at) => at.fmt(f),
            Target::New { pool, ordinal } => f.pad(&format!("{pool}/(new {})", ordinal + 1)),
        }
    }
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Writes down a tenant.
    CreateTenant {
        /// Its name.
        tenant: TenantId,
        /// Its network.
        network: NetworkSpec,
        /// Its quotas.
        quotas: Quotas,
    },
    /// Changes a tenant's quotas.
    UpdateTenant {
        /// Its name.
        tenant: TenantId,
        /// Its quotas.
        quotas: Quotas,
    },
    /// Writes down a pool.
    CreatePool {
        /// Its address.
        pool: PoolAddress,
        /// Its declaration.
        spec: Box<PoolSpec>,
    },
    /// Changes a pool's declaration.
    UpdatePool {
        /// Its address.
        pool: PoolAddress,
        /// Its declaration.
        spec: Box<PoolSpec>,
    },
    /// Builds a pool's image.
    BuildImage {
        /// The pool.
        pool: PoolAddress,
    },
    /// Finishes or undoes what was cut off.
    Recover {
        /// The instance.
        at: InstanceAddress,
    },
    /// Writes down new instances.
    CreateInstances {
        /// The pool.
        pool: PoolAddress,
        /// How many.
        count: u32,
        /// How many of them, the last ones, only stand in while others are replaced.
        standing_in: u32,
    },
    /// Makes bridges and packet filter rules what the documents say.
    ApplyNetwork,
    /// Changes the state of an instance.
    Change {
        /// How.
        verb: Verb,
        /// Which.
        target: Target,
        /// The state that the instance is on its way to; quotas count it as that.
        goal: StateName,
    },
    /// Waits until a pool has its wanted number of ready instances.
    Gate {
        /// The pool.
        pool: PoolAddress,
        /// How many.
        wanted: u32,
    },
    /// Does nothing; other steps come after it.
    Barrier,
    /// Removes a pool that has no instances any more.
    DestroyPool {
        /// The pool.
        pool: PoolAddress,
    },
    /// Removes a tenant that has no pools any more.
    DestroyTenant {
        /// The tenant.
        tenant: TenantId,
    },
}

impl Action {
    /// Tells whether the step is one that an operator wants to see: it changes something.
    pub fn is_visible(&self) -> bool {
        !matches!(self, Action::Gate { .. } | Action::Barrier)
    }

    /// The verb alone, as shown in listings.
    pub fn verb(&self) -> &'static str {
        match self {
            Action::CreateTenant { .. } => "create tenant",
            Action::UpdateTenant { .. } => "update tenant",
            Action::CreatePool { .. } => "create pool",
            Action::UpdatePool { .. } => "update pool",
            Action::BuildImage { .. } => "build image",
            Action::Recover { .. } => "recover",
            Action::CreateInstances { .. } => "create",
            Action::ApplyNetwork => "apply network",
            Action::Change { verb, .. } => verb.as_str(),
            Action::Gate { .. } => "await ready",
            Action::Barrier => "wait",
            Action::DestroyPool { .. } => "destroy pool",
            Action::DestroyTenant { .. } => "destroy tenant",
        }
    }

    /// The object, as shown in listings.
    pub fn object(&self) -> String {
        match self {
            Action::CreateTenant { tenant, .. } | Action::UpdateTenant { tenant, .. } | Action::DestroyTenant { tenant } => {
                tenant.to_string()
            }
            Action::CreatePool { pool, .. }
            | Action::UpdatePool { pool, .. }
            | Action::BuildImage { pool }
            | Action::Gate { pool, .. }
            | Action::DestroyPool { pool } => pool.to_string(),
            Action::CreateInstances { pool, count: 1, .. } => format!("{pool} (1 instance)"),
            Action::CreateInstances { pool, count, .. } => format!("{pool} ({count} instances)"),
            Action::Recover { at } => at.to_string(),
            Action::ApplyNetwork => "bridges and packet filter".to_owned(),
            Action::Change { target, .. } => target.to_string(),
            Action::Barrier => String::new(),
        }
    }

    /// The tenant that it concerns, where it is one.
    pub fn tenant(&self) -> Option<&TenantId> {
        match self {
            Action::CreateTenant { tenant, .. } | Action::UpdateTenant { tenant, .. } | Action::DestroyTenant { tenant } => Some(tenant),
            Action::CreatePool { pool, .. }
            | Action::UpdatePool { pool, .. }
            | Action::BuildImage { pool }
            | Action::CreateInstances { pool, .. }
            | Action::Gate { pool, .. }
            | Action::DestroyPool { pool }
            | Action::Change { target: Target::New { pool, .. }, .. } => Some(&pool.tenant),
            Action::Recover { at } | Action::Change { target: Target::Existing(at), .. } => Some(&at.tenant),
            Action::ApplyNetwork | Action::Barrier => None,
        }
    }
}

/// Something that is not done now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Deferred {
    /// The pool or instance.
    pub object: String,
    /// What would be done, e.g. `start` or `start 3 instances`.
    pub what: String,
    /// Why not now.
    pub why: String,
    /// In how many milliseconds it can be, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_ms: Option<u64>,
}

impl Plan {
    /// The steps that change something.
    pub fn visible(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|step| step.action.is_visible())
    }

    /// Tells whether there is nothing to do and nothing that waits.
    pub fn is_settled(&self) -> bool {
        self.steps.is_empty() && self.deferred.is_empty()
    }
}
