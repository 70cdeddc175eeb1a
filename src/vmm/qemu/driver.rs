//! The driver: the interface of [`crate::vmm`] over one QEMU process per machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use mvm_types::{InstanceAddress, NodeId};
use rustix::fs::{Gid, Uid, fchown};

use super::args::{CommandLine, DriveArg, NicArg, RamArg, RamMapping, Start, TCG_CACHE_MIB, kernel_arguments, render};
use super::files::{QMP_SOCKET, listen_all};
use super::memory;
use super::probe::{self, HostFacts, KvmVerdict};
use super::qmp::{Command, QmpClient, QmpError, RunState};
use super::spawn::{Inherited, Launch, launch};
use crate::infra::process::ProcessIdentity;
use crate::vmm::child::Children;
use crate::vmm::facts;
use crate::vmm::files::{append_to, find_in_path, open_for_vmm, open_log};
use crate::vmm::limits;
use crate::vmm::process::{self, pid_of};
use crate::vmm::{
    Acceleration, Drive, DriveAccess, Lifetime, Liveness, Nic, Rates, SNAPSHOT_FILES, Sought, VmHandle, VmSpec, Vmm, VmmError, VmmKind,
    VmmStamp,
};

/// How long QEMU may take to its greeting, or to an answer. It starts in some 40 ms; a busy host with hundreds of guests in
/// software is slower by two orders.
const QMP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a bare kernel may take to boot with KVM; real virtualisation needs below one second.
const KVM_PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// What a console's log or QEMU's own may hold, in bytes, or as much as the instance's largest drive where that is more: the limit is
/// one of the process. A pass trims them long before.
const MAX_LOG: u64 = 32 << 20;

/// Which acceleration to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AccelerationChoice {
    /// KVM where a guest boots with it, software elsewhere.
    #[default]
    Auto,
    /// KVM, tried or not.
    Kvm,
    /// Software.
    Tcg,
}

/// How the driver is set up.
#[derive(Debug, Clone)]
pub struct QemuOptions {
    /// The program; `None` looks for `qemu-system-x86_64` in `PATH`.
    pub binary: Option<PathBuf>,
    /// Where what was found out about this host is remembered; its directory exists.
    pub facts_file: PathBuf,
    /// Which acceleration to use.
    pub acceleration: AccelerationChoice,
}

/// The QEMU driver.
#[derive(Debug)]
pub struct Qemu {
    /// The program, once it was looked for.
    binary: OnceLock<PathBuf>,
    options: QemuOptions,
    facts: Mutex<Option<HostFacts>>,
    children: Children,
}

impl Qemu {
    /// Looks for nothing and runs nothing yet: who only looks at a fleet needs no QEMU.
    pub fn new(options: QemuOptions) -> Self {
        Self { binary: OnceLock::new(), options, facts: Mutex::new(None), children: Children::default() }
    }

    /// Whether somebody chose how guests are executed.
    pub(in crate::vmm) fn was_told_how(&self) -> bool {
        self.options.acceleration != AccelerationChoice::Auto
    }

    /// Finds the program.
    ///
    /// # Errors
    /// [`VmmError::Unusable`] when there is none.
    fn binary(&self) -> Result<&Path, VmmError> {
        if let Some(binary) = self.binary.get() {
            return Ok(binary);
        }
        let binary = match &self.options.binary {
            Some(binary) => binary.clone(),
            None => find_in_path("qemu-system-x86_64").ok_or_else(|| VmmError::Unusable {
                vmm: "qemu",
                why: "qemu-system-x86_64 is not in PATH; install the package qemu-system-x86".into(),
            })?,
        };
        Ok(self.binary.get_or_init(|| binary))
    }

    /// Finds out what QEMU can do here, or remembers it.
    ///
    /// With a kernel, KVM is tried by booting it, once per boot of the host and build of QEMU.
    pub fn host_facts(&self, kernel: Option<&Path>) -> Result<HostFacts, VmmError> {
        let binary = self.binary()?;
        let mut known = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let file = &self.options.facts_file;
        let mut facts = match known.take().or_else(|| probe::remembered(file, binary)) {
            Some(facts) => facts,
            None => {
                let facts = probe::inspect(binary)?;
                self.remember(&facts);
                facts
            }
        };
        if let (KvmVerdict::Untried, Some(kernel), AccelerationChoice::Auto) = (&facts.kvm, kernel, self.options.acceleration) {
            facts.kvm = self.try_kvm(kernel)?;
            self.remember(&facts);
        }
        Ok(known.insert(facts).clone())
    }

    fn remember(&self, facts: &HostFacts) {
        if let Err(error) = facts::write(&self.options.facts_file, facts) {
            tracing::debug!(file = %self.options.facts_file.display(), %error, "cannot remember what QEMU can do");
        }
    }

    /// Tells how guests are executed: by choice, or by what was found out.
    fn acceleration(&self, facts: &HostFacts) -> Result<Acceleration, VmmError> {
        match (self.options.acceleration, &facts.kvm) {
            (AccelerationChoice::Kvm, _) | (AccelerationChoice::Auto, KvmVerdict::Usable) => Ok(Acceleration::Kvm),
            (AccelerationChoice::Tcg, _) | (AccelerationChoice::Auto, KvmVerdict::Unusable { .. }) => Ok(Acceleration::Tcg),
            (AccelerationChoice::Auto, KvmVerdict::Untried) => Err(VmmError::Unusable {
                vmm: "qemu",
                why: "whether KVM boots a guest was not tried yet, for want of a kernel; build an image first".into(),
            }),
        }
    }

    /// Boots a bare kernel with KVM. The guest is ours, so that it may run as mvm's own user.
    fn try_kvm(&self, kernel: &Path) -> Result<KvmVerdict, VmmError> {
        let what = "cannot try KVM";
        let failed = |source| VmmError::Io { what: what.into(), source };
        let dir = tempfile::tempdir().map_err(failed)?;
        let (console_log, vmm_log) = (dir.path().join("console"), dir.path().join("log"));
        let mut inherit = Inherited::default();
        let append = kernel_arguments(Acceleration::Kvm, 0, &["loglevel=4".into()]);
        const MEM_MIB: u32 = 128;
        let line = CommandLine {
            marker: "mvm:kvm-probe",
            acceleration: Acceleration::Kvm,
            vcpus: 1,
            mem_mib: MEM_MIB,
            ram: RamArg { fd: inherit.hand(memory::create(u64::from(MEM_MIB) << 20).map_err(failed)?), mapping: RamMapping::Shared },
            qmp: None,
            agents: &[],
            console: inherit.hand(append_to(&console_log).map_err(failed)?),
            drives: &[],
            nic: None,
            rates: Rates::default(),
            start: Start::Boot { kernel: inherit.hand(File::open(kernel).map_err(failed)?), initrd: None, append: &append },
        };
        let launched = Launch {
            args: render(&line),
            inherit,
            procs: None,
            uid: None,
            device_group: None,
            log: append_to(&vmm_log).map_err(failed)?,
            lifetime: Lifetime::WithCaller,
            largest_file: MAX_LOG,
        };
        let mut child = launch(self.binary()?, launched).map_err(failed)?;
        let status = match ProcessIdentity::of(pid_of(&child)) {
            Some(identity) => {
                let pidfd = process::open(&identity).map_err(failed)?;
                let ended = pidfd.map_or(Ok(Liveness::Gone), |fd| process::wait(&fd, KVM_PROBE_TIMEOUT)).map_err(failed)?;
                process::kill(&identity)?;
                let status = child.wait().map_err(failed)?;
                (ended == Liveness::Gone).then_some(status)
            }
            None => Some(child.wait().map_err(failed)?),
        };
        let mut console = Vec::new();
        File::open(&console_log).and_then(|file| file.take(1 << 20).read_to_end(&mut console)).map_err(failed)?;
        let mut log = process::log_tail(&vmm_log);
        if let Some(signal) = status.and_then(|status| status.signal()) {
            log = format!("{log} (signal {signal})");
        }
        Ok(probe::judge(
            status.is_some(),
            status.is_some_and(|status| status.success()),
            &String::from_utf8_lossy(&console),
            &log,
            KVM_PROBE_TIMEOUT,
        ))
    }

    /// Starts QEMU and waits for its greeting.
    fn start(&self, spec: VmSpec, ram: OwnedFd, from: From) -> Result<(VmHandle, QmpClient), VmmError> {
        self.children.reap();
        let kernel = match &from {
            From::Kernel => Some(spec.kernel.as_path()),
            From::Snapshot { .. } => None,
        };
        let facts = self.host_facts(Some(kernel.unwrap_or(&spec.kernel)))?;
        let acceleration = self.acceleration(&facts)?;
        let group = limits::group(&spec, self.overhead_mib() + soft_tlb_mib(acceleration, &spec))?;
        let procs = limits::procs(group.as_ref())?;
        let mut inherit = Inherited::default();
        let mapping = match from {
            From::Kernel => RamMapping::Shared,
            From::Snapshot { .. } => RamMapping::Private,
        };
        let ram = RamArg { fd: inherit.hand(ram), mapping };
        let sockets = listen_all(&spec.run_dir, &mut inherit)?;
        let console = inherit.hand(open_log(&spec.console_log)?);
        let mut largest_file = MAX_LOG;
        for drive in spec.drives.iter().filter(|drive| drive.access == DriveAccess::ReadWrite) {
            let length = rustix::fs::fstat(&drive.file)
                .map_err(|error| VmmError::Io { what: format!("cannot tell the size of drive {}", drive.name), source: error.into() })?;
            largest_file = largest_file.max(u64::try_from(length.st_size).unwrap_or(0));
        }
        let drives: Vec<(&str, RawFd, _)> =
            spec.drives.into_iter().map(|Drive { name, file, access }| (name, inherit.hand(file), access)).collect();
        let drives: Vec<DriveArg<'_>> = drives.into_iter().map(|(name, fd, access)| DriveArg { name, fd, access }).collect();
        let nic = spec.nic.map(|Nic { tap, mac, .. }| NicArg { tap: inherit.hand(tap), mac });
        let append = kernel_arguments(acceleration, facts.tsc_khz, &spec.kernel_args);
        let start = match from {
            From::Kernel => Start::Boot {
                kernel: inherit.hand(open_for_vmm(&spec.kernel, spec.uid)?),
                initrd: match &spec.initrd {
                    Some(initrd) => Some(inherit.hand(open_for_vmm(initrd, spec.uid)?)),
                    None => None,
                },
                append: &append,
            },
            From::Snapshot { device_state } => Start::Restore { device_state: inherit.hand(device_state) },
        };
        let args = render(&CommandLine {
            marker: &marker(&spec.node, &spec.at),
            acceleration,
            vcpus: spec.vcpus,
            mem_mib: spec.mem_mib,
            ram,
            qmp: Some(sockets.qmp),
            agents: &sockets.agents,
            console,
            drives: &drives,
            nic,
            rates: spec.rates,
            start,
        });
        let device_group = match (acceleration, spec.uid) {
            (Acceleration::Kvm, Some(_)) => fs::metadata("/dev/kvm").ok().map(|meta| meta.gid()),
            _ => None,
        };
        let log = open_log(&spec.vmm_log)?;
        let binary = self.binary()?;
        let child =
            launch(binary, Launch { args, inherit, procs, uid: spec.uid, device_group, log, lifetime: spec.lifetime, largest_file })
                .map_err(|source| VmmError::Io { what: format!("cannot start {}", binary.display()), source })?;
        drop(group);
        let identity = ProcessIdentity::of(pid_of(&child));
        self.children.add(child);
        let ended = || VmmError::Failed { what: "cannot start QEMU", why: process::log_tail(&spec.vmm_log) };
        let Some(process) = identity else { return Err(ended()) };
        let vm = VmHandle {
            vmm: VmmKind::Qemu,
            process,
            run_dir: spec.run_dir,
            mem_mib: spec.mem_mib,
            stamp: Some(stamp(&facts, acceleration)),
        };
        match QmpClient::connect(&vm.run_dir.join(QMP_SOCKET), Instant::now() + QMP_TIMEOUT) {
            Ok(client) => Ok((vm, client)),
            Err(error) => {
                // Whatever was started must be gone; that it cannot be killed is worse news than why it was to be.
                self.kill(&vm)?;
                Err(match error {
                    QmpError::Closed { .. } => ended(),
                    other => self.qmp_error("cannot start QEMU", &vm, other),
                })
            }
        }
    }

    /// Connects to a machine that runs.
    fn connect(&self, what: &'static str, vm: &VmHandle) -> Result<QmpClient, VmmError> {
        if self.liveness(vm) == Liveness::Gone {
            return Err(VmmError::Gone { what });
        }
        QmpClient::connect(&vm.run_dir.join(QMP_SOCKET), Instant::now() + QMP_TIMEOUT).map_err(|error| self.qmp_error(what, vm, error))
    }

    fn qmp_error(&self, what: &'static str, vm: &VmHandle, error: QmpError) -> VmmError {
        // A QEMU that closes the connection, or does not listen any more, is mostly about to end.
        let patience = match error {
            QmpError::Closed { .. } | QmpError::Io { .. } => Duration::from_secs(1),
            _ => Duration::ZERO,
        };
        if let Ok(Liveness::Gone) = self.wait_exit(vm, patience) {
            return VmmError::Gone { what };
        }
        match error {
            QmpError::Timeout { after_ms, .. } => VmmError::Timeout { what: what.into(), after_ms },
            other => VmmError::Failed { what, why: other.to_string() },
        }
    }

    /// Waits until the device state is read, and leaves the machine paused.
    fn finish_restore(&self, vm: &VmHandle, client: &mut QmpClient, log: &Path) -> Result<(), VmmError> {
        let what = "cannot restore the snapshot";
        let deadline = Instant::now() + QMP_TIMEOUT;
        loop {
            match client.run_state() {
                // It is read by QEMU's main loop, in some milliseconds, mostly before the greeting.
                Ok(RunState::Inmigrate) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(RunState::Paused) => return Ok(()),
                Ok(state) => return Err(VmmError::Failed { what, why: format!("QEMU is {state:?} and should be Paused") }),
                Err(QmpError::Closed { .. }) => return Err(VmmError::Failed { what, why: process::log_tail(log) }),
                Err(error) => return Err(self.qmp_error(what, vm, error)),
            }
        }
    }
}

impl Vmm for Qemu {
    fn kind(&self) -> VmmKind {
        VmmKind::Qemu
    }

    fn prepare(&self, kernel: &Path) -> Result<(), VmmError> {
        self.host_facts(Some(kernel)).map(drop)
    }

    fn overhead_mib(&self) -> u32 {
        // Its own heap, stacks and buffers, seen as 20 to 30 MiB of QEMU 7.2, and in software the cache of translated code.
        const OWN_MIB: u32 = 32;
        match self.options.acceleration {
            AccelerationChoice::Kvm => OWN_MIB,
            AccelerationChoice::Auto | AccelerationChoice::Tcg => OWN_MIB + TCG_CACHE_MIB,
        }
    }

    fn stamp(&self) -> Result<VmmStamp, VmmError> {
        let facts = self.host_facts(None)?;
        let acceleration = self.acceleration(&facts)?;
        Ok(stamp(&facts, acceleration))
    }

    fn boot(&self, spec: VmSpec) -> Result<VmHandle, VmmError> {
        let ram = memory::create(u64::from(spec.mem_mib) << 20)
            .map_err(|source| VmmError::Io { what: format!("cannot make {} MiB of guest memory", spec.mem_mib), source })?;
        self.start(spec, ram, From::Kernel).map(|(vm, _)| vm)
    }

    fn pause(&self, vm: &VmHandle) -> Result<(), VmmError> {
        let what = "cannot pause the virtual machine";
        let mut client = self.connect(what, vm)?;
        client.execute(Command::Stop).map_err(|error| self.qmp_error(what, vm, error))
    }

    fn resume(&self, vm: &VmHandle) -> Result<(), VmmError> {
        let what = "cannot resume the virtual machine";
        let mut client = self.connect(what, vm)?;
        client.execute(Command::Cont).map_err(|error| self.qmp_error(what, vm, error))
    }

    fn snapshot(&self, vm: &VmHandle, dir: &Path) -> Result<(), VmmError> {
        let what = "cannot make a snapshot";
        let [state_name, memory_name] = SNAPSHOT_FILES;
        let failed = |name: &str| {
            let what = format!("cannot write {}", dir.join(name).display());
            move |source| VmmError::Io { what, source }
        };
        let mut client = self.connect(what, vm)?;
        let state = client.run_state().map_err(|error| self.qmp_error(what, vm, error))?;
        if state != RunState::Paused {
            return Err(VmmError::Failed { what, why: format!("the virtual machine is {state:?}; pause it first") });
        }
        let mut refused = None;
        memory::replace(dir, state_name, |file| {
            if let Err(error) = save_devices(&mut client, file, &dir.join(format!("{state_name}.new"))) {
                refused = Some(error);
            }
            match &refused {
                None => Ok(()),
                Some(_) => Err(io::Error::other("QEMU did not write it")),
            }
        })
        .map_err(|error| match refused.take() {
            Some(SaveError::Qmp(error)) => self.qmp_error(what, vm, error),
            Some(SaveError::Io(error)) => failed(state_name)(error),
            None => failed(state_name)(error),
        })?;
        let copied = memory::save(vm.process.pid, u64::from(vm.mem_mib) << 20, dir, memory_name)
            .map_err(|error| if self.liveness(vm) == Liveness::Gone { VmmError::Gone { what } } else { failed(memory_name)(error) })?;
        // Whether what was copied was all of it: a process that died meanwhile, and whose pid is another's, cannot be told apart
        // otherwise.
        if self.liveness(vm) == Liveness::Gone {
            return Err(VmmError::Gone { what });
        }
        tracing::debug!(pid = vm.process.pid, copied = copied.bytes, "copied guest memory");
        Ok(())
    }

    fn restore(&self, spec: VmSpec, dir: &Path, _made_by: &VmmStamp) -> Result<VmHandle, VmmError> {
        let [state_name, memory_name] = SNAPSHOT_FILES;
        let open = |name: &str, write: bool| {
            let path = dir.join(name);
            OpenOptions::new()
                .read(true)
                .write(write)
                .open(&path)
                .map_err(|source| VmmError::Io { what: format!("cannot open {}", path.display()), source })
        };
        let device_state = open(state_name, false)?;
        // QEMU 7.2 opens what it maps for writing even when it maps it privately, and does so as the instance's user.
        let ram = open(memory_name, true)?;
        let prepared = ram.metadata().and_then(|meta| {
            if let Some(uid) = spec.uid.filter(|uid| meta.uid() != *uid) {
                fchown(&ram, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
            }
            Ok(meta.len())
        });
        let length =
            prepared.map_err(|source| VmmError::Io { what: format!("cannot hand over {}", dir.join(memory_name).display()), source })?;
        let wanted = u64::from(spec.mem_mib) << 20;
        if length != wanted {
            return Err(VmmError::Failed {
                what: "cannot restore the snapshot",
                why: format!("its memory has {length} bytes and the machine {wanted}"),
            });
        }
        let log = spec.vmm_log.clone();
        let (vm, mut client) = self.start(spec, ram.into(), From::Snapshot { device_state })?;
        match self.finish_restore(&vm, &mut client, &log) {
            Ok(()) => Ok(vm),
            Err(error) => {
                self.kill(&vm)?;
                Err(error)
            }
        }
    }

    fn kill(&self, vm: &VmHandle) -> Result<(), VmmError> {
        let result = process::kill(&vm.process);
        self.children.reap();
        result
    }

    fn wait_exit(&self, vm: &VmHandle, timeout: Duration) -> Result<Liveness, VmmError> {
        let liveness = process::wait_exit(&vm.process, timeout)?;
        self.children.reap();
        Ok(liveness)
    }

    fn find_stray(&self, sought: &Sought<'_>) -> Result<Option<VmHandle>, VmmError> {
        let found = process::find_by_option("-name", &format!("guest={}", marker(sought.node, sought.at)), sought.uid)
            .map_err(|source| VmmError::Io { what: "cannot look through /proc".into(), source })?;
        Ok(found.map(|process| sought.found(VmmKind::Qemu, process)))
    }
}

/// Where a machine comes from.
enum From {
    Kernel,
    Snapshot { device_state: File },
}

/// What QEMU needs in software, in MiB at most, to find pages of the guest: tables of each virtual CPU that grow with what is in use
/// (`CPU_TLB_DYN_MAX_BITS` of QEMU), seen from a thirty-second of the guest's memory up.
fn soft_tlb_mib(acceleration: Acceleration, spec: &VmSpec) -> u32 {
    const MOST_MIB: u32 = 128;
    if acceleration == Acceleration::Tcg { u32::from(spec.vcpus) * (spec.mem_mib / 32).min(MOST_MIB) } else { 0 }
}

/// What snapshots of a machine that starts now depend on.
fn stamp(facts: &HostFacts, acceleration: Acceleration) -> VmmStamp {
    let model = if acceleration == Acceleration::Kvm { "host" } else { "max" };
    VmmStamp {
        vmm: VmmKind::Qemu,
        build: format!("{} blake3 {}", facts.version, facts.binary_hash),
        acceleration,
        cpu: format!("{model} on {}", facts.host_cpu),
    }
}

/// What `-name` carries.
fn marker(node: &NodeId, at: &InstanceAddress) -> String {
    format!("mvm:{node}/{at}")
}

enum SaveError {
    Qmp(QmpError),
    Io(io::Error),
}

/// Lets QEMU write its devices' state to a file that is open here.
fn save_devices(client: &mut QmpClient, file: &File, path: &Path) -> Result<(), SaveError> {
    // A descriptor for writing only, as QEMU asks of the set it opens for writing.
    let output = OpenOptions::new().write(true).open(path).map_err(SaveError::Io)?;
    let set = client.add_fd(output.as_fd(), "device.state").map_err(SaveError::Qmp)?;
    let saved = client.execute(Command::XenSaveDevicesState { filename: format!("/dev/fdset/{set}"), live: false });
    let removed = client.execute(Command::RemoveFd { fdset_id: set });
    saved.and(removed).map_err(SaveError::Qmp)?;
    // QEMU's magic number, as the only thing about the file that can be checked here.
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).map_err(SaveError::Io)?;
    if &magic != b"QEVM" {
        return Err(SaveError::Io(io::Error::new(io::ErrorKind::InvalidData, "QEMU wrote something else than a device state")));
    }
    Ok(())
}
