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

/// Reads the start time of a process in clock ticks since boot; `None` when there is no such process or it is a zombie.
pub fn start_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&stat);
    // The command may contain anything, also spaces and parentheses: count from the last one.
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
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
}
