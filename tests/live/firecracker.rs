//! Firecracker for live tests: a stand-in that speaks its protocol, or the real one.
//!
//! ```text
//!  MVM_TEST_FIRECRACKER=/path/firecracker    a real one, with its jailer beside it
//!  MVM_TEST_FIRECRACKER_ARGS=--no-seccomp    for one that was built without filters
//!  MVM_TEST_GUEST_KERNEL=/path/vmlinux       a kernel that has everything built in, where the image's does not boot
//!  MVM_TEST_KERNEL_ARGS=…                    what that wants to be told
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::rig::Rig;
use crate::wire::run;

/// Variables of a test run with a real Firecracker.
const REAL: &str = "MVM_TEST_FIRECRACKER";
const REAL_ARGS: &str = "MVM_TEST_FIRECRACKER_ARGS";
const KERNEL: &str = "MVM_TEST_GUEST_KERNEL";
const KERNEL_ARGS: &str = "MVM_TEST_KERNEL_ARGS";

/// Tells whether guests are real.
pub fn is_real() -> bool {
    std::env::var_os(REAL).is_some()
}

/// Makes what a host with Firecracker has.
pub fn prepare(rig: &Rig) {
    match std::env::var_os(KERNEL) {
        Some(kernel) if is_real() => other_kernel(rig, Path::new(&kernel)),
        _ => {}
    }
    if !is_real() {
        stand_in(rig, &healthy());
    }
}

/// The script of a stand-in that behaves.
pub fn healthy() -> Value {
    json!({ "kernel": "any" })
}

/// Has a command use it.
pub fn choose(rig: &Rig, command: &mut Command) {
    command.env("MVM_VMM", "firecracker").env_remove("MVM_JAIL_NETNS");
    let program = std::env::var_os(REAL).map_or_else(|| rig.path("firecracker").join("firecracker"), PathBuf::from);
    command.env("MVM_FIRECRACKER", program).env("MVM_FIRECRACKER_DIR", rig.path("versions"));
    if is_real() {
        for (from, to) in [(REAL_ARGS, "MVM_FIRECRACKER_ARGS"), (KERNEL_ARGS, "MVM_KERNEL_ARGS")] {
            command.env(to, std::env::var_os(from).unwrap_or_default());
        }
    }
}

/// Has a command use the stand-in.
pub fn choose_stand_in(rig: &Rig, command: &mut Command) {
    command.env("MVM_VMM", "firecracker").env("MVM_FIRECRACKER", rig.path("firecracker/firecracker"));
    command.env("MVM_FIRECRACKER_DIR", rig.path("versions"));
    for name in ["MVM_FIRECRACKER_ARGS", "MVM_KERNEL_ARGS", "MVM_PRODUCTION", "MVM_ALLOW_OLD_FIRECRACKER", "MVM_JAIL_NETNS"] {
        command.env_remove(name);
    }
}

/// Puts the stand-in and its jailer in place, with a script of how it misbehaves (crates/mvm-fake-firecracker/src/script.rs).
pub fn stand_in(rig: &Rig, script: &Value) {
    let dir = rig.path("firecracker");
    fs::create_dir_all(&dir).unwrap();
    pack(&dir.join("firecracker"), script);
    let beside = Path::new(env!("CARGO_BIN_EXE_mvm")).with_file_name("fake-jailer");
    assert!(beside.exists(), "the stand-in for the jailer is built with the workspace: {}", beside.display());
    fs::copy(beside, dir.join("jailer")).unwrap();
}

/// Writes a stand-in that takes a guest's agent and shell along into its jail.
pub fn pack(to: &Path, script: &Value) {
    let beside = Path::new(env!("CARGO_BIN_EXE_mvm"));
    let program = std::env::var_os("MVM_FAKE_FIRECRACKER").map_or_else(|| beside.with_file_name("fake-firecracker.static"), PathBuf::from);
    assert!(program.exists(), "the stand-in for Firecracker is built before the live tests run: {}", program.display());
    let agent = beside.with_file_name("mvm-guest-agent.static");
    let busybox = Path::new(env!("CARGO_TARGET_TMPDIR")).join("live-images/parts/busybox");
    let file = to.with_extension("json");
    fs::write(&file, script.to_string()).unwrap();
    let shell = format!("/bin/sh={}", busybox.display());
    let words = ["--pack", to.to_str().unwrap(), "--agent", agent.to_str().unwrap(), "--script", file.to_str().unwrap(), "--file", &shell];
    run(program.to_str().unwrap(), &words);
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Gives the built-in image another kernel, and an initial RAM disk without modules.
fn other_kernel(rig: &Rig, kernel: &Path) {
    let agent = fs::read(Path::new(env!("CARGO_BIN_EXE_mvm")).with_file_name("mvm-guest-agent.static")).unwrap();
    let initrd = mvm::image::initramfs::write(&agent, &[]).unwrap();
    for entry in fs::read_dir(rig.state().join("images")).unwrap().map(|entry| entry.unwrap().path()) {
        let Ok(text) = fs::read(entry.join("manifest.json")) else { continue };
        let mut manifest: Value = serde_json::from_slice(&text).unwrap();
        for (name, content) in [("vmlinux", &fs::read(kernel).unwrap()), ("initrd", &initrd)] {
            // They are other hosts' too.
            fs::remove_file(entry.join(name)).unwrap();
            fs::write(entry.join(name), content).unwrap();
            fs::set_permissions(entry.join(name), fs::Permissions::from_mode(0o644)).unwrap();
            manifest[name]["size"] = content.len().into();
            manifest[name]["blake3"] = blake3::hash(content).to_hex().to_string().into();
        }
        fs::remove_file(entry.join("manifest.json")).unwrap();
        fs::write(entry.join("manifest.json"), manifest.to_string()).unwrap();
    }
}
