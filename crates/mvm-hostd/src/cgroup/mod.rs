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

mod group;
mod hierarchy;

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

pub use group::{Group, Place};
pub use hierarchy::{Hierarchy, NoLimits};

/// The controllers that limits are set with.
pub const NEEDED: [&str; 4] = ["cpu", "io", "memory", "pids"];

/// The group above all of mvm's.
const BASE: &str = "mvm";

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

/// Moves the calling process into the group whose [`Group::procs`] this is. One system call: fit for between fork and exec.
///
/// # Errors
/// When the kernel refuses.
pub fn join(procs: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::write(procs, b"0")?;
    Ok(())
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
mod tests;
