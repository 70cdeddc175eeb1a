//! What needs root, as one closed set of typed requests: bridges, TAPs, packet filter rules, drives, run directories.
//!
//! Requests carry ids and numbers, never shell text; paths are derived from them on this side of the seam. Every verb is
//! idempotent, so that whoever finds a half-done operation can repeat it.

mod fake;
mod local;
mod verify;

pub use fake::{FakeHost, FakeState};
pub use local::LocalHost;
pub use mvm_hostd::facts::{Ability, HostFacts};

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use mvm_hostd::cgroup;
use mvm_types::{InstanceAddress, InstanceId};
use zeroize::Zeroizing;

use crate::net::{BuilderNetwork, InstanceNetwork, Ruleset, TenantNetwork};

/// The label of a drive, by which the guest finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DriveLabel {
    /// `mvm-secrets`: in memory only.
    Secrets,
    /// `mvm-config`.
    Config,
}

impl DriveLabel {
    /// The file system label.
    pub fn as_str(self) -> &'static str {
        match self {
            DriveLabel::Secrets => "mvm-secrets",
            DriveLabel::Config => "mvm-config",
        }
    }
}

/// One file of a drive that mvm builds.
pub struct DriveFile {
    /// Its name at the root of the drive.
    pub name: String,
    /// Its content; wiped from this process's memory when dropped.
    pub content: Zeroizing<Vec<u8>>,
    /// Its permission bits.
    pub mode: u32,
}

/// What the network of this host looks like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedNetwork {
    /// The tenant bridges that are there and ours, by name.
    pub bridges: std::collections::BTreeSet<String>,
    /// The hash of the rules that are loaded, when they are those that mvm loaded last and nobody changed them.
    ///
    /// Compare with [`Ruleset::fingerprint`].
    pub ruleset: Option<String>,
    /// Whether the host forwards between its interfaces.
    pub forwards: bool,
    /// TAPs of ours, by name: every machine that runs holds one.
    pub taps: std::collections::BTreeSet<String>,
    /// TAPs of ours that are ports of no bridge: theirs was removed by somebody, or they were taken off it.
    pub loose: std::collections::BTreeSet<String>,
}

/// One thing that `mvm net verify` looked at from the host's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkCheck {
    /// What should be so.
    pub what: String,
    /// What is wrong with it, and what to do; `None` when nothing is.
    pub fault: Option<String>,
}

/// What should exist; everything else that carries this node's mark goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostExpectations {
    /// The names of the bridges of the tenants that are there.
    pub bridges: std::collections::BTreeSet<String>,
    /// Instances that may have a run directory, in-memory drives and a cgroup.
    pub instances: std::collections::BTreeSet<InstanceId>,
    /// The names of all instances' TAPs; none when an instance cannot be read, whose TAP would be taken for nobody's.
    pub taps: Option<std::collections::BTreeSet<String>>,
}

/// How large a console or VMM log may be when mvm looks at it, in bytes: 4 MiB; a quarter of it is kept.
pub const MAX_LOG: u64 = 4 << 20;

/// Everything that needs root.
pub trait Host: Send + Sync {
    /// Makes the tenant's bridge with its gateway address, and what forwarding needs.
    fn ensure_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError>;

    /// Removes the tenant's bridge.
    fn remove_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError>;

    /// Makes the instance's TAP on its tenant's bridge and opens it. It is gone when the last descriptor is closed.
    ///
    /// # Errors
    /// When no rules have been loaded since the host booted.
    fn create_tap(&self, network: &InstanceNetwork, uid: Option<u32>) -> Result<OwnedFd, HostError>;

    /// Makes the TAP of the microVM that builds for a tenant, as [`Host::create_tap`] does.
    ///
    /// # Errors
    /// As [`Host::create_tap`], and when another build for the tenant still holds it.
    fn create_builder_tap(&self, network: &BuilderNetwork, uid: Option<u32>) -> Result<OwnedFd, HostError>;

    /// Loads the packet filter rules in one transaction, unless they are loaded already.
    ///
    /// An instance must be in the rules before its TAP is made: a port that no rule lists passes nothing.
    fn apply_ruleset(&self, ruleset: &Ruleset) -> Result<(), HostError>;

    /// Removes every rule of mvm, and takes back what was changed of the host's settings.
    fn remove_ruleset(&self) -> Result<(), HostError>;

    /// Checks from the host's side that bridges, ports and rules are as the state says, without spawning a process.
    fn verify_network(&self, ruleset: &Ruleset) -> Result<Vec<NetworkCheck>, HostError>;

    /// Returns the memory that guests may have altogether, in MiB: what the host has, less a share for itself.
    fn guest_memory_mib(&self) -> Result<u64, HostError>;

    /// Gathers what this host is and can do.
    fn facts(&self) -> Result<HostFacts, HostError>;

    /// Looks at bridges and rules without spawning a process.
    fn observe_network(&self) -> Result<ObservedNetwork, HostError>;

    /// Makes the instance's directory for sockets and returns its path.
    fn ensure_run_dir(&self, instance: &InstanceId) -> Result<PathBuf, HostError>;

    /// Returns where limits are set for what runs a machine of this id; `None` on a host that has no cgroup v2 hierarchy for it.
    fn limits_of(&self, instance: &InstanceId) -> Result<Option<cgroup::Place>, HostError>;

    /// Removes the instance's sockets, locks and in-memory drives, and its cgroup with whatever is still in it.
    fn remove_run_dir(&self, instance: &InstanceId) -> Result<(), HostError>;

    /// Makes the instance's data disk, or grows it; never formats or shrinks one that is there.
    ///
    /// `size_mib` is its size in MiB.
    fn ensure_data_disk(&self, at: &InstanceAddress, size_mib: u64) -> Result<(), HostError>;

    /// Opens the instance's data disk for reading and writing.
    fn open_data_disk(&self, at: &InstanceAddress) -> Result<OwnedFd, HostError>;

    /// Builds a small read-only drive and opens it. The secrets drive never touches a persistent file system.
    fn build_drive(&self, instance: &InstanceId, label: DriveLabel, files: &[DriveFile]) -> Result<OwnedFd, HostError>;

    /// Removes the instance's volumes, snapshot and logs: everything below its directory but its document.
    fn remove_instance_files(&self, at: &InstanceAddress) -> Result<(), HostError>;

    /// Keeps the end of the instance's console and VMM logs when they have grown beyond [`MAX_LOG`].
    fn trim_logs(&self, at: &InstanceAddress) -> Result<(), HostError>;

    /// Makes the instance's snapshot directory.
    fn ensure_snapshot_dir(&self, at: &InstanceAddress) -> Result<(), HostError>;

    /// Removes the instance's snapshot.
    fn remove_snapshot(&self, at: &InstanceAddress) -> Result<(), HostError>;

    /// Makes the TAPs of these instances that are ports of no bridge, ports of theirs again.
    fn reattach(&self, ruleset: &Ruleset) -> Result<(), HostError>;

    /// Removes what carries this node's mark and is not expected; returns what that was, in words.
    fn sweep(&self, expected: &HostExpectations) -> Result<Vec<String>, HostError>;
}

/// Why the host could not do something.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It was refused or failed, with what to do about it where that is known.
    #[error("{what}: {why}")]
    Failed {
        /// What was being done.
        what: String,
        /// What went wrong.
        why: String,
    },
    /// The operating system refused.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The program was ended by a test here.
    #[error("killed at host effect {0}")]
    Killed(usize),
}
