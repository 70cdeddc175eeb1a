//! The clock seam, and moments that survive a reboot and a jumping wall clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A point in time as recorded in documents.
///
/// Policy compares [`Moment`]s of one boot by the boot clock, so a wall clock that jumps changes nothing; across
/// boots only the wall clock is left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Milliseconds since 1970-01-01T00:00:00Z.
    pub wall_ms: i64,
    /// Milliseconds of `CLOCK_BOOTTIME`.
    pub boot_ms: u64,
    /// The kernel's boot id, which names the boot that `boot_ms` counts from.
    pub boot: Arc<str>,
}

impl Moment {
    /// Returns the time from `self` to `now`; zero when the clock says that it is negative.
    pub fn elapsed(&self, now: &Moment) -> Duration {
        if self.boot == now.boot {
            Duration::from_millis(now.boot_ms.saturating_sub(self.boot_ms))
        } else {
            Duration::from_millis(u64::try_from(now.wall_ms.saturating_sub(self.wall_ms)).unwrap_or(0))
        }
    }

    /// Returns the moment `later` after this one, in the same boot.
    pub fn plus(&self, later: Duration) -> Moment {
        let ms = u64::try_from(later.as_millis()).unwrap_or(u64::MAX);
        Moment {
            wall_ms: self.wall_ms.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX)),
            boot_ms: self.boot_ms.saturating_add(ms),
            boot: self.boot.clone(),
        }
    }

    /// Formats the wall clock part as RFC 3339 with milliseconds, in UTC.
    pub fn to_rfc3339(&self) -> String {
        jiff::Timestamp::from_millisecond(self.wall_ms).map(|t| format!("{t:.3}")).unwrap_or_else(|_| self.wall_ms.to_string())
    }
}

/// Where the time comes from.
pub trait Clock: Send + Sync {
    /// Returns the present moment.
    fn now(&self) -> Moment;
}

/// The machine's own clocks.
pub struct SystemClock {
    boot: Arc<str>,
}

impl SystemClock {
    /// Reads the boot id once; `unknown` where the kernel does not tell.
    pub fn new() -> Self {
        Self { boot: super::process::host_boot_id() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Moment {
        let wall = clock_gettime(ClockId::Realtime);
        let boot = clock_gettime(ClockId::Boottime);
        Moment {
            wall_ms: wall.tv_sec * 1000 + wall.tv_nsec / 1_000_000,
            boot_ms: u64::try_from(boot.tv_sec * 1000 + boot.tv_nsec / 1_000_000).unwrap_or(0),
            boot: self.boot.clone(),
        }
    }
}

/// A clock that stands still until it is told to move.
pub struct ManualClock {
    ms: AtomicU64,
}

impl ManualClock {
    /// Starts at one hour after a boot, on 2026-01-01.
    pub fn new() -> Self {
        Self { ms: AtomicU64::new(3_600_000) }
    }

    /// Moves the clock.
    pub fn advance(&self, by: Duration) {
        self.ms.fetch_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

impl Default for ManualClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Moment {
        let ms = self.ms.load(Ordering::SeqCst);
        Moment { wall_ms: 1_767_225_600_000 + i64::try_from(ms).unwrap_or(i64::MAX), boot_ms: ms, boot: "manual".into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wall_clock_that_jumps_does_not_count_within_a_boot() {
        let start = ManualClock::new().now();
        let mut later = start.plus(Duration::from_secs(5));
        later.wall_ms -= 86_400_000;
        assert_eq!(start.elapsed(&later), Duration::from_secs(5));
        later.boot = "another".into();
        assert_eq!(start.elapsed(&later), Duration::ZERO);
    }
}
