//! What this host is and can do, for `mvm doctor` and `mvm node info`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use rustix::fs::{OFlags, StatFs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::cgroup::Hierarchy;
use crate::error::{During, HostdError};
use crate::program;

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of linux/magic.h.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The facts of one host at one time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// `uname -r`.
    pub kernel: String,
    /// This boot's id.
    pub boot_id: String,
    /// Processors that may be used.
    pub cpus: usize,
    /// Memory, in MiB.
    pub memory_total_mib: u64,
    /// Memory that can be given to new processes without swapping, in MiB (`MemAvailable`).
    pub memory_available_mib: u64,
    /// Swap, in MiB; with any, memory that holds secrets may be written to a disk.
    pub swap_total_mib: u64,
    /// Whether this process is root.
    pub is_root: bool,
    /// Whether `/dev/net/tun` opens, or why not.
    pub tun: Ability,
    /// The controllers of the cgroup v2 hierarchy that limits can be set with; empty where all belong to cgroup v1.
    pub cgroup2_controllers: Vec<String>,
    /// Where the cgroup v2 hierarchy is mounted, if it is.
    pub cgroup2_mount: Option<String>,
    /// Whether VMM processes are limited by cgroup v2, and where, or why not.
    pub limits: Ability,
    /// How to have them, where they are not.
    pub limits_remedy: Option<String>,
    /// Whether the kernel has nftables, or what is missing.
    pub nftables: Ability,
    /// The first line of `nft --version`, or why it does not run.
    pub nft: Ability,
    /// Whether `mke2fs` is there, or what to install.
    pub mke2fs: Ability,
    /// Whether the host forwards between its interfaces (`net.ipv4.ip_forward`).
    pub ip_forward: bool,
    /// Whether bridged packets pass the IP rules as well (`br_netfilter`); mvm's rules hold with and without.
    pub bridge_netfilter: bool,
    /// Whether the run directory is in memory.
    pub run_in_memory: bool,
    /// Free space for root below the state directory, in MiB.
    pub state_free_mib: u64,
    /// Size of the file system that the state directory is on, in MiB.
    pub state_total_mib: u64,
}

/// Something that is there, with what is known of it, or is not, with what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ability {
    /// It is there.
    Yes(String),
    /// It is not, and this is why.
    No(String),
}

impl Ability {
    /// Whether it is there.
    pub fn is_yes(&self) -> bool {
        matches!(self, Self::Yes(_))
    }

    fn of(result: Result<String, HostdError>) -> Self {
        match result {
            Ok(text) => Self::Yes(text),
            Err(error) => Self::No(chain(&error)),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

/// Gathers the facts; starts one process, `nft --version`. Needs no root and makes nothing: a directory that is not there yet, or
/// not for this user, is judged by the one that it is or would be in.
pub fn gather(state: &Path, run: &Path) -> Result<HostFacts, HostdError> {
    let memory = fs::read_to_string("/proc/meminfo").during(|| "cannot read /proc/meminfo".to_owned())?;
    let mounts = fs::read_to_string("/proc/self/mounts").during(|| "cannot read /proc/self/mounts".to_owned())?;
    let cgroup2_mount = cgroup2(&mounts);
    let controllers = cgroup2_mount.as_ref().and_then(|mount| fs::read_to_string(Path::new(mount).join("cgroup.controllers")).ok());
    let space = nearest(state, |dir| rustix::fs::statvfs(dir))?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").during(|| "cannot read the boot id".to_owned())?;
    let tun = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty());
    let limits = Hierarchy::find();
    Ok(HostFacts {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        boot_id: boot_id.trim().to_owned(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        memory_total_mib: kib(&memory, "MemTotal:") / 1024,
        memory_available_mib: kib(&memory, "MemAvailable:") / 1024,
        swap_total_mib: kib(&memory, "SwapTotal:") / 1024,
        is_root: rustix::process::geteuid().is_root(),
        tun: Ability::of(
            tun.during(|| "/dev/net/tun does not open; load the kernel module tun (modprobe tun)".to_owned())
                .map(|_| "/dev/net/tun".into()),
        ),
        cgroup2_controllers: controllers.unwrap_or_default().split_whitespace().map(str::to_owned).collect(),
        cgroup2_mount,
        limits_remedy: limits.as_ref().err().map(|none| none.remedy.to_owned()),
        limits: match limits {
            Ok(found) => Ability::Yes(found.root().display().to_string()),
            Err(none) => Ability::No(none.why),
        },
        nftables: Ability::of(crate::nft::generation().map(|generation| format!("generation {generation}"))),
        nft: Ability::of(nft_version()),
        mke2fs: Ability::of(program::find("mke2fs", "e2fsprogs").map(|path| path.display().to_string())),
        ip_forward: crate::sysctl::forwards()?,
        bridge_netfilter: crate::sysctl::read("net/bridge/bridge-nf-call-iptables")?.as_deref() == Some("1"),
        run_in_memory: is_in_memory(run)?,
        state_free_mib: (space.f_bfree * space.f_frsize) >> 20,
        state_total_mib: (space.f_blocks * space.f_frsize) >> 20,
    })
}

/// Whether the file system that a directory is on, or would be on, is in memory.
///
/// # Errors
/// When it cannot be looked at.
pub fn is_in_memory(dir: &Path) -> Result<bool, HostdError> {
    Ok(is_of_memory(&nearest(dir, |dir| rustix::fs::statfs(dir))?))
}

/// Whether an open file is in memory.
///
/// # Errors
/// When it cannot be looked at.
pub fn is_file_in_memory(file: impl AsFd) -> io::Result<bool> {
    Ok(is_of_memory(&rustix::fs::fstatfs(file)?))
}

fn is_of_memory(stat: &StatFs) -> bool {
    #[allow(clippy::unnecessary_cast, reason = "the width of f_type differs between architectures")]
    IN_MEMORY.contains(&(stat.f_type as i64))
}

/// Looks at a path, or else at the nearest one above it that can be looked at.
fn nearest<T>(path: &Path, look: impl Fn(&Path) -> Result<T, Errno>) -> Result<T, HostdError> {
    let mut above = path.ancestors().filter(|path| !path.as_os_str().is_empty());
    let result = above.find_map(|path| match look(path) {
        Err(Errno::NOENT | Errno::ACCESS) => None,
        other => Some(other),
    });
    result.unwrap_or(Err(Errno::NOENT)).during(|| format!("cannot look at the file system of {}", path.display()))
}

fn nft_version() -> Result<String, HostdError> {
    let mut command = Command::new(program::find("nft", "nftables")?);
    command.arg("--version");
    let text = program::run(command, "ask nft for its version", b"")?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// A line of `/proc/meminfo`, in KiB; 0 when it is not there.
fn kib(memory: &str, key: &str) -> u64 {
    let value = memory.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix("kB")?.trim().parse().ok());
    value.unwrap_or(0)
}

fn cgroup2(mounts: &str) -> Option<String> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (mount, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| mount.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_tables_are_read() {
        let memory = "MemTotal:       24684084 kB\nMemFree:  1 kB\nSwapTotal:             0 kB\n";
        assert_eq!(kib(memory, "MemTotal:"), 24_684_084);
        assert_eq!(kib(memory, "MemAvailable:"), 0);
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2(mounts).as_deref(), Some("/sys/fs/cgroup/unified"));
        assert_eq!(cgroup2("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn this_host_has_facts() {
        let top = tempfile::tempdir().unwrap();
        let missing = top.path().join("not/yet");
        let facts = gather(&missing, &missing).unwrap();
        assert!(!top.path().join("not").exists(), "looking makes nothing");
        assert!(facts.cpus > 0 && facts.memory_total_mib > facts.memory_available_mib && facts.state_free_mib <= facts.state_total_mib);
        assert!(!facts.kernel.is_empty() && facts.boot_id.len() == 36);
    }
}
