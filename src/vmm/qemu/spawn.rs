//! Starting a QEMU: own session, own uid, no privileges to gain, nothing inherited but what it was handed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use mvm_hostd::cgroup;
use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags};
use rustix::process::{Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit, setsid, umask};
use rustix::thread::{set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use rustix::{process::Gid, process::Uid};

use crate::vmm::Lifetime;

/// What a QEMU gets.
#[derive(Debug)]
pub(super) struct Launch {
    pub args: Vec<String>,
    /// The descriptors that the arguments name by number.
    pub inherit: Inherited,
    /// `cgroup.procs` of the group that limits it.
    pub procs: Option<OwnedFd>,
    /// The user and group to become; needs root.
    pub uid: Option<u32>,
    /// The only other group kept: that of `/dev/kvm`.
    pub device_group: Option<u32>,
    /// Where standard output and error go.
    pub log: File,
    /// Whether it outlives the thread that starts it.
    pub lifetime: Lifetime,
    /// How far it may write into any file, in bytes: a guest that talks without end does not fill the host's disk with its
    /// console. Writing beyond fails, and nothing else happens.
    pub largest_file: u64,
}

/// Descriptors that a child keeps under their numbers.
#[derive(Debug, Default)]
pub(super) struct Inherited(Vec<OwnedFd>);

impl Inherited {
    /// Takes a descriptor and returns the number that the child will know it by.
    pub(super) fn hand(&mut self, fd: impl Into<OwnedFd>) -> RawFd {
        let fd = fd.into();
        let number = fd.as_raw_fd();
        self.0.push(fd);
        number
    }

    /// Looks at the descriptors.
    pub(super) fn iter(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }
}

/// Limits of each QEMU. Threads count against the uid, which is the instance's own: virtual CPUs and at most 64 workers for drives.
const LIMITS: [(Resource, u64); 3] = [(Resource::Core, 0), (Resource::Nofile, 1024), (Resource::Nproc, 512)];

/// Starts the program; its descriptors are closed in this process when this returns.
pub(super) fn launch(binary: &Path, launch: Launch) -> io::Result<Child> {
    let mut command = Command::new(binary);
    command.args(&launch.args).env_clear().current_dir("/").stdin(Stdio::null()).stdout(launch.log.try_clone()?).stderr(launch.log);
    let fds: Vec<RawFd> = launch.inherit.iter().map(|fd| fd.as_raw_fd()).collect();
    let identity = launch.uid.map(|id| (Uid::from_raw(id), Gid::from_raw(id)));
    let groups: Vec<Gid> = launch.device_group.into_iter().map(Gid::from_raw).collect();
    let (lifetime, largest_file) = (launch.lifetime, launch.largest_file);
    let (parent, procs) = (getpid(), launch.procs);
    let prepare = move || {
        // First, so that all that it makes is charged to its group.
        if let Some(procs) = &procs {
            cgroup::join(procs.as_fd())?;
        }
        setsid()?;
        umask(Mode::from_raw_mode(0o077));
        // SAFETY: a system call without pointers into this program; the handler is the kernel's own.
        if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
        for (resource, value) in LIMITS.into_iter().chain([(Resource::Fsize, largest_file)]) {
            setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
        }
        if let Some((uid, gid)) = identity {
            set_thread_groups(&groups)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
        }
        set_no_new_privs(true)?;
        // After the change of uid, which clears it.
        if lifetime == Lifetime::WithCaller {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // A parent that died before that sends no signal any more.
            if getppid() != Some(parent) {
                return Err(Errno::SRCH.into());
            }
        }
        for fd in &fds {
            // SAFETY: `launch.inherit` owns these descriptors until the child has been started.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only (rustix issues them directly); it neither allocates nor locks.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn()?;
    drop(launch.inherit);
    Ok(child)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_joins_its_group_and_is_told_when_it_has_written_enough() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let procs = tempfile::NamedTempFile::new().unwrap();
        let largest_file = 100_000;
        let launched = Launch {
            args: Vec::new(),
            inherit: Inherited::default(),
            procs: Some(procs.reopen().unwrap().into()),
            uid: None,
            device_group: None,
            log: log.reopen().unwrap(),
            lifetime: Lifetime::WithCaller,
            largest_file,
        };
        let ended = launch(Path::new("/usr/bin/yes"), launched).unwrap().wait().unwrap();
        assert_eq!(ended.code(), Some(1), "an error of its own, not the signal: {ended}");
        assert_eq!(log.as_file().metadata().unwrap().len(), largest_file);
        assert_eq!(std::fs::read_to_string(procs.path()).unwrap(), "0", "the process that writes it");
    }
}
