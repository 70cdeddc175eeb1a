//! The driver: the interface of [`crate::vmm`] over one jailed Firecracker per machine.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mvm_firecracker::{Api, ApiError, ApiErrorKind, CallTiming, CpuTemplate, Deadlines, Found, HugePages, Paused, SnapshotType, Unknown};
use mvm_hostd::HostdError;
use mvm_hostd::apart;
use mvm_types::{InstanceAddress, InstanceId};
use rustix::fs::OFlags;

use super::args::{self, Machine};
use super::ends::{log_text, panic, reason, reason_of_end};
use super::metrics;
use super::snapshot::{Scratch, merge};
use super::start::{From, Started};
use super::versions::{self, Installed, Verdict};
use crate::infra::process::ProcessIdentity;
use crate::vmm::child::Children;
use crate::vmm::files::{open_plain, open_socket};
use crate::vmm::process;
use crate::vmm::{
    Acceleration, DriveAccess, Lifetime, Liveness, Rates, SNAPSHOT_FILES, Sought, VmHandle, VmSpec, Vmm, VmmCall, VmmError, VmmKind,
    VmmStamp,
};

/// How long calls may take. A busy host is slower by two orders than an idle one; a Firecracker that hangs is given up after it.
pub(super) const DEADLINES: Deadlines = Deadlines {
    connect: Duration::from_secs(10),
    call: Duration::from_secs(10),
    start: Duration::from_secs(30),
    snapshot: Duration::from_secs(180),
};

/// How long one that hung up is waited for: it may be ending, and says why.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a bare kernel may take to boot; real virtualisation needs below one second.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// The least that Firecracker may write into a file, in bytes: its log, the guest's console. It ends when it writes beyond, which is why
/// this is more than a log of warnings comes to in years.
pub(super) const LEAST_FILE: u64 = 256 << 20;

/// The most bytes of a device state; Firecracker itself reads no more.
const MOST_STATE: u64 = 10_000_000;

/// In the run directory of a restored machine, as long as its memory's writes since then are all tracked: what it was restored from and
/// what was written since are its memory.
const TRACKED: &str = "memory-is-tracked";

/// What network a Firecracker sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JailNetwork {
    /// The host's, of which an unprivileged user can use what others can.
    Shared,
    /// Its guest's interface, and nothing else.
    Own,
}

/// How the driver is set up.
#[derive(Debug, Clone)]
pub struct FirecrackerOptions {
    /// The program; `None` looks for the newest of [`versions::VERSIONS_DIR`], then in `PATH`.
    pub binary: Option<PathBuf>,
    /// Where versions lie side by side.
    pub versions: PathBuf,
    /// Whether one older than [`versions::MINIMUM`] is taken.
    pub allow_old: bool,
    /// Where what was found out is remembered; its directory exists, and jails are made over an empty one beside it.
    pub facts_file: PathBuf,
    /// The CPU template that guests see, so that snapshots wake on unlike hosts.
    pub cpu_template: Option<CpuTemplate>,
    /// The user of a machine that only tries whether guests boot.
    pub trial_uid: u32,
    /// The pages that guest memory is made of.
    pub huge_pages: HugePages,
    /// What network a Firecracker sees.
    pub network: JailNetwork,
    /// Arguments of guests' kernels before those of their images.
    pub kernel_args: Vec<String>,
    /// Arguments of Firecracker's own, for one that was built without its system call filters.
    pub extra: Vec<String>,
}

/// The Firecracker driver.
#[derive(Debug)]
pub struct Firecracker {
    pub(super) options: FirecrackerOptions,
    found: Mutex<Option<Looked>>,
    pub(super) children: Children,
    timeline: Mutex<Vec<VmmCall>>,
    /// Those that wait for their first resume.
    restored: Mutex<Vec<Restored>>,
}

/// A machine that was restored and not resumed yet, with the connection over which that is said.
#[derive(Debug)]
struct Restored {
    process: ProcessIdentity,
    api: Api<Paused>,
    /// How long it took until Firecracker listened.
    jail: Duration,
    /// What the connection was made to.
    _socket: OwnedFd,
}

/// What came of looking for Firecrackers.
#[derive(Debug)]
enum Looked {
    Found(Vec<Installed>),
    /// One that hangs is not asked again at each turn; one that was installed since then is found soon.
    Nothing {
        why: String,
        at: Instant,
    },
}

/// How long it is not looked again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

impl Firecracker {
    /// Looks for nothing and runs nothing yet.
    pub fn new(options: FirecrackerOptions) -> Self {
        Self { options, found: Mutex::default(), children: Children::default(), timeline: Mutex::default(), restored: Mutex::default() }
    }

    /// The Firecrackers of this host, the one that machines start with first.
    ///
    /// # Errors
    /// When there is none that can be used.
    pub fn installed(&self) -> Result<Vec<Installed>, VmmError> {
        let mut known = lock(&self.found);
        let unusable = |why: String| VmmError::Unusable { vmm: "firecracker", why };
        match &*known {
            Some(Looked::Found(found)) => return Ok(found.clone()),
            Some(Looked::Nothing { why, at }) if at.elapsed() < LOOK_AGAIN => return Err(unusable(why.clone())),
            _ => {}
        }
        let FirecrackerOptions { binary, versions, allow_old, facts_file, .. } = &self.options;
        match versions::find(binary.as_deref(), versions, *allow_old, facts_file) {
            Ok(found) => {
                *known = Some(Looked::Found(found.clone()));
                Ok(found)
            }
            Err(why) => {
                *known = Some(Looked::Nothing { why: why.clone(), at: Instant::now() });
                Err(unusable(why))
            }
        }
    }

    /// Tells whether guests boot here, trying it with a kernel where that is not known.
    ///
    /// # Errors
    /// When there is no Firecracker with a jailer.
    pub fn verdict(&self, kernel: Option<&Path>) -> Result<Verdict, VmmError> {
        let all = self.installed()?;
        let first = &all[0];
        let (Verdict::Untried, Some(kernel)) = (&first.verdict, kernel) else { return Ok(first.verdict.clone()) };
        let verdict = self.try_to_boot(first, kernel)?;
        if let Err(error) = versions::remember_verdict(&self.options.facts_file, &all, first, &verdict) {
            tracing::debug!(%error, "cannot remember whether Firecracker boots guests");
        }
        let mut known = lock(&self.found);
        if let Some(Looked::Found(all)) = known.as_mut()
            && let Some(one) = all.first_mut()
        {
            one.verdict = verdict.clone();
        }
        Ok(verdict)
    }

    /// Boots a bare kernel, which panics at the end of its own start: `panic=1 reboot=k` makes that the end of Firecracker.
    fn try_to_boot(&self, installed: &Installed, kernel: &Path) -> Result<Verdict, VmmError> {
        const MEM_MIB: u32 = 128;
        if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
            return Ok(Verdict::Unusable { why: format!("/dev/kvm cannot be opened: {error}") });
        }
        let what = "cannot try Firecracker";
        let failed = |source| VmmError::Io { what: what.into(), source };
        let dir = tempfile::tempdir().map_err(failed)?;
        let spec = VmSpec {
            at: InstanceAddress::new(name(what)?, name(what)?, InstanceId::from_bits(std::process::id())),
            node: name(what)?,
            uid: Some(self.options.trial_uid),
            limits: None,
            vcpus: 1,
            mem_mib: MEM_MIB,
            kernel: kernel.to_owned(),
            initrd: None,
            kernel_args: vec!["loglevel=4".into()],
            drives: Vec::new(),
            nic: None,
            rates: Rates::default(),
            reclaim_memory: false,
            run_dir: dir.path().to_owned(),
            scratch: None,
            console_log: dir.path().join("console"),
            vmm_log: dir.path().join("log"),
            lifetime: Lifetime::WithCaller,
        };
        let console = spec.console_log.clone();
        let vm = match self.boot_with(installed, spec) {
            Ok(vm) => vm,
            Err(error) => return Ok(Verdict::Unusable { why: error.to_string() }),
        };
        let ended = self.wait_exit(&vm, PROBE_TIMEOUT)?;
        self.kill(&vm)?;
        let said = fs::read(&console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let panicked = said.contains("Kernel panic - not syncing: VFS") || said.contains("Kernel panic - not syncing: No working init");
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing").to_owned();
        Ok(match (ended, panicked) {
            (Liveness::Gone, true) => Verdict::Usable,
            (Liveness::Gone, false) => Verdict::Unusable { why: format!("a guest ended early; its console ends with {last:?}") },
            (Liveness::Alive, _) => Verdict::Unusable {
                why: format!("a guest did not boot within {} s; its console ends with {last:?}", PROBE_TIMEOUT.as_secs()),
            },
        })
    }

    fn boot_with(&self, installed: &Installed, spec: VmSpec) -> Result<VmHandle, VmmError> {
        let what = "cannot start Firecracker";
        let names: Vec<(&'static str, bool)> = spec.drives.iter().map(|one| (one.name, one.access == DriveAccess::ReadOnly)).collect();
        let nic = spec.nic.as_ref().map(|nic| (nic.tap_name.clone(), nic.mac));
        let boot = args::boot(&Machine {
            vcpus: spec.vcpus,
            mem_mib: spec.mem_mib,
            has_initrd: spec.initrd.is_some(),
            kernel_args: args::kernel_arguments(&self.options.kernel_args, &spec.kernel_args),
            drives: names,
            nic: nic.as_ref().map(|(name, mac)| (name.as_str(), *mac)),
            // A number of the instance's own, as its uid is.
            cid: spec.uid.unwrap_or(3),
            cpu_template: self.options.cpu_template,
            huge_pages: self.options.huge_pages,
            rates: spec.rates,
            reclaim_memory: spec.reclaim_memory,
            version: installed.numbers(),
        })
        .map_err(|why| VmmError::Failed { what, why })?;
        let Started { vm, api, jail, tap, cable, socket: _socket } = self.start(installed, spec, From::Kernel)?;
        match api.boot(&boot) {
            Ok(mut api) => {
                self.note(jail, api.take_timeline());
                self.let_go(what, &vm, tap, cable)?;
                Ok(vm)
            }
            Err(failed) => Err(self.give_up(what, &vm, failed.error)),
        }
    }

    /// Keeps the calls of a start, after the making of its jail.
    fn note(&self, jail: Duration, calls: Vec<CallTiming>) {
        *lock(&self.timeline) = vec![VmmCall { what: "jail".into(), began_us: 0, took_us: micros(jail) }];
        self.note_more(jail, calls);
    }

    /// Keeps more calls over the same connection.
    fn note_more(&self, jail: Duration, calls: Vec<CallTiming>) {
        let after = micros(jail);
        let calls = calls.into_iter().map(|call| VmmCall { what: call.request, began_us: after + call.began_us, took_us: call.took_us });
        lock(&self.timeline).extend(calls);
    }

    /// The connection of a machine that was restored and not resumed yet.
    fn take_restored(&self, vm: &VmHandle) -> Option<Restored> {
        let mut all = lock(&self.restored);
        let place = all.iter().position(|one| one.process == vm.process)?;
        Some(all.swap_remove(place))
    }

    /// Why a machine is gone: what it ended with, if this process started it, or else what it said last.
    pub(super) fn last_words(&self, vm: &VmHandle) -> Option<String> {
        let status = self.children.end_of(vm.process.pid);
        let log = log_text(&vm.run_dir.join(args::HOST_DIR_NAME));
        panic(&log).or_else(|| status.as_ref().and_then(reason_of_end)).or_else(|| reason(&log))
    }

    /// Connects to a machine that runs, and finds its phase; the descriptor is what is connected to again when Firecracker hangs up.
    fn attach(&self, what: &'static str, vm: &VmHandle) -> Result<(Found, OwnedFd), VmmError> {
        if self.liveness(vm) == Liveness::Gone {
            return Err(VmmError::Gone { what });
        }
        let host_dir = vm.run_dir.join(args::HOST_DIR_NAME);
        let socket = open_socket(&host_dir, args::API_SOCKET)
            .map_err(|source| VmmError::Io { what: format!("{what}: {}", host_dir.join(args::API_SOCKET).display()), source })?;
        let api = Api::<Unknown>::attach(&by_descriptor(&socket), DEADLINES).map_err(|error| self.call_failed(what, vm, error))?;
        let found = api.find_phase().map_err(|failed| self.call_failed(what, vm, failed.error))?;
        Ok((found, socket))
    }

    fn call_failed(&self, what: &'static str, vm: &VmHandle, error: ApiError) -> VmmError {
        let patience = if matches!(error.kind, ApiErrorKind::Closed | ApiErrorKind::Io { .. }) { LAST_WORDS } else { Duration::ZERO };
        if let Ok(Liveness::Gone) = self.wait_exit(vm, patience) {
            return VmmError::Gone { what };
        }
        api_error(what, error)
    }

    /// Finds the version that made a snapshot.
    fn maker(&self, made_by: &VmmStamp) -> Result<Installed, VmmError> {
        let all = self.installed()?;
        let what = "cannot restore the snapshot";
        all.into_iter()
            .find(|one| one.build() == made_by.build)
            .ok_or_else(|| VmmError::Failed { what, why: format!("{} made it, and is not on this host any more", made_by.build) })
    }

    /// Puts what Firecracker wrote in place of the snapshot in `dir`.
    fn keep(&self, vm: &VmHandle, uid: u32, scratch: &Scratch, dir: &Path, kind: SnapshotType) -> io::Result<()> {
        let [state_name, memory_name] = SNAPSHOT_FILES;
        let bytes = u64::from(vm.mem_mib) << 20;
        let state = scratch.take(args::STATE, uid, 1..=MOST_STATE)?;
        let memory = scratch.take(args::MEMORY, uid, bytes..=bytes)?;
        match kind {
            SnapshotType::Full => scratch.hand_over(args::MEMORY, &memory, dir, memory_name, uid)?,
            SnapshotType::Diff => {
                let base = open_plain(&dir.join(memory_name), OFlags::RDWR)?;
                let merged = merge(&memory, &base)?;
                tracing::debug!(pid = vm.process.pid, merged, "merged guest memory");
                scratch.remove(args::MEMORY)?;
            }
        }
        scratch.hand_over(args::STATE, &state, dir, state_name, uid)
    }

    fn write_snapshot(&self, vm: &VmHandle, api: &mut Api<Paused>, dir: &Path) -> Result<(), VmmError> {
        let what = "cannot write a snapshot";
        let failed = |source| VmmError::Io { what: format!("cannot write a snapshot to {}", dir.display()), source };
        // Below the instance's directory, as the snapshot is.
        let path = dir.with_file_name(SCRATCH_NAME);
        let scratch = Scratch::open(&path).map_err(failed)?;
        let uid = rustix::fs::fstat(scratch.fd()).map_err(|error| failed(error.into()))?.st_uid;
        for name in [args::STATE, args::MEMORY] {
            scratch.remove(name).map_err(failed)?;
        }
        let tracked = vm.run_dir.join(TRACKED);
        let kind = if tracked.exists() && dir.join(SNAPSHOT_FILES[1]).exists() { SnapshotType::Diff } else { SnapshotType::Full };
        // What Firecracker writes now it does not write again: unless all of it arrives, the next one is whole.
        match fs::remove_file(&tracked) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        api.create_snapshot(&args::create(kind)).map_err(|error| self.call_failed(what, vm, error))?;
        let kept = self.keep(vm, uid, &scratch, dir, kind);
        let removed = [args::STATE, args::MEMORY].map(|name| scratch.remove(name));
        kept.map_err(failed)?;
        removed.into_iter().collect::<io::Result<()>>().map_err(failed)?;
        if kind == SnapshotType::Diff {
            File::create(&tracked).map_err(failed)?;
        }
        // Whether what was written was all of it.
        if self.liveness(vm) == Liveness::Gone { Err(VmmError::Gone { what }) } else { Ok(()) }
    }
}

/// The name of a machine's scratch directory, beside its snapshot's.
pub(in crate::vmm) const SCRATCH_NAME: &str = "vmm";

impl Vmm for Firecracker {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    fn prepare(&self, kernel: &Path) -> Result<(), VmmError> {
        self.verdict(Some(kernel)).map(drop)
    }

    fn overhead_mib(&self) -> u32 {
        // Its own memory, seen as 5 to 7 MiB, and the jail's: the copy of the program, the drives that are in memory only.
        24
    }

    fn stamp(&self) -> Result<VmmStamp, VmmError> {
        Ok(stamp(&self.installed()?[0]))
    }

    fn stamp_for(&self, made_by: &VmmStamp) -> Result<VmmStamp, VmmError> {
        let all = self.installed()?;
        let same = all.iter().find(|one| one.build() == made_by.build);
        Ok(stamp(same.unwrap_or(&all[0])))
    }

    fn boot(&self, spec: VmSpec) -> Result<VmHandle, VmmError> {
        let installed = self.installed()?.swap_remove(0);
        self.boot_with(&installed, spec)
    }

    fn pause(&self, vm: &VmHandle) -> Result<(), VmmError> {
        let what = "cannot pause the virtual machine";
        let (found, _socket) = self.attach(what, vm)?;
        match found {
            Found::Paused(_) => Ok(()),
            Found::Running(api) => api.pause().map(drop).map_err(|failed| self.call_failed(what, vm, failed.error)),
            Found::Preboot(_) => Err(VmmError::Failed { what, why: "it was never started".into() }),
        }
    }

    fn resume(&self, vm: &VmHandle) -> Result<(), VmmError> {
        let what = "cannot resume the virtual machine";
        if let Some(Restored { api, jail, _socket, .. }) = self.take_restored(vm) {
            let mut api = api.resume().map_err(|failed| self.call_failed(what, vm, failed.error))?;
            self.note_more(jail, api.take_timeline());
            return Ok(());
        }
        let (found, _socket) = self.attach(what, vm)?;
        match found {
            Found::Running(_) => Ok(()),
            Found::Paused(api) => api.resume().map(drop).map_err(|failed| self.call_failed(what, vm, failed.error)),
            Found::Preboot(_) => Err(VmmError::Failed { what, why: "it was never started".into() }),
        }
    }

    fn snapshot(&self, vm: &VmHandle, dir: &Path) -> Result<(), VmmError> {
        let what = "cannot write a snapshot";
        let (found, _socket) = self.attach(what, vm)?;
        match found {
            Found::Paused(mut api) => self.write_snapshot(vm, &mut api, dir),
            _ => Err(VmmError::Failed { what, why: "the virtual machine runs; pause it first".into() }),
        }
    }

    fn restore(&self, spec: VmSpec, dir: &Path, made_by: &VmmStamp) -> Result<VmHandle, VmmError> {
        let what = "cannot restore the snapshot";
        let installed = self.maker(made_by)?;
        let memory = dir.join(SNAPSHOT_FILES[1]);
        let length =
            fs::metadata(&memory).map_err(|source| VmmError::Io { what: format!("cannot open {}", memory.display()), source })?.len();
        let wanted = u64::from(spec.mem_mib) << 20;
        if length != wanted {
            return Err(VmmError::Failed { what, why: format!("its memory has {length} bytes and the machine {wanted}") });
        }
        let load = args::load(spec.nic.as_ref().map(|nic| nic.tap_name.as_str())).map_err(|why| VmmError::Failed { what, why })?;
        // Made anew for each start: the guest finds what is in them now, of whatever length.
        let renewed = spec.drives.iter().filter(|one| matches!(one.name, "config" | "secrets"));
        let renewed: Vec<_> =
            renewed.map(|one| args::changed_drive(one.name)).collect::<Result<_, _>>().map_err(|why| VmmError::Failed { what, why })?;
        let tracked = spec.run_dir.join(TRACKED);
        let Started { vm, api, jail, tap, cable, socket } = self.start(&installed, spec, From::Snapshot { dir })?;
        let mut api = match api.load_snapshot(&args::outputs(installed.numbers()), &load) {
            Ok(api) => api,
            Err(failed) => return Err(self.not_loaded(&vm, failed.error)),
        };
        for drive in &renewed {
            if let Err(error) = api.patch_drive(drive) {
                return Err(self.give_up(what, &vm, error));
            }
        }
        if let Err(source) = File::create(&tracked) {
            self.kill(&vm)?;
            return Err(VmmError::Io { what: format!("cannot make {}", tracked.display()), source });
        }
        self.note(jail, api.take_timeline());
        self.let_go(what, &vm, tap, cable)?;
        lock(&self.restored).push(Restored { process: vm.process.clone(), api, jail, _socket: socket });
        Ok(vm)
    }

    fn kill(&self, vm: &VmHandle) -> Result<(), VmmError> {
        drop(self.take_restored(vm));
        let network = own_network(&vm.process);
        let result = process::kill(&vm.process);
        self.children.reap();
        result.map(|()| unplug(network))
    }

    fn wait_exit(&self, vm: &VmHandle, timeout: Duration) -> Result<Liveness, VmmError> {
        let network = own_network(&vm.process);
        let liveness = process::wait_exit(&vm.process, timeout)?;
        self.children.reap();
        if liveness == Liveness::Gone {
            unplug(network);
        }
        Ok(liveness)
    }

    fn find_stray(&self, sought: &Sought<'_>) -> Result<Option<VmHandle>, VmmError> {
        let found = process::find_by_option("--id", &args::jail_id(sought.node, sought.at), sought.uid)
            .map_err(|source| VmmError::Io { what: "cannot look through /proc".into(), source })?;
        Ok(found.map(|process| sought.found(VmmKind::Firecracker, process)))
    }

    fn why_gone(&self, vm: &VmHandle, vmm_log: &Path) -> Option<String> {
        self.last_words(vm).or_else(|| reason(&process::log_tail(vmm_log)))
    }

    fn take_timeline(&self) -> Vec<VmmCall> {
        std::mem::take(&mut *lock(&self.timeline))
    }

    fn metrics(&self, vm: &VmHandle) -> Result<serde_json::Map<String, serde_json::Value>, VmmError> {
        let what = "cannot read the VMM's metrics";
        let path = vm.run_dir.join(args::HOST_DIR_NAME);
        let failed = |source| VmmError::Io { what: format!("{what} from {}", path.join(args::METRICS).display()), source };
        let pipe = Scratch::open(&path).and_then(|dir| metrics::open(&dir, args::METRICS)).map_err(failed)?;
        // What nobody read is in the way of what is new.
        metrics::drain(&pipe).map_err(failed)?;
        let (found, _socket) = self.attach(what, vm)?;
        match found {
            Found::Running(mut api) => api.flush_metrics(),
            Found::Paused(mut api) => api.flush_metrics(),
            Found::Preboot(_) => return Err(VmmError::Failed { what, why: "it was never started".into() }),
        }
        .map_err(|error| self.call_failed(what, vm, error))?;
        let text = metrics::drain(&pipe).map_err(failed)?;
        metrics::newest(&text).ok_or_else(|| VmmError::Failed { what, why: "Firecracker wrote none when it was asked to".into() })
    }
}

/// What the machine is called that only tries whether guests boot.
fn name<T: std::str::FromStr>(what: &'static str) -> Result<T, VmmError> {
    "probe".parse().map_err(|_| VmmError::Failed { what, why: "a probe has no name".into() })
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The network namespace of a machine, where that is another one than this thread's.
fn own_network(process: &ProcessIdentity) -> Option<OwnedFd> {
    let namespace = File::open(format!("/proc/{}/ns/net", process.pid)).ok()?;
    let here = fs::metadata("/proc/thread-self/ns/net").ok()?;
    let is_here = namespace.metadata().ok()?.ino() == here.ino();
    // Looked at after opening: a pid may be another process's by now.
    (!is_here && process.is_alive()).then(|| namespace.into())
}

/// Takes the interface of a machine that has ended off the host.
fn unplug(network: Option<OwnedFd>) {
    let Some(namespace) = network else { return };
    if let Err(error) = apart::unplug(namespace.as_fd()) {
        // The kernel does it when nobody has the namespace open.
        tracing::debug!(error = with_source(&error), "an interface stays until its network namespace is gone");
    }
}

/// An error in one line with what the system said of it.
pub(super) fn with_source(error: &HostdError) -> String {
    error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
}

fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn by_descriptor(socket: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", socket.as_raw_fd()).into()
}

pub(super) fn api_error(what: &'static str, error: ApiError) -> VmmError {
    match error.kind {
        ApiErrorKind::Timeout { after_ms } => VmmError::Timeout { what: format!("{what}: {}", error.request), after_ms },
        kind => VmmError::Failed { what, why: ApiError { request: error.request, kind }.to_string() },
    }
}

pub(super) fn stamp(installed: &Installed) -> VmmStamp {
    VmmStamp {
        vmm: VmmKind::Firecracker,
        build: installed.build(),
        acceleration: Acceleration::Kvm,
        cpu: format!("host on {}", installed.cpu),
    }
}
