//! What each verb does between its intent and its result; the frame around it is [`super::lifecycle`].

use std::time::{Duration, Instant};

use super::lifecycle::{Locked, StopMode};
use super::machine::Machine;
use super::snapshot::{SnapshotError, SnapshotManifest, manifest_key};
use super::state::{InstanceState, StateName, StopReason, Transition, TransitionStep};
use crate::guest::WakeFixup;
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::keys;
use crate::vm::usage::Usage;
use crate::vmm::{Liveness, Sought, VmHandle, VmSpec, VmmError};

/// How long the last threads of a VMM may take to end after its guest is lost.
const LAST_THREADS: Duration = Duration::from_secs(1);
/// How long the lifecycle tries to reach a guest agent that ran a moment ago.
const REACH: Duration = Duration::from_secs(10);
/// How long a guest may take to prepare for a snapshot, and to find itself again after a wake.
const FIXUP: Duration = Duration::from_secs(30);

impl Locked<'_> {
    pub(super) fn start(&mut self, goal: StateName) -> Result<(), LifecycleError> {
        let revision = self.doc.revision.clone().ok_or_else(|| LifecycleError::Refused {
            what: format!("start {}", self.at),
            why: format!("its pool has no image yet; `mvm pool build {}` builds it", self.at.pool_address()),
        })?;
        let image = self.node.images().open(&revision)?;
        let mem_mib = self.doc.blueprint.resources.mem_mib;
        if mem_mib < image.min_mem_mib {
            let pool = self.at.pool_address();
            let why = format!(
                "its image {revision} needs at least {0} MiB of memory, and it has {mem_mib}; `mvm pool update {pool} --mem-mib {0}` gives it that",
                image.min_mem_mib
            );
            return Err(LifecycleError::Refused { what: format!("start {}", self.at), why });
        }
        self.doc.config_version = self.pool.config_version;
        self.doc.secrets_epoch = self.tenant.secrets_epoch;
        let machine = Machine::of(self);
        let drives = std::thread::scope(|scope| {
            let drives = scope.spawn(|| machine.drives());
            self.intend_with_room(StateName::Running, goal, TransitionStep::Undoable)?;
            Ok::<_, LifecycleError>(drives.join().expect("making drives does not panic"))
        })?;
        let result = drives.and_then(|drives| self.boot(machine.spec(drives, &image)?));
        match result {
            Ok((vm, guest_boot)) => {
                let since = self.node.clock().now();
                self.arrive(InstanceState::Running { vm, since, guest_boot })
            }
            Err(error) => self.undone(error),
        }
    }

    fn boot(&mut self, spec: VmSpec) -> Result<(VmHandle, String), LifecycleError> {
        let vm = self.node.vmm().boot(spec)?;
        let ready = self.node.guests().control(&vm, Instant::now() + self.patience()).and_then(|mut guest| {
            let deadline = Instant::now() + self.patience();
            guest.wait_ready(deadline)
        });
        match ready {
            Ok(ready) => Ok((vm, ready.boot_id)),
            Err(error) => {
                let error = error.into();
                let (said, died) = self.with_last_words(&vm, &error);
                self.node.vmm().kill(&vm)?;
                if died {
                    let why = format!(
                        "the virtual machine ended before its guest was ready ({said}); `mvm logs {} --source console` has its last words",
                        self.at
                    );
                    return Err(LifecycleError::Unready { what: format!("start {}", self.at), why });
                }
                Err(error)
            }
        }
    }

    /// Takes back an intent whose effects were undone by whoever failed, and cleans up.
    fn undone(&mut self, error: LifecycleError) -> Result<(), LifecycleError> {
        if error.is_killed() {
            return Err(error);
        }
        self.act.error = Some(with_causes(&error));
        // Whoever failed ended what it had started; where it could not, the intent stays, and the next one tries again.
        if let Some(stray) = self.stray()? {
            self.node.vmm().kill(&stray)?;
        }
        self.node.host().remove_run_dir(&self.at.instance)?;
        let state = self.doc.state.clone();
        let failure = self.doc.failure.take();
        self.arrive(state)?;
        self.doc.failure = failure;
        Err(error)
    }

    fn vm(&self) -> Result<(VmHandle, String), LifecycleError> {
        match &self.doc.state {
            InstanceState::Running { vm, guest_boot, .. } | InstanceState::Warm { vm, guest_boot, .. } => {
                Ok((vm.clone(), guest_boot.clone()))
            }
            other => Err(LifecycleError::Refused { what: format!("reach {}", self.at), why: format!("it is {}", other.name()) }),
        }
    }

    fn fixup(&self) -> WakeFixup {
        let mut entropy = [0; 64];
        (self.node.seams.random)(&mut entropy);
        WakeFixup { entropy }
    }

    /// Lets the guest find itself again: clock, random pool, drives, hooks. Returns its boot id.
    pub(super) fn greet(&self, vm: &VmHandle) -> Result<String, LifecycleError> {
        let deadline = Instant::now() + FIXUP;
        let mut guest = self.node.guests().control(vm, deadline)?;
        Ok(guest.wake(&self.fixup(), deadline)?.boot_id)
    }

    /// An error in words, with why the machine is gone, if it is; and whether it is.
    pub(super) fn with_last_words(&self, vm: &VmHandle, error: &LifecycleError) -> (String, bool) {
        let text = with_causes(error);
        // A guest is lost a moment before the last thread of its VMM is.
        let died = matches!(self.node.vmm().wait_exit(vm, LAST_THREADS), Ok(Liveness::Gone));
        match self.node.why_gone(&self.at, vm).filter(|_| died) {
            Some(why) => (format!("{text}; {why}"), died),
            None => (text, died),
        }
    }

    fn drain(&self, vm: &VmHandle) -> Result<(), LifecycleError> {
        let timeout = Duration::from_secs(self.policy().drain_timeout_seconds.into());
        let mut guest = self.node.guests().control(vm, Instant::now() + REACH)?;
        if let crate::guest::Drained::Busy(busy) = guest.drain(timeout)? {
            tracing::info!(instance = %self.at, busy = busy.join(", "), "still busy at the drain deadline");
        }
        Ok(())
    }

    pub(super) fn warm(&mut self) -> Result<(), LifecycleError> {
        let (vm, guest_boot) = self.vm()?;
        self.intend_with_room(StateName::Warm, StateName::Warm, TransitionStep::Undoable)?;
        let paused = self.drain(&vm).and_then(|()| Ok(self.node.vmm().pause(&vm)?));
        match paused {
            Ok(()) => {
                let since = self.node.clock().now();
                self.arrive(InstanceState::Warm { vm, since, guest_boot })
            }
            Err(error) => self.back_to_running(&vm, error),
        }
    }

    /// After a failure on the way down the guest goes on as before, or is found dead.
    fn back_to_running(&mut self, vm: &VmHandle, error: LifecycleError) -> Result<(), LifecycleError> {
        if error.is_killed() {
            return Err(error);
        }
        // Undoing is what recovery does with this intent.
        tracing::warn!(instance = %self.at, error = with_causes(&error), pid = vm.process.pid, "going back to Running");
        self.act.error = Some(with_causes(&error));
        let earlier = self.doc.failure.clone();
        self.recover()?;
        // What failed is the verb, and how often it did counts on.
        self.doc.failure = earlier;
        Err(error)
    }

    pub(super) fn resume(&mut self) -> Result<(), LifecycleError> {
        let (vm, _) = self.vm()?;
        // Whoever finds this goes on with the machine: its memory is the only one there is.
        self.intend_with_room(StateName::Running, StateName::Running, TransitionStep::Resumed { vm: vm.clone() })?;
        self.node.vmm().resume(&vm)?;
        let guest_boot = self.greet(&vm)?;
        let since = self.node.clock().now();
        self.arrive(InstanceState::Running { vm, since, guest_boot })
    }

    pub(super) fn sleep(&mut self) -> Result<(), LifecycleError> {
        let (vm, guest_boot) = self.vm()?;
        self.intend(StateName::Sleeping, TransitionStep::Undoable)?;
        let snapshot = match self.snapshot(&vm) {
            Ok(manifest) => Some(manifest.id()),
            Err(error) => return self.back_to_running(&vm, error),
        };
        self.reached(TransitionStep::Saved)?;
        self.node.vmm().kill(&vm)?;
        self.node.host().remove_run_dir(&self.at.instance)?;
        let since = self.node.clock().now();
        self.arrive(InstanceState::Sleeping { since, guest_boot, snapshot })
    }

    /// Drains, prepares, pauses and writes the snapshot; the manifest last.
    fn snapshot(&mut self, vm: &VmHandle) -> Result<SnapshotManifest, LifecycleError> {
        let vmm = self.node.vmm();
        if self.doc.state.name() == StateName::Warm {
            vmm.resume(vm)?;
        } else {
            self.drain(vm)?;
        }
        {
            let deadline = Instant::now() + FIXUP;
            let mut guest = self.node.guests().control(vm, deadline)?;
            guest.prepare_sleep(deadline)?;
        }
        vmm.pause(vm)?;
        self.node.host().ensure_snapshot_dir(&self.at)?;
        let dir = self.node.paths.snapshot(&self.at);
        vmm.snapshot(vm, &dir)?;
        let taken = self.node.clock().now();
        // What the machine was started with, which an upgrade since then does not change.
        let stamp = match &vm.stamp {
            Some(stamp) => stamp.clone(),
            None => vmm.stamp()?,
        };
        let manifest = SnapshotManifest::describe(&self.node.id, &self.doc, stamp, taken, &dir, vmm.snapshot_files())?;
        self.node.documents().write(&manifest_key(&self.at), &manifest)?;
        Ok(manifest)
    }

    pub(super) fn wake(&mut self, goal: StateName) -> Result<(), LifecycleError> {
        let vmm = self.node.vmm();
        let manifest: SnapshotManifest =
            self.node.documents().read(&manifest_key(&self.at))?.ok_or_else(|| SnapshotError::Missing { instance: self.at.to_string() })?;
        let revision = self.doc.revision.clone().ok_or_else(|| SnapshotError::Missing { instance: self.at.to_string() })?;
        let image = self.node.images().open(&revision)?;
        // After a reboot of the host nothing is known of its abilities.
        vmm.prepare(&image.kernel)?;
        manifest.check_conditions(&self.node.id, &self.doc, &vmm.stamp_for(&manifest.stamp)?)?;
        self.doc.config_version = self.pool.config_version;
        self.doc.secrets_epoch = self.tenant.secrets_epoch;
        let dir = self.node.paths.snapshot(&self.at);
        let machine = Machine::of(self);
        // The snapshot is mapped, not read; that its files are what was written is found out while the VMM starts.
        let restored = std::thread::scope(|scope| {
            let check = scope.spawn(|| manifest.check_files(&dir));
            let drives = scope.spawn(|| machine.drives());
            self.intend_with_room(StateName::Running, goal, TransitionStep::Undoable)?;
            let drives = drives.join().expect("making drives does not panic");
            let spec = drives.and_then(|drives| machine.spec(drives, &image));
            let vm = spec.and_then(|spec| Ok(vmm.restore(spec, &dir, &manifest.stamp)?));
            let checked = check.join().expect("checking hashes does not panic");
            Ok::<_, LifecycleError>(match (vm, checked) {
                (Ok(vm), Ok(())) => Ok(vm),
                (Ok(vm), Err(damaged)) => vmm.kill(&vm).map_err(LifecycleError::from).and(Err(damaged.into())),
                (Err(LifecycleError::Vmm(VmmError::SnapshotRefused { why })), Ok(())) => {
                    Err(SnapshotError::Refused { instance: self.at.to_string(), why }.into())
                }
                (Err(error), Ok(())) => Err(error),
                (Err(error), Err(damaged)) => Err(if error.is_killed() { error } else { damaged.into() }),
            })
        })?;
        let vm = match restored {
            Ok(vm) => vm,
            Err(error) => return self.undone(error),
        };
        // From here on the snapshot is used up: the guest runs on, and its disk with it.
        self.reached(TransitionStep::Resumed { vm: vm.clone() })?;
        self.node.documents().raw().forget(&manifest_key(&self.at))?;
        let woken = vmm.resume(&vm).map_err(LifecycleError::from).and_then(|()| self.greet(&vm));
        match woken {
            Ok(guest_boot) => {
                let since = self.node.clock().now();
                self.arrive(InstanceState::Running { vm, since, guest_boot })
            }
            Err(error) if error.is_killed() => Err(error),
            Err(error) => {
                let (text, died) = self.with_last_words(&vm, &error);
                let why = format!("the guest did not come back: {text}");
                self.act.error = Some(why.clone());
                self.end(StopReason::SnapshotLost(why.clone()))?;
                Err(if died { LifecycleError::Unready { what: format!("wake {}", self.at), why } } else { error })
            }
        }
    }

    pub(super) fn stop(&mut self, mode: StopMode) -> Result<(), LifecycleError> {
        self.intend(StateName::Stopped, TransitionStep::Undoable)?;
        if mode == StopMode::Graceful
            && let Some(vm) = self.doc.state.vm().cloned()
        {
            self.ask_to_end(&vm);
        }
        self.end(StopReason::Requested)
    }

    /// How long its guest may take from a start until it is ready.
    fn patience(&self) -> Duration {
        Duration::from_secs(self.policy().ready_timeout_seconds.into())
    }

    /// Asks the guest to end and waits; whether it did is seen by who kills what is left.
    fn ask_to_end(&self, vm: &VmHandle) {
        let grace = Duration::from_secs(self.policy().graceful_shutdown_seconds.into());
        let asked = || -> Result<(), LifecycleError> {
            if self.doc.state.name() == StateName::Warm {
                self.node.vmm().resume(vm)?;
            } else {
                self.drain(vm)?;
            }
            self.node.guests().control(vm, Instant::now() + grace.min(REACH))?.shutdown(grace)?;
            self.node.vmm().wait_exit(vm, grace)?;
            Ok(())
        };
        if let Err(error) = asked() {
            tracing::warn!(instance = %self.at, error = with_causes(&error), "the guest did not end by itself and is killed");
        }
    }

    /// Ends whatever is left of the instance's process and snapshot, and records that it is stopped.
    pub(super) fn end(&mut self, why: StopReason) -> Result<(), LifecycleError> {
        if self.act.error.is_none() {
            self.act.why = why.words();
        }
        self.kill_machines()?;
        self.node.documents().raw().remove(&manifest_key(&self.at))?;
        self.node.host().remove_snapshot(&self.at)?;
        self.node.host().remove_run_dir(&self.at.instance)?;
        let since = self.node.clock().now();
        self.arrive(InstanceState::Stopped { since, why })
    }

    /// Kills every virtual machine that may run for this instance: those that are recorded, and one that was not yet.
    pub(super) fn kill_machines(&mut self) -> Result<(), LifecycleError> {
        let vmm = self.node.vmm();
        let resumed = match self.doc.transition.as_ref().map(|transition| &transition.step) {
            Some(TransitionStep::Resumed { vm }) => Some(vm),
            _ => None,
        };
        for vm in self.doc.state.vm().into_iter().chain(resumed) {
            vmm.kill(vm)?;
        }
        if self.doc.transition.is_some()
            && let Some(stray) = self.stray()?
        {
            vmm.kill(&stray)?;
        }
        Ok(())
    }

    /// Finds a machine that was started for this instance and not written down.
    pub(super) fn stray(&self) -> Result<Option<VmHandle>, LifecycleError> {
        let sought = Sought {
            node: &self.node.id,
            at: &self.at,
            uid: self.node.vmm_uid(|range| range.instance(self.doc.net_id, self.doc.offset)),
            run_dir: self.node.paths.run_instance(&self.at.instance),
            mem_mib: self.doc.blueprint.resources.mem_mib,
        };
        Ok(self.node.vmm().find_stray(&sought)?)
    }

    pub(super) fn rebuild(&mut self) -> Result<(), LifecycleError> {
        let revision = self.pool.revision.clone().ok_or_else(|| LifecycleError::Refused {
            what: format!("rebuild {}", self.at),
            why: format!("its pool has no image yet; `mvm pool build {}` builds it", self.at.pool_address()),
        })?;
        let blueprint = self.pool.spec.blueprint();
        let (was, is) = (self.doc.blueprint.resources.data_disk_mib, blueprint.resources.data_disk_mib);
        let tenant = self.tenant.clone();
        let ask = |before: &Usage| Usage { disk_mib: before.disk_mib.saturating_sub(was) + is, ..before.clone() };
        let before = self.doc.clone();
        self.doc.blueprint = blueprint;
        self.doc.revision = Some(revision);
        self.doc.config_version = self.pool.config_version;
        self.doc.state = InstanceState::Ready;
        self.doc.failure = None;
        let node = self.node;
        let rebuilt = node.take_room(&tenant, ask, || {
            self.record(StateName::Ready)?;
            self.save()
        });
        if rebuilt.is_err() {
            // What a failure is recorded with is the instance as it was.
            self.doc = before;
        }
        rebuilt
    }

    pub(super) fn destroy(&mut self) -> Result<(), LifecycleError> {
        let (counted, resources) = (crate::vm::usage::counts_as(&self.doc), self.doc.blueprint.resources.clone());
        // Without the state, so that a recovery of what is cut off here can only go on destroying; but a machine that was
        // started and not written down is found by this intent's being there.
        self.kill_machines()?;
        self.doc.transition = Some(Transition { to: StateName::Destroyed, step: TransitionStep::Undoable, since: self.node.clock().now() });
        self.save()?;
        self.kill_machines()?;
        self.node.host().remove_run_dir(&self.at.instance)?;
        self.node.host().remove_instance_files(&self.at)?;
        self.record(StateName::Destroyed)?;
        self.node.documents().raw().remove_tree(&keys::instance_dir(&self.at))?;
        let pool = self.at.pool.clone();
        self.node.give_back_room(&self.at.tenant, |usage| {
            usage.leave(counted, &resources);
            usage.remove_instance(&pool, resources.data_disk_mib);
        })
    }
}
