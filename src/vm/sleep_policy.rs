//! PURE: may this instance be warmed, put to sleep or stopped by a plan, and if not, until when.

use std::time::Duration;

use super::instance::{InstanceState, StateName, Verb};
use super::pool::RuntimePolicy;
use super::pool::role::RoleTraits;
use crate::infra::clock::Moment;

/// Why an instance keeps its state for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keep {
    /// The rule and what it says.
    pub why: String,
    /// How long it says so.
    pub wait: Duration,
}

/// The policy of a pool with what its role demands: neither makes shorter or less what the other wants.
pub fn effective(policy: &RuntimePolicy, role: &RoleTraits) -> RuntimePolicy {
    RuntimePolicy {
        min_running_seconds: policy.min_running_seconds.max(role.min_running_seconds),
        min_running: policy.min_running.max(role.min_running),
        ..policy.clone()
    }
}

/// Tells whether the runtime policy lets a plan take an instance down by a verb now.
///
/// It speaks of plans only: what a person asks for by hand is done.
pub fn may(verb: Verb, state: &InstanceState, policy: &RuntimePolicy, now: &Moment) -> Result<(), Keep> {
    let (rule, seconds) = match state.name() {
        StateName::Running => ("min_running_seconds", policy.min_running_seconds),
        StateName::Warm => ("min_warm_seconds", policy.min_warm_seconds),
        _ => return Ok(()),
    };
    if !matches!(verb, Verb::Warm | Verb::Sleep | Verb::Stop | Verb::Destroy) {
        return Ok(());
    }
    let least = Duration::from_secs(seconds.into());
    let been = state.since().map_or(Duration::MAX, |since| since.elapsed(now));
    if been >= least {
        return Ok(());
    }
    Err(Keep { why: format!("{} for {} s of {rule} {seconds}", state.name(), been.as_secs()), wait: least - been })
}
