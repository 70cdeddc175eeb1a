//! What this host's QEMU can do, found out by trying, and remembered until the host reboots or QEMU changes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::vmm::VmmError;
use crate::vmm::facts::{self, Key, host_cpu};

/// Whether KVM can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmVerdict {
    /// A guest kernel booted with it.
    Usable,
    /// It cannot.
    Unusable {
        /// Why, for people.
        why: String,
    },
    /// `/dev/kvm` opens, but there was no kernel to try it with yet.
    Untried,
}

/// What was found out about QEMU on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Which binary on which boot of the host this is about.
    key: Key,
    /// The first line of `qemu-system-x86_64 --version`.
    pub version: String,
    /// The BLAKE3 hash of the binary, its first 16 hex digits.
    pub binary_hash: String,
    /// The rate of the host's time stamp counter, in kHz.
    pub tsc_khz: u64,
    /// The host's CPU model, and with it a short hash of its features.
    pub host_cpu: String,
    /// Whether KVM can be used.
    pub kvm: KvmVerdict,
}

/// Reads the remembered facts, when they are about this binary and this boot of the host.
pub(super) fn remembered(file: &Path, binary: &Path) -> Option<HostFacts> {
    let facts: HostFacts = facts::read(file)?;
    (facts.key == Key::of(binary).ok()?).then_some(facts)
}

/// Finds out everything but what needs a guest.
pub(super) fn inspect(binary: &Path) -> Result<HostFacts, VmmError> {
    let failed = |source| VmmError::Io { what: format!("cannot inspect {}", binary.display()), source };
    let key = Key::of(binary).map_err(failed)?;
    let kvm = match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => KvmVerdict::Untried,
        Err(error) => KvmVerdict::Unusable { why: format!("/dev/kvm cannot be opened: {error}") },
    };
    let mut hash = blake3::Hasher::new();
    let mut file = File::open(binary).map_err(failed)?;
    io::copy(&mut file, &mut hash).map_err(failed)?;
    Ok(HostFacts {
        key,
        version: version(binary)?,
        binary_hash: hash.finalize().to_hex()[..16].to_owned(),
        tsc_khz: measure_tsc_khz(),
        host_cpu: host_cpu(&fs::read_to_string("/proc/cpuinfo").map_err(failed)?),
        kvm,
    })
}

/// The oldest QEMU that was tried.
const MINIMUM: (u32, u32) = (7, 2);

fn version(binary: &Path) -> Result<String, VmmError> {
    let what = || format!("cannot run {} --version", binary.display());
    let mut child = Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| VmmError::Io { what: what(), source })?;
    let mut text = String::new();
    if let Some(out) = child.stdout.take() {
        out.take(4096).read_to_string(&mut text).map_err(|source| VmmError::Io { what: what(), source })?;
    }
    child.wait().map_err(|source| VmmError::Io { what: what(), source })?;
    let line = text.lines().next().unwrap_or_default().trim();
    match parse_version(line) {
        Some(found) if found >= MINIMUM => Ok(line.to_owned()),
        Some((major, minor)) => Err(VmmError::Unusable {
            vmm: "qemu",
            why: format!("{} is version {major}.{minor}, and {}.{} or later is needed", binary.display(), MINIMUM.0, MINIMUM.1),
        }),
        None => Err(VmmError::Unusable { vmm: "qemu", why: format!("{} --version says {line:?}, which is not QEMU", binary.display()) }),
    }
}

fn parse_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.strip_prefix("QEMU emulator version ")?.split(['.', ' ', '(']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Measures the rate of the time stamp counter against the monotonic clock, over 50 ms.
///
/// Each end is taken from the quickest of 20 readings, which are some 100 ns wide on a virtual machine: an error of about 4 ppm,
/// a hundredth of what the guest's own measurement against the PIT has.
fn measure_tsc_khz() -> u64 {
    fn reading(since: Instant) -> (u64, Duration) {
        let once = || {
            let before = since.elapsed();
            // SAFETY: reading the time stamp counter has no precondition on x86-64 in user space unless it was forbidden by
            // prctl(PR_SET_TSC), which nobody does here.
            let ticks = unsafe { core::arch::x86_64::_rdtsc() };
            let after = since.elapsed();
            (after - before, ticks, (before + after) / 2)
        };
        let (_, ticks, at) = (0..20).map(|_| once()).min_by_key(|(width, ..)| *width).unwrap_or_else(once);
        (ticks, at)
    }
    let since = Instant::now();
    let (first, from) = reading(since);
    std::thread::sleep(Duration::from_millis(50));
    let (last, to) = reading(since);
    let nanoseconds = (to - from).as_nanos().max(1);
    u64::try_from(u128::from(last.wrapping_sub(first)) * 1_000_000 / nanoseconds).unwrap_or(0)
}

/// Judges the boot of a bare kernel with KVM: what QEMU's end and the guest's console say.
///
/// A kernel without a root file system panics at the end of its own start, which `panic=-1` turns into a reset, and `-no-reboot`
/// into the end of QEMU.
pub(super) fn judge(ended: bool, success: bool, console: &str, log: &str, limit: Duration) -> KvmVerdict {
    let panicked = console.contains("Kernel panic - not syncing: VFS") || console.contains("Kernel panic - not syncing: No working init");
    match (ended, success, panicked) {
        (true, true, true) => KvmVerdict::Usable,
        (false, ..) => {
            let last = console.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("nothing");
            KvmVerdict::Unusable { why: format!("a guest did not boot within {} s; its console ends with {last:?}", limit.as_secs()) }
        }
        (true, ..) => KvmVerdict::Unusable { why: format!("QEMU ended before a guest had booted: {log}") },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 9"), None);
        assert_eq!(parse_version("busybox"), None);
    }

    #[test]
    fn the_rate_is_plausible_and_repeatable() {
        let (a, b) = (measure_tsc_khz(), measure_tsc_khz());
        assert!((500_000..10_000_000).contains(&a), "{a} kHz");
        assert!(a.abs_diff(b) * 2000 < a, "{a} and {b} kHz differ by more than 500 ppm");
    }

    #[test]
    fn only_a_kernel_at_its_end_makes_kvm_usable() {
        let limit = Duration::from_secs(10);
        let panic = "Linux version 6.1\nKernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)\n";
        assert_eq!(judge(true, true, panic, "", limit), KvmVerdict::Usable);
        for (ended, success, console, log, expected) in [
            (false, false, "Probing EDD\n", "", "\"Probing EDD\""),
            (true, false, "", "error: failed to set MSR 0x345", "MSR 0x345"),
            (true, true, "Linux version 6.1", "", "before a guest had booted"),
        ] {
            let KvmVerdict::Unusable { why } = judge(ended, success, console, log, limit) else { panic!("usable") };
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn facts_are_forgotten_with_the_binary() {
        let dir = tempfile::tempdir().unwrap();
        let (binary, file) = (dir.path().join("qemu"), dir.path().join("facts.json"));
        fs::write(&binary, "one").unwrap();
        let facts = HostFacts {
            key: Key::of(&binary).unwrap(),
            version: "QEMU emulator version 7.2.0".into(),
            binary_hash: "00".into(),
            tsc_khz: 1,
            host_cpu: "x".into(),
            kvm: KvmVerdict::Unusable { why: "y".into() },
        };
        assert_eq!(remembered(&file, &binary), None);
        facts::write(&file, &facts).unwrap();
        assert_eq!(remembered(&file, &binary), Some(facts));
        fs::write(&binary, "other").unwrap();
        assert_eq!(remembered(&file, &binary), None);
        fs::write(&file, "{").unwrap();
        assert_eq!(remembered(&file, &binary), None);
    }
}
