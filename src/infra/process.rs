//! Identities of processes that outlive the program that started them.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// A process, named so that a reused pid or a rebooted host is not taken for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// The process id.
    pub pid: i32,
    /// When it started: clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub start_ticks: u64,
    /// The kernel's boot id at that time.
    pub boot: Arc<str>,
}

/// Returns this boot's id (`/proc/sys/kernel/random/boot_id`), or `unknown`.
pub fn host_boot_id() -> Arc<str> {
    static BOOT: std::sync::OnceLock<Arc<str>> = std::sync::OnceLock::new();
    BOOT.get_or_init(|| match std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(text) => text.trim().into(),
        Err(_) => "unknown".into(),
    })
    .clone()
}

/// Reads the start time of a process in clock ticks since boot; `None` when there is no such process or all of it has ended.
pub fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_start_ticks(&String::from_utf8_lossy(&stat))
}

/// Reads field 22 of `/proc/<pid>/stat` (proc_pid_stat(5)), unless fields 3 and 20 say that no thread of the process is left.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The command may contain anything, also spaces and parentheses: count from the last one.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3).copied();
    // A first thread that has ended is a zombie until the others have, and they still hold what the process has open.
    let others: bool = field(20)?.parse::<u32>().ok()? > 1;
    if matches!(field(3)?, "Z" | "X") && !others {
        return None;
    }
    field(22)?.parse().ok()
}

impl ProcessIdentity {
    /// Names a running process; `None` when it is gone already.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, start_ticks: start_ticks(pid)?, boot: host_boot_id() })
    }

    /// Tells whether just this process still runs.
    pub fn is_alive(&self) -> bool {
        self.boot == host_boot_id() && start_ticks(self.pid) == Some(self.start_ticks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_another_process() {
        let me = ProcessIdentity::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(me.is_alive());
        assert!(!ProcessIdentity { start_ticks: me.start_ticks + 1, ..me.clone() }.is_alive());
        assert!(!ProcessIdentity { boot: "earlier".into(), ..me }.is_alive());
        assert!(ProcessIdentity::of(i32::MAX).is_none());
    }

    #[test]
    fn a_process_is_gone_when_all_of_its_threads_are() {
        let stat = |state: &str, threads: u32| {
            parse_start_ticks(&format!("7 (a) b (c)) {state} 1 7 7 0 -1 4194560 90 0 0 0 25 5 0 0 20 0 {threads} 0 12345 512 3"))
        };
        assert_eq!((stat("S", 1), stat("R", 3)), (Some(12345), Some(12345)));
        assert_eq!((stat("Z", 2), stat("Z", 1), stat("X", 0)), (Some(12345), None, None));
        assert_eq!(parse_start_ticks("7 (a"), None);
    }
}
