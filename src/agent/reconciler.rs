//! The loop: observe, plan, execute, and again until there is nothing left to do.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::desired::{AdmissionError, DesiredState, DesiredTenant, InvalidDocument, SCHEMA_VERSION, admit};
use super::execute::{End, ExecuteOptions, Outcome, Progress, execute};
use super::observe::{Observed, observe};
use super::plan::{Deferred, Plan, Retry, check_against, plan};
use crate::agent::roles;
use crate::infra::clock::Moment;
use crate::store::{LockGuard, StoreError, Wait};
use crate::vm::error::{FailureKind, LifecycleError, with_causes};
use crate::vm::instance::StateName;
use crate::vm::keys;
use crate::vm::node::Node;
use crate::vm::pool::DesiredCounts;

/// Why a document was not carried out at all.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// It contradicts itself or what is there.
    #[error(transparent)]
    Invalid(#[from] InvalidDocument),
    /// It is not for this node, or not newer.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// Something else went wrong.
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
}

impl ReconcileError {
    /// Returns what kind of failure it is.
    pub fn kind(&self) -> FailureKind {
        match self {
            ReconcileError::Invalid(_) => FailureKind::Invalid,
            ReconcileError::Admission(_) => FailureKind::Refused,
            ReconcileError::Lifecycle(error) => error.kind(),
        }
    }
}

/// What one pass did.
#[derive(Debug, Default)]
pub struct Report {
    /// The plan.
    pub plan: Plan,
    /// What became of each step, in the plan's order.
    pub outcomes: Vec<Outcome>,
    /// What could not be read.
    pub problems: Vec<String>,
}

impl Report {
    /// The visible steps with what became of them.
    pub fn visible(&self) -> impl Iterator<Item = (&super::plan::Step, &Outcome)> {
        self.plan.steps.iter().zip(&self.outcomes).filter(|(step, _)| step.action.is_visible())
    }

    /// The steps that failed, with their errors.
    pub fn failed(&self) -> impl Iterator<Item = (&Outcome, &str, bool)> {
        self.outcomes.iter().filter_map(|outcome| match &outcome.end {
            End::Failed { error, retry } => Some((outcome, error.as_str(), *retry)),
            _ => None,
        })
    }
}

/// How far `apply` came.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "result", rename_all = "kebab-case")]
pub enum Applied {
    /// Everything is as declared.
    Ready,
    /// Something could not be done, and waiting longer does not help.
    Partly {
        /// What failed, by object.
        failed: BTreeMap<String, String>,
        /// What waits.
        deferred: Vec<Deferred>,
    },
    /// The time was up.
    TimedOut {
        /// What still waits or fails.
        deferred: Vec<Deferred>,
        /// What failed last, by object.
        failed: BTreeMap<String, String>,
    },
    /// Somebody interrupted; the next apply goes on from here.
    Interrupted,
}

/// How `apply` goes about it.
pub struct ApplyOptions<'a> {
    /// When to give up.
    pub deadline: Instant,
    /// How many steps run at the same time.
    pub parallel: usize,
    /// Told of every step.
    pub progress: &'a (dyn Fn(Progress<'_>) + Sync),
    /// Once true, no further step begins.
    pub cancel: &'a AtomicBool,
}

/// Observes and plans; changes nothing.
pub fn look(node: &Node, desired: &DesiredState, retry: Retry) -> Result<(Observed, Plan), ReconcileError> {
    let mut observed = observe(node)?;
    check_against(desired, &observed)?;
    roles::learn(node, desired, &observed.tenants, &mut observed.roles)?;
    admit(desired, &node.id, node.node_doc()?.admitted.as_ref())?;
    let plan = plan(desired, &observed, &node.clock().now(), retry);
    Ok((observed, plan))
}

/// One pass: observes, plans, and carries the plan out. Only one runs at a time on a state directory.
///
/// # Errors
/// When the document is refused, or another mvm reconciles and `wait` is over. Failures of steps are in the report.
pub fn pass(node: &Node, desired: &DesiredState, retry: Retry, wait: Wait, options: &ExecuteOptions<'_>) -> Result<Report, ReconcileError> {
    let _one_at_a_time = alone(node, wait, options.cancel)?;
    let (observed, plan) = look(node, desired, retry)?;
    if let Some(admitted) = admit(desired, &node.id, node.node_doc()?.admitted.as_ref())? {
        node.update_node_doc(|doc| doc.admitted = Some(admitted))?;
    }
    let outcomes = execute(node, &plan, options);
    let instances = observed.tenants.values().flat_map(|tenant| tenant.pools.values()).flat_map(|pool| &pool.instances);
    for one in instances.filter(|one| one.doc.state.vm().is_some()) {
        if let Err(error) = node.host().trim_logs(&one.doc.at()) {
            tracing::warn!(error = with_causes(&error), "a guest's log is not trimmed");
        }
    }
    Ok(Report { plan, outcomes, problems: observed.problems })
}

/// Waits until no other mvm reconciles, or until the caller does not want it any more.
fn alone(node: &Node, wait: Wait, cancel: &AtomicBool) -> Result<Box<dyn LockGuard>, LifecycleError> {
    const SLICE: Duration = Duration::from_millis(100);
    loop {
        let slice = match wait {
            Wait::No => Wait::No,
            Wait::Until(deadline) => Wait::Until(deadline.min(Instant::now() + SLICE)),
        };
        match node.documents().raw().lock(keys::RECONCILE_LOCK, slice) {
            Err(StoreError::Locked { .. })
                if !cancel.load(Ordering::SeqCst) && matches!(wait, Wait::Until(deadline) if Instant::now() < deadline) => {}
            locked => return Ok(locked?),
        }
    }
}

/// Passes until everything is as declared, or cannot be.
pub fn apply(node: &Node, desired: &DesiredState, options: &ApplyOptions<'_>) -> Result<Applied, ReconcileError> {
    /// How often one object may fail before apply says so instead of trying on.
    const TRIES: u32 = 3;
    const NAP: Duration = Duration::from_millis(20);
    let execute_options = ExecuteOptions { parallel: options.parallel, progress: options.progress, cancel: options.cancel };
    let mut retry = Retry::Now;
    let mut tries: BTreeMap<String, u32> = BTreeMap::new();
    let mut hopeless: BTreeMap<String, String> = BTreeMap::new();
    let mut last: Option<Plan> = None;
    loop {
        let report = match pass(node, desired, retry, Wait::Until(options.deadline), &execute_options) {
            Err(error) if is_elsewhere(&error) && options.cancel.load(Ordering::SeqCst) => return Ok(Applied::Interrupted),
            report => report?,
        };
        retry = Retry::WhenDue;
        if options.cancel.load(Ordering::SeqCst) {
            return Ok(Applied::Interrupted);
        }
        if report.plan.is_settled() {
            if report.problems.is_empty() {
                return Ok(Applied::Ready);
            }
            let failed = BTreeMap::from([("documents".to_owned(), report.problems.join("; "))]);
            return Ok(Applied::Partly { failed, deferred: Vec::new() });
        }
        let mut failed: BTreeMap<String, String> = BTreeMap::new();
        for (outcome, error, retry_can_help) in report.failed() {
            failed.insert(outcome.object.clone(), error.to_owned());
            let count = tries.entry(outcome.object.clone()).or_default();
            *count += 1;
            if !retry_can_help || *count >= TRIES {
                hopeless.insert(outcome.object.clone(), error.to_owned());
            }
        }
        // What failed before and waits for its next try is still failing.
        for one in report.plan.deferred.iter().filter(|one| tries.contains_key(&one.object)) {
            failed.entry(one.object.clone()).or_insert_with(|| one.why.clone());
        }
        let deferred = report.plan.deferred.clone();
        let wait = report.plan.look_again;
        // Doing the same again and again is no progress.
        let did = report.visible().any(|(_, outcome)| outcome.is_done()) && last.as_ref() != Some(&report.plan);
        last = Some(report.plan);
        if !did && (!hopeless.is_empty() || (failed.is_empty() && wait.is_none())) {
            failed.extend(hopeless);
            return Ok(Applied::Partly { failed, deferred });
        }
        if Instant::now() >= options.deadline {
            return Ok(Applied::TimedOut { deferred, failed });
        }
        if !did {
            let until = Instant::now() + wait.unwrap_or(Duration::from_millis(200)).max(NAP);
            while Instant::now() < until.min(options.deadline) {
                if options.cancel.load(Ordering::SeqCst) {
                    return Ok(Applied::Interrupted);
                }
                std::thread::sleep(NAP);
            }
        }
    }
}

/// Returns the document of what was declared: the same declarations that are on disk.
pub fn declared(observed: &Observed) -> DesiredState {
    let tenants = observed.tenants.values().map(|tenant| DesiredTenant {
        tenant_id: tenant.doc.tenant_id.clone(),
        network: tenant.doc.network.clone(),
        quotas: tenant.doc.quotas.clone(),
        pools: tenant.pools.values().map(|pool| pool.doc.spec.clone()).collect(),
    });
    DesiredState { schema_version: SCHEMA_VERSION, tenants: tenants.collect(), ..DesiredState::empty() }
}

/// Returns what waits for something, by object, and why, as long as nothing that failed comes right.
pub fn waiting(observed: &Observed, now: &Moment) -> BTreeMap<String, String> {
    let plan = plan(&declared(observed), observed, now, Retry::Never);
    plan.deferred.into_iter().map(|one| (one.object, format!("{} waits: {}", one.what, one.why))).collect()
}

/// Returns the document that describes what is there; applying it changes nothing.
///
/// The counts are those of the states that instances are in. One that is in none of the three (stopped by hand, say) counts as
/// running, since a document cannot say otherwise and what is not counted would be destroyed: applying it starts that one.
pub fn describe(observed: &Observed) -> DesiredState {
    let mut document = declared(observed);
    for tenant in &mut document.tenants {
        for spec in &mut tenant.pools {
            let Some(pool) = observed.tenants.get(&tenant.tenant_id).and_then(|tenant| tenant.pools.get(&spec.pool_id)) else { continue };
            let wanted = || pool.instances.iter().filter(|one| !one.doc.stands_in);
            let count = |state: StateName| wanted().filter(|one| one.doc.state.name() == state).count();
            let (warm, sleeping) = (count(StateName::Warm), count(StateName::Sleeping));
            let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            spec.desired_counts =
                DesiredCounts { running: number(wanted().count() - warm - sleeping), warm: number(warm), sleeping: number(sleeping) };
        }
    }
    document
}

/// Tells whether an error says that another mvm reconciles right now.
pub fn is_elsewhere(error: &ReconcileError) -> bool {
    matches!(error, ReconcileError::Lifecycle(LifecycleError::Document(crate::store::DocumentError::Store(StoreError::Locked { .. }))))
}
