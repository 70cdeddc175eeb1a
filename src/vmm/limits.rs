//! What the process of a virtual machine may use of the host: one rule for all drivers, which its cgroup enforces.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use mvm_hostd::HostdError;
use mvm_hostd::cgroup::{DiskLimit, Group, Limits, disk_of};
use mvm_hostd::facts::{is_file_in_memory, is_in_memory};

use super::{DriveAccess, VmSpec, VmmError};

/// Memory besides all that is counted, in MiB: what an overhead was seen to be is no promise of the next release, and logs may be in
/// memory. No guest should end for either.
const SPARE_MIB: u64 = 64;

/// The share of guest memory that its page tables take, on the host's side and the guest's: 16 to 24 bytes for each 4 KiB, which is
/// 1/256 to 1/170; twice the larger one.
const PAGE_TABLES: u64 = 85;

/// Processors besides one for each virtual one: threads of the VMM's own move what drives and network move.
const OWN_PROCESSORS: u32 = 1;

/// Threads besides one for each virtual processor: QEMU has up to 64 workers for drives and some of its own, Firecracker two; the
/// process is one of them.
const OWN_TASKS: u64 = 128;

/// How long a guest's whole memory may at most take to its disk, in seconds: however little its drives may move, it sleeps and wakes in
/// time.
const WHOLE_MEMORY_SECONDS: u64 = 60;

/// Makes the group of a machine that is about to start, where this host has limits. `overhead_mib` is what the driver's
/// [`super::Vmm::overhead_mib`] says.
pub(super) fn group(spec: &VmSpec, overhead_mib: u32) -> Result<Option<Group>, VmmError> {
    let Some(place) = &spec.limits else { return Ok(None) };
    let group = place.make(&limits(spec, overhead_mib)?).map_err(|error| match error {
        HostdError::Io { what, source } => VmmError::Io { what, source },
        HostdError::Refused { what, why } => VmmError::Failed { what: "cannot limit the VMM", why: format!("{what}: {why}") },
    })?;
    Ok(Some(group))
}

/// What a process writes to in order to join the group; the group is kept until it has.
pub(super) fn procs(group: Option<&Group>) -> Result<Option<OwnedFd>, VmmError> {
    let procs = group.map(|group| group.procs().try_clone_to_owned()).transpose();
    procs.map_err(|source| VmmError::Io { what: "cannot hand over a cgroup".into(), source })
}

fn limits(spec: &VmSpec, overhead_mib: u32) -> Result<Limits, VmmError> {
    let guest = u64::from(spec.mem_mib) << 20;
    let besides = (u64::from(overhead_mib) + SPARE_MIB) << 20;
    let disks = match spec.rates.drive_mib {
        Some(rate) => disks(spec, u64::from(rate) << 20)?,
        None => Vec::new(),
    };
    Ok(Limits {
        memory_bytes: guest + guest / PAGE_TABLES + besides + files_in_memory(spec)?,
        processors: u32::from(spec.vcpus) + OWN_PROCESSORS,
        tasks: u64::from(spec.vcpus) + OWN_TASKS,
        disks,
    })
}

/// How many bytes the VMM may write to files that are themselves memory, and that it is charged with.
fn files_in_memory(spec: &VmSpec) -> Result<u64, VmmError> {
    let mut bytes = 0;
    for drive in spec.drives.iter().filter(|drive| drive.access == DriveAccess::ReadWrite) {
        let failed = |source| VmmError::Io { what: format!("cannot look at drive {}", drive.name), source };
        if is_file_in_memory(&drive.file).map_err(failed)? {
            let length = rustix::fs::fstat(&drive.file).map_err(|error| failed(error.into()))?.st_size;
            bytes += u64::try_from(length).unwrap_or(0);
        }
    }
    let snapshot = match &spec.scratch {
        Some(scratch) => {
            is_in_memory(scratch).map_err(|error| VmmError::Failed { what: "cannot limit the VMM", why: error.to_string() })?
        }
        None => false,
    };
    Ok(bytes + if snapshot { u64::from(spec.mem_mib) << 20 } else { 0 })
}

/// The disks that the drives and the snapshot are on. Each moves what all of its drives may, and never so little that the guest's
/// memory would not get through in [`WHOLE_MEMORY_SECONDS`].
fn disks(spec: &VmSpec, rate: u64) -> Result<Vec<DiskLimit>, VmmError> {
    let mut drives: BTreeMap<(u32, u32), u64> = BTreeMap::new();
    for drive in &spec.drives {
        let meta = rustix::fs::fstat(&drive.file)
            .map_err(|error| VmmError::Io { what: format!("cannot look at drive {}", drive.name), source: error.into() })?;
        if let Some(disk) = disk_of(meta.st_dev) {
            *drives.entry(disk).or_default() += 1;
        }
    }
    // It may not be there yet; the directory that it will be in is.
    let scratch = spec.scratch.as_ref().and_then(|scratch| std::fs::metadata(scratch.parent()?).ok());
    if let Some(disk) = scratch.and_then(|meta| disk_of(meta.dev())) {
        drives.entry(disk).or_default();
    }
    let least = (u64::from(spec.mem_mib) << 20) / WHOLE_MEMORY_SECONDS;
    let limit = |(device, drives)| DiskLimit { device, bytes_per_second: least.max(rate.saturating_mul(drives)) };
    Ok(drives.into_iter().map(limit).collect())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use mvm_types::{InstanceAddress, InstanceId};

    use super::*;
    use crate::vmm::{Drive, Lifetime, Rates};

    const MIB: u64 = 1 << 20;

    fn spec(drives: Vec<Drive>, scratch: Option<&Path>) -> VmSpec {
        VmSpec {
            at: InstanceAddress::new("acme".parse().unwrap(), "web".parse().unwrap(), InstanceId::from_bits(1)),
            node: "n".parse().unwrap(),
            uid: None,
            limits: None,
            vcpus: 3,
            mem_mib: 850,
            kernel: "/kernel".into(),
            initrd: None,
            kernel_args: Vec::new(),
            drives,
            nic: None,
            rates: Rates::default(),
            reclaim_memory: false,
            run_dir: "/run".into(),
            scratch: scratch.map(Path::to_owned),
            console_log: "/console".into(),
            vmm_log: "/log".into(),
            lifetime: Lifetime::Detached,
        }
    }

    fn in_memory(name: &'static str, access: DriveAccess) -> Drive {
        let file = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 100 * MIB).unwrap();
        Drive { name, file, access }
    }

    #[test]
    fn a_machine_may_use_what_it_was_given_and_what_its_vmm_needs() {
        let read_only = in_memory("config", DriveAccess::ReadOnly);
        let told = limits(&spec(vec![read_only], None), 24).unwrap();
        let expected = Limits { memory_bytes: (850 + 10 + 24 + 64) * MIB, processors: 4, tasks: 131, disks: Vec::new() };
        assert_eq!(told, expected);
        assert!(group(&spec(Vec::new(), None), 24).unwrap().is_none(), "a host without limits");
    }

    #[test]
    fn files_that_are_memory_are_counted() {
        let bare = limits(&spec(Vec::new(), None), 0).unwrap().memory_bytes;
        let data = in_memory("data", DriveAccess::ReadWrite);
        assert_eq!(limits(&spec(vec![data], None), 0).unwrap().memory_bytes, bare + 100 * MIB);
        // A file system in memory on every Linux.
        let there = limits(&spec(Vec::new(), Some(Path::new("/dev/shm/vmm"))), 0).unwrap().memory_bytes;
        assert_eq!(there, bare + 850 * MIB);
    }

    #[test]
    fn a_disk_moves_what_its_drives_may_and_a_whole_memory_in_a_minute() {
        let Some((path, disk)) = [env!("CARGO_MANIFEST_DIR"), "/", "/usr", "/home"]
            .into_iter()
            .find_map(|path| Some((path, disk_of(std::fs::metadata(path).ok()?.dev())?)))
        else {
            // No directory here is on a disk of its own; that of memory is none either.
            return assert_eq!(disk_of(std::fs::metadata("/dev/shm").unwrap().dev()), None);
        };
        let open = |name| Drive { name, file: File::open(path).unwrap().into(), access: DriveAccess::ReadOnly };
        let limits_with = |mib, drives, scratch| {
            let rates = Rates { drive_mib: Some(mib), ..Rates::default() };
            limits(&VmSpec { rates, ..spec(drives, scratch) }, 0).unwrap().disks
        };
        let limited = |mib| {
            let drives = vec![open("root"), open("data"), in_memory("config", DriveAccess::ReadOnly)];
            limits_with(mib, drives, None)
        };
        assert_eq!(limited(50), [DiskLimit { device: disk, bytes_per_second: 100 * MIB }]);
        assert_eq!(limited(1), [DiskLimit { device: disk, bytes_per_second: 850 * MIB / 60 }]);
        let scratch = Path::new(path).join("vmm");
        assert_eq!(limits_with(1, Vec::new(), Some(&scratch)), [DiskLimit { device: disk, bytes_per_second: 850 * MIB / 60 }]);
    }
}
