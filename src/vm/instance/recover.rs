//! What becomes of an instance whose change of state was cut off, or whose virtual machine died.
//!
//! | found | becomes |
//! |---|---|
//! | on its way up, undoable | what it was: whatever was started is killed |
//! | on its way down, undoable, its machine runs | Running again: resumed, and the guest set right; also when the guest is slow to answer |
//! | being resumed (`Resumed`, Warm) | Running; also when the guest is slow to answer: its memory is the only copy |
//! | its snapshot used up (`Resumed`, Sleeping), the machine runs | Running; Stopped when the guest does not answer: its random pool is that of the snapshot |
//! | its snapshot used up, the machine is gone | Stopped |
//! | its snapshot whole (`Saved`) | Sleeping: the process is killed |
//! | on its way to Stopped | Stopped |
//! | on its way to Destroyed | destroyed by the next plan or hand; here it stays as it is |
//! | Running or Warm, the machine is gone | Stopped |

use mvm_hostd::cgroup::Place;
use mvm_types::InstanceAddress;

use super::lifecycle::Locked;
use super::snapshot::{SnapshotManifest, manifest_key};
use super::state::{InstanceState, StateName, StopReason, TransitionStep};
use crate::infra::failure::Failure;
use crate::vm::error::LifecycleError;
use crate::vm::node::Node;
use crate::vmm::{Liveness, VmHandle};

/// What becomes of a machine that runs and whose guest does not answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Silent {
    /// It may only be slow.
    RunsOn,
    /// It must not go on without having been set right.
    Stops,
}

impl Node {
    /// Why an instance's machine is gone, as far as kernel, VMM and its log tell.
    pub fn why_gone(&self, at: &InstanceAddress, vm: &VmHandle) -> Option<String> {
        // Best known by the kernel, and by no log.
        let limits = self.host().limits_of(&at.instance).ok().flatten();
        match limits.filter(Place::ran_out_of_memory) {
            Some(place) => Some(format!("its VMM took more memory than memory.max of its cgroup allows ({place})")),
            None => self.vmm().why_gone(vm, &self.paths.vmm_log(at)),
        }
    }
}

impl Locked<'_> {
    /// Brings document and world together again. Returns what was found, in words, or `None` when they agreed.
    pub(super) fn recover(&mut self) -> Result<Option<&'static str>, LifecycleError> {
        let Some(transition) = self.doc.transition.clone() else {
            return match self.doc.state.vm() {
                Some(vm) if self.node.vmm().liveness(vm) == Liveness::Gone => {
                    let why = self.why_gone(vm);
                    self.end(why)?;
                    Ok(Some("its virtual machine had died"))
                }
                _ => Ok(None),
            };
        };
        match (transition.to, transition.step) {
            (StateName::Destroyed, _) => Ok(None),
            (StateName::Stopped, _) => {
                self.end(StopReason::Requested)?;
                Ok(Some("its stop was finished"))
            }
            (_, TransitionStep::Saved) => {
                self.kill_machines()?;
                self.node.host().remove_run_dir(&self.at.instance)?;
                let guest_boot = self.guest_boot();
                let manifest: Option<SnapshotManifest> = self.node.documents().read(&manifest_key(&self.at))?;
                let snapshot = manifest.map(|manifest| manifest.id());
                let since = self.node.clock().now();
                self.arrive(InstanceState::Sleeping { since, guest_boot, snapshot })?;
                Ok(Some("its sleep was finished"))
            }
            (_, TransitionStep::Resumed { vm }) => {
                let silent = if self.doc.state.name() == StateName::Warm { Silent::RunsOn } else { Silent::Stops };
                self.go_on(&vm, silent)?;
                Ok(Some("its wake was finished"))
            }
            // On its way down: the machine is the one of the state.
            (StateName::Warm | StateName::Sleeping, TransitionStep::Undoable) => {
                let Some(vm) = self.doc.state.vm().cloned() else {
                    self.end(StopReason::Died)?;
                    return Ok(Some("its virtual machine had died"));
                };
                self.go_on(&vm, Silent::RunsOn)?;
                Ok(Some("it went back to Running"))
            }
            // On its way up: whatever was started is not written down.
            (_, TransitionStep::Undoable) => {
                let recorded = self.doc.state.vm().map(|vm| vm.process.clone());
                if let Some(stray) = self.stray()?.filter(|stray| recorded.as_ref() != Some(&stray.process)) {
                    self.node.vmm().kill(&stray)?;
                }
                if self.doc.state.vm().is_none() {
                    self.node.host().remove_run_dir(&self.at.instance)?;
                }
                let (state, failure) = (self.doc.state.clone(), self.doc.failure.clone());
                self.doc.failure = failure;
                self.arrive(state)?;
                Ok(Some("it was undone"))
            }
        }
    }

    /// Why a machine is gone, as far as its VMM has said so.
    pub(super) fn why_gone(&self, vm: &VmHandle) -> StopReason {
        self.node.why_gone(&self.at, vm).map_or(StopReason::Died, |why| {
            tracing::warn!(instance = %self.at, why, "its virtual machine died");
            StopReason::DiedOf(why)
        })
    }

    fn guest_boot(&self) -> String {
        match &self.doc.state {
            InstanceState::Running { guest_boot, .. }
            | InstanceState::Warm { guest_boot, .. }
            | InstanceState::Sleeping { guest_boot, .. } => guest_boot.clone(),
            _ => String::new(),
        }
    }

    /// Lets a machine run on when it is alive; else the instance is stopped.
    fn go_on(&mut self, vm: &VmHandle, silent: Silent) -> Result<(), LifecycleError> {
        let vmm = self.node.vmm();
        if vmm.liveness(vm) == Liveness::Gone {
            return self.end(self.why_gone(vm));
        }
        // What the snapshot directory holds may be half brought up to date: it is no snapshot of anything.
        self.node.documents().raw().remove(&manifest_key(&self.at))?;
        let since = self.doc.state.since().filter(|_| self.doc.state.name() == StateName::Running).cloned();
        let since = since.unwrap_or_else(|| self.node.clock().now());
        let resumed = vmm.resume(vm).map_err(LifecycleError::from);
        let runs = resumed.is_ok();
        match resumed.and_then(|()| self.greet(vm)) {
            Ok(guest_boot) => self.arrive(InstanceState::Running { vm: vm.clone(), since, guest_boot }),
            Err(error) if !error.is_killed() && runs && silent == Silent::RunsOn && vmm.liveness(vm) == Liveness::Alive => {
                let why = crate::vm::error::with_causes(&error);
                tracing::warn!(instance = %self.at, error = why, "the guest does not answer, and runs on");
                let failure = Failure::again(self.doc.failure.as_ref(), "recover", why, &self.node.clock().now());
                let guest_boot = self.guest_boot();
                self.arrive_with(InstanceState::Running { vm: vm.clone(), since, guest_boot }, Some(failure))
            }
            Err(error) if error.is_killed() => Err(error),
            Err(error) => {
                let (why, _) = self.with_last_words(vm, &error);
                tracing::warn!(instance = %self.at, error = why, "the guest did not come back and is stopped");
                self.end(StopReason::DiedOf(format!("the guest did not come back: {why}")))
            }
        }
    }
}
