//! A start, of a kernel or of a snapshot: the jail, its network, and a Firecracker that listens.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use mvm_firecracker::{Api, ApiError, ApiErrorKind, Fresh};
use mvm_hostd::HostdError;
use mvm_hostd::apart::{self, Cable};
use mvm_hostd::tap::KeptTap;
use rustix::fs::{Gid, OFlags, Uid, fchown};
use rustix::process::Pid;

use super::args::{self, Limits};
use super::driver::{DEADLINES, Firecracker, JailNetwork, LAST_WORDS, LEAST_FILE, api_error, by_descriptor, stamp, with_source};
use super::ends::words;
use super::jail::{self, Entry, Launch, Network};
use super::metrics;
use super::snapshot::{Scratch, guard};
use super::versions::Installed;
use crate::infra::process::ProcessIdentity;
use crate::vmm::child::Child;
use crate::vmm::files::{open_directory, open_for_vmm, open_log, open_plain_at, open_socket};
use crate::vmm::{Drive, DriveAccess, Liveness, Nic, SNAPSHOT_FILES, VmHandle, VmSpec, Vmm, VmmError, VmmKind, limits, process};

/// What a machine is made from.
pub(super) enum From<'a> {
    Kernel,
    Snapshot { dir: &'a Path },
}

/// A started Firecracker that was told nothing yet.
pub(super) struct Started {
    pub(super) vm: VmHandle,
    pub(super) api: Api<Fresh>,
    /// How long it took until Firecracker listened.
    pub(super) jail: Duration,
    /// The TAP on the host, which is kept until Firecracker has it.
    pub(super) tap: Option<KeptTap>,
    /// Or the way to it.
    pub(super) cable: Option<Cable>,
    /// What the API's connections are made to, as long as there may be more of them.
    pub(super) socket: OwnedFd,
}

impl Firecracker {
    /// Starts a Firecracker in its jail and waits until it listens.
    pub(super) fn start(&self, installed: &Installed, spec: VmSpec, from: From<'_>) -> Result<Started, VmmError> {
        let what = "cannot start Firecracker";
        let begun = Instant::now();
        self.children.reap();
        let unusable = |why: String| VmmError::Unusable { vmm: "firecracker", why };
        let jailer = installed.jailer.as_deref().ok_or_else(|| {
            unusable(format!(
                "there is no jailer beside {}; `mvm node install-firecracker` puts both in place",
                installed.firecracker.display()
            ))
        })?;
        let uid = spec.uid.ok_or_else(|| unusable("its jail is made by root; try it with sudo".into()))?;
        let io = |doing: String| move |source| VmmError::Io { what: doing, source };
        let group = limits::group(&spec, self.overhead_mib())?;
        let base = self.options.facts_file.with_file_name("jails");
        match fs::DirBuilder::new().mode(0o700).create(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io(format!("cannot make {}", base.display()))(error)),
            _ => {}
        }
        let host_dir = spec.run_dir.join(args::HOST_DIR_NAME);
        let (entries, largest) = fill(&spec, &from, &host_dir, uid)?;
        let (network, tap, cable) = self.network(spec.nic).map_err(|error| VmmError::Failed { what, why: with_source(&error) })?;
        let id = args::jail_id(&spec.node, &spec.at);
        let limits = Limits { file_bytes: largest, descriptors: 2048 };
        let arguments =
            args::jailer(&installed.firecracker.to_string_lossy(), &base.to_string_lossy(), &id, uid, limits, &self.options.extra);
        let launched = Launch {
            jailer,
            arguments,
            firecracker: &installed.firecracker,
            id: &id,
            base: &base,
            uid,
            procs: limits::procs(group.as_ref())?,
            entries,
            network,
            lifetime: spec.lifetime,
            console: open_log(&spec.console_log)?,
            log: open_log(&spec.vmm_log)?,
        };
        let mut child = jail::launch(launched).map_err(io(format!("cannot start {}", jailer.display())))?;
        drop((spec.drives, group));
        let ended = |status: Option<ExitStatus>| VmmError::Failed { what, why: words(status, &host_dir, &spec.vmm_log) };
        let Some(process) = ProcessIdentity::of(child.pid()) else { return Err(ended(child.wait().ok())) };
        let socket = match wait_for_socket(&host_dir, &mut child) {
            Ok(Some(socket)) => socket,
            Ok(None) => return Err(ended(child.wait().ok())),
            Err(error) => {
                process::kill(&process)?;
                let _ = child.wait();
                return Err(error);
            }
        };
        self.children.add(child);
        let vm =
            VmHandle { vmm: VmmKind::Firecracker, process, run_dir: spec.run_dir, mem_mib: spec.mem_mib, stamp: Some(stamp(installed)) };
        let jail = begun.elapsed();
        match Api::connect_while(&by_descriptor(&socket), DEADLINES, || self.liveness(&vm) == Liveness::Alive) {
            Ok(api) => Ok(Started { vm, api, jail, tap, cable, socket }),
            Err(error) => Err(self.give_up(what, &vm, error)),
        }
    }

    /// The network of a jail. Firecracker opens the TAP itself, by its name, and one queue has one owner.
    fn network(&self, nic: Option<Nic>) -> Result<(Network, Option<KeptTap>, Option<Cable>), HostdError> {
        Ok(match (nic, self.options.network) {
            (None, JailNetwork::Shared) => (Network::Host, None, None),
            (None, JailNetwork::Own) => (Network::Nothing, None, None),
            (Some(nic), JailNetwork::Shared) => (Network::Host, Some(KeptTap::keep(nic.tap, &nic.tap_name)?), None),
            (Some(nic), JailNetwork::Own) => {
                let cable = apart::take_apart(nic.tap, &nic.tap_name, nic.mac)?;
                (Network::Apart(cable.namespace()?), None, Some(cable))
            }
        })
    }

    /// Has the TAP, or the way to it, end with the machine.
    pub(super) fn let_go(&self, what: &'static str, vm: &VmHandle, tap: Option<KeptTap>, cable: Option<Cable>) -> Result<(), VmmError> {
        if let Some(cable) = cable {
            cable.let_go();
        }
        let (Some(mut tap), Some(pid)) = (tap, Pid::from_raw(vm.process.pid)) else { return Ok(()) };
        let name = tap.name().to_owned();
        let why = match tap.let_go(pid) {
            Ok(true) => return Ok(()),
            Ok(false) => format!("Firecracker did not open TAP {name}"),
            Err(error) => error.to_string(),
        };
        // One that ends has nothing open any more; that it ended is what counts.
        let gone = matches!(self.wait_exit(vm, LAST_WORDS), Ok(Liveness::Gone));
        self.kill(vm)?;
        drop(tap);
        let words = self.last_words(vm).filter(|_| gone).map_or_else(String::new, |words| format!(": {words}"));
        Err(VmmError::Failed { what, why: if gone { format!("Firecracker ended{words}") } else { why } })
    }

    /// As [`Self::give_up`], of one that was told to load a snapshot.
    pub(super) fn not_loaded(&self, vm: &VmHandle, error: ApiError) -> VmmError {
        let refused = matches!(error.kind, ApiErrorKind::Fault { .. }) && error.request == "PUT /snapshot/load";
        let why = error.to_string();
        match self.give_up("cannot restore the snapshot", vm, error) {
            VmmError::Failed { .. } if refused => VmmError::SnapshotRefused { why },
            other => other,
        }
    }

    /// Ends a machine of which a call failed while it was made.
    pub(super) fn give_up(&self, what: &'static str, vm: &VmHandle, error: ApiError) -> VmmError {
        // It may have ended by itself, and says why in its log.
        let lost = matches!(error.kind, ApiErrorKind::Closed | ApiErrorKind::Ended | ApiErrorKind::Io { .. });
        let patience = if lost { LAST_WORDS } else { Duration::ZERO };
        let gone = matches!(self.wait_exit(vm, patience), Ok(Liveness::Gone));
        // That it cannot be killed is worse news than why it was to be.
        if let Err(worse) = self.kill(vm) {
            return worse;
        }
        if gone && lost {
            let words = self.last_words(vm).map_or_else(String::new, |words| format!(": {words}"));
            return VmmError::Failed { what, why: format!("{}: Firecracker ended{words}", error.request) };
        }
        api_error(what, error)
    }
}

/// What is in a jail, and how long the largest file is that Firecracker may write, in bytes.
fn fill(spec: &VmSpec, from: &From<'_>, host_dir: &Path, uid: u32) -> Result<(Vec<Entry>, u64), VmmError> {
    let io = |doing: String| move |source| VmmError::Io { what: doing, source };
    let host = Scratch::make(host_dir, uid).map_err(io(format!("cannot make {}", host_dir.display())))?;
    metrics::make(&host, args::METRICS, uid).map_err(io(format!("cannot make {}", host_dir.join(args::METRICS).display())))?;
    let mut entries = vec![Entry::directory(args::HOST_DIR, host.fd())?];
    if let Some(path) = &spec.scratch {
        let scratch = Scratch::make(path, uid).map_err(io(format!("cannot make {}", path.display())))?;
        entries.push(Entry::directory(args::SCRATCH_DIR, scratch.fd())?);
    }
    match from {
        From::Kernel => {
            entries.push(readable(args::KERNEL, &spec.kernel, uid)?);
            if let Some(initrd) = &spec.initrd {
                entries.push(readable(args::INITRD, initrd, uid)?);
            }
        }
        From::Snapshot { dir } => {
            let opened = open_directory(dir).map_err(io(format!("cannot open {}", dir.display())))?;
            for (path, name) in [args::RESTORE_STATE, args::RESTORE_MEMORY].into_iter().zip(SNAPSHOT_FILES) {
                let file = open_plain_at(&opened, name, OFlags::RDONLY).and_then(|file| guard(&file, uid).map(|()| file));
                let file = file.map_err(io(format!("cannot open {}", dir.join(name).display())))?;
                entries.push(Entry::file(path, &file.into(), DriveAccess::ReadOnly)?);
            }
        }
    }
    let mut largest = LEAST_FILE.max(u64::from(spec.mem_mib) << 20);
    for Drive { name, file, access } in &spec.drives {
        if *access == DriveAccess::ReadWrite {
            let prepared = fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid))).and_then(|()| rustix::fs::fstat(file));
            let length = prepared.map_err(|error| io(format!("cannot hand over drive {name}"))(error.into()))?.st_size;
            largest = largest.max(u64::try_from(length).unwrap_or(0));
        }
        entries.push(Entry::file(args::drive_path(name), file, *access)?);
    }
    Ok((entries, largest))
}

/// A file that the machine's user has to be able to read.
fn readable(path: &str, file: &Path, uid: u32) -> Result<Entry, VmmError> {
    Entry::file(path, &open_for_vmm(file, Some(uid))?.into(), DriveAccess::ReadOnly)
}

/// Waits for the API's socket; `None` when the process ends before.
fn wait_for_socket(host_dir: &Path, child: &mut Child) -> Result<Option<OwnedFd>, VmmError> {
    const NAP: Duration = Duration::from_micros(100);
    let failed = |source| VmmError::Io { what: format!("cannot open {}", host_dir.join(args::API_SOCKET).display()), source };
    let deadline = Instant::now() + DEADLINES.connect;
    loop {
        match open_socket(host_dir, args::API_SOCKET) {
            Ok(socket) => return Ok(Some(socket)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        if child.try_wait().map_err(failed)?.is_some() {
            return Ok(None);
        }
        if Instant::now() >= deadline {
            let after_ms = u64::try_from(DEADLINES.connect.as_millis()).unwrap_or(u64::MAX);
            return Err(VmmError::Timeout { what: "cannot reach Firecracker's API".into(), after_ms });
        }
        std::thread::sleep(NAP);
    }
}
