//! The jail: namespaces and a tmpfs of the child's own, filled before it becomes the jailer.
//!
//! Everything that needs a name, a length or memory is prepared before the clone; between clone and exec there are system calls only.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use mvm_hostd::cgroup;
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, SeekFrom, Uid, seek};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change, mount_remount, move_mount, open_tree,
};
use rustix::process::{Resource, Rlimit, setrlimit, setsid, umask};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_no_new_privs, unshare_unsafe};

use crate::vmm::child::{self, Child, Program};
use crate::vmm::{DriveAccess, Lifetime, VmmError};

/// What the jail may take besides its files: directories, devices, the jailer's own. A limit, no use.
const SLACK: u64 = 16 << 20;

/// Something in the jail.
pub(super) struct Entry {
    path: String,
    content: Content,
}

enum Content {
    /// A file or directory of the host, mounted.
    Mounted { tree: OwnedFd, kind: Kind, access: DriveAccess, name: Option<LentName> },
    /// A file in memory that has no name anywhere, copied.
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
            Ok(tree) => {
                // The kernel puts a mount only of what has a name in place.
                let name =
                    if rustix::fs::fstat(file).map_err(failed)?.st_nlink == 0 { Some(LentName::lend(file).map_err(failed)?) } else { None };
                let tree = name.as_ref().map_or(Ok(tree), LentName::clone_mount).map_err(failed)?;
                Ok(Self { path, content: Content::Mounted { tree, kind: Kind::File, access, name } })
            }
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
        Ok(Self { path, content: Content::Mounted { tree, kind: Kind::Directory, access: DriveAccess::ReadWrite, name: None } })
    }
}

const CLONE: OpenTreeFlags = OpenTreeFlags::AT_EMPTY_PATH.union(OpenTreeFlags::OPEN_TREE_CLONE).union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// A name in its own directory that a file without one (`O_TMPFILE`) has while it is put into a jail.
struct LentName {
    directory: OwnedFd,
    name: String,
}

impl LentName {
    fn lend(file: &OwnedFd) -> rustix::io::Result<Self> {
        // That of the directory, and a name that is none: `/place/#123 (deleted)`.
        let place = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new())?;
        let place = Path::new(OsStr::from_bytes(place.as_bytes())).parent().ok_or(Errno::NOENT)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::open(place, flags, Mode::empty())?;
        let name = format!(".jailed-{}-{}", std::process::id(), file.as_raw_fd());
        rustix::fs::linkat(file, c"", &directory, &name, AtFlags::EMPTY_PATH)?;
        Ok(Self { directory, name })
    }

    fn clone_mount(&self) -> rustix::io::Result<OwnedFd> {
        open_tree(&self.directory, &self.name, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
    }
}

impl Drop for LentName {
    fn drop(&mut self) {
        if let Err(error) = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            tracing::warn!(name = self.name, %error, "a drive keeps the name that it was lent");
        }
    }
}

/// The network of what is in a jail.
#[derive(Debug)]
pub(super) enum Network {
    /// The host's.
    Host,
    /// That of a namespace, in which its TAP is.
    Apart(OwnedFd),
    /// None: a namespace with nothing in it.
    Nothing,
}

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
    /// What network it has.
    pub network: Network,
    /// How long it outlives whoever starts it.
    pub lifetime: Lifetime,
    /// Standard output: the guest's console.
    pub console: File,
    /// Standard error: the jailer's words, and Firecracker's last ones.
    pub log: File,
}

/// A step between clone and exec.
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
    // Until all is in its place.
    let mut names = Vec::new();
    for Entry { path, content } in launch.entries {
        let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent).to_owned();
        if !parent.is_empty() && !made.contains(&parent) {
            steps.push(directory(&root.join(parent.trim_start_matches('/')), true)?);
            made.push(parent);
        }
        let target = c_string(&root.join(path.trim_start_matches('/')))?;
        match content {
            Content::Mounted { tree, kind, access, name } => {
                names.extend(name);
                steps.push(Step::Mount { tree, target, kind, access });
            }
            Content::Copied { from, bytes: length } => {
                bytes += length.next_multiple_of(4096);
                steps.push(Step::Copy { from, target, bytes: length });
            }
        }
    }
    let (base, options) = (c_string(launch.base)?, CString::new(format!("mode=0755,size={bytes},nr_inodes=1024"))?);
    let owner = (Uid::from_raw(launch.uid), Gid::from_raw(launch.uid));
    let (network, procs) = (launch.network, launch.procs);
    let new_namespaces = match network {
        Network::Nothing => UnshareFlags::NEWNS | UnshareFlags::NEWNET,
        Network::Host | Network::Apart(_) => UnshareFlags::NEWNS,
    };
    let prepare = || {
        // First, so that all that it makes is charged to its group.
        if let Some(procs) = &procs {
            cgroup::join(procs.as_fd())?;
        }
        setsid()?;
        umask(Mode::from_raw_mode(0o077));
        for (resource, value) in [(Resource::Core, 0), (Resource::Nproc, 512)] {
            setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
        }
        if let Network::Apart(namespace) = &network {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        }
        // SAFETY: the child has one thread; no file descriptor table or address space is shared with another one.
        unsafe { unshare_unsafe(new_namespaces) }?;
        mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        mount(c"mvm-jail", base.as_c_str(), c"tmpfs", MountFlags::NOSUID, Some(options.as_c_str()))?;
        for step in &steps {
            carry_out(step, owner)?;
        }
        set_no_new_privs(true)?;
        Ok(())
    };
    let (stdout, stderr) = (launch.console.into(), launch.log.into());
    let program = Program { path: launch.jailer, arguments: &launch.arguments, stdout, stderr, prepare };
    // SAFETY: the closure makes system calls only, with paths that are NUL-terminated already; it neither allocates nor locks.
    unsafe { child::spawn(&program, launch.lifetime) }
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
            // Most of it is a hole, and stays one: that is half a millisecond for each drive.
            rustix::fs::ftruncate(&to, *bytes)?;
            let mut offset = 0;
            while offset < *bytes {
                offset = match seek(from, SeekFrom::Data(offset)) {
                    Ok(data) => data,
                    Err(Errno::NXIO) => break,
                    Err(error) => return Err(error.into()),
                };
                let end = seek(from, SeekFrom::Hole(offset))?.min(*bytes);
                seek(&to, SeekFrom::Start(offset))?;
                while offset < end {
                    let length = usize::try_from(end - offset).unwrap_or(usize::MAX);
                    if rustix::fs::sendfile(&to, from, Some(&mut offset), length)? == 0 {
                        return Err(Errno::IO.into());
                    }
                }
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
            network: Network::Host,
            lifetime: Lifetime::Detached,
            console: file("console"),
            log: file("log"),
        };
        assert!(launch(launched).expect("jails need root").wait().unwrap().success());
        assert_eq!(std::fs::read_to_string(dir.path().join("procs")).unwrap(), "0", "the process that writes it");
        assert_eq!(std::fs::read_dir(&base).unwrap().count(), 0);
    }
}
