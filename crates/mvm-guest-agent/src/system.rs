//! What the kernel says about the guest.

use mvm_guest_api::proto::Usage;

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Milliseconds since the kernel started, sleep included.
pub fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}

/// `CLOCK_REALTIME` in nanoseconds.
pub fn unix_time_ns() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// The kernel's id of this boot.
pub fn boot_id() -> String {
    read("/proc/sys/kernel/random/boot_id").trim().to_owned()
}

/// The kernel's release.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Memory, load and processor time.
pub fn usage() -> Usage {
    let meminfo = read("/proc/meminfo");
    let field =
        |name: &str| meminfo.lines().find_map(|line| line.strip_prefix(name)?.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0);
    let load = read("/proc/loadavg");
    let load: f32 = load.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0);
    let stat = read("/proc/stat");
    // user nice system idle iowait irq softirq steal, proc(5).
    let ticks: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_ascii_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    let total: u64 = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Usage {
        mem_total_kib: field("MemTotal:"),
        mem_available_kib: field("MemAvailable:"),
        load1_centi: (load * 100.0) as u32,
        cpu_busy_ticks: total - idle,
        cpu_total_ticks: total,
    }
}
