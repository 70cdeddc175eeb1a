//! Finds the guest agent for the initramfs.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use super::ImageError;

/// Names the agent's file.
pub const AGENT_VARIABLE: &str = "MVM_GUEST_AGENT";
/// Beside the running program.
const BESIDE: &str = "mvm-guest-agent.static";
/// Where a package puts it.
const INSTALLED: &str = "/usr/lib/mvm/mvm-guest-agent";

/// Finds the agent: by `MVM_GUEST_AGENT` (given as `named`), beside the running program, or installed.
///
/// # Errors
/// When it is at none of these places.
pub fn find_agent(named: Option<&OsStr>) -> Result<PathBuf, ImageError> {
    let candidates = match named {
        Some(path) => vec![PathBuf::from(path)],
        None => {
            let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(BESIDE)));
            beside.into_iter().chain([PathBuf::from(INSTALLED)]).collect()
        }
    };
    match candidates.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => Err(ImageError::NoAgent { looked_at: candidates.iter().map(|path| path.display().to_string()).collect() }),
    }
}

/// Reads the agent and refuses one that could not start in an initramfs.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let bytes = fs::read(path).map_err(ImageError::at(path))?;
    match check(&bytes) {
        Ok(()) => Ok(bytes),
        Err(why) => Err(ImageError::Agent { path: path.to_owned(), why }),
    }
}

/// A static executable for this machine's kind of processor.
pub(super) fn check(elf: &[u8]) -> Result<(), String> {
    let half = |at: usize| elf.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
    // ELF-64, little endian.
    if !elf.starts_with(b"\x7fELF\x02\x01") || elf.len() < 64 {
        return Err("is not an executable of 64 bits".into());
    }
    // e_machine: EM_X86_64, EM_AARCH64.
    let wanted = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    if half(0x12) != wanted {
        return Err(format!("is for another processor (ELF machine {}, not {wanted})", half(0x12)));
    }
    let table = elf.get(0x20..0x28).map_or(0, |b| u64::from_le_bytes(b.try_into().expect("eight bytes were taken"))) as usize;
    let (entry, count) = (usize::from(half(0x36)), usize::from(half(0x38)));
    for index in 0..count {
        let at = table.saturating_add(index * entry);
        // PT_INTERP: a dynamic linker is wanted, which an initramfs does not have.
        if elf.get(at..at.saturating_add(4)) == Some(&3u32.to_le_bytes()) {
            return Err("is linked dynamically (it has a PT_INTERP header)".into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused_by_name() {
        // The test itself is one.
        let path = std::env::current_exe().unwrap();
        let text = read(&path).unwrap_err().to_string();
        assert!(text.contains("PT_INTERP") && text.contains(path.to_str().unwrap()), "{text}");
    }

    #[test]
    fn what_is_no_program_is_refused() {
        assert!(check(b"#!/bin/sh\n").is_err());
        let mut elf = vec![0; 64];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x12] = 8;
        assert!(check(&elf).unwrap_err().contains("another processor"));
    }

    #[test]
    fn a_named_agent_that_is_not_there_is_not_replaced_by_another() {
        let error = find_agent(Some(OsStr::new("/nowhere/agent"))).unwrap_err();
        assert!(error.to_string().starts_with("there is no guest agent at /nowhere/agent;"), "{error}");
    }
}
