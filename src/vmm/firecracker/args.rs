//! PURE: what a Firecracker and its jailer are told.

use mvm_firecracker as fc;
use mvm_types::{InstanceAddress, NodeId};

use crate::vmm::Rates;

/// Where things are in the jail.
pub(super) const KERNEL: &str = "/image/kernel";
pub(super) const INITRD: &str = "/image/initrd";
/// The directory that the host sees as `jail` in the run directory.
pub(super) const HOST_DIR: &str = "/host";
/// The directory that snapshots are written to.
pub(super) const SCRATCH_DIR: &str = "/scratch";
/// The snapshot that a machine is restored from.
pub(super) const RESTORE_STATE: &str = "/restore/state";
pub(super) const RESTORE_MEMORY: &str = "/restore/memory";

/// The name of [`HOST_DIR`] in the run directory.
pub(super) const HOST_DIR_NAME: &str = "jail";
/// Names in it.
pub(super) const API_SOCKET: &str = "api.sock";
/// The socket that Firecracker joins to the guest's vsock, relative to the run directory.
pub const VSOCK_SOCKET: &str = "jail/v.sock";
const VSOCK_IN_JAIL: &str = "/host/v.sock";
pub(super) const LOG: &str = "firecracker.log";
pub(super) const METRICS: &str = "metrics";

/// Names in [`SCRATCH_DIR`].
pub(super) const STATE: &str = "state";
pub(super) const MEMORY: &str = "memory";

/// The name of the only network interface.
const IFACE: &str = "eth0";

/// Where a drive is in the jail.
pub(super) fn drive_path(name: &str) -> String {
    format!("/drives/{name}")
}

/// A jail's name, by which a process that nobody recorded is found: the jailer takes letters, digits and dashes, 64 at most.
pub(super) fn jail_id(node: &NodeId, at: &InstanceAddress) -> String {
    format!("mvm-{}", &blake3::hash(format!("{node}/{at}").as_bytes()).to_hex()[..40])
}

/// What a guest may say on its console in a second, in bytes: what a serial line of 115,200 baud carries. What is beyond is lost.
const CONSOLE_BYTES_PER_SECOND: u64 = 11_520;
/// What it may say besides at once, as when it boots.
const CONSOLE_BURST: u64 = 1 << 20;

/// The oldest Firecracker that bounds a console.
const BOUNDS_CONSOLES: (u32, u32, u32) = (1, 16, 0);

/// The token buckets of a device: what is moved in bytes, and how often.
fn limiter(bytes: Option<u64>, times: Option<u64>) -> Option<fc::RateLimiter> {
    // A bucket that holds a tenth of a second, filled ten times a second: smooth, and nothing is too large for it.
    let bucket = |rate: u64, least: u64| {
        let size = (rate / 10).max(least);
        fc::TokenBucket { size, refill_time: (size * 1000 / rate.max(1)).max(1), one_time_burst: None }
    };
    let limiter = fc::RateLimiter { bandwidth: bytes.map(|rate| bucket(rate, 1 << 16)), ops: times.map(|rate| bucket(rate, 1)) };
    (limiter != fc::RateLimiter::default()).then_some(limiter)
}

fn drive_limiter(rates: Rates) -> Option<fc::RateLimiter> {
    limiter(rates.drive_mib.map(|mib| u64::from(mib) << 20), rates.drive_iops.map(u64::from))
}

fn net_limiter(rates: Rates) -> Option<fc::RateLimiter> {
    limiter(rates.net_mbit.map(|mbit| u64::from(mbit) * 125_000), None)
}

/// A balloon that takes nothing of itself: the guest reports pages that are free, and Firecracker gives them back.
fn balloon() -> fc::Balloon {
    fc::Balloon {
        amount_mib: 0,
        deflate_on_oom: true,
        stats_polling_interval_s: None,
        free_page_hinting: None,
        free_page_reporting: Some(true),
    }
}

/// What a jailed Firecracker may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    /// The largest file that it may write, in bytes: a Firecracker that writes beyond ends.
    pub file_bytes: u64,
    /// How many descriptors it may have.
    pub descriptors: u64,
}

/// The jailer's arguments (docs/jailer.md of Firecracker).
pub(super) fn jailer(exec_file: &str, base: &str, id: &str, uid: u32, limits: Limits, extra: &[String]) -> Vec<String> {
    let mut all: Vec<String> = ["--id", id, "--exec-file", exec_file, "--chroot-base-dir", base].map(str::to_owned).into();
    all.extend(["--uid".to_owned(), uid.to_string(), "--gid".to_owned(), uid.to_string()]);
    all.extend(["--resource-limit".to_owned(), format!("fsize={}", limits.file_bytes)]);
    all.extend(["--resource-limit".to_owned(), format!("no-file={}", limits.descriptors)]);
    all.extend(["--".to_owned(), "--api-sock".to_owned(), format!("{HOST_DIR}/{API_SOCKET}")]);
    all.extend_from_slice(extra);
    all
}

/// The kernel's arguments besides those that Firecracker adds for its devices.
///
/// `reboot=k` makes a restart the end of Firecracker, `panic=1` a panic one second later; a guest that powers off only halts, so that
/// the agent is told to restart instead. The keyboard controller has nothing but its reset line.
pub(super) fn kernel_arguments(extra: &[String], image: &[String]) -> String {
    let own = ["console=ttyS0", "reboot=k", "panic=1", "mvm.off=reset", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd"];
    own.into_iter().map(str::to_owned).chain(extra.iter().cloned()).chain(image.iter().cloned()).collect::<Vec<_>>().join(" ")
}

/// A machine as it is configured before its boot.
pub(super) struct Machine<'a> {
    pub vcpus: u8,
    pub mem_mib: u32,
    pub has_initrd: bool,
    pub kernel_args: String,
    /// Names and whether the guest only reads them; the first is the root device.
    pub drives: Vec<(&'a str, bool)>,
    /// The TAP's name and the guest's MAC.
    pub nic: Option<(&'a str, [u8; 6])>,
    pub cid: u32,
    pub cpu_template: Option<fc::CpuTemplate>,
    pub huge_pages: fc::HugePages,
    pub rates: Rates,
    pub reclaim_memory: bool,
    pub version: (u32, u32, u32),
}

fn id(name: &str) -> Result<fc::ResourceId, String> {
    fc::ResourceId::try_from(name).map_err(|error| error.to_string())
}

/// Where a Firecracker of this version writes to, and how much.
pub(super) fn outputs(version: (u32, u32, u32)) -> fc::Outputs {
    let bucket = fc::TokenBucket { size: CONSOLE_BYTES_PER_SECOND, refill_time: 1000, one_time_burst: Some(CONSOLE_BURST) };
    fc::Outputs {
        logger: Some(fc::Logger {
            log_path: Some(format!("{HOST_DIR}/{LOG}")),
            level: Some(fc::LogLevel::Warning),
            show_level: Some(true),
            show_log_origin: None,
            module: None,
        }),
        metrics: Some(fc::Metrics { metrics_path: format!("{HOST_DIR}/{METRICS}"), emit_id: None, properties: None }),
        // The console is what Firecracker inherits as standard output, which is opened for appending.
        serial: (version >= BOUNDS_CONSOLES).then_some(fc::SerialDevice { serial_out_path: None, rate_limiter: Some(bucket) }),
    }
}

/// Everything that is configured before a boot.
///
/// # Errors
/// What Firecracker would not take.
pub(super) fn boot(machine: &Machine<'_>) -> Result<fc::Boot, String> {
    let drives = machine.drives.iter().enumerate().map(|(index, (name, read_only))| {
        Ok(fc::Drive {
            drive_id: id(name)?,
            path_on_host: drive_path(name),
            is_root_device: index == 0,
            is_read_only: *read_only,
            partuuid: None,
            cache_type: (!read_only).then_some(fc::CacheType::Writeback),
            io_engine: None,
            rate_limiter: drive_limiter(machine.rates),
        })
    });
    let nic = machine.nic.map(|(tap, mac)| {
        Ok::<_, String>(fc::NetworkInterface {
            iface_id: id(IFACE)?,
            host_dev_name: tap.to_owned(),
            guest_mac: Some(mac.map(|byte| format!("{byte:02x}")).join(":")),
            mtu: None,
            rx_rate_limiter: net_limiter(machine.rates),
            tx_rate_limiter: net_limiter(machine.rates),
        })
    });
    Ok(fc::Boot {
        outputs: outputs(machine.version),
        machine_config: fc::MachineConfiguration {
            vcpu_count: fc::VcpuCount::try_from(u32::from(machine.vcpus)).map_err(|error| error.to_string())?,
            mem_size_mib: machine.mem_mib,
            smt: Some(false),
            track_dirty_pages: None,
            cpu_template: machine.cpu_template,
            huge_pages: Some(machine.huge_pages),
        },
        boot_source: fc::BootSource {
            kernel_image_path: KERNEL.to_owned(),
            initrd_path: machine.has_initrd.then(|| INITRD.to_owned()),
            boot_args: Some(machine.kernel_args.clone()),
        },
        drives: drives.collect::<Result<_, String>>()?,
        network_interfaces: nic.transpose()?.into_iter().collect(),
        vsock: Some(fc::Vsock {
            guest_cid: fc::GuestCid::try_from(machine.cid).map_err(|error| error.to_string())?,
            uds_path: VSOCK_IN_JAIL.to_owned(),
        }),
        entropy: Some(fc::EntropyDevice::default()),
        balloon: machine.reclaim_memory.then(balloon),
    })
}

/// How a snapshot is loaded: with this host's TAP and socket, whatever it was made with, and with its writes tracked for the next one.
///
/// # Errors
/// What Firecracker would not take.
pub(super) fn load(tap: Option<&str>) -> Result<fc::SnapshotLoad, String> {
    let interface = |tap: &str| Ok::<_, String>(fc::NetworkOverride { iface_id: id(IFACE)?, host_dev_name: tap.to_owned() });
    Ok(fc::SnapshotLoad {
        snapshot_path: RESTORE_STATE.to_owned(),
        mem_backend: fc::MemoryBackend { backend_type: fc::MemoryBackendType::File, backend_path: RESTORE_MEMORY.to_owned() },
        track_dirty_pages: Some(true),
        network_overrides: tap.map(interface).transpose()?.into_iter().collect(),
        vsock_override: Some(fc::VsockOverride { uds_path: VSOCK_IN_JAIL.to_owned() }),
        clock_realtime: Some(true),
        huge_pages: None,
    })
}

/// How a snapshot is made.
pub(super) fn create(snapshot_type: fc::SnapshotType) -> fc::SnapshotCreate {
    fc::SnapshotCreate { mem_file_path: format!("{SCRATCH_DIR}/{MEMORY}"), snapshot_path: format!("{SCRATCH_DIR}/{STATE}"), snapshot_type }
}

/// A drive whose file is another one than when the snapshot was made, under the same path.
///
/// # Errors
/// What Firecracker would not take.
pub(super) fn changed_drive(name: &str) -> Result<fc::PartialDrive, String> {
    Ok(fc::PartialDrive { drive_id: id(name)?, path_on_host: Some(drive_path(name)), rate_limiter: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jail_is_named_by_node_and_instance() {
        let node: NodeId = "n-1".parse().unwrap();
        let at = |bits: u32| InstanceAddress::new("acme".parse().unwrap(), "web".parse().unwrap(), mvm_types::InstanceId::from_bits(bits));
        let id = jail_id(&node, &at(1));
        assert!(id.len() <= 64 && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{id}");
        assert_eq!(id, jail_id(&node, &at(1)));
        assert_ne!(id, jail_id(&node, &at(2)));
        assert_ne!(id, jail_id(&"n-2".parse().unwrap(), &at(1)));
    }

    #[test]
    fn the_jailer_is_told_who_and_how_much() {
        let limits = Limits { file_bytes: 1024, descriptors: 64 };
        let all = jailer("/lib/firecracker", "/run/jail", "mvm-1", 1_879_048_193, limits, &["--no-seccomp".into()]).join(" ");
        assert_eq!(
            all,
            "--id mvm-1 --exec-file /lib/firecracker --chroot-base-dir /run/jail --uid 1879048193 --gid 1879048193 --resource-limit \
             fsize=1024 --resource-limit no-file=64 -- --api-sock /host/api.sock --no-seccomp"
        );
    }

    #[test]
    fn the_image_has_the_last_word_with_the_kernel() {
        let text = kernel_arguments(&["a=1".into()], &["a=2".into(), "quiet".into()]);
        assert_eq!(text, "console=ttyS0 reboot=k panic=1 mvm.off=reset i8042.noaux i8042.nomux i8042.dumbkbd a=1 a=2 quiet");
    }

    #[test]
    fn the_first_drive_is_the_root_and_only_the_data_disk_is_written() {
        let machine = Machine {
            vcpus: 2,
            mem_mib: 128,
            has_initrd: false,
            kernel_args: "quiet".into(),
            drives: vec![("root", true), ("data", false)],
            nic: Some(("tn7i1", [2, 0, 10, 240, 7, 3])),
            cid: 7,
            cpu_template: None,
            huge_pages: fc::HugePages::None,
            rates: Rates { drive_mib: Some(50), drive_iops: Some(2000), net_mbit: Some(100) },
            reclaim_memory: true,
            version: (1, 17, 0),
        };
        let boot = boot(&machine).unwrap();
        let drives: Vec<_> = boot.drives.iter().map(|one| (one.path_on_host.as_str(), one.is_root_device, one.is_read_only)).collect();
        assert_eq!(drives, [("/drives/root", true, true), ("/drives/data", false, false)]);
        assert_eq!(boot.network_interfaces[0].guest_mac.as_deref(), Some("02:00:0a:f0:07:03"));
        // In bytes, and milliseconds: 50 MiB and 12.5 MB a second.
        let rate = |limiter: &Option<fc::RateLimiter>| {
            let bucket = limiter.as_ref().unwrap().bandwidth.as_ref().unwrap();
            (bucket.size, bucket.refill_time)
        };
        assert_eq!(rate(&boot.drives[1].rate_limiter), (5 << 20, 100));
        assert_eq!(rate(&boot.network_interfaces[0].tx_rate_limiter), (1_250_000, 100));
        assert!(boot.outputs.serial.is_some() && outputs((1, 15, 0)).serial.is_none(), "an older one does not know it");
        let ops = boot.drives[1].rate_limiter.as_ref().unwrap().ops.as_ref().unwrap();
        assert_eq!((ops.size, ops.refill_time), (200, 100));
        assert!(
            boot.balloon.as_ref().is_some_and(|one| one.amount_mib == 0 && one.deflate_on_oom && one.free_page_reporting == Some(true))
        );
        let slow = Rates { net_mbit: Some(1), drive_iops: Some(1), ..Rates::default() };
        let once = drive_limiter(slow).unwrap();
        assert_eq!((once.bandwidth, once.ops.map(|bucket| (bucket.size, bucket.refill_time))), (None, Some((1, 1000))));
        for wanted in [7, 19, 29, 99, 12_345] {
            let bucket = drive_limiter(Rates { drive_iops: Some(wanted), ..Rates::default() }).unwrap().ops.unwrap();
            let (got, wanted) = (bucket.size as f64 * 1000.0 / bucket.refill_time as f64, f64::from(wanted));
            assert!((wanted..wanted * 1.03).contains(&got), "{got} for {wanted}");
        }
        assert_eq!(drive_limiter(Rates { net_mbit: Some(1), ..Rates::default() }), None);
        let bucket = net_limiter(slow).unwrap().bandwidth.unwrap();
        assert!(bucket.size >= 65_536 && bucket.size * 1000 / bucket.refill_time <= 125_100, "{bucket:?}");
        assert!(super::boot(&Machine { cid: 2, ..machine }).is_err(), "CID 2 is the host's");
    }
}
