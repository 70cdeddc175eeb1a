//! A deterministic virtual machine monitor: nothing runs, everything is remembered, delays and failures are scripted.
//!
//! It serves three ends: scenarios with thousands of instances, killing mvm at every effect, and rehearsing a fleet file
//! (`--vmm simulated`), for which the simulated machines are kept in a file between commands.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_types::InstanceAddress;
use serde::{Deserialize, Serialize};

use super::{Acceleration, Liveness, Sought, VmHandle, VmSpec, VmStats, Vmm, VmmError, VmmKind, VmmStamp};
use crate::guest::{Drained, GuestChannel, GuestControl, GuestError, GuestReady, WakeFixup};
use crate::infra::kill_switch::KillSwitch;
use crate::infra::process::ProcessIdentity;

/// What happens in a simulation besides everything going well: an ordered list of rules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// The rules; the first that matches and is not used up counts.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// One rule of a script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The step that it is about.
    pub step: SimulatedStep,
    /// Which instances: a tenant, `tenant/pool` or `tenant/pool/instance`; all when left out.
    #[serde(default)]
    pub object: String,
    /// How long the step takes, in milliseconds.
    #[serde(default)]
    pub delay_ms: u64,
    /// The error that it ends with, if it fails.
    #[serde(default)]
    pub fail: Option<String>,
    /// How often the rule counts; always when left out.
    #[serde(default)]
    pub times: Option<u32>,
}

/// What of a simulated machine can be slow or fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SimulatedStep {
    /// The VMM starts.
    Boot,
    /// The guest becomes ready.
    Ready,
    /// The guest drains.
    Drain,
    /// The machine is paused.
    Pause,
    /// The machine runs again.
    Resume,
    /// The snapshot is written.
    Snapshot,
    /// The machine is restored.
    Restore,
    /// The guest finds itself again after a wake.
    Wake,
    /// The guest shuts down.
    Shutdown,
    /// The machine dies right after its guest was ready.
    Die,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Machine {
    at: String,
    mem_mib: u32,
    paused: bool,
    guest_boot: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct World {
    /// Machines that run, by the number that stands for their pid.
    machines: BTreeMap<i32, Machine>,
    /// Guests on disk: their boot ids by instance.
    snapshots: BTreeMap<String, String>,
    last: i32,
    #[serde(skip)]
    used: HashMap<usize, u32>,
    #[serde(skip)]
    changed: bool,
}

/// The simulated monitor; also the way to its guests.
#[derive(Clone)]
pub struct SimulatedVmm {
    world: Arc<Mutex<World>>,
    script: Arc<Script>,
    switch: Arc<KillSwitch>,
    file: Option<PathBuf>,
}

impl SimulatedVmm {
    /// Starts with no machines.
    pub fn new(script: Script) -> Self {
        Self { world: Arc::default(), script: Arc::new(script), switch: KillSwitch::never(), file: None }
    }

    /// Goes on with the machines of a file, in which they are kept when [`SimulatedVmm::save`] is called.
    ///
    /// # Errors
    /// When there is a file and it cannot be read.
    pub fn kept_in(file: PathBuf, script: Script) -> std::io::Result<Self> {
        let world = match std::fs::read(&file) {
            Ok(content) => serde_json::from_slice(&content)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => World::default(),
            Err(error) => return Err(error),
        };
        Ok(Self { world: Arc::new(Mutex::new(world)), file: Some(file), ..Self::new(script) })
    }

    /// Writes the machines down, if any changed.
    pub fn save(&self) -> std::io::Result<()> {
        let (Some(file), mut world) = (&self.file, self.lock()) else { return Ok(()) };
        if std::mem::take(&mut world.changed) {
            let dir = file.parent().unwrap_or(Path::new("."));
            std::fs::create_dir_all(dir)?;
            let mut new = tempfile::NamedTempFile::new_in(dir)?;
            new.write_all(&serde_json::to_vec(&*world)?)?;
            new.persist(file)?;
        }
        Ok(())
    }

    /// Returns the same machines as the next process of mvm finds them.
    pub fn next_process(&self, switch: Arc<KillSwitch>) -> Self {
        Self { switch, ..self.clone() }
    }

    /// Returns the same machines with another script.
    pub fn with_script(&self, rules: &[Rule]) -> Self {
        Self { script: Arc::new(Script { rules: rules.to_vec() }), ..self.clone() }
    }

    /// Returns the instances whose machines run, with whether they are paused.
    pub fn machines(&self) -> BTreeMap<String, bool> {
        self.lock().machines.values().map(|machine| (machine.at.clone(), machine.paused)).collect()
    }

    /// Returns the instances that have more than one machine: there must never be any.
    pub fn doubles(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        self.lock().machines.values().filter(|machine| !seen.insert(machine.at.clone())).map(|machine| machine.at.clone()).collect()
    }

    /// Ends a machine as a crash would.
    pub fn crash(&self, at: &InstanceAddress) {
        let mut world = self.lock();
        world.changed = true;
        world.machines.retain(|_, machine| machine.at != at.to_string());
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plays the first rule that matches; what it says went wrong.
    fn play(&self, step: SimulatedStep, at: &str) -> Option<String> {
        let rule = {
            let mut world = self.lock();
            let matches = |rule: &Rule| {
                rule.step == step && (rule.object.is_empty() || at == rule.object || at.starts_with(&format!("{}/", rule.object)))
            };
            let left = |index: usize, rule: &Rule| rule.times.is_none_or(|times| world.used.get(&index).copied().unwrap_or(0) < times);
            let found = self.script.rules.iter().enumerate().find(|(index, rule)| matches(rule) && left(*index, rule))?;
            *world.used.entry(found.0).or_default() += 1;
            found.1
        };
        std::thread::sleep(Duration::from_millis(rule.delay_ms));
        rule.fail.clone()
    }

    fn effect(&self) -> Result<(), VmmError> {
        self.switch.effect().map_err(VmmError::Killed)
    }

    fn step(&self, what: &'static str, step: SimulatedStep, at: &str) -> Result<(), VmmError> {
        match self.play(step, at) {
            None => Ok(()),
            Some(why) => Err(VmmError::Failed { what, why }),
        }
    }

    fn add(&self, spec: &VmSpec, paused: bool, guest_boot: Option<String>) -> VmHandle {
        let mut world = self.lock();
        world.changed = true;
        world.last += 1;
        let pid = world.last;
        let guest_boot = guest_boot.unwrap_or_else(|| format!("boot-{pid}"));
        world.machines.insert(pid, Machine { at: spec.at.to_string(), mem_mib: spec.mem_mib, paused, guest_boot });
        VmHandle { stamp: Some(stamp()), ..handle(pid, spec.run_dir.clone(), spec.mem_mib) }
    }

    fn machine<T>(&self, what: &'static str, vm: &VmHandle, change: impl FnOnce(&mut World, i32) -> T) -> Result<T, VmmError> {
        let mut world = self.lock();
        if !world.machines.contains_key(&vm.process.pid) {
            return Err(VmmError::Gone { what });
        }
        world.changed = true;
        Ok(change(&mut world, vm.process.pid))
    }

    fn at(&self, vm: &VmHandle) -> String {
        self.lock().machines.get(&vm.process.pid).map(|machine| machine.at.clone()).unwrap_or_default()
    }
}

fn handle(pid: i32, run_dir: PathBuf, mem_mib: u32) -> VmHandle {
    VmHandle {
        vmm: VmmKind::Simulated,
        process: ProcessIdentity { pid, start_ticks: 0, boot: "simulated".into() },
        run_dir,
        mem_mib,
        stamp: None,
    }
}

fn stamp() -> VmmStamp {
    VmmStamp { vmm: VmmKind::Simulated, build: "simulated 1".into(), acceleration: Acceleration::None, cpu: "simulated".into() }
}

impl Vmm for SimulatedVmm {
    fn kind(&self) -> VmmKind {
        VmmKind::Simulated
    }

    fn stamp(&self) -> Result<VmmStamp, VmmError> {
        Ok(stamp())
    }

    fn snapshot_files(&self) -> &'static [&'static str] {
        &[]
    }

    fn boot(&self, spec: VmSpec) -> Result<VmHandle, VmmError> {
        self.step("boot", SimulatedStep::Boot, &spec.at.to_string())?;
        self.effect()?;
        Ok(self.add(&spec, false, None))
    }

    fn pause(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.step("pause", SimulatedStep::Pause, &self.at(vm))?;
        self.effect()?;
        self.machine("pause", vm, |world, pid| world.machines.get_mut(&pid).into_iter().for_each(|machine| machine.paused = true))
    }

    fn resume(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.step("resume", SimulatedStep::Resume, &self.at(vm))?;
        self.effect()?;
        self.machine("resume", vm, |world, pid| world.machines.get_mut(&pid).into_iter().for_each(|machine| machine.paused = false))
    }

    fn snapshot(&self, vm: &VmHandle, _dir: &Path) -> Result<(), VmmError> {
        self.step("snapshot", SimulatedStep::Snapshot, &self.at(vm))?;
        self.effect()?;
        self.machine("snapshot", vm, |world, pid| {
            if let Some(machine) = world.machines.get(&pid).cloned() {
                world.snapshots.insert(machine.at, machine.guest_boot);
            }
        })
    }

    fn restore(&self, spec: VmSpec, _dir: &Path, _made_by: &VmmStamp) -> Result<VmHandle, VmmError> {
        let at = spec.at.to_string();
        self.step("restore", SimulatedStep::Restore, &at)?;
        self.effect()?;
        let guest_boot = self.lock().snapshots.get(&at).cloned();
        if guest_boot.is_none() {
            return Err(VmmError::Failed { what: "restore", why: "there is no snapshot".into() });
        }
        Ok(self.add(&spec, true, guest_boot))
    }

    fn kill(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.effect()?;
        let mut world = self.lock();
        world.changed |= world.machines.remove(&vm.process.pid).is_some();
        Ok(())
    }

    fn wait_exit(&self, vm: &VmHandle, _timeout: Duration) -> Result<Liveness, VmmError> {
        Ok(self.liveness(vm))
    }

    fn liveness(&self, vm: &VmHandle) -> Liveness {
        if self.lock().machines.contains_key(&vm.process.pid) { Liveness::Alive } else { Liveness::Gone }
    }

    fn find_stray(&self, sought: &Sought<'_>) -> Result<Option<VmHandle>, VmmError> {
        let world = self.lock();
        let found = world.machines.iter().find(|(_, machine)| machine.at == sought.at.to_string());
        Ok(found.map(|(pid, machine)| handle(*pid, sought.run_dir.clone(), machine.mem_mib)))
    }

    fn stats(&self, vm: &VmHandle) -> Result<VmStats, VmmError> {
        self.machine("stats", vm, |_, _| VmStats::default())
    }
}

impl GuestChannel for SimulatedVmm {
    fn control(&self, vm: &VmHandle, _deadline: Instant) -> Result<Box<dyn GuestControl>, GuestError> {
        match self.lock().machines.get(&vm.process.pid) {
            Some(machine) if !machine.paused => {
                Ok(Box::new(SimulatedGuest { vmm: self.clone(), vm: vm.clone(), machine: machine.clone() }))
            }
            Some(_) => Err(GuestError::Unreachable { why: "the simulated machine is paused".into() }),
            None => Err(GuestError::Unreachable { why: "the simulated machine is gone".into() }),
        }
    }
}

struct SimulatedGuest {
    vmm: SimulatedVmm,
    vm: VmHandle,
    machine: Machine,
}

impl SimulatedGuest {
    fn play(&self, what: &'static str, step: SimulatedStep) -> Result<(), GuestError> {
        match self.vmm.play(step, &self.machine.at) {
            None => Ok(()),
            Some(why) => Err(GuestError::Failed { what, why }),
        }
    }

    fn ready(&self) -> GuestReady {
        GuestReady { agent_version: "simulated".into(), boot_id: self.machine.guest_boot.clone(), clock_ns: 0 }
    }

    fn end(&self) {
        let mut world = self.vmm.lock();
        world.changed = true;
        world.machines.remove(&self.vm.process.pid);
    }
}

impl GuestControl for SimulatedGuest {
    fn wait_ready(&mut self, _deadline: Instant) -> Result<GuestReady, GuestError> {
        self.play("wait until ready", SimulatedStep::Ready)?;
        if self.vmm.play(SimulatedStep::Die, &self.machine.at).is_some() {
            self.end();
        }
        Ok(self.ready())
    }

    fn drain(&mut self, _timeout: Duration) -> Result<Drained, GuestError> {
        self.play("drain", SimulatedStep::Drain)?;
        Ok(Drained::Idle)
    }

    fn prepare_sleep(&mut self, _deadline: Instant) -> Result<(), GuestError> {
        Ok(())
    }

    fn wake(&mut self, _fixup: &WakeFixup, _deadline: Instant) -> Result<GuestReady, GuestError> {
        self.play("wake", SimulatedStep::Wake)?;
        Ok(self.ready())
    }

    fn shutdown(&mut self, _grace: Duration) -> Result<(), GuestError> {
        self.play("shut down", SimulatedStep::Shutdown)?;
        self.end();
        Ok(())
    }
}
