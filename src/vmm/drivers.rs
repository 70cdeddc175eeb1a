//! All drivers of real machines behind one interface: which one a new machine gets, and for one that is there the one that made it.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use mvm_hostd::cgroup::Hierarchy;
use mvm_types::{InstanceAddress, NodeId};

use super::firecracker::{Firecracker, Verdict};
use super::qemu::Qemu;
use super::{Acceleration, Lifetime, Liveness, VmHandle, VmSpec, VmStats, Vmm, VmmCall, VmmError, VmmKind, VmmStamp};

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
}

impl Drivers {
    /// Puts them together.
    pub fn new(firecracker: Firecracker, qemu: Qemu, choice: DriverChoice, demand: Demand) -> Self {
        Self { firecracker, qemu, choice, demand }
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

    /// Refuses, in production, a machine that would be no boundary, and says so when it has no limits.
    fn check(&self, driver: &dyn Vmm) -> Result<(), VmmError> {
        if self.demand == Demand::Production
            && let Err(none) = Hierarchy::find()
        {
            static SAID: Once = Once::new();
            SAID.call_once(|| tracing::warn!("no limits of memory, CPU, processes and disks are set on VMMs: {none}"));
        }
        let acceleration = driver.stamp()?.acceleration;
        if acceleration != Acceleration::Tcg {
            return Ok(());
        }
        if self.demand == Demand::Production {
            return Err(VmmError::Unusable {
                vmm: driver.kind().as_str(),
                why: "guests would run in software (TCG), which is no boundary against hostile ones, and --production demands one: use a host \
                      whose /dev/kvm boots guests (`mvm doctor` says what is wrong with this one)"
                    .into(),
            });
        }
        static WARNED: Once = Once::new();
        WARNED.call_once(|| tracing::info!("guests run in software (TCG), which is slow and no boundary against hostile ones"));
        Ok(())
    }
}

impl Vmm for Drivers {
    fn kind(&self) -> VmmKind {
        self.choose(None).map_or(VmmKind::Qemu, Vmm::kind)
    }

    fn prepare(&self, kernel: &Path) -> Result<(), VmmError> {
        let driver = self.choose(Some(kernel))?;
        driver.prepare(kernel)?;
        self.check(driver)
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
        let mut driver = self.choose(Some(&spec.kernel))?;
        // The kernel clears a process's wish to end with its parent when it changes its user, as a jailer does.
        if spec.lifetime == Lifetime::WithCaller && !driver.kind().capabilities().ends_with_caller {
            driver = &self.qemu;
        }
        driver.prepare(&spec.kernel)?;
        self.check(driver)?;
        driver.boot(spec)
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
        self.of(made_by.vmm).restore(spec, dir, made_by)
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

    fn find_stray(&self, node: &NodeId, at: &InstanceAddress, run_dir: &Path, mem_mib: u32) -> Result<Option<VmHandle>, VmmError> {
        match self.firecracker.find_stray(node, at, run_dir, mem_mib)? {
            Some(found) => Ok(Some(found)),
            None => self.qemu.find_stray(node, at, run_dir, mem_mib),
        }
    }

    fn why_gone(&self, vm: &VmHandle, vmm_log: &Path) -> Option<String> {
        self.of(vm.vmm).why_gone(vm, vmm_log)
    }

    fn take_timeline(&self) -> Vec<VmmCall> {
        // Only one of them has one.
        self.firecracker.take_timeline()
    }

    fn stats(&self, vm: &VmHandle) -> Result<VmStats, VmmError> {
        self.of(vm.vmm).stats(vm)
    }
}
