//! Tries `mvm_hostd::cgroup` with the kernel of a machine that may be spoilt: `tests/live/limits.rs` runs it in a microVM.
//!
//! Mounts the hierarchy, makes groups in it, and sees that each limit is kept; then starts and ends as many as its argument says.
//! What it has shown it writes down, one line each; what is not so ends it with a panic.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mvm_hostd::cgroup::{DiskLimit, Group, Hierarchy, Limits, Place, disk_of, join};
use rustix::mount::{MountFlags, mount};

const MOUNT: &str = "/sys/fs/cgroup";
const MIB: u64 = 1 << 20;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("try") => trial(args[2].parse().unwrap()),
        Some("eat") => eat(args[2].parse().unwrap()),
        Some("fork") => fork(args[2].parse().unwrap()),
        Some("wait") => sleep(Duration::from_secs(600)),
        other => panic!("{other:?}? cgroup-trial try CYCLES"),
    }
}

/// Uses so much memory, in MiB.
fn eat(mib: u64) {
    let mut eaten = vec![0u8; usize::try_from(mib * MIB).unwrap()];
    for page in eaten.chunks_mut(4096) {
        page[0] = 1;
    }
    println!("{}", std::hint::black_box(eaten).len());
}

/// Starts so many processes, and tells how many came about.
fn fork(wanted: u32) {
    let children: Vec<Child> = (0..wanted).map_while(|_| command("wait", "").spawn().ok()).collect();
    println!("{}", children.len());
    for mut child in children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

fn command(what: &str, how_much: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args([what, how_much]).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Starts it in a group, as the drivers do.
fn spawn_in(group: &Group, mut command: Command) -> Child {
    let procs = group.procs().as_raw_fd();
    // SAFETY: one system call; the group outlives the start.
    unsafe { command.pre_exec(move || join(std::os::fd::BorrowedFd::borrow_raw(procs))) };
    command.spawn().unwrap()
}

fn limits(memory_mib: u64, tasks: u64) -> Limits {
    Limits { memory_bytes: memory_mib * MIB, processors: 2, tasks, disks: Vec::new() }
}

fn read(place: &Place, file: &str) -> String {
    fs::read_to_string(place.path().join(file)).unwrap().trim().to_owned()
}

fn directories(dir: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries.filter(|entry| entry.file_type().unwrap().is_dir()).map(|entry| entry.path()).collect()
}

fn eventually(what: &str, is: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        sleep(Duration::from_millis(10));
    }
}

fn trial(cycles: u32) {
    let none = Hierarchy::find().unwrap_err();
    assert!(none.why.contains("no cgroup v2 hierarchy is mounted"), "{none}");
    mount("cgroup2", MOUNT, "cgroup2", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"").unwrap();
    let before = directories(Path::new(MOUNT));
    let hierarchy = Hierarchy::find().unwrap();
    assert_eq!(hierarchy.root(), Path::new(MOUNT));
    println!("found: a hierarchy with all controllers");

    let place = hierarchy.place("node", "i-1a2b3c4d").unwrap();
    written(&place);
    memory(&place);
    tasks(&place);
    ended(&hierarchy, &place);
    swept(&hierarchy, &place);
    for round in 0..cycles {
        let group = place.make(&limits(16, 8)).unwrap();
        let mut child = spawn_in(&group, command("eat", "1"));
        drop(group);
        if round % 2 == 0 {
            assert!(child.wait().unwrap().success(), "round {round}");
            assert!(place.end().unwrap(), "round {round}");
        } else {
            assert!(place.end().unwrap(), "round {round}");
            child.wait().unwrap();
        }
    }
    println!("cycles: {cycles}");
    assert_eq!(directories(Path::new(MOUNT)), before);
    println!("left: nothing");
}

/// Each limit is what it was meant to be.
fn written(place: &Place) {
    let device = fs::read_to_string("/sys/block/vda/dev").unwrap();
    let (major, minor) = device.trim().split_once(':').unwrap();
    let disk = disk_of(rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap())).unwrap();
    // No whole number of pages.
    let disks = vec![DiskLimit { device: disk, bytes_per_second: 3_000_000 }];
    let group = place.make(&Limits { memory_bytes: 16 * MIB + 1000, processors: 3, tasks: 77, disks }).unwrap();
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
    println!("written: memory.max, cpu.max, pids.max, io.max");
}

/// Who takes more memory than the group has is killed; who takes less is not.
fn memory(place: &Place) {
    let run = |mib: &str| -> (ExitStatus, bool) {
        let group = place.make(&limits(16, 8)).unwrap();
        let status = spawn_in(&group, command("eat", mib)).wait().unwrap();
        let ran_out = place.ran_out_of_memory();
        assert!(place.end().unwrap() && !place.ran_out_of_memory());
        (status, ran_out)
    };
    let (status, ran_out) = run("8");
    assert!(status.success() && !ran_out, "{status}, {ran_out}");
    let (status, ran_out) = run("64");
    assert!(status.signal() == Some(9) && ran_out, "{status}, {ran_out}");
    println!("memory: 8 MiB of 16 are had, and 64 are not");
}

/// There are no more processes than there may be.
fn tasks(place: &Place) {
    let group = place.make(&limits(32, 8)).unwrap();
    let mut fork = command("fork", "20");
    fork.stdout(Stdio::piped());
    let output = spawn_in(&group, fork).wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "7", "and itself");
    assert!(read(place, "pids.events").lines().any(|line| line.starts_with("max ") && line != "max 0"));
    drop(group);
    assert!(place.end().is_ok() && !place.path().exists());
    println!("tasks: 8 of 21 came about");
}

/// The end of a group is the end of all that is in it, and can be repeated.
fn ended(hierarchy: &Hierarchy, place: &Place) {
    let group = place.make(&limits(32, 64)).unwrap();
    let mut child = spawn_in(&group, command("fork", "5"));
    eventually("six processes are in it", || read(place, "cgroup.procs").lines().count() == 6);
    drop(group);
    assert!(place.path().exists(), "somebody has joined it");
    assert!(hierarchy.sweep("node", |_| false).unwrap().is_empty(), "it has processes");
    assert!(place.path().join("cgroup.kill").exists());
    assert!(place.end().unwrap());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    assert!(!place.path().exists() && !place.end().unwrap());
    // What is left under a name is ended before there is another one of it.
    let group = place.make(&limits(32, 64)).unwrap();
    let mut child = spawn_in(&group, command("wait", ""));
    drop(group);
    drop(place.make(&limits(32, 64)).unwrap());
    assert_eq!(child.wait().unwrap().signal(), Some(9));
    println!("ended: with all that was in it");
}

/// What a killed process left is removed; what is being made is not.
fn swept(hierarchy: &Hierarchy, place: &Place) {
    let group = place.make(&limits(32, 64)).unwrap();
    let other = hierarchy.place("node", "i-00000002").unwrap();
    fs::create_dir(other.path()).unwrap();
    assert_eq!(hierarchy.sweep("node", |_| false).unwrap(), [other.path()]);
    std::mem::forget(spawn_in(&group, command("wait", "")));
    drop(group);
    assert!(hierarchy.sweep("node", |_| false).unwrap().is_empty());
    assert!(place.end().unwrap());
    println!("swept: only what nobody uses");
}
