//! One group: made, limited, read back, ended.

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

use super::hierarchy::Hierarchy;
use super::{BASE, DiskLimit, Limits};
use crate::error::{During, HostdError};

/// The time that [`Limits::processors`] is a share of, in microseconds; the kernel's own default.
const PERIOD_US: u64 = 100_000;

/// How long the kernel may take to end the killed processes of a group: it has to give back their memory first.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// How often making a group is tried when another process takes the one above away meanwhile, empty.
const TRIES: usize = 8;

/// Where the group of one instance is, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub(super) hierarchy: Hierarchy,
    pub(super) name: String,
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

    pub(super) fn open(&self) -> Result<Option<OwnedFd>, HostdError> {
        let path = self.path();
        match rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => Ok(None),
            other => other.map(Some).during(|| format!("cannot open the cgroup {}", path.display())),
        }
    }

    /// Removes the directory; returns whether it was there.
    pub(super) fn remove(&self) -> Result<bool, HostdError> {
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
    pub(super) fn is_populated(&self, dir: &OwnedFd) -> Result<bool, HostdError> {
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

/// The files of a group.
pub(super) struct Files<'a> {
    pub(super) dir: BorrowedFd<'a>,
    pub(super) path: &'a Path,
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
    pub(super) fn set(&self, file: &str, value: &str, is: impl Fn(&str) -> bool) -> Result<(), HostdError> {
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

    pub(super) fn limit(&self, limits: &Limits) -> Result<(), HostdError> {
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
pub(super) fn has_disk_limit(text: &str, disk: &DiskLimit) -> bool {
    let device = format!("{}:{}", disk.device.0, disk.device.1);
    text.lines().any(|line| {
        let mut fields = line.split(' ');
        let has = |key: &str| line.split(' ').any(|field| field.strip_prefix(key) == Some(&disk.bytes_per_second.to_string()));
        fields.next() == Some(&device) && has("rbps=") && has("wbps=")
    })
}
