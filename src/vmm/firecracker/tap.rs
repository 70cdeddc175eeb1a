//! A TAP on its way from mvm, which makes it, to Firecracker, which opens it by name.
//!
//! A TAP is gone with its last descriptor, and has one at a time: between the two it is kept by name, and only then.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::ioctl;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::infra::process::ProcessIdentity;

/// `_IOW('T', 203, int)` of linux/if_tun.h.
const TUNSETPERSIST: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 203);

/// Keeps a TAP although nobody has it open.
pub(super) fn keep(tap: &OwnedFd) -> io::Result<()> {
    persist(tap, 1)
}

/// Lets a TAP end with the process that has it open; returns whether that process has it.
pub(super) fn let_go(process: &ProcessIdentity, name: &str) -> io::Result<bool> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(false) };
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    // Looked at after opening: what the descriptor holds cannot change hands any more.
    if !process.is_alive() {
        return Ok(false);
    }
    let wanted = format!("iff:\t{name}");
    for entry in fs::read_dir(format!("/proc/{}/fdinfo", process.pid))? {
        let entry = entry?;
        let Some(number) = entry.file_name().to_str().and_then(|text| text.parse().ok()) else { continue };
        let Ok(info) = fs::read_to_string(entry.path()) else { continue };
        if info.lines().any(|line| line == wanted) {
            persist(&pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())?, 0)?;
            return Ok(true);
        }
    }
    Ok(false)
}

fn persist(tap: &OwnedFd, on: usize) -> io::Result<()> {
    // SAFETY: `TUNSETPERSIST` takes an integer argument and accesses no memory.
    Ok(unsafe { ioctl::ioctl(tap, ioctl::IntegerSetter::<TUNSETPERSIST>::new_usize(on)) }?)
}
