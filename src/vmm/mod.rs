//! The drivers' one interface: what the lifecycle needs of a virtual machine monitor.
//!
//! Drivers differ in files, not in the callers: nobody outside this module asks which one it has.
//!
//! ```text
//!  boot ----> running <--pause/resume--> paused --snapshot--> (files) --kill
//!  restore -------------------------------^
//! ```
//!
//! A driver does not know of desired state, quotas or documents. It starts processes and names them by
//! [`ProcessIdentity`]; the caller records them.

pub mod capabilities;
mod child;
pub mod drivers;
mod facts;
pub(crate) mod files;
pub mod firecracker;
mod limits;
mod process;
pub mod qemu;
pub mod simulated;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_hostd::cgroup::Place;
use mvm_types::{InstanceAddress, NodeId};
use serde::{Deserialize, Serialize};

use crate::infra::process::ProcessIdentity;

/// Which driver.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// Firecracker, in a jail.
    Firecracker,
    /// QEMU's `microvm` machine.
    #[default]
    Qemu,
    /// The deterministic simulation.
    Simulated,
}

impl VmmKind {
    /// The name used on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            VmmKind::Firecracker => "firecracker",
            VmmKind::Qemu => "qemu",
            VmmKind::Simulated => "simulated",
        }
    }
}

/// How guest instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acceleration {
    /// In hardware.
    Kvm,
    /// In software: slow, and no isolation boundary.
    Tcg,
    /// Not at all: the simulation.
    None,
}

/// What a snapshot depends on besides its own files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStamp {
    /// The driver.
    pub vmm: VmmKind,
    /// The VMM's version and build, e.g. `QEMU 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18) sha 1a2b…`.
    pub build: String,
    /// How instructions are executed.
    pub acceleration: Acceleration,
    /// The CPU model that the guest saw, and the host's where it shows through.
    pub cpu: String,
}

/// A drive, in the order in which the guest sees them.
#[derive(Debug)]
pub struct Drive {
    /// A short name for the VMM: `root`, `data`, `secrets`, `config`.
    pub name: &'static str,
    /// The open image.
    pub file: OwnedFd,
    /// Whether the guest may write.
    pub access: DriveAccess,
}

/// Whether a guest may write to a drive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriveAccess {
    /// It may not.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// The network interface of a guest.
#[derive(Debug)]
pub struct Nic {
    /// An open TAP descriptor (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`).
    pub tap: OwnedFd,
    /// The TAP's name, for a VMM that opens it itself.
    pub tap_name: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
}

/// What a guest's devices may move in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of each drive, in MiB.
    pub drive_mib: Option<u32>,
    /// How often each drive is read from or written to.
    pub drive_iops: Option<u32>,
    /// Of the network interface in each direction, in Mbit (10^6 bits). Where a driver does not shape it, the packet filter of the
    /// TAP's bridge drops what is beyond.
    pub net_mbit: Option<u32>,
}

/// How long a virtual machine outlives whoever started it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Until it is ended: it goes on when mvm ends.
    Detached,
    /// It is killed by the kernel when the thread that started it ends, however that comes about.
    WithCaller,
}

/// Everything that a driver needs to make one virtual machine.
///
/// The descriptors are consumed: they are closed in this process once the VMM has them.
#[derive(Debug)]
pub struct VmSpec {
    /// Whose it is.
    pub at: InstanceAddress,
    /// The node, part of the marker by which stray processes are found.
    pub node: NodeId,
    /// The uid and gid of the VMM process; `None` where mvm does not run as root.
    pub uid: Option<u32>,
    /// Where limits of the VMM process are set; `None` on a host where none can be. Ended by the caller, when the process has ended.
    pub limits: Option<Place>,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory, in MiB.
    pub mem_mib: u32,
    /// The uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk, where the image has one.
    pub initrd: Option<PathBuf>,
    /// Kernel arguments besides the driver's own.
    pub kernel_args: Vec<String>,
    /// Drives in order: the first one is `/dev/vda`.
    pub drives: Vec<Drive>,
    /// The network interface, where there is one.
    pub nic: Option<Nic>,
    /// What drives and interface may move.
    pub rates: Rates,
    /// Whether memory that the guest frees goes back to the host, where the driver can do that.
    pub reclaim_memory: bool,
    /// An existing directory, root's only, for the sockets.
    pub run_dir: PathBuf,
    /// A directory on a disk, below one that is root's only, in which the driver may make what the VMM writes to; none for a machine
    /// that never sleeps.
    pub scratch: Option<PathBuf>,
    /// Where the guest's console goes; appended to.
    pub console_log: PathBuf,
    /// Where the VMM's own messages go; appended to.
    pub vmm_log: PathBuf,
    /// Whether it outlives this process.
    pub lifetime: Lifetime,
}

/// A virtual machine that was started earlier, perhaps by another process of mvm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmHandle {
    /// The driver that started it.
    #[serde(default)]
    pub vmm: VmmKind,
    /// The VMM's process.
    pub process: ProcessIdentity,
    /// Where its sockets are.
    pub run_dir: PathBuf,
    /// Guest memory, in MiB.
    pub mem_mib: u32,
    /// What snapshots of this very machine depend on: the VMM that it runs in, which may have been replaced on disk since. Unknown
    /// for one that was found again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<VmmStamp>,
}

/// A virtual machine that may have been started and not been written down.
#[derive(Debug)]
pub struct Sought<'a> {
    /// The node that would have started it.
    pub node: &'a NodeId,
    /// Its instance.
    pub at: &'a InstanceAddress,
    /// Its VMM's user, or mvm's own as yet; `None` when all of them are mvm's own.
    pub uid: Option<u32>,
    /// Where its sockets would be.
    pub run_dir: PathBuf,
    /// Guest memory, in MiB.
    pub mem_mib: u32,
}

impl Sought<'_> {
    /// The handle of what was found.
    fn found(&self, vmm: VmmKind, process: ProcessIdentity) -> VmHandle {
        VmHandle { vmm, process, run_dir: self.run_dir.clone(), mem_mib: self.mem_mib, stamp: None }
    }
}

/// Whether a virtual machine is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// Its process runs.
    Alive,
    /// It does not.
    Gone,
}

/// What a virtual machine uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStats {
    /// CPU time of the VMM process, in milliseconds.
    pub cpu_ms: u64,
    /// Resident memory of the VMM process, in KiB.
    pub rss_kib: u64,
}

/// One step of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmmCall {
    /// What it was: `jail`, or a call such as `PUT /drives/root`.
    pub what: String,
    /// When it began, in microseconds since the start did.
    pub began_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// The names of the files that a snapshot consists of, relative to its directory.
pub const SNAPSHOT_FILES: [&str; 2] = ["device.state", "memory"];

/// A virtual machine monitor.
pub trait Vmm: Send + Sync {
    /// Returns which driver this is, for display only.
    fn kind(&self) -> VmmKind;

    /// Finds out with a kernel what [`Vmm::stamp`] cannot find out without one; once per boot of the host, and free afterwards.
    fn prepare(&self, _kernel: &Path) -> Result<(), VmmError> {
        Ok(())
    }

    /// Describes what snapshots of machines that start now depend on.
    fn stamp(&self) -> Result<VmmStamp, VmmError>;

    /// Describes what would restore a snapshot with this stamp: the very VMM that made it where that is still there, else the one that
    /// machines start with now.
    fn stamp_for(&self, made_by: &VmmStamp) -> Result<VmmStamp, VmmError> {
        let _ = made_by;
        self.stamp()
    }

    /// Memory that a virtual machine of this driver needs besides its guest's, in MiB, at most.
    fn overhead_mib(&self) -> u32 {
        0
    }

    /// The files that a snapshot of this driver consists of, relative to its directory.
    fn snapshot_files(&self) -> &'static [&'static str] {
        &SNAPSHOT_FILES
    }

    /// Starts a virtual machine; its virtual CPUs run when this returns.
    ///
    /// # Errors
    /// Whatever was started is gone again when this fails.
    fn boot(&self, spec: VmSpec) -> Result<VmHandle, VmmError>;

    /// Stops the virtual CPUs. Idempotent.
    fn pause(&self, vm: &VmHandle) -> Result<(), VmmError>;

    /// Lets the virtual CPUs run. Idempotent.
    fn resume(&self, vm: &VmHandle) -> Result<(), VmmError>;

    /// Writes [`SNAPSHOT_FILES`] of a paused virtual machine into `dir`, durably; files that are there already are those it was
    /// restored from, and may be brought up to date in place: they are no snapshot of anything until this returns, so whoever resumes
    /// a restored machine first withdraws the snapshot. The machine stays paused, also on failure. Can be repeated.
    ///
    /// Nobody may talk to the guest's agent meanwhile: its ports would still take what is sent.
    fn snapshot(&self, vm: &VmHandle, dir: &Path) -> Result<(), VmmError>;

    /// Starts a virtual machine from a snapshot and leaves it paused. The snapshot is mapped, not read, and stays as it is. `made_by`
    /// is what [`Vmm::stamp_for`] said of it.
    fn restore(&self, spec: VmSpec, dir: &Path, made_by: &VmmStamp) -> Result<VmHandle, VmmError>;

    /// Ends the virtual machine at once and returns when it is gone. Idempotent.
    fn kill(&self, vm: &VmHandle) -> Result<(), VmmError>;

    /// Waits for the virtual machine to end by itself. Returns whether it did.
    fn wait_exit(&self, vm: &VmHandle, timeout: Duration) -> Result<Liveness, VmmError>;

    /// Tells whether it runs; cheap, since every pass asks it of every instance.
    fn liveness(&self, vm: &VmHandle) -> Liveness {
        if vm.process.is_alive() { Liveness::Alive } else { Liveness::Gone }
    }

    /// Finds the machine of an instance that was started and not recorded, if it runs.
    fn find_stray(&self, sought: &Sought<'_>) -> Result<Option<VmHandle>, VmmError>;

    /// Says why a machine that is gone has ended, as far as its VMM's log and console tell.
    fn why_gone(&self, vm: &VmHandle, vmm_log: &Path) -> Option<String> {
        let _ = (vm, vmm_log);
        None
    }

    /// What the last start or restore by this driver consisted of, in order; forgotten afterwards. Empty where it is one step.
    fn take_timeline(&self) -> Vec<VmmCall> {
        Vec::new()
    }

    /// What an operator has to know of how machines were started by this process, whom nobody told.
    fn warnings(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Returns what the VMM itself counts, under its own names; counts of events are those since it wrote them last.
    fn metrics(&self, vm: &VmHandle) -> Result<serde_json::Map<String, serde_json::Value>, VmmError> {
        let _ = vm;
        Err(VmmError::Failed {
            what: "cannot read the VMM's metrics",
            why: format!("{} keeps none; `mvm instance stats` has what the host counts", self.kind().as_str()),
        })
    }

    /// Returns what it uses.
    fn stats(&self, vm: &VmHandle) -> Result<VmStats, VmmError> {
        process::stats(&vm.process).ok_or(VmmError::Gone { what: "cannot read what the virtual machine uses" })
    }
}

/// Why a driver could not do something.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// This host cannot run it.
    #[error("{vmm} cannot be used here: {why}")]
    Unusable {
        /// The driver.
        vmm: &'static str,
        /// What is wrong and how to mend it.
        why: String,
    },
    /// The VMM did not do what was asked.
    #[error("{what}: {why}")]
    Failed {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        why: String,
    },
    /// The VMM does not take a snapshot that is as it was written.
    #[error("the VMM refuses the snapshot: {why}")]
    SnapshotRefused {
        /// What it says.
        why: String,
    },
    /// The VMM did not answer in time.
    #[error("{what}: no answer within {after_ms} ms")]
    Timeout {
        /// What was being done.
        what: String,
        /// How long was waited, in milliseconds.
        after_ms: u64,
    },
    /// The program was ended by a test here.
    #[error("killed at effect {0}")]
    Killed(usize),
    /// The virtual machine is gone.
    #[error("{what}: the virtual machine is gone")]
    Gone {
        /// What was being done.
        what: &'static str,
    },
    /// The operating system refused.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}
