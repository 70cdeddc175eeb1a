//! What is tried in a guest, whose kernel has cgroup v2 with all controllers. A guest has busybox, and no C library but what the test
//! brings along.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use mvm::host::{Host, HostExpectations, LocalHost};
use mvm::infra::paths::Paths;
use mvm::vmm::firecracker::{Firecracker, FirecrackerOptions, JailNetwork};
use mvm::vmm::{Drive, DriveAccess, Lifetime, Liveness, Rates, VmSpec, Vmm};
use mvm_firecracker::HugePages;
use mvm_hostd::cgroup::{DiskLimit, Group, Hierarchy, Limits, Place, disk_of, join};
use mvm_types::{InstanceAddress, InstanceId, NodeId};
use rustix::mount::{MountFlags, mount};

const MOUNT: &str = "/sys/fs/cgroup";
const MIB: u64 = 1 << 20;

fn mount_hierarchy() {
    mount("cgroup2", MOUNT, "cgroup2", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"").unwrap();
}

/// Starts a script in a group, as the drivers start a VMM.
fn spawn_in(group: &Group, script: &str) -> Child {
    let procs = group.procs().as_raw_fd();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]);
    // SAFETY: one system call with a descriptor that the group owns until after the start.
    unsafe { command.pre_exec(move || join(BorrowedFd::borrow_raw(procs))) };
    command.spawn().unwrap()
}

fn limits(memory_mib: u64, tasks: u64) -> Limits {
    Limits { memory_bytes: memory_mib * MIB, processors: 2, tasks, disks: Vec::new() }
}

fn read(place: &Place, file: &str) -> String {
    fs::read_to_string(place.path().join(file)).unwrap().trim().to_owned()
}

fn groups_there() -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(MOUNT).unwrap().map(Result::unwrap);
    entries.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()).collect()
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes groups, sees that each limit is kept, and ends them.
pub fn groups(cycles: u32) {
    let none = Hierarchy::find().unwrap_err();
    assert!(none.why.contains("no cgroup v2 hierarchy is mounted"), "{none}");
    mount_hierarchy();
    let before = groups_there();
    let hierarchy = Hierarchy::find().unwrap();
    assert_eq!(hierarchy.root(), Path::new(MOUNT));
    let place = hierarchy.place("node", "i-1a2b3c4d").unwrap();
    written(&place);
    memory(&place);
    tasks(&place);
    ended(&hierarchy, &place);
    swept(&hierarchy, &place);
    for cycle in 0..cycles {
        let group = place.make(&limits(16, 8)).unwrap();
        let ends = cycle % 2 == 0;
        let mut child = spawn_in(&group, if ends { "true" } else { "exec sleep 600" });
        drop(group);
        assert!(!ends || child.wait().unwrap().success(), "cycle {cycle}");
        assert!(place.end().unwrap() || ends, "cycle {cycle}");
        child.wait().unwrap();
    }
    assert_eq!(groups_there(), before);
}

/// Each limit is what it was meant to be.
fn written(place: &Place) {
    let device = fs::read_to_string("/sys/block/vda/dev").unwrap();
    let (major, minor) = device.trim().split_once(':').unwrap();
    let disk = disk_of(rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap())).unwrap();
    let disks = vec![DiskLimit { device: disk, bytes_per_second: 3_000_000 }];
    // No whole number of pages.
    let group = place.make(&Limits { memory_bytes: 16 * MIB + 1000, processors: 3, tasks: 77, disks }).unwrap();
    assert_eq!(fs::metadata(place.path()).unwrap().permissions().mode() & 0o777, 0o700, "nobody else can lock it");
    assert_eq!(read(place, "memory.max"), (16 * MIB).to_string());
    assert_eq!(read(place, "memory.oom.group"), "1");
    assert_eq!(read(place, "cpu.max"), "300000 100000");
    assert_eq!(read(place, "pids.max"), "77");
    assert!(read(place, "io.max").starts_with(&format!("{}:{} rbps=3000000 wbps=3000000", disk.0, disk.1)), "{}", read(place, "io.max"));
    let swap = place.path().join("memory.swap.max");
    assert!(!swap.exists() || read(place, "memory.swap.max") == "0");
    drop(group);
    assert!(!place.path().exists(), "nobody had joined it");
    let wrong = Limits { disks: vec![DiskLimit { device: (4000, 0), bytes_per_second: 1 }], ..limits(16, 8) };
    let error = place.make(&wrong).unwrap_err().to_string();
    assert!(error.contains("io.max") && error.contains("4000:0"), "{error}");
    assert!(!place.path().exists());
}

/// Who takes more memory than the group has is killed; who takes less is not.
fn memory(place: &Place) {
    let takes = |mib: u64| -> (ExitStatus, bool) {
        let group = place.make(&limits(16, 8)).unwrap();
        // A buffer of that size, which is filled.
        let status = spawn_in(&group, &format!("exec dd if=/dev/zero of=/dev/null bs={mib}M count=1")).wait().unwrap();
        let ran_out = place.ran_out_of_memory();
        assert!(place.end().unwrap() && !place.ran_out_of_memory());
        (status, ran_out)
    };
    let (status, ran_out) = takes(8);
    assert!(status.success() && !ran_out, "{status}, {ran_out}");
    let (status, ran_out) = takes(64);
    assert!(status.signal() == Some(9) && ran_out, "{status}, {ran_out}");
}

/// There are no more processes than there may be.
fn tasks(place: &Place) {
    let group = place.make(&limits(32, 8)).unwrap();
    let shell = spawn_in(&group, "for i in $(seq 20); do sleep 600 & done").wait().unwrap();
    assert!(!shell.success(), "it cannot fork: {shell}");
    assert_eq!(read(place, "cgroup.procs").lines().count(), 7, "besides the shell, which has ended");
    assert!(read(place, "pids.events").lines().any(|line| line.starts_with("max ") && line != "max 0"));
    drop(group);
    assert!(place.end().unwrap() && !place.path().exists());
}

/// The end of a group is the end of all that is in it, and can be repeated.
fn ended(hierarchy: &Hierarchy, place: &Place) {
    let group = place.make(&limits(32, 64)).unwrap();
    let mut child = spawn_in(&group, "for i in 1 2 3 4 5; do sleep 600 & done; wait");
    eventually("six processes are in it", || read(place, "cgroup.procs").lines().count() == 6);
    drop(group);
    assert!(place.path().exists(), "somebody has joined it");
    assert!(hierarchy.sweep("node", |_| false).unwrap().is_empty(), "it has processes");
    assert!(place.end().unwrap());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(!place.path().exists() && !place.end().unwrap());
    // What is left under a name is ended before there is another one of it.
    let group = place.make(&limits(32, 64)).unwrap();
    let mut child = spawn_in(&group, "exec sleep 600");
    drop(group);
    drop(place.make(&limits(32, 64)).unwrap());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
}

/// What a killed process left is removed; what is being made is not.
fn swept(hierarchy: &Hierarchy, place: &Place) {
    let group = place.make(&limits(32, 64)).unwrap();
    let other = hierarchy.place("node", "i-00000002").unwrap();
    fs::create_dir(other.path()).unwrap();
    assert_eq!(hierarchy.sweep("node", |_| false).unwrap(), [other.path()]);
    let mut child = spawn_in(&group, "exec sleep 600");
    drop(group);
    assert!(hierarchy.sweep("node", |_| false).unwrap().is_empty());
    assert!(place.end().unwrap());
    child.wait().unwrap();
}

/// A machine, as mvm describes it to the driver.
fn machine(dir: &Path, host: &LocalHost, node: &NodeId, instance: &InstanceId) -> VmSpec {
    // On the guest's own disk, which `io.max` can limit, and in memory.
    let root = Drive { name: "root", file: File::open("/bin/busybox").unwrap().into(), access: DriveAccess::ReadOnly };
    let data = File::options().read(true).write(true).create(true).truncate(false).open(dir.join("data")).unwrap();
    data.set_len(8 << 20).unwrap();
    let data = Drive { name: "data", file: data.into(), access: DriveAccess::ReadWrite };
    VmSpec {
        at: InstanceAddress::new("acme".parse().unwrap(), "web".parse().unwrap(), instance.clone()),
        node: node.clone(),
        uid: Some(0x7007_0000),
        limits: host.limits_of(instance).unwrap(),
        vcpus: 2,
        mem_mib: 85,
        kernel: "/bin/busybox".into(),
        initrd: None,
        kernel_args: Vec::new(),
        drives: vec![root, data],
        nic: None,
        rates: Rates { drive_mib: Some(10), ..Rates::default() },
        reclaim_memory: false,
        run_dir: host.ensure_run_dir(instance).unwrap(),
        scratch: Some(dir.join("vmm")),
        console_log: dir.join("console.log"),
        vmm_log: dir.join("vmm.log"),
        lifetime: Lifetime::Detached,
    }
}

/// Starts and ends machines with Firecracker's driver.
pub fn driver(dir: &Path) {
    let mounted = Path::new(MOUNT);
    let (node, instance) = ("trial".parse::<NodeId>().unwrap(), InstanceId::from_bits(0x1a2b_3c4d));
    mount_hierarchy();
    let paths = Paths::new(dir.join("state"), Some(dir.join("run")));
    let host = LocalHost::new(paths, &node);
    let driver = Firecracker::new(FirecrackerOptions {
        network: JailNetwork::Shared,
        binary: Some(dir.join("firecracker")),
        versions: dir.join("versions"),
        allow_old: true,
        facts_file: dir.join("run/firecracker.json"),
        cpu_template: None,
        huge_pages: HugePages::None,
        trial_uid: 0x7000_0000,
        kernel_args: Vec::new(),
        extra: Vec::new(),
    });
    let group = mounted.join("mvm/trial.i-1a2b3c4d");
    let read = |file: &str| fs::read_to_string(group.join(file)).unwrap().trim().to_owned();
    let start = || {
        let vm = driver.boot(machine(dir, &host, &node, &instance)).unwrap();
        let own = fs::read_to_string(format!("/proc/{}/cgroup", vm.process.pid)).unwrap();
        assert!(own.lines().any(|line| line == "0::/mvm/trial.i-1a2b3c4d"), "{own}");
        assert!(read("cgroup.procs").lines().any(|line| line == vm.process.pid.to_string()));
        vm
    };

    let vm = start();
    // Guest, page tables, Firecracker, to spare; data and snapshot, which are in memory here.
    assert_eq!(read("memory.max"), ((85 + 1 + 24 + 64 + 8 + 85) * MIB).to_string());
    assert_eq!(read("cpu.max"), "300000 100000");
    assert_eq!(read("pids.max"), "130");
    assert!(read("io.max").contains(" rbps=10485760 wbps=10485760 "), "{}", read("io.max"));
    let charged: u64 = read("memory.current").parse().unwrap();
    assert!(charged > MIB, "the jail's memory is its own: {charged}");
    driver.kill(&vm).unwrap();
    host.remove_run_dir(&instance).unwrap();
    assert!(!mounted.join("mvm").exists());

    // Its end was not seen by anybody: the group goes with the next sweep, and not before the machine has.
    let vm = start();
    let expected = HostExpectations { instances: [instance.clone()].into(), ..HostExpectations::default() };
    assert_eq!(host.sweep(&expected).unwrap(), Vec::<String>::new());
    driver.kill(&vm).unwrap();
    // The stand-in's guest is a process of its own, which ends after it.
    eventually("it is gone", || read("cgroup.events").contains("populated 0"));
    let swept = host.sweep(&HostExpectations::default()).unwrap();
    assert!(swept.contains(&format!("cgroup {}", group.display())), "{swept:?}");
    assert!(!mounted.join("mvm").exists());

    // A machine that was not written down is ended with its group.
    let vm = start();
    host.remove_run_dir(&instance).unwrap();
    // It leaves its group a moment before all of its PID namespace has ended, and it with that.
    assert_eq!(driver.wait_exit(&vm, Duration::from_secs(5)).unwrap(), Liveness::Gone);
    assert!(!mounted.join("mvm").exists());

    // One that cannot be started leaves none.
    fs::remove_file(dir.join("jailer.real")).unwrap();
    driver.boot(machine(dir, &host, &node, &instance)).unwrap_err();
    host.remove_run_dir(&instance).unwrap();
    assert!(!mounted.join("mvm").exists());
}
