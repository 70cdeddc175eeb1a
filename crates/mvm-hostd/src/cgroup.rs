//! Limits of processes by cgroup v2 (Documentation/admin-guide/cgroup-v2.rst of Linux): groups are made, limited, read back, ended.
//!
//! ```text
//!  <mount>/                          cgroup.subtree_control: cpu io memory pids
//!  <mount>/mvm/                      the same; there while any group is
//!  <mount>/mvm/<node>.<instance>/    memory.max, cpu.max, pids.max, io.max; one VMM process
//! ```
//!
//! At the root of the hierarchy, since VMMs outlive the unit or session that mvm was started in. A process that makes a group holds
//! a lock on its directory until somebody has joined it, so that a sweep does not take it for one that was left. The directory is
//! root's only: nobody else can hold that lock.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, mkdirat, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::error::{During, HostdError};

/// The controllers that limits are set with.
pub const NEEDED: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The group above all of mvm's.
const BASE: &str = "mvm";

/// The time that [`Limits::processors`] is a share of, in microseconds; the kernel's own default.
const PERIOD_US: u64 = 100_000;

/// How long the kernel may take to end the killed processes of a group: it has to give back their memory first.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// How often making a group is tried when another process takes the one above away meanwhile, empty.
const TRIES: usize = 8;

/// What the processes of a group may use together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Memory of all kinds that is charged to them, in bytes; beyond it one of them is killed, and all others with it. None of it is
    /// swapped.
    pub memory_bytes: u64,
    /// Processors, as time: 2 is two seconds of computing in one second.
    pub processors: u32,
    /// Processes and threads.
    pub tasks: u64,
    /// What they may move from and to disks.
    pub disks: Vec<DiskLimit>,
}

/// What may be moved from and to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskLimit {
    /// Major and minor number of the whole disk.
    pub device: (u32, u32),
    /// Bytes per second, each for reading and for writing.
    pub bytes_per_second: u64,
}

/// Why no limits can be set on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}; to mend it, {remedy}")]
pub struct NoLimits {
    /// What is missing.
    pub why: String,
    /// How to mend it.
    pub remedy: &'static str,
}

impl NoLimits {
    fn new(why: impl Into<String>, remedy: &'static str) -> Self {
        Self { why: why.into(), remedy }
    }
}

/// A hierarchy of groups in which limits can be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    root: PathBuf,
}

impl Hierarchy {
    /// Finds the hierarchy of this host. Changes nothing.
    ///
    /// # Errors
    /// When there is none that has all of [`NEEDED`] and lets groups be made at its root.
    pub fn find() -> Result<Self, NoLimits> {
        match fs::read_to_string("/proc/self/mountinfo") {
            Ok(mounts) => Self::among(&mounts),
            Err(error) => Err(NoLimits::new(format!("/proc/self/mountinfo cannot be read: {error}"), "mount /proc")),
        }
    }

    /// Finds it among mounts, as `/proc/self/mountinfo` has them.
    fn among(mounts: &str) -> Result<Self, NoLimits> {
        let mut first = None;
        for mount in cgroup2_mounts(mounts) {
            match usable(&mount) {
                Ok(()) => return Ok(Self { root: mount.place }),
                Err(why) => drop(first.get_or_insert(why)),
            }
        }
        Err(first.unwrap_or_else(|| NoLimits::new("no cgroup v2 hierarchy is mounted", UNIFIED)))
    }

    /// The directory of groups.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the group of a node's instance is, or would be.
    ///
    /// # Errors
    /// When a name is more than lower-case letters, digits and dashes.
    pub fn place(&self, node: &str, instance: &str) -> Result<Place, HostdError> {
        for name in [node, instance] {
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
                let why = "a group's name consists of lower-case letters, digits and dashes";
                return Err(HostdError::refused(format!("cannot name a cgroup after {name:?}"), why));
            }
        }
        Ok(Place { hierarchy: self.clone(), name: format!("{node}.{instance}") })
    }

    /// Removes the groups of a node that no process is in, that nobody makes just now, and whose instance is not to be kept.
    ///
    /// # Errors
    /// When the kernel refuses. Returns the directories that were removed.
    pub fn sweep(&self, node: &str, keep: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, HostdError> {
        let base = self.root.join(BASE);
        let entries = match fs::read_dir(&base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.during(|| format!("cannot list {}", base.display()))?,
        };
        let mut removed = Vec::new();
        for entry in entries {
            let entry = entry.during(|| format!("cannot list {}", base.display()))?;
            let name = entry.file_name();
            let Some(instance) = name.to_str().and_then(|name| name.strip_prefix(node)?.strip_prefix('.')) else { continue };
            if keep(instance) {
                continue;
            }
            // Another name was not given by mvm.
            let Ok(place) = self.place(node, instance) else { continue };
            let Some(dir) = place.open()? else { continue };
            if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() && !place.is_populated(&dir)? && place.remove()? {
                removed.push(entry.path());
            }
        }
        self.remove_base();
        Ok(removed)
    }

    /// Removes the group above all others, unless one is left or it is gone already.
    fn remove_base(&self) {
        // Who makes a group just now makes this one again.
        let _ = fs::remove_dir(self.root.join(BASE));
    }

    /// Makes the group above all others, and has the controllers in it and below it.
    fn ensure_base(&self) -> Result<(), HostdError> {
        let base = self.root.join(BASE);
        match fs::create_dir(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).during(|| format!("cannot make the cgroup {}", base.display()));
            }
            _ => {}
        }
        hand_on(&self.root)?;
        hand_on(&base)
    }
}

/// What to do where only a part of the hierarchy is shown.
const ON_THE_HOST: &str = "run mvm on the host itself, or give its container the host's cgroup namespace and /sys/fs/cgroup for writing";
/// What to do where the controllers are those of cgroup v1.
const UNIFIED: &str = "boot the host with systemd.unified_cgroup_hierarchy=1, or cgroup_no_v1=all, on the kernel's command line";

struct Mount {
    place: PathBuf,
    read_only: bool,
}

/// The mounts of cgroup v2, from lines of proc_pid_mountinfo(5).
fn cgroup2_mounts(mounts: &str) -> impl Iterator<Item = Mount> {
    mounts.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        if kind.next() != Some("cgroup2") {
            return None;
        }
        let mut fields = fields.split(' ').skip(4);
        let (place, options) = (fields.next()?, fields.next()?);
        let read_only = |options: &str| options.split(',').any(|option| option == "ro");
        let place = place.replace(r"\040", " ").into();
        Some(Mount { place, read_only: read_only(options) || kind.nth(1).is_some_and(read_only) })
    })
}

/// Tells whether groups with limits can be made in a hierarchy, or why not.
fn usable(mount: &Mount) -> Result<(), NoLimits> {
    let root = mount.place.display();
    let read = |name: &str| {
        let unreadable = |error| NoLimits::new(format!("{root}/{name} cannot be read: {error}"), ON_THE_HOST);
        fs::read_to_string(mount.place.join(name)).map_err(unreadable)
    };
    let missing = without(&read("cgroup.controllers")?);
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(NoLimits::new(format!("the cgroup v2 hierarchy at {root} does not have {missing}, which cgroup v1 may hold"), UNIFIED));
    }
    if mount.read_only {
        return Err(NoLimits::new(format!("{root} is mounted read-only, as in most containers"), ON_THE_HOST));
    }
    // The hierarchy's own root has no type, and is the only group that may have both processes and groups with controllers.
    let is_inner = mount.place.join("cgroup.type").exists();
    if is_inner && !without(&read("cgroup.subtree_control")?).is_empty() && !read("cgroup.procs")?.trim().is_empty() {
        return Err(NoLimits::new(processes_in(&mount.place), ON_THE_HOST));
    }
    Ok(())
}

fn processes_in(group: &Path) -> String {
    format!("{} has processes in it, and such a group hands no controllers on", group.display())
}

/// The needed controllers that a list does not have.
fn without(list: &str) -> Vec<&'static str> {
    NEEDED.into_iter().filter(|needed| !list.split_whitespace().any(|one| one == *needed)).collect()
}

/// Has a group hand its controllers on to the groups in it.
fn hand_on(group: &Path) -> Result<(), HostdError> {
    let file = group.join("cgroup.subtree_control");
    let read = || fs::read_to_string(&file).during(|| format!("cannot read {}", file.display()));
    let missing = without(&read()?);
    if missing.is_empty() {
        return Ok(());
    }
    let wanted: Vec<String> = missing.iter().map(|one| format!("+{one}")).collect();
    let wanted = wanted.join(" ");
    match fs::OpenOptions::new().write(true).open(&file).and_then(|mut file| io::Write::write_all(&mut file, wanted.as_bytes())) {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            Err(HostdError::refused(format!("cannot write {wanted} to {}", file.display()), processes_in(group)))
        }
        other => other.during(|| format!("cannot write {wanted} to {}", file.display())),
    }
}

/// Where the group of one instance is, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    hierarchy: Hierarchy,
    name: String,
}

impl Place {
    /// The group's directory.
    pub fn path(&self) -> PathBuf {
        self.hierarchy.root.join(BASE).join(&self.name)
    }

    /// Makes the group with its limits, each of which is read back. One that was left is ended first.
    ///
    /// # Errors
    /// When the kernel refuses, or has another limit than was written; nothing is left then.
    pub fn make(&self, limits: &Limits) -> Result<Group, HostdError> {
        for _ in 1..TRIES {
            match self.try_to_make(limits) {
                Err(HostdError::Io { source, .. }) if is_gone(&source) => {}
                other => return other,
            }
        }
        self.try_to_make(limits)
    }

    fn try_to_make(&self, limits: &Limits) -> Result<Group, HostdError> {
        self.hierarchy.ensure_base()?;
        let path = self.path();
        let what = || format!("cannot make the cgroup {}", path.display());
        match mkdirat(rustix::fs::CWD, &path, Mode::RWXU) {
            Err(Errno::EXIST) => {
                self.end()?;
                self.hierarchy.ensure_base()?;
                mkdirat(rustix::fs::CWD, &path, Mode::RWXU).during(what)?;
            }
            other => other.during(what)?,
        }
        let dir = self.open()?.ok_or(Errno::NOENT).during(what)?;
        flock(&dir, FlockOperation::LockExclusive).during(what)?;
        let files = Files { dir: dir.as_fd(), path: &path };
        let limited = files.limit(limits).and_then(|()| files.open("cgroup.procs", OFlags::WRONLY));
        match limited {
            Ok(procs) => Ok(Group { place: self.clone(), procs, _locked: dir }),
            Err(error) => {
                self.remove()?;
                self.hierarchy.remove_base();
                Err(error)
            }
        }
    }

    /// Kills what is in the group and removes it; returns whether it was there. Idempotent.
    ///
    /// # Errors
    /// When the kernel refuses, or does not end the processes in time.
    pub fn end(&self) -> Result<bool, HostdError> {
        let Some(dir) = self.open()? else { return Ok(false) };
        let deadline = Instant::now() + END_TIMEOUT;
        while self.is_populated(&dir)? {
            self.kill_all(&dir)?;
            if !self.wait_until_empty(&dir, deadline)? {
                let why = format!("its processes were killed, and are there after {} s", END_TIMEOUT.as_secs());
                return Err(HostdError::refused(format!("cannot end the cgroup {}", self.path().display()), why));
            }
        }
        self.remove()?;
        self.hierarchy.remove_base();
        Ok(true)
    }

    /// Tells whether the kernel has killed a process of the group because it took more than its `memory.max`; not, when the group is gone.
    ///
    /// `oom_kill` alone also counts what the host's own want of memory ended (admin-guide/cgroup-v2.rst of the kernel).
    pub fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.path().join("memory.events")).unwrap_or_default();
        let some = |name: &str| events.lines().any(|line| line.strip_prefix(name).is_some_and(|times| times.trim() != "0"));
        some("oom ") && some("oom_kill ")
    }

    fn open(&self) -> Result<Option<OwnedFd>, HostdError> {
        let path = self.path();
        match rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => Ok(None),
            other => other.map(Some).during(|| format!("cannot open the cgroup {}", path.display())),
        }
    }

    /// Removes the directory; returns whether it was there.
    fn remove(&self) -> Result<bool, HostdError> {
        let path = self.path();
        match unlinkat(rustix::fs::CWD, &path, AtFlags::REMOVEDIR) {
            Err(Errno::NOENT) => Ok(false),
            other => other.map(|()| true).during(|| format!("cannot remove the cgroup {}", path.display())),
        }
    }

    /// Kills every process of the group.
    fn kill_all(&self, dir: &OwnedFd) -> Result<(), HostdError> {
        let path = self.path();
        let files = Files { dir: dir.as_fd(), path: &path };
        match files.write("cgroup.kill", "1") {
            // Linux has it from 5.14 on; before, what they start meanwhile is killed the next time.
            Err(error) if error.is_not_found() => {}
            Err(HostdError::Io { source, .. }) if is_gone(&source) => return Ok(()),
            other => return other,
        }
        let there = match files.read("cgroup.procs") {
            Err(HostdError::Io { source, .. }) if is_gone(&source) => return Ok(()),
            other => other?,
        };
        for pid in there.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
            match kill_process(pid, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error).during(|| format!("cannot kill process {} of {}", pid.as_raw_nonzero(), path.display())),
            }
        }
        Ok(())
    }

    /// Tells whether a process is in the group; not, when it is gone.
    fn is_populated(&self, dir: &OwnedFd) -> Result<bool, HostdError> {
        let path = self.path();
        match (Files { dir: dir.as_fd(), path: &path }).read("cgroup.events") {
            Ok(events) => Ok(populated(&events)),
            Err(HostdError::Io { source, .. }) if is_gone(&source) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Waits a moment, or until the last process has left; returns whether there is time for more.
    fn wait_until_empty(&self, dir: &OwnedFd, deadline: Instant) -> Result<bool, HostdError> {
        /// What was started while all others were killed is killed after this.
        const MOMENT: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let path = self.path();
        let events = match (Files { dir: dir.as_fd(), path: &path }).open("cgroup.events", OFlags::RDONLY) {
            Ok(events) => events,
            Err(HostdError::Io { source, .. }) if is_gone(&source) => return Ok(true),
            Err(error) => return Err(error),
        };
        // The kernel tells of a change to what was read last.
        let mut text = [0; 256];
        let length = rustix::io::read(&events, &mut text).during(|| format!("cannot read {}/cgroup.events", path.display()))?;
        if populated(&String::from_utf8_lossy(&text[..length])) {
            match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&MOMENT)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error).during(|| format!("cannot wait for the processes of {}", path.display())),
            }
        }
        Ok(Instant::now() < deadline)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path().display())
    }
}

/// What the kernel answers for a group that was removed: by its name, or by what was open of it.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

fn populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// A group with its limits, for a process to join. When this is dropped, one that nobody has joined is removed.
#[derive(Debug)]
pub struct Group {
    place: Place,
    procs: OwnedFd,
    /// Tells a sweep that somebody is about to join.
    _locked: OwnedFd,
}

impl Group {
    /// What a process writes to in order to join: see [`join`].
    pub fn procs(&self) -> BorrowedFd<'_> {
        self.procs.as_fd()
    }

    /// Where it is.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Busy: somebody has joined.
        if self.place.remove().is_ok() {
            self.place.hierarchy.remove_base();
        }
    }
}

/// Moves the calling process into the group whose [`Group::procs`] this is. One system call: fit for between fork and exec.
///
/// # Errors
/// When the kernel refuses.
pub fn join(procs: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::write(procs, b"0")?;
    Ok(())
}

/// The files of a group.
struct Files<'a> {
    dir: BorrowedFd<'a>,
    path: &'a Path,
}

impl Files<'_> {
    fn open(&self, file: &str, how: OFlags) -> Result<OwnedFd, HostdError> {
        openat(self.dir, file, how | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
            .during(|| format!("cannot open {}", self.path.join(file).display()))
    }

    fn read(&self, file: &str) -> Result<String, HostdError> {
        let open = fs::File::from(self.open(file, OFlags::RDONLY)?);
        io::read_to_string(open).during(|| format!("cannot read {}", self.path.join(file).display()))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), HostdError> {
        let open = self.open(file, OFlags::WRONLY)?;
        rustix::io::write(&open, value.as_bytes()).during(|| format!("cannot write {value:?} to {}", self.path.join(file).display()))?;
        Ok(())
    }

    /// Writes a limit, and reads it back: `is` tells whether what is read means what was written.
    fn set(&self, file: &str, value: &str, is: impl Fn(&str) -> bool) -> Result<(), HostdError> {
        self.write(file, value)?;
        let read = self.read(file)?;
        if is(read.trim()) {
            return Ok(());
        }
        let why = format!("{file} was written as {value:?} and reads {:?}", read.trim());
        Err(HostdError::refused(format!("cannot limit the cgroup {}", self.path.display()), why))
    }

    /// As [`Files::set`], where this kernel has the file.
    fn set_if_there(&self, file: &str, value: &str) -> Result<(), HostdError> {
        match self.set(file, value, |read| read == value) {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }
    }

    fn limit(&self, limits: &Limits) -> Result<(), HostdError> {
        // Only a kernel with swap has it; the other one is there from 4.19 on.
        self.set_if_there("memory.swap.max", "0")?;
        self.set_if_there("memory.oom.group", "1")?;
        let page = rustix::param::page_size() as u64;
        let whole_pages = limits.memory_bytes / page * page;
        self.set("memory.max", &limits.memory_bytes.to_string(), |read| read.parse() == Ok(whole_pages))?;
        let quota = format!("{} {PERIOD_US}", u64::from(limits.processors) * PERIOD_US);
        self.set("cpu.max", &quota, |read| read == quota)?;
        self.set("pids.max", &limits.tasks.to_string(), |read| read.parse() == Ok(limits.tasks))?;
        for disk in &limits.disks {
            let ((major, minor), rate) = (disk.device, disk.bytes_per_second);
            let line = format!("{major}:{minor} rbps={rate} wbps={rate}");
            self.set("io.max", &line, |read| has_disk_limit(read, disk))?;
        }
        Ok(())
    }
}

/// Tells whether `io.max` has a limit: `8:16 rbps=2097152 wbps=2097152 riops=max wiops=max`.
fn has_disk_limit(text: &str, disk: &DiskLimit) -> bool {
    let device = format!("{}:{}", disk.device.0, disk.device.1);
    text.lines().any(|line| {
        let mut fields = line.split(' ');
        let has = |key: &str| line.split(' ').any(|field| field.strip_prefix(key) == Some(&disk.bytes_per_second.to_string()));
        fields.next() == Some(&device) && has("rbps=") && has("wbps=")
    })
}

/// The whole disk that a file system is on, for [`DiskLimit`], by the device number of a file on it; `None` where that is none by
/// itself: in memory, or of a file system that has several.
pub fn disk_of(device: u64) -> Option<(u32, u32)> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let entry = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A limit is one of the whole disk: the directory above a partition's.
    let whole = if entry.join("partition").exists() { entry.canonicalize().ok()?.parent()?.to_owned() } else { entry };
    let text = fs::read_to_string(whole.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const ALL: &str = "cpuset cpu io memory hugetlb pids\n";

    /// A directory with the files that the kernel makes for a group.
    fn group(dir: &Path, controllers: &str) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
        for file in ["cgroup.subtree_control", "cgroup.procs", "memory.max", "cpu.max", "pids.max", "io.max"] {
            fs::write(dir.join(file), "").unwrap();
        }
        fs::write(dir.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
    }

    fn mounted(dir: &Path, options: &str) -> String {
        format!("31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n38 31 0:31 / {} {options} shared:9 - cgroup2 cgroup2 rw\n", dir.display())
    }

    fn found(mounts: &str) -> String {
        Hierarchy::among(mounts).map_or_else(|why| why.to_string(), |found| found.root().display().to_string())
    }

    fn limits() -> Limits {
        let disks = vec![DiskLimit { device: (8, 16), bytes_per_second: 2_097_152 }];
        Limits { memory_bytes: 100 << 20, processors: 2, tasks: 70, disks }
    }

    #[test]
    fn the_hierarchy_with_all_controllers_is_found() {
        let top = tempfile::tempdir().unwrap();
        let (bare, whole) = (top.path().join("bare"), top.path().join("whole"));
        group(&bare, "hugetlb\n");
        group(&whole, ALL);
        assert_eq!(found(&(mounted(&bare, "rw,relatime") + &mounted(&whole, "rw,relatime"))), whole.display().to_string());
        let why = found(&mounted(&bare, "rw,relatime"));
        assert!(why.contains("does not have cpu, io, memory, pids") && why.contains("systemd.unified_cgroup_hierarchy=1"), "{why}");
        let why = found("25 1 0:22 / /proc rw - proc proc rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n");
        assert!(why.contains("no cgroup v2 hierarchy is mounted") && why.contains("cgroup_no_v1=all"), "{why}");
        let why = found(&mounted(&whole, "ro,relatime"));
        assert!(why.contains("mounted read-only"), "{why}");
        let spaced = top.path().join("a place");
        group(&spaced, ALL);
        let mounts = mounted(&spaced, "rw").replace("a place", r"a\040place");
        assert_eq!(found(&mounts), spaced.display().to_string());
    }

    #[test]
    fn a_container_s_own_root_is_used_where_it_hands_controllers_on() {
        let top = tempfile::tempdir().unwrap();
        let root = top.path().join("root");
        group(&root, ALL);
        fs::write(root.join("cgroup.type"), "domain\n").unwrap();
        fs::write(root.join("cgroup.procs"), "1\n17\n").unwrap();
        let why = found(&mounted(&root, "rw"));
        assert!(why.contains("has processes in it") && why.contains("run mvm on the host itself"), "{why}");
        fs::write(root.join("cgroup.subtree_control"), ALL).unwrap();
        assert_eq!(found(&mounted(&root, "rw")), root.display().to_string());
        fs::write(root.join("cgroup.subtree_control"), "cpu\n").unwrap();
        fs::write(root.join("cgroup.procs"), "").unwrap();
        assert_eq!(found(&mounted(&root, "rw")), root.display().to_string());
    }

    #[test]
    fn only_missing_controllers_are_asked_for() {
        let top = tempfile::tempdir().unwrap();
        group(top.path(), ALL);
        let file = top.path().join("cgroup.subtree_control");
        fs::write(&file, "memory pids\n").unwrap();
        hand_on(top.path()).unwrap();
        assert!(fs::read_to_string(&file).unwrap().starts_with("+cpu +io"));
        fs::write(&file, ALL).unwrap();
        hand_on(top.path()).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), ALL);
    }

    #[test]
    fn limits_are_written_and_what_reads_otherwise_is_an_error() {
        let top = tempfile::tempdir().unwrap();
        group(top.path(), ALL);
        let dir = OwnedFd::from(fs::File::open(top.path()).unwrap());
        let files = Files { dir: dir.as_fd(), path: top.path() };
        let read = |file: &str| fs::read_to_string(top.path().join(file)).unwrap();
        files.limit(&limits()).unwrap();
        assert_eq!((read("memory.max"), read("cpu.max"), read("pids.max")), ("104857600".into(), "200000 100000".into(), "70".into()));
        assert_eq!(read("io.max"), "8:16 rbps=2097152 wbps=2097152");
        assert!(!top.path().join("memory.swap.max").exists(), "a kernel without swap has no limit of it");
        // The kernel counts in pages.
        assert!(files.set("memory.max", "4097", |read| read == "4096").is_err());

        fs::remove_file(top.path().join("pids.max")).unwrap();
        let error = files.limit(&limits()).unwrap_err();
        assert!(error.is_not_found() && error.to_string().contains("pids.max"), "{error}");
        symlink("/dev/null", top.path().join("pids.max")).unwrap();
        assert!(files.limit(&limits()).is_err(), "no link is followed");
        fs::remove_file(top.path().join("memory.max")).unwrap();
        // Longer than what is written over it: a limit that did not come about.
        fs::write(top.path().join("memory.max"), "1048576000").unwrap();
        let error = files.limit(&limits()).unwrap_err().to_string();
        let said = r#"memory.max was written as "104857600" and reads "1048576000""#;
        assert!(error.contains(said) && error.contains(top.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_disk_limit_is_found_among_those_of_other_disks() {
        let limit = limits().disks[0];
        assert!(has_disk_limit("8:0 rbps=1 wbps=max riops=max wiops=max\n8:16 rbps=2097152 wbps=2097152 riops=max wiops=max\n", &limit));
        assert!(!has_disk_limit("8:1 rbps=2097152 wbps=2097152 riops=max wiops=max\n", &limit));
        assert!(!has_disk_limit("8:16 rbps=2097152 wbps=max riops=max wiops=max\n", &limit));
        assert!(!has_disk_limit("", &limit));
    }

    #[test]
    fn what_cannot_be_limited_is_not_left() {
        let top = tempfile::tempdir().unwrap();
        group(top.path(), ALL);
        group(&top.path().join(BASE), ALL);
        let hierarchy = Hierarchy { root: top.path().to_owned() };
        let place = hierarchy.place("node", "i-1a2b3c4d").unwrap();
        assert_eq!(place.path(), top.path().join("mvm/node.i-1a2b3c4d"));
        let error = place.make(&limits()).unwrap_err().to_string();
        assert!(error.contains("node.i-1a2b3c4d/memory.max"), "{error}");
        assert!(!place.path().exists());
        assert!(!place.end().unwrap(), "it can be repeated");
    }

    #[test]
    fn only_groups_that_nobody_uses_or_makes_are_swept() {
        let top = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { root: top.path().to_owned() };
        assert_eq!(hierarchy.sweep("node", |_| false).unwrap(), Vec::<PathBuf>::new());
        let base = top.path().join(BASE);
        for name in ["node.i-1", "node.i-2", "node.i-3", "node.Not Ours", "other.i-1", "node2.i-1"] {
            fs::create_dir_all(base.join(name)).unwrap();
        }
        let making = hierarchy.place("node", "i-3").unwrap().open().unwrap().unwrap();
        flock(&making, FlockOperation::LockExclusive).unwrap();
        assert_eq!(hierarchy.sweep("node", |instance| instance == "i-2").unwrap(), [base.join("node.i-1")]);
        drop(making);
        assert_eq!(hierarchy.sweep("node", |_| false).unwrap().len(), 2);
        assert!(base.join("other.i-1").exists() && base.join("node2.i-1").exists());
        fs::remove_dir(base.join("node.Not Ours")).unwrap();
        for name in ["other", "node2"] {
            assert_eq!(hierarchy.sweep(name, |_| false).unwrap().len(), 1);
        }
        assert!(!base.exists(), "the last one takes the one above with it");
    }

    #[test]
    fn names_are_no_paths() {
        let hierarchy = Hierarchy { root: "/nonexistent".into() };
        for name in ["", "..", "a/b", "a.b", "A", "a\n"] {
            assert!(hierarchy.place("node", name).is_err() && hierarchy.place(name, "i-1").is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_file_s_disk_is_a_whole_one_or_none() {
        for entry in fs::read_dir("/sys/dev/block").into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap();
            let (major, minor) = name.split_once(':').unwrap();
            let disk = disk_of(rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap())).unwrap();
            assert!(!Path::new(&format!("/sys/dev/block/{}:{}/partition", disk.0, disk.1)).exists(), "{name} {disk:?}");
        }
        assert_eq!(disk_of(rustix::fs::makedev(0, 40)), None);
    }
}
