//! Installs what is missing, by package name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::workspace::{output, succeed};

/// What somebody needs: a program, and the package of Debian and Ubuntu that has it.
type Needs = [(&'static str, &'static str)];

/// For running fleets.
pub const FLEETS: [(&str, &str); 4] =
    [("qemu-system-x86_64", "qemu-system-x86"), ("nft", "nftables"), ("mke2fs", "e2fsprogs"), ("dpkg-deb", "dpkg")];
/// For running every test: libFuzzer is C++, tests of the network make theirs with `ip`, and those of flakes and Nix modules
/// evaluate and build with Nix, and run what writes a gateway's rules.
pub const TESTS: [(&str, &str); 9] = [
    FLEETS[0],
    FLEETS[1],
    FLEETS[2],
    FLEETS[3],
    ("ip", "iproute2"),
    ("g++", "g++"),
    ("nix-instantiate", "nix-bin"),
    ("git", "git"),
    ("jq", "jq"),
];
/// For measuring: `strace` counts what a pass asks of the kernel.
pub const BENCH: [(&str, &str); 6] = [FLEETS[0], FLEETS[1], FLEETS[2], FLEETS[3], ("strace", "strace"), ("unshare", "util-linux")];

/// Where programs of the system are, whatever PATH says.
const SYSTEM: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
/// The kernels of which the built-in image can be made; one of them is known to apt when its lists are there.
const KERNELS: [&str; 3] = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-generic"];

/// Installs the packages of which the programs are missing, and sees to it that apt knows a kernel, unless the parts of
/// the built-in image were taken already (described by the file `parts`).
///
/// # Errors
/// When this is not x86-64, something is missing and this is not root or not a system with apt, or apt fails.
pub fn ensure(needs: &Needs, parts: Option<&Path>) -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("mvm runs microVMs on x86-64 only".into());
    }
    let missing: Vec<&str> = needs.iter().filter(|(program, _)| !is_installed(program)).map(|(_, package)| *package).collect();
    let has_kernel = parts.is_some_and(Path::exists) || knows_a_kernel();
    if missing.is_empty() && has_kernel {
        eprintln!("nothing is missing");
        return Ok(());
    }
    require_root(&missing)?;
    if !is_installed("apt-get") {
        return Err(format!("there is no apt-get here; install what belongs to the Debian packages {}, and try again", missing.join(" ")));
    }
    // An installation that was never updated knows no packages; an old list names versions that are gone.
    let updated = !has_kernel;
    if updated {
        update()?;
    }
    if missing.is_empty() {
        return Ok(());
    }
    if let Err(error) = install(&missing) {
        if updated {
            return Err(error);
        }
        update()?;
        install(&missing)?;
    }
    match needs.iter().find(|(program, _)| !is_installed(program)) {
        None => Ok(()),
        Some((program, package)) => Err(format!("the package {package} is installed, and there is still no {program}")),
    }
}

/// # Errors
/// When this is not root; names the packages that root would install.
pub fn require_root(missing: &[&str]) -> Result<(), String> {
    let root = fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0);
    match (root, missing) {
        (true, _) => Ok(()),
        (false, []) => Err("networks and microVMs are made by root; try again as root".into()),
        (false, missing) => Err(format!("this needs root; try again as root, which also installs what is missing: {}", missing.join(" "))),
    }
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(SYSTEM.map(Into::into)).any(|dir| dir.join(program).is_file())
}

fn knows_a_kernel() -> bool {
    KERNELS.iter().any(|name| {
        let mut ask = Command::new("apt-cache");
        output(ask.args(["--no-all-versions", "show", name])).is_ok_and(|said| said.contains("Package:"))
    })
}

fn update() -> Result<(), String> {
    eprintln!("apt-get update");
    succeed(apt().arg("update"))
}

fn install(packages: &[&str]) -> Result<(), String> {
    eprintln!("apt-get install {}", packages.join(" "));
    succeed(apt().args(["install", "--yes", "--no-install-recommends"]).args(packages))
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    // Another apt may be at work (unattended upgrades on a fresh cloud host): wait for it, up to 5 minutes.
    command.args(["-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    command
}
