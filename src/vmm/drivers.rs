//! All drivers of real machines behind one interface: which one a new machine gets, and for one that is there the one that made it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::firecracker::{Firecracker, Verdict};
use super::qemu::Qemu;
use super::{Acceleration, Liveness, Sought, VmHandle, VmSpec, VmStats, Vmm, VmmCall, VmmError, VmmKind, VmmStamp};

/// Which driver new machines get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverChoice {
    /// Firecracker where it boots guests, else QEMU.
    Auto,
    /// Firecracker.
    Firecracker,
    /// QEMU.
    Qemu,
}

/// What is demanded of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// That it runs.
    Any,
    /// That it is a boundary against a hostile guest: hardware, and Firecracker only in its jail.
    Production,
}

/// The drivers of this host.
#[derive(Debug)]
pub struct Drivers {
    firecracker: Firecracker,
    qemu: Qemu,
    choice: DriverChoice,
    demand: Demand,
    /// Whether a machine was started in software where nobody chose that.
    fell_back: AtomicBool,
    /// Whether a machine was started without limits where that matters.
    unlimited: AtomicBool,
}

/// What is said of a machine without limits.
const UNLIMITED: &str = "no limits of memory, CPU, processes and disks are set on VMMs; `mvm doctor` says why, and how to have them";

/// What is said of one in software.
const IN_SOFTWARE: &str =
    "guests run in software (TCG), which is slow and no boundary against hostile ones; `mvm doctor` says why, and --production refuses it";

impl Drivers {
    /// Puts them together.
    pub fn new(firecracker: Firecracker, qemu: Qemu, choice: DriverChoice, demand: Demand) -> Self {
        Self { firecracker, qemu, choice, demand, fell_back: AtomicBool::new(false), unlimited: AtomicBool::new(false) }
    }

    fn of(&self, kind: VmmKind) -> &dyn Vmm {
        match kind {
            VmmKind::Firecracker => &self.firecracker,
            VmmKind::Qemu | VmmKind::Simulated => &self.qemu,
        }
    }

    /// The driver for a new machine, as far as is known without a kernel to try it with.
    fn choose(&self, kernel: Option<&Path>) -> Result<&dyn Vmm, VmmError> {
        match self.choice {
            DriverChoice::Firecracker => Ok(&self.firecracker),
            DriverChoice::Qemu => Ok(&self.qemu),
            DriverChoice::Auto => {
                let Ok(installed) = self.firecracker.installed() else { return Ok(&self.qemu) };
                if installed[0].jailer.is_none() {
                    return match self.demand {
                        Demand::Any => Ok(&self.qemu),
                        Demand::Production => Err(VmmError::Unusable {
                            vmm: "firecracker",
                            why: format!(
                                "there is no jailer beside {}, and --production demands one; `mvm node install-firecracker` puts both in place",
                                installed[0].firecracker.display()
                            ),
                        }),
                    };
                }
                Ok(match self.firecracker.verdict(kernel)? {
                    Verdict::Usable => &self.firecracker,
                    Verdict::Unusable { .. } | Verdict::Untried => &self.qemu,
                })
            }
        }
    }

    /// Refuses, in production, a machine that would be no boundary.
    fn check(&self, made_as: &VmmStamp) -> Result<(), VmmError> {
        if made_as.acceleration != Acceleration::Tcg {
            return Ok(());
        }
        if self.demand == Demand::Production {
            return Err(VmmError::Unusable {
                vmm: made_as.vmm.as_str(),
                why: "guests would run in software (TCG), which is no boundary against hostile ones, and --production demands one: use a host \
                      whose /dev/kvm boots guests (`mvm doctor` says what is wrong with this one)"
                    .into(),
            });
        }
        Ok(())
    }

    /// Starts a machine, and notes what there is to be said of it.
    fn start(
        &self,
        acceleration: Acceleration,
        spec: VmSpec,
        start: impl FnOnce(VmSpec) -> Result<VmHandle, VmmError>,
    ) -> Result<VmHandle, VmmError> {
        let limited = spec.limits.is_some();
        let vm = start(spec)?;
        let chosen = self.choice != DriverChoice::Auto || self.qemu.was_told_how();
        if acceleration == Acceleration::Tcg && !chosen {
            self.fell_back.store(true, Ordering::Relaxed);
        }
        if self.demand == Demand::Production && !limited {
            self.unlimited.store(true, Ordering::Relaxed);
        }
        Ok(vm)
    }
}

impl Vmm for Drivers {
    fn kind(&self) -> VmmKind {
        self.choose(None).map_or(VmmKind::Qemu, Vmm::kind)
    }

    fn prepare(&self, kernel: &Path) -> Result<(), VmmError> {
        let driver = self.choose(Some(kernel))?;
        driver.prepare(kernel)?;
        self.check(&driver.stamp()?)
    }

    fn overhead_mib(&self) -> u32 {
        self.choose(None).map_or_else(|_| self.qemu.overhead_mib(), Vmm::overhead_mib)
    }

    fn stamp(&self) -> Result<VmmStamp, VmmError> {
        self.choose(None)?.stamp()
    }

    fn stamp_for(&self, made_by: &VmmStamp) -> Result<VmmStamp, VmmError> {
        self.of(made_by.vmm).stamp_for(made_by)
    }

    fn boot(&self, spec: VmSpec) -> Result<VmHandle, VmmError> {
        let driver = self.choose(Some(&spec.kernel))?;
        driver.prepare(&spec.kernel)?;
        let stamp = driver.stamp()?;
        self.check(&stamp)?;
        self.start(stamp.acceleration, spec, |spec| driver.boot(spec))
    }

    fn pause(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.of(vm.vmm).pause(vm)
    }

    fn resume(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.of(vm.vmm).resume(vm)
    }

    fn snapshot(&self, vm: &VmHandle, dir: &Path) -> Result<(), VmmError> {
        self.of(vm.vmm).snapshot(vm, dir)
    }

    fn restore(&self, spec: VmSpec, dir: &Path, made_by: &VmmStamp) -> Result<VmHandle, VmmError> {
        self.check(made_by)?;
        self.start(made_by.acceleration, spec, |spec| self.of(made_by.vmm).restore(spec, dir, made_by))
    }

    fn kill(&self, vm: &VmHandle) -> Result<(), VmmError> {
        self.of(vm.vmm).kill(vm)
    }

    fn wait_exit(&self, vm: &VmHandle, timeout: Duration) -> Result<Liveness, VmmError> {
        self.of(vm.vmm).wait_exit(vm, timeout)
    }

    fn liveness(&self, vm: &VmHandle) -> Liveness {
        self.of(vm.vmm).liveness(vm)
    }

    fn find_stray(&self, sought: &Sought<'_>) -> Result<Option<VmHandle>, VmmError> {
        match self.firecracker.find_stray(sought)? {
            Some(found) => Ok(Some(found)),
            None => self.qemu.find_stray(sought),
        }
    }

    fn why_gone(&self, vm: &VmHandle, vmm_log: &Path) -> Option<String> {
        self.of(vm.vmm).why_gone(vm, vmm_log)
    }

    fn take_timeline(&self) -> Vec<VmmCall> {
        // Only one of them has one.
        self.firecracker.take_timeline()
    }

    fn warnings(&self) -> Vec<&'static str> {
        let all = [(&self.fell_back, IN_SOFTWARE), (&self.unlimited, UNLIMITED)];
        all.into_iter().filter(|(so, _)| so.load(Ordering::Relaxed)).map(|(_, said)| said).collect()
    }

    fn metrics(&self, vm: &VmHandle) -> Result<serde_json::Map<String, serde_json::Value>, VmmError> {
        self.of(vm.vmm).metrics(vm)
    }

    fn stats(&self, vm: &VmHandle) -> Result<VmStats, VmmError> {
        self.of(vm.vmm).stats(vm)
    }
}
