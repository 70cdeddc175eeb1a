//! The one lifecycle: whatever changes an instance, by hand or by plan, comes through here.
//!
//! Every verb does the same around its own part:
//!
//! ```text
//! lock -> recover what was cut off -> is it legal? -> intent on disk -> effects -> audit -> result on disk
//! ```
//!
//! The record comes before the result that it is of: a process that is killed in between leaves a record of what the next one undoes
//! or does again, with a record of its own, and nothing ever happens that there is no record of.
//!
//! What is a verb's own is in [`super::verbs`]. A verb that fails undoes what it did, and records the failure; a verb that is killed
//! leaves the intent, from which the next one finishes or undoes it ([`super::recover`]).

use std::time::Instant;

use mvm_types::InstanceAddress;

use super::config::InstanceDoc;
use super::snapshot::SnapshotError;
use super::state::{InstanceState, StateName, Transition, TransitionStep, Verb};
use crate::audit::Entry;
use crate::infra::failure::Failure;
use crate::store::LockGuard;
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::keys;
use crate::vm::node::Node;
use crate::vm::pool::{PoolDoc, RuntimePolicy};
use crate::vm::tenant::TenantDoc;
use crate::vm::usage::{Counted, Usage};

/// How an instance is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// The guest is asked to end, and killed at its deadline.
    Graceful,
    /// The VMM is killed at once.
    Force,
}

/// What finishing or undoing a change that was cut off is called in the log.
const RECOVER: &str = "recover";

/// What a failed wake that is the snapshot's fault is recorded as: the next plan boots the instance afresh.
pub const SNAPSHOT_REFUSED: &str = "wake (snapshot refused)";

/// What a failed wake is recorded as whose snapshot is whole, and which the VMM did not take; that may be the host's fault, which passes.
pub const VMM_REFUSED: &str = "wake (refused by the VMM)";

/// How often the VMM may refuse a snapshot before the next plan boots the instance afresh: for half a minute by the waits between.
pub const MOST_REFUSALS: u32 = 5;

/// An instance, locked, with what it belongs to.
pub(super) struct Locked<'a> {
    pub node: &'a Node,
    pub at: InstanceAddress,
    pub tenant: TenantDoc,
    pub pool: PoolDoc,
    pub doc: InstanceDoc,
    pub guard: Box<dyn LockGuard>,
    pub(super) act: Act,
}

/// What is being done to an instance, for the record.
pub(super) struct Act {
    action: &'static str,
    from: StateName,
    begun: Instant,
    /// What it failed with, when it is being undone.
    pub(super) error: Option<String>,
    /// Why it is done, where that is nobody's wish.
    pub(super) why: Option<String>,
    said: Said,
}

/// What the record says of it so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Said {
    Nothing,
    Done,
    Failed,
}

impl Act {
    fn new(action: &'static str, from: StateName) -> Self {
        Self { action, from, begun: Instant::now(), error: None, why: None, said: Said::Nothing }
    }
}

impl Node {
    /// Starts an instance afresh and waits until its guest is ready.
    ///
    /// `goal` is the state that it is on its way to: an instance that starts only to be warmed counts as warm.
    pub fn start(&self, at: &InstanceAddress, goal: StateName) -> Result<(), LifecycleError> {
        self.change(Verb::Start, at, |instance| instance.start(goal))
    }

    /// Pauses an instance and keeps its memory.
    pub fn warm(&self, at: &InstanceAddress) -> Result<(), LifecycleError> {
        self.change(Verb::Warm, at, |instance| instance.warm())
    }

    /// Lets a warm instance run again, with its clock set right.
    pub fn resume(&self, at: &InstanceAddress) -> Result<(), LifecycleError> {
        self.change(Verb::Resume, at, |instance| instance.resume())
    }

    /// Writes an instance to disk and ends its process.
    pub fn sleep(&self, at: &InstanceAddress) -> Result<(), LifecycleError> {
        self.change(Verb::Sleep, at, |instance| instance.sleep())
    }

    /// Lets an instance go on from its snapshot, and waits until its guest is ready.
    pub fn wake(&self, at: &InstanceAddress, goal: StateName) -> Result<(), LifecycleError> {
        self.change(Verb::Wake, at, |instance| instance.wake(goal))
    }

    /// Ends an instance; its data disk stays. A sleeping one loses its snapshot.
    pub fn stop(&self, at: &InstanceAddress, mode: StopMode) -> Result<(), LifecycleError> {
        self.change(Verb::Stop, at, |instance| instance.stop(mode))
    }

    /// Makes an instance take its pool's present image and resources.
    pub fn rebuild(&self, at: &InstanceAddress) -> Result<(), LifecycleError> {
        self.change(Verb::Rebuild, at, |instance| instance.rebuild())
    }

    /// Removes an instance with everything that it has, also its data.
    pub fn destroy(&self, at: &InstanceAddress) -> Result<(), LifecycleError> {
        let mut instance = self.lock_instance(at)?;
        instance.begin(Verb::Destroy.as_str());
        let result = instance.destroy();
        instance.conclude(&result)?;
        if result.is_ok() {
            instance.guard.retire();
        }
        result
    }

    /// Finishes or undoes what was cut off, and notices a virtual machine that died.
    pub fn recover(&self, at: &InstanceAddress) -> Result<StateName, LifecycleError> {
        let mut instance = self.lock_instance(at)?;
        instance.begin(RECOVER);
        let result = match instance.recover() {
            // Whoever brought it up for another state did not come to that.
            Ok(None) if instance.doc.passing_to.is_some() => instance.go_no_further(),
            other => other,
        };
        if !matches!(result, Ok(None)) {
            instance.conclude(&result)?;
        }
        result.map(|_| instance.doc.state.name())
    }

    /// The frame around every verb but destroy.
    fn change(
        &self,
        verb: Verb,
        at: &InstanceAddress,
        body: impl FnOnce(&mut Locked<'_>) -> Result<(), LifecycleError>,
    ) -> Result<(), LifecycleError> {
        let mut instance = self.lock_instance(at)?;
        if instance.doc.transition.as_ref().is_some_and(|transition| transition.to == StateName::Destroyed) {
            let why = format!("its end was cut off; `mvm instance destroy {at}` finishes it");
            return Err(LifecycleError::Refused { what: format!("{verb} {at}"), why });
        }
        instance.begin(RECOVER);
        let recovered = instance.recover();
        if !matches!(recovered, Ok(None)) {
            instance.conclude(&recovered)?;
        }
        recovered?;
        verb.check(instance.doc.state.name(), at)?;
        let begun = Instant::now();
        instance.begin(verb.as_str());
        let result = body(&mut instance);
        instance.conclude(&result)?;
        if let Err(error) = &result
            && !error.is_killed()
        {
            instance.record_failure(verb, error)?;
        }
        tracing::info!(instance = %at, verb = %verb, ok = result.is_ok(), took_ms = begun.elapsed().as_millis() as u64, "changed");
        result
    }

    fn lock_instance(&self, at: &InstanceAddress) -> Result<Locked<'_>, LifecycleError> {
        // Before the lock, so that asking for what is not there leaves no lock behind.
        self.instance(at)?;
        let guard = self.lock(&keys::instance_dir(at))?;
        let doc = match self.instance(at) {
            Ok(doc) => doc,
            Err(error) => {
                guard.retire();
                return Err(error);
            }
        };
        let tenant = self.tenant(&at.tenant)?;
        let pool = self.pool(&at.pool_address())?;
        let act = Act::new(RECOVER, doc.state.name());
        Ok(Locked { node: self, at: at.clone(), tenant, pool, doc, guard, act })
    }
}

impl Locked<'_> {
    pub(super) fn policy(&self) -> &RuntimePolicy {
        &self.pool.spec.runtime_policy
    }

    /// Begins something that there will be a record of.
    fn begin(&mut self, action: &'static str) {
        self.act = Act::new(action, self.doc.state.name());
    }

    /// Records what is being done, once; called before the document says what became of it.
    pub(super) fn record(&mut self, to: StateName) -> Result<(), LifecycleError> {
        if self.act.said != Said::Nothing {
            return Ok(());
        }
        self.append_record(to)
    }

    fn append_record(&mut self, to: StateName) -> Result<(), LifecycleError> {
        let Act { action, from, begun, error, why, .. } = &self.act;
        let said = if error.is_none() { Said::Done } else { Said::Failed };
        let entry = Entry {
            object: self.at.to_string(),
            role: Some(self.doc.role),
            action: (*action).to_owned(),
            from: Some(from.to_string()),
            to: Some(to.to_string()),
            error: error.clone(),
            why: why.clone(),
            took: begun.elapsed(),
        };
        self.node.audit().record(&self.at.tenant, entry)?;
        self.act.said = said;
        Ok(())
    }

    /// Records how it ended, unless that is on record.
    fn conclude<T>(&mut self, result: &Result<T, LifecycleError>) -> Result<(), LifecycleError> {
        let state = self.doc.state.name();
        match result {
            Ok(_) => self.record(state),
            Err(error) if error.is_killed() || self.act.said == Said::Failed => Ok(()),
            Err(error) => {
                self.act.error = Some(with_causes(error));
                match self.append_record(state) {
                    // The disk is full, say: the error itself is what the caller has to hear.
                    Err(failed) if !failed.is_killed() => {
                        tracing::warn!(instance = %self.at, error = with_causes(&failed), "the failure cannot be recorded");
                        Ok(())
                    }
                    other => other,
                }
            }
        }
    }

    pub(super) fn save(&self) -> Result<(), LifecycleError> {
        Ok(self.node.documents().write(&keys::instance_doc(&self.at), &self.doc)?)
    }

    /// Writes down what is about to happen.
    pub(super) fn intend(&mut self, to: StateName, step: TransitionStep) -> Result<(), LifecycleError> {
        self.doc.transition = Some(Transition { to, step, since: self.node.clock().now() });
        self.save()
    }

    /// Writes down how far it has come.
    pub(super) fn reached(&mut self, step: TransitionStep) -> Result<(), LifecycleError> {
        if let Some(transition) = &mut self.doc.transition {
            transition.step = step;
        }
        self.save()
    }

    /// Writes down the result, and gives the room back that the state before took and this one does not.
    pub(super) fn arrive(&mut self, state: InstanceState) -> Result<(), LifecycleError> {
        self.arrive_with(state, None)
    }

    /// Writes down the result with what did not go well on the way.
    pub(super) fn arrive_with(&mut self, state: InstanceState, failure: Option<Failure>) -> Result<(), LifecycleError> {
        self.record(state.name())?;
        let was = crate::vm::usage::counts_as(&self.doc);
        // Up, it may yet be on its way to another state; anywhere else it has arrived.
        if state.name() != StateName::Running {
            self.doc.passing_to = None;
        }
        self.doc.state = state;
        self.doc.transition = None;
        self.doc.failure = failure;
        self.save()?;
        let is = crate::vm::usage::counts_as(&self.doc);
        if was != is {
            let resources = self.doc.blueprint.resources.clone();
            self.node.give_back_room(&self.at.tenant, |usage| {
                usage.leave(was, &resources);
                usage.enter(is, &resources);
            })?;
        }
        Ok(())
    }

    /// Writes down the intent while the room for it is taken. `goal` is where it goes from there.
    pub(super) fn intend_with_room(&mut self, to: StateName, goal: StateName, step: TransitionStep) -> Result<(), LifecycleError> {
        let resources = self.doc.blueprint.resources.clone();
        let from = crate::vm::usage::counts_as(&self.doc);
        self.doc.passing_to = (goal != to).then_some(goal);
        let counted = Counted::on_the_way(to, self.doc.passing_to);
        let tenant = self.tenant.clone();
        let ask = |before: &Usage| {
            let mut after = before.clone();
            after.leave(from, &resources);
            after.enter(counted, &resources);
            after
        };
        let node = self.node;
        let intended = node.take_room(&tenant, ask, || self.intend(to, step));
        if intended.is_err() {
            self.doc.passing_to = None;
            self.doc.transition = None;
        }
        intended
    }

    fn record_failure(&mut self, verb: Verb, error: &LifecycleError) -> Result<(), LifecycleError> {
        let step = match error {
            LifecycleError::Snapshot(SnapshotError::Refused { .. }) => VMM_REFUSED,
            LifecycleError::Snapshot(_) => SNAPSHOT_REFUSED,
            _ => verb.as_str(),
        };
        let now = self.node.clock().now();
        self.doc.failure = Some(Failure::again(self.doc.failure.as_ref(), step, with_causes(error), &now));
        match self.save() {
            // The disk is full, say: the error itself is what the caller has to hear.
            Err(failed) if !failed.is_killed() => {
                tracing::warn!(instance = %self.at, error = with_causes(&failed), "the failure cannot be written down");
                Ok(())
            }
            other => other,
        }
    }

    /// Forgets that it was brought up for another state than to run.
    fn go_no_further(&mut self) -> Result<Option<&'static str>, LifecycleError> {
        let was = crate::vm::usage::counts_as(&self.doc);
        self.record(self.doc.state.name())?;
        self.doc.passing_to = None;
        self.save()?;
        let (is, resources) = (crate::vm::usage::counts_as(&self.doc), self.doc.blueprint.resources.clone());
        self.node.give_back_room(&self.at.tenant, |usage| {
            usage.leave(was, &resources);
            usage.enter(is, &resources);
        })?;
        Ok(Some("it was brought up for another state, and went no further"))
    }
}
