//! What the figures were measured on.

use std::fmt;
use std::fs;

use serde::{Deserialize, Serialize};

use crate::program;

/// A host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Its processor, as the kernel calls it.
    pub cpu: String,
    /// How many processors there are.
    pub cores: usize,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// QEMU's version.
    pub qemu: String,
    /// How guests are executed, when any were.
    pub acceleration: Option<String>,
    /// The file system below the state directory, by its type.
    pub file_system: String,
    /// How many processes wanted a processor in the minute before it began: above a few tenths, others were at work, too.
    pub load: f64,
}

impl Machine {
    /// Looks at this host.
    pub fn look(dir: &std::path::Path) -> Result<Machine, String> {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("unknown", |(_, name)| name);
        let memory = rustix::system::sysinfo();
        let dir = dir.to_str().ok_or("the temporary directory's path is not UTF-8")?;
        Ok(Machine {
            cpu: cpu.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory.totalram as u64 * u64::from(memory.mem_unit) / (1024 * 1024),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            qemu: program::output("qemu-system-x86_64", &["--version"])?.lines().next().unwrap_or_default().to_owned(),
            acceleration: None,
            load: fs::read_to_string("/proc/loadavg").ok().and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(f64::NAN),
            file_system: program::output("stat", &["-f", "-c", "%T", dir])?.trim().to_owned(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { cpu, cores, memory_mib, kernel, qemu, acceleration, file_system, load } = self;
        write!(f, "{cpu}, {cores} cores, {memory_mib} MiB, Linux {kernel}, {file_system}; {qemu}")?;
        if let Some(acceleration) = acceleration {
            write!(f, ", guests by {acceleration}")?;
        }
        write!(f, "; load {load}")
    }
}
