//! VMM processes as the kernel shows them: alive or gone, what they use, which ones nobody recorded.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

use super::{Liveness, VmStats, VmmError};
use crate::infra::process::ProcessIdentity;

/// Opens just this process; `None` when it is gone, also when its pid is another's by now.
pub(super) fn open(process: &ProcessIdentity) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(None) };
    let fd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    // Looked at after opening: what the descriptor holds cannot change hands any more.
    Ok(process.is_alive().then_some(fd))
}

/// Waits until the process ends, at most for `timeout`.
pub(super) fn wait(pidfd: &OwnedFd, timeout: Duration) -> io::Result<Liveness> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Ok(Liveness::Alive),
            Ok(_) => return Ok(Liveness::Gone),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until just this process has ended, at most for `timeout`.
pub(super) fn wait_exit(process: &ProcessIdentity, timeout: Duration) -> Result<Liveness, VmmError> {
    let failed = |source| VmmError::Io { what: format!("cannot wait for VMM process {}", process.pid), source };
    match open(process).map_err(failed)? {
        Some(pidfd) => wait(&pidfd, timeout).map_err(failed),
        None => Ok(Liveness::Gone),
    }
}

/// How long the kernel may take to end a killed process: it has to give back its memory and descriptors first.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// Ends the process with `SIGKILL` and returns when it is gone. Idempotent.
pub(super) fn kill(process: &ProcessIdentity) -> Result<(), VmmError> {
    let io = |what: &str| {
        let what = format!("cannot {what} VMM process {}", process.pid);
        move |source| VmmError::Io { what, source }
    };
    let Some(pidfd) = open(process).map_err(io("open"))? else { return Ok(()) };
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(io("kill")(error.into())),
    }
    match wait(&pidfd, KILL_TIMEOUT).map_err(io("wait for"))? {
        Liveness::Gone => Ok(()),
        Liveness::Alive => Err(VmmError::Timeout {
            what: "cannot kill the VMM process".into(),
            after_ms: u64::try_from(KILL_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}

/// Reads CPU time and resident memory; `None` when the process is gone.
pub(super) fn stats(process: &ProcessIdentity) -> Option<VmStats> {
    if !process.is_alive() {
        return None;
    }
    parse_stats(&fs::read_to_string(format!("/proc/{}/stat", process.pid)).ok()?)
}

/// Reads `/proc/<pid>/stat` (proc_pid_stat(5)): fields 14 and 15 are clock ticks, field 24 is pages.
fn parse_stats(stat: &str) -> Option<VmStats> {
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)?.checked_add(field(15)?)?;
    let page_kib = u64::try_from(rustix::param::page_size()).ok()? / 1024;
    Some(VmStats {
        cpu_ms: ticks.checked_mul(1000)? / rustix::param::clock_ticks_per_second().max(1),
        rss_kib: field(24)?.checked_mul(page_kib)?,
    })
}

/// Finds a process whose command line has this option with this value.
///
/// Only processes of this user or of our own count: another user of the host may name a process as he likes.
pub(super) fn find_by_option(option: &str, value: &str, uid: Option<u32>) -> io::Result<Option<ProcessIdentity>> {
    let own = geteuid().as_raw();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // Named before it is read: a process that takes over the pid meanwhile is another one.
        let Some(process) = ProcessIdentity::of(pid) else { continue };
        let Ok(command_line) = fs::read(entry.path().join("cmdline")) else { continue };
        if !has_option(&command_line, option, value) {
            continue;
        }
        let Ok(owner) = entry.metadata() else { continue };
        if (owner.uid() == own || Some(owner.uid()) == uid) && process.is_alive() {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// Tells whether an argument list (separated by NUL) has an option, the first time that it is there, with a value.
fn has_option(command_line: &[u8], option: &str, value: &str) -> bool {
    let mut args = command_line.split(|b| *b == 0);
    while let Some(arg) = args.next() {
        if arg == option.as_bytes() {
            return args.next() == Some(value.as_bytes());
        }
    }
    false
}

/// The pid of a child.
pub(super) fn pid_of(child: &Child) -> i32 {
    // The kernel's pids are positive and below 2^22.
    i32::try_from(child.id()).unwrap_or(-1)
}

/// Returns the last lines of a log for an error message, at most 2 KiB, on one line.
pub(super) fn log_tail(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    const MOST: u64 = 2048;
    let read = || {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines[lines.len().saturating_sub(5)..].join("; ")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn sleeper() -> (Child, ProcessIdentity) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        (child, process)
    }

    #[test]
    fn kill_ends_just_this_process_and_can_be_repeated() {
        let (mut child, process) = sleeper();
        for other in [
            ProcessIdentity { start_ticks: process.start_ticks + 1, ..process.clone() },
            ProcessIdentity { boot: "earlier".into(), ..process.clone() },
        ] {
            kill(&other).unwrap();
            assert!(open(&other).unwrap().is_none());
        }
        assert!(process.is_alive());
        kill(&process).unwrap();
        kill(&process).unwrap();
        assert!(!process.is_alive());
        child.wait().unwrap();
        kill(&process).unwrap();
    }

    #[test]
    fn stats_count_fields_after_the_command() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 90 0 0 0 25 5 0 0 20 0 3 0 100 12345 512 18446744073709551615 0";
        let per_second = rustix::param::clock_ticks_per_second();
        let page_kib = rustix::param::page_size() as u64 / 1024;
        assert_eq!(parse_stats(stat), Some(VmStats { cpu_ms: 30_000 / per_second, rss_kib: 512 * page_kib }));
        assert_eq!(parse_stats("7 (a"), None);
        assert_eq!(parse_stats("7 (a) S 1"), None);
    }

    #[test]
    fn a_marker_is_the_whole_name() {
        let line = b"qemu\0-name\0guest=mvm:n/t/p/i-1\0-m\x00128M\0";
        assert!(has_option(line, "-name", "guest=mvm:n/t/p/i-1"));
        assert!(!has_option(line, "-name", "guest=mvm:n/t/p/i-"));
        assert!(!has_option(line, "-name", "guest=mvm:n/t/p/i-11"));
        assert!(!has_option(b"grep\0guest=mvm:n/t/p/i-1\0", "-name", "guest=mvm:n/t/p/i-1"));
        assert!(!has_option(b"", "-name", ""));
    }

    #[test]
    fn the_tail_of_a_log_is_short() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("{}\nlast\n\n", "x\n".repeat(5000))).unwrap();
        assert_eq!(log_tail(file.path()), "x; x; x; x; last");
        assert_eq!(log_tail(Path::new("/nonexistent")), "");
    }
}
