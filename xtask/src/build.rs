//! Builds mvm and the guest agent.

use std::fs;
use std::path::{Path, PathBuf};

use crate::workspace::{TRIPLE, cargo, succeed, target};

/// How mvm itself is built. The guest agent always has its own profile, `guest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Quickly.
    Dev,
    /// To be used.
    Release,
}

impl Profile {
    fn directory(self) -> &'static str {
        match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        }
    }
}

/// The profile of what runs in guests: small, since it is unpacked and started in every one.
const GUEST: &str = "guest";

/// Builds both programs; returns the path of mvm, beside which the agent lies.
///
/// # Errors
/// When one does not compile.
pub fn all(profile: Profile) -> Result<PathBuf, String> {
    let mvm = match profile {
        Profile::Dev => {
            succeed(&mut cargo(["build", "--package", "mvm", "--bin", "mvm"]))?;
            target()?.join(profile.directory()).join("mvm")
        }
        // One file that runs on any Linux, and that starts a fifth faster than one whose libraries have to be found and bound.
        Profile::Release => statically("mvm", "mvm", profile.directory(), "release/mvm")?,
    };
    guest_agent(profile)?;
    Ok(mvm)
}

/// Builds the guest agent and puts it where an mvm of this profile looks for it; returns its path.
///
/// # Errors
/// When it does not compile.
pub fn guest_agent(profile: Profile) -> Result<PathBuf, String> {
    statically("mvm-guest-agent", "mvm-guest-agent", GUEST, &format!("{}/mvm-guest-agent.static", profile.directory()))
}

/// Builds the stand-in for Firecracker that tests put into jails; returns its path.
///
/// # Errors
/// When it does not compile.
pub fn fake_firecracker(profile: Profile) -> Result<PathBuf, String> {
    statically("mvm-fake-firecracker", "fake-firecracker", GUEST, &format!("{}/fake-firecracker.static", profile.directory()))
}

/// Builds what measures, to be used; returns its path, beside which the stand-in's jailer lies.
///
/// # Errors
/// When it does not compile.
pub fn bench() -> Result<PathBuf, String> {
    statically("mvm-fake-firecracker", "fake-jailer", "release", "release/fake-jailer")?;
    statically("mvm-bench", "mvm-bench", "release", "release/mvm-bench")
}

/// Builds a program that needs no library of the host's, and puts it into a place of the target directory; returns its path.
fn statically(package: &str, program: &str, profile: &str, place: &str) -> Result<PathBuf, String> {
    let target = target()?;
    // A directory of its own: other flags would have everything else compiled anew each time.
    let own = target.join("static");
    let mut build = cargo(["build", "--profile", profile, "--package", package, "--bin", program, "--target", TRIPLE, "--target-dir"]);
    build.arg(&own);
    build.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    succeed(&mut build)?;
    let made = own.join(TRIPLE).join(profile).join(program);
    let place = target.join(place);
    put(&made, &place).map_err(|error| format!("cannot copy {} to {}: {error}", made.display(), place.display()))?;
    Ok(place)
}

/// Copies where it differs, whole or not at all: somebody may be reading the old one.
fn put(from: &Path, to: &Path) -> std::io::Result<()> {
    let content = fs::read(from)?;
    if fs::read(to).is_ok_and(|there| there == content) {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    let new = to.with_extension("new");
    fs::copy(from, &new)?;
    fs::rename(&new, to)
}
