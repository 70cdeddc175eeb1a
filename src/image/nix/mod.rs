//! Images that a flake describes.
//!
//! ```text
//!  flake reference -> sources (local tree) -> FlakeBuilder: on this host | in a microVM -> result directory
//!                                                                       vmlinux, initrd?, rootfs, vmm.json
//! ```
//!
//! A builder evaluates and builds one attribute of a flake, and copies the result out of its Nix store into a directory of ours.
//! It does not decide whether to build, and does not judge what it copied: that is one code for all builders.

mod contents;
mod error;
pub mod fingerprint;
mod git;
mod git_index;
mod host;
mod log;
mod process;
mod reference;
mod source;
mod stored;
mod tree;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use contents::{RootFormat, VmmConfig};
pub use error::BuildError;
pub use host::{HostBuilder, Packages, attributes, parse_closure, sweep};
pub use log::{Lines, Record, printable};
pub use process::find_nix;
pub use reference::{Reference, check as check_reference};
pub use source::{Source, fetch};
pub use stored::{FILES, FlakeImage, FlakeManifest};

/// The name of a build's log in its work directory.
pub const LOG: &str = "build.log";

/// What to build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The flake reference for nix: as locked where it could be, or a copy of its sources.
    pub flake_ref: String,
    /// What people call the flake: as it was declared. Errors and the log say nothing else.
    pub shown: String,
    /// The flake's sources: a directory of this host with its `flake.nix`, which nobody changes while it is built.
    pub tree: PathBuf,
    /// The attribute, e.g. `packages.x86_64-linux.tenant-worker-minimal`.
    pub attribute: String,
    /// What the build may use.
    pub limits: Limits,
}

/// What a build may use; it is killed with all its processes when it takes more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How long it may take altogether.
    pub time: Duration,
    /// How long it may say nothing.
    pub silence: Duration,
    /// How much it may say, in bytes.
    pub log_bytes: u64,
    /// How many processes it may have at a time.
    pub processes: u32,
    /// How much memory it may use, in MiB.
    pub mem_mib: u32,
    /// How large its result may be, in MiB.
    pub disk_mib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30 * 60),
            silence: Duration::from_secs(5 * 60),
            log_bytes: 16 << 20,
            processes: 2048,
            mem_mib: 4096,
            disk_mib: 8192,
        }
    }
}

/// Where a result came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provenance {
    /// The result's path in the Nix store that it was built in.
    pub store_path: String,
    /// Everything that it refers to, itself included, in any order.
    pub closure: Vec<ClosurePath>,
}

/// One path of a closure, as `nix path-info --json --recursive` tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClosurePath {
    /// The path in the store.
    pub path: String,
    /// The hash of its NAR, e.g. `sha256-…`.
    pub nar_hash: String,
    /// The size of its NAR in bytes.
    pub nar_size: u64,
}

/// Follows a build, and can end it.
pub trait BuildWatch: Sync {
    /// Takes a line of the build's log, without its end, bounded and free of control characters.
    fn line(&self, line: &str);

    /// Tells whether the build should end now; asked several times a second.
    fn cancelled(&self) -> bool;
}

/// Where flakes are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BuilderKind {
    /// On this host, with its own nix.
    Host,
    /// In a microVM that is thrown away.
    Vm,
}

impl BuilderKind {
    /// The name, as on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            BuilderKind::Host => "host",
            BuilderKind::Vm => "vm",
        }
    }
}

/// Builds flakes.
///
/// Guarantees: when `build` returns or the caller dies, no process of the build goes on; `into` holds regular files only, of at
/// most `limits.disk_mib` together, and among them those of `vmlinux`, `initrd`, `rootfs` and `vmm.json` that the result has; an
/// attribute that is not there is [`BuildError::NoAttribute`] with those that are, found out before anything is built.
pub trait FlakeBuilder: Send + Sync {
    /// Where it builds.
    fn kind(&self) -> BuilderKind;

    /// Builds a job, and puts its result into `into`, an empty directory.
    ///
    /// What the builder puts beside `into` goes with the build: the directory that both lie in is the build's own.
    ///
    /// # Errors
    /// Whatever went wrong; what is in `into` then is no result.
    fn build(&self, job: &Job, into: &Path, watch: &dyn BuildWatch) -> Result<Provenance, BuildError>;
}
