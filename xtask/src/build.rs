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

/// Builds both programs; returns the path of mvm, beside which the agent lies.
///
/// # Errors
/// When one does not compile.
pub fn all(profile: Profile) -> Result<PathBuf, String> {
    let mut build = cargo(["build", "--package", "mvm", "--bin", "mvm"]);
    if profile == Profile::Release {
        build.arg("--release");
    }
    succeed(&mut build)?;
    guest_agent(profile)?;
    Ok(target()?.join(profile.directory()).join("mvm"))
}

/// Builds the guest agent and puts it where an mvm of this profile looks for it; returns its path.
///
/// # Errors
/// When it does not compile.
pub fn guest_agent(profile: Profile) -> Result<PathBuf, String> {
    statically("mvm-guest-agent", "mvm-guest-agent", profile)
}

/// Builds the stand-in for Firecracker that tests put into jails; returns its path.
///
/// # Errors
/// When it does not compile.
pub fn fake_firecracker(profile: Profile) -> Result<PathBuf, String> {
    statically("mvm-fake-firecracker", "fake-firecracker", profile)
}

fn statically(package: &str, program: &str, profile: Profile) -> Result<PathBuf, String> {
    let target = target()?;
    // A directory of its own: other flags would have everything else compiled anew each time.
    let own = target.join("guest-agent");
    let mut build = cargo(["build", "--profile", "guest", "--package", package, "--bin", program, "--target", TRIPLE, "--target-dir"]);
    build.arg(&own);
    build.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    succeed(&mut build)?;
    let made = own.join(TRIPLE).join("guest").join(program);
    let place = target.join(profile.directory()).join(format!("{program}.static"));
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
