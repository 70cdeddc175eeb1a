//! The jail: a mount namespace and a tmpfs of the child's own, filled before it becomes the jailer.
//!
//! Everything that needs a name, a length or memory is prepared before the fork; between fork and exec there are system calls only.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use mvm_hostd::cgroup;
use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, mount_remount, move_mount, open_tree,
};
use rustix::process::{Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit, setsid, umask};
use rustix::thread::{UnshareFlags, set_no_new_privs, unshare_unsafe};

use crate::vmm::{DriveAccess, VmmError};

/// What the jail may take besides its files: directories, devices, the jailer's own. A limit, no use.
const SLACK: u64 = 16 << 20;

/// Something in the jail.
pub(super) struct Entry {
    path: String,
    content: Content,
}

enum Content {
    /// A file or directory of the host, mounted.
    Mounted { tree: OwnedFd, kind: Kind, access: DriveAccess },
    /// A file that has no name anywhere, copied.
    Copied { from: OwnedFd, bytes: u64 },
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
}

impl Entry {
    /// An open file of the host under a path of the jail.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(super) fn file(path: impl Into<String>, file: &OwnedFd, access: DriveAccess) -> Result<Self, VmmError> {
        let path = path.into();
        let failed = |error: Errno| VmmError::Io { what: format!("cannot put {path} into the jail"), source: error.into() };
        match open_tree(file, c"", CLONE) {
            Ok(tree) => Ok(Self { path, content: Content::Mounted { tree, kind: Kind::File, access } }),
            // What is in memory only has no mount that could be cloned.
            Err(Errno::INVAL) => {
                let bytes = u64::try_from(rustix::fs::fstat(file).map_err(failed)?.st_size).unwrap_or(0);
                let from = rustix::io::fcntl_dupfd_cloexec(file, 3).map_err(failed)?;
                Ok(Self { path, content: Content::Copied { from, bytes } })
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// A directory of the host that Firecracker writes to.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(super) fn directory(path: impl Into<String>, directory: &OwnedFd) -> Result<Self, VmmError> {
        let path = path.into();
        let tree = open_tree(directory, c"", CLONE)
            .map_err(|error| VmmError::Io { what: format!("cannot put {path} into the jail"), source: error.into() })?;
        Ok(Self { path, content: Content::Mounted { tree, kind: Kind::Directory, access: DriveAccess::ReadWrite } })
    }
}

const CLONE: OpenTreeFlags = OpenTreeFlags::AT_EMPTY_PATH.union(OpenTreeFlags::OPEN_TREE_CLONE).union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// What is started in a jail.
pub(super) struct Launch<'a> {
    /// The jailer.
    pub jailer: &'a Path,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Firecracker, which the jailer copies.
    pub firecracker: &'a Path,
    /// The jail's name.
    pub id: &'a str,
    /// An empty directory, over which the jail's tmpfs is mounted where only the jailer sees it.
    pub base: &'a Path,
    /// Whose it is.
    pub uid: u32,
    /// `cgroup.procs` of the group that limits it.
    pub procs: Option<OwnedFd>,
    /// What is in it.
    pub entries: Vec<Entry>,
    /// Standard output: the guest's console.
    pub console: File,
    /// Standard error: the jailer's words, and Firecracker's last ones.
    pub log: File,
}

/// A step between fork and exec.
enum Step {
    Directory { path: CString, own: bool },
    Mount { tree: OwnedFd, target: CString, kind: Kind, access: DriveAccess },
    Copy { from: OwnedFd, target: CString, bytes: u64 },
}

/// Starts the jailer in a jail; what was handed over is closed in this process when this returns.
pub(super) fn launch(launch: Launch<'_>) -> io::Result<Child> {
    let name = launch.firecracker.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut root = launch.base.join(name);
    let mut steps = vec![directory(&root, false)?];
    root.push(launch.id);
    steps.push(directory(&root, false)?);
    root.push("root");
    steps.push(directory(&root, true)?);
    let mut bytes = std::fs::metadata(launch.firecracker)?.len() + SLACK;
    let mut made: Vec<String> = Vec::new();
    for Entry { path, content } in launch.entries {
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        if !parent.is_empty() && !made.contains(&parent) {
            steps.push(directory(&root.join(parent.trim_start_matches('/')), true)?);
            made.push(parent);
        }
        let target = c_string(&root.join(path.trim_start_matches('/')))?;
        match content {
            Content::Mounted { tree, kind, access } => steps.push(Step::Mount { tree, target, kind, access }),
            Content::Copied { from, bytes: length } => {
                bytes += length.next_multiple_of(4096);
                steps.push(Step::Copy { from, target, bytes: length });
            }
        }
    }
    let (base, options) = (c_string(launch.base)?, CString::new(format!("mode=0755,size={bytes},nr_inodes=1024"))?);
    let owner = (Uid::from_raw(launch.uid), Gid::from_raw(launch.uid));
    let mut command = Command::new(launch.jailer);
    command.args(&launch.arguments).env_clear().current_dir("/").stdin(Stdio::null()).stdout(launch.console).stderr(launch.log);
    let (parent, procs) = (getpid(), launch.procs);
    let prepare = move || {
        // First, so that all that it makes is charged to its group.
        if let Some(procs) = &procs {
            cgroup::join(procs.as_fd())?;
        }
        // Until it has another user, which ends this, and by then it can be found by its name (`find_stray`).
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() != Some(parent) {
            return Err(Errno::SRCH.into());
        }
        setsid()?;
        umask(Mode::from_raw_mode(0o077));
        for (resource, value) in [(Resource::Core, 0), (Resource::Nproc, 512)] {
            setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
        }
        // SAFETY: the child of a fork has one thread; no file descriptor table or address space is shared with another one.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        mount(c"mvm-jail", base.as_c_str(), c"tmpfs", MountFlags::NOSUID, Some(options.as_c_str()))?;
        for step in &steps {
            carry_out(step, owner)?;
        }
        set_no_new_privs(true)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only, with paths that are NUL-terminated already; it neither
    // allocates nor locks.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}

fn carry_out(step: &Step, (uid, gid): (Uid, Gid)) -> io::Result<()> {
    match step {
        Step::Directory { path, own } => {
            rustix::fs::mkdir(path.as_c_str(), Mode::from_raw_mode(0o700))?;
            if *own {
                rustix::fs::chown(path.as_c_str(), Some(uid), Some(gid))?;
            }
        }
        Step::Mount { tree, target, kind, access } => {
            match kind {
                Kind::Directory => rustix::fs::mkdir(target.as_c_str(), Mode::from_raw_mode(0o700))?,
                Kind::File => drop(create(target)?),
            }
            move_mount(tree, c"", CWD, target.as_c_str(), MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            if *access == DriveAccess::ReadOnly {
                flags |= MountFlags::RDONLY;
            }
            mount_remount(target.as_c_str(), flags, c"")?;
        }
        Step::Copy { from, target, bytes } => {
            let to = create(target)?;
            let (mut offset, mut left) = (0, *bytes);
            while left > 0 {
                let sent = rustix::fs::sendfile(&to, from, Some(&mut offset), usize::try_from(left).unwrap_or(usize::MAX))?;
                if sent == 0 {
                    return Err(Errno::IO.into());
                }
                left = left.saturating_sub(sent as u64);
            }
            rustix::fs::fchown(&to, Some(uid), Some(gid))?;
        }
    }
    Ok(())
}

fn create(path: &CString) -> io::Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path.as_c_str(), flags, Mode::RUSR)?)
}

fn directory(path: &Path, own: bool) -> io::Result<Step> {
    Ok(Step::Directory { path: c_string(path)?, own })
}

fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jailer_joins_its_group_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| File::create(dir.path().join(name)).unwrap();
        let base = dir.path().join("jails");
        std::fs::create_dir(&base).unwrap();
        let launched = Launch {
            jailer: Path::new("/bin/true"),
            arguments: Vec::new(),
            firecracker: Path::new("/bin/true"),
            id: "mvm-test",
            base: &base,
            uid: 0,
            procs: Some(file("procs").into()),
            entries: Vec::new(),
            console: file("console"),
            log: file("log"),
        };
        assert!(launch(launched).expect("jails need root").wait().unwrap().success());
        assert_eq!(std::fs::read_to_string(dir.path().join("procs")).unwrap(), "0", "the process that writes it");
        assert_eq!(std::fs::read_dir(&base).unwrap().count(), 0);
    }
}
