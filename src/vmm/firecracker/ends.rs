//! Why a Firecracker ended: what its exit code, its log and its last words mean.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use super::args;
use super::driver::LEAST_FILE;
use super::snapshot::Scratch;
use crate::vmm::process;

/// Firecracker's log in the directory that it shares with the host: at most its end.
pub(super) fn log_text(host_dir: &Path) -> String {
    let Ok(scratch) = Scratch::open(host_dir) else { return String::new() };
    let owner = rustix::fs::fstat(scratch.fd()).map_or(0, |meta| meta.st_uid);
    // By descriptor: what is in that directory is not mvm's.
    match scratch.take(args::LOG, owner, 0..=LEAST_FILE) {
        Ok(file) => process::log_tail(format!("/proc/self/fd/{}", file.as_raw_fd()).as_ref()),
        Err(_) => String::new(),
    }
}

/// What Firecracker's end means (`FcExitCode` of Firecracker); its log may be too late for it.
pub(super) fn reason_of_end(status: &ExitStatus) -> Option<String> {
    let filter = "its system call filter ended it; a release of Firecracker has filters that fit it (--firecracker-args --no-seccomp turns \
                  them off in a development build)";
    Some(match (status.code(), status.signal()) {
        (Some(148), _) | (_, Some(libc::SIGSYS)) => filter.into(),
        (Some(151), _) => "it wrote more into a file than it may".into(),
        (Some(149 | 150 | 154..=157), _) => format!("it was ended by a signal of its own, exit code {}", status.code().unwrap_or(-1)),
        (_, Some(libc::SIGKILL)) => "it was killed".into(),
        (_, Some(signal)) => format!("it was ended by signal {signal}"),
        _ => return None,
    })
}

/// What a Firecracker panicked of. It aborts then, by a signal that is none to the first process of a namespace, and so by another one.
pub(super) fn panic(log: &str) -> Option<String> {
    log.split_once("Firecracker panicked at ").map(|(_, what)| format!("it panicked at {what}"))
}

/// What Firecracker's last words mean.
pub(super) fn reason(log: &str) -> Option<String> {
    if let Some(rest) = log.split("intercepting a bad syscall (").nth(1) {
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        return Some(format!(
            "Firecracker's system call filter ended it at system call {number}; a release of Firecracker has filters that fit it"
        ));
    }
    if log.contains("Vmm is stopping") || log.contains("exit_code=0") {
        return Some("its guest restarted or panicked, which ends it; `mvm logs --source console` has its last words".into());
    }
    // What it was asked to do is in its log as well, and that a pipe of metrics which nobody reads is full.
    let is_bad = |line: &&str| ["ERROR]", "WARN]", "panicked at"].iter().any(|word| line.contains(word));
    log.split("; ").filter(is_bad).filter(|line| !line.contains("Failed to write metrics")).last().map(|line| line.trim().to_owned())
}

/// Why a Firecracker ended before it listened.
pub(super) fn words(status: Option<ExitStatus>, host_dir: &Path, vmm_log: &Path) -> String {
    let log = log_text(host_dir);
    if let Some(why) = panic(&log).or_else(|| status.as_ref().and_then(reason_of_end)) {
        return why;
    }
    let said = reason(&log).unwrap_or_else(|| process::log_tail(vmm_log));
    match status {
        Some(status) if let Some(signal) = status.signal() => format!("it was ended by signal {signal}: {said}"),
        Some(status) => format!("it ended with exit code {}: {said}", status.code().unwrap_or(-1)),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_understood() {
        let said = |raw: i32| reason_of_end(&ExitStatus::from_raw(raw));
        assert!(said(148 << 8).unwrap().contains("system call filter"));
        assert!(said(libc::SIGSYS).unwrap().contains("system call filter"));
        assert_eq!(said(libc::SIGKILL).as_deref(), Some("it was killed"));
        assert!(said(151 << 8).unwrap().contains("more into a file"));
        assert_eq!((said(0), said(1 << 8)), (None, None));
    }

    #[test]
    fn last_words_are_understood() {
        let bad = "2026-11-24T11:20:00 [mvm:main] Shutting down VM after intercepting a bad syscall (232).";
        assert!(reason(bad).unwrap().contains("at system call 232"));
        assert!(reason("x; Vmm is stopping.").unwrap().contains("restarted or panicked"));
        let panicked = "2026-11-24T15:02:32 [mvm:main] Firecracker panicked at src/main.rs:309:48:; Invalid instance ID";
        assert_eq!(panic(panicked).as_deref(), Some("it panicked at src/main.rs:309:48:; Invalid instance ID"));
        assert_eq!(panic(bad), None);
        let bad = "1 [x:main:ERROR] one";
        assert_eq!(reason(&format!("0 [x:main:WARN] early; {bad}; 2 [x:fc_api] The API server received")).as_deref(), Some(bad));
        assert_eq!(reason(&format!("{bad}; 2 [x:main:ERROR] Failed to write metrics: full")).as_deref(), Some(bad));
        assert_eq!((reason(""), reason("2 [x:fc_api] The API server received a Put request")), (None, None));
    }
}
