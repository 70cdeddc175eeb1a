//! On directories with the files that the kernel makes for groups; the kernel's own are in the live tests.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::group::{Files, has_disk_limit};
use super::hierarchy::hand_on;
use super::{BASE, DiskLimit, Hierarchy, Limits, disk_of};

const ALL: &str = "cpuset cpu io memory hugetlb pids\n";

/// A directory with the files that the kernel makes for a group.
fn group(dir: &Path, controllers: &str) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("cgroup.controllers"), controllers).unwrap();
    for file in ["cgroup.subtree_control", "cgroup.procs", "memory.max", "cpu.max", "pids.max", "io.max"] {
        fs::write(dir.join(file), "").unwrap();
    }
    fs::write(dir.join("cgroup.events"), "populated 0\nfrozen 0\n").unwrap();
}

fn mounted(dir: &Path, options: &str) -> String {
    format!("31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw\n38 31 0:31 / {} {options} shared:9 - cgroup2 cgroup2 rw\n", dir.display())
}

fn found(mounts: &str) -> String {
    Hierarchy::among(mounts).map_or_else(|why| why.to_string(), |found| found.root().display().to_string())
}

fn limits() -> Limits {
    let disks = vec![DiskLimit { device: (8, 16), bytes_per_second: 2_097_152 }];
    Limits { memory_bytes: 100 << 20, processors: 2, tasks: 70, disks }
}

#[test]
fn the_hierarchy_with_all_controllers_is_found() {
    let top = tempfile::tempdir().unwrap();
    let (bare, whole) = (top.path().join("bare"), top.path().join("whole"));
    group(&bare, "hugetlb\n");
    group(&whole, ALL);
    assert_eq!(found(&(mounted(&bare, "rw,relatime") + &mounted(&whole, "rw,relatime"))), whole.display().to_string());
    let why = found(&mounted(&bare, "rw,relatime"));
    assert!(why.contains("does not have cpu, io, memory, pids") && why.contains("systemd.unified_cgroup_hierarchy=1"), "{why}");
    let why = found("25 1 0:22 / /proc rw - proc proc rw\n32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n");
    assert!(why.contains("no cgroup v2 hierarchy is mounted") && why.contains("cgroup_no_v1=all"), "{why}");
    let why = found(&mounted(&whole, "ro,relatime"));
    assert!(why.contains("mounted read-only"), "{why}");
    let spaced = top.path().join("a place");
    group(&spaced, ALL);
    let mounts = mounted(&spaced, "rw").replace("a place", r"a\040place");
    assert_eq!(found(&mounts), spaced.display().to_string());
}

#[test]
fn a_container_s_own_root_is_used_where_it_hands_controllers_on() {
    let top = tempfile::tempdir().unwrap();
    let root = top.path().join("root");
    group(&root, ALL);
    fs::write(root.join("cgroup.type"), "domain\n").unwrap();
    fs::write(root.join("cgroup.procs"), "1\n17\n").unwrap();
    let why = found(&mounted(&root, "rw"));
    assert!(why.contains("has processes in it") && why.contains("run mvm on the host itself"), "{why}");
    fs::write(root.join("cgroup.subtree_control"), ALL).unwrap();
    assert_eq!(found(&mounted(&root, "rw")), root.display().to_string());
    fs::write(root.join("cgroup.subtree_control"), "cpu\n").unwrap();
    fs::write(root.join("cgroup.procs"), "").unwrap();
    assert_eq!(found(&mounted(&root, "rw")), root.display().to_string());
}

#[test]
fn only_missing_controllers_are_asked_for() {
    let top = tempfile::tempdir().unwrap();
    group(top.path(), ALL);
    let file = top.path().join("cgroup.subtree_control");
    fs::write(&file, "memory pids\n").unwrap();
    hand_on(top.path()).unwrap();
    assert!(fs::read_to_string(&file).unwrap().starts_with("+cpu +io"));
    fs::write(&file, ALL).unwrap();
    hand_on(top.path()).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), ALL);
}

#[test]
fn limits_are_written_and_what_reads_otherwise_is_an_error() {
    let top = tempfile::tempdir().unwrap();
    group(top.path(), ALL);
    let dir = OwnedFd::from(fs::File::open(top.path()).unwrap());
    let files = Files { dir: dir.as_fd(), path: top.path() };
    let read = |file: &str| fs::read_to_string(top.path().join(file)).unwrap();
    files.limit(&limits()).unwrap();
    assert_eq!((read("memory.max"), read("cpu.max"), read("pids.max")), ("104857600".into(), "200000 100000".into(), "70".into()));
    assert_eq!(read("io.max"), "8:16 rbps=2097152 wbps=2097152");
    assert!(!top.path().join("memory.swap.max").exists(), "a kernel without swap has no limit of it");
    // The kernel counts in pages.
    assert!(files.set("memory.max", "4097", |read| read == "4096").is_err());

    fs::remove_file(top.path().join("pids.max")).unwrap();
    let error = files.limit(&limits()).unwrap_err();
    assert!(error.is_not_found() && error.to_string().contains("pids.max"), "{error}");
    symlink("/dev/null", top.path().join("pids.max")).unwrap();
    assert!(files.limit(&limits()).is_err(), "no link is followed");
    fs::remove_file(top.path().join("memory.max")).unwrap();
    // Longer than what is written over it: a limit that did not come about.
    fs::write(top.path().join("memory.max"), "1048576000").unwrap();
    let error = files.limit(&limits()).unwrap_err().to_string();
    let said = r#"memory.max was written as "104857600" and reads "1048576000""#;
    assert!(error.contains(said) && error.contains(top.path().to_str().unwrap()), "{error}");
}

#[test]
fn a_disk_limit_is_found_among_those_of_other_disks() {
    let limit = limits().disks[0];
    assert!(has_disk_limit("8:0 rbps=1 wbps=max riops=max wiops=max\n8:16 rbps=2097152 wbps=2097152 riops=max wiops=max\n", &limit));
    assert!(!has_disk_limit("8:1 rbps=2097152 wbps=2097152 riops=max wiops=max\n", &limit));
    assert!(!has_disk_limit("8:16 rbps=2097152 wbps=max riops=max wiops=max\n", &limit));
    assert!(!has_disk_limit("", &limit));
}

#[test]
fn what_cannot_be_limited_is_not_left() {
    let top = tempfile::tempdir().unwrap();
    group(top.path(), ALL);
    group(&top.path().join(BASE), ALL);
    let hierarchy = Hierarchy { root: top.path().to_owned() };
    let place = hierarchy.place("node", "i-1a2b3c4d").unwrap();
    assert_eq!(place.path(), top.path().join("mvm/node.i-1a2b3c4d"));
    let error = place.make(&limits()).unwrap_err().to_string();
    assert!(error.contains("node.i-1a2b3c4d/memory.max"), "{error}");
    assert!(!place.path().exists());
    assert!(!place.end().unwrap(), "it can be repeated");
}

#[test]
fn only_groups_that_nobody_uses_or_makes_are_swept() {
    let top = tempfile::tempdir().unwrap();
    let hierarchy = Hierarchy { root: top.path().to_owned() };
    assert_eq!(hierarchy.sweep("node", |_| false).unwrap(), Vec::<PathBuf>::new());
    let base = top.path().join(BASE);
    for name in ["node.i-1", "node.i-2", "node.i-3", "node.Not Ours", "other.i-1", "node2.i-1"] {
        fs::create_dir_all(base.join(name)).unwrap();
    }
    let making = hierarchy.place("node", "i-3").unwrap().open().unwrap().unwrap();
    flock(&making, FlockOperation::LockExclusive).unwrap();
    assert_eq!(hierarchy.sweep("node", |instance| instance == "i-2").unwrap(), [base.join("node.i-1")]);
    drop(making);
    assert_eq!(hierarchy.sweep("node", |_| false).unwrap().len(), 2);
    assert!(base.join("other.i-1").exists() && base.join("node2.i-1").exists());
    fs::remove_dir(base.join("node.Not Ours")).unwrap();
    for name in ["other", "node2"] {
        assert_eq!(hierarchy.sweep(name, |_| false).unwrap().len(), 1);
    }
    assert!(!base.exists(), "the last one takes the one above with it");
}

#[test]
fn names_are_no_paths() {
    let hierarchy = Hierarchy { root: "/nonexistent".into() };
    for name in ["", "..", "a/b", "a.b", "A", "a\n"] {
        assert!(hierarchy.place("node", name).is_err() && hierarchy.place(name, "i-1").is_err(), "{name:?}");
    }
}

#[test]
fn a_file_s_disk_is_a_whole_one_or_none() {
    for entry in fs::read_dir("/sys/dev/block").into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let (major, minor) = name.split_once(':').unwrap();
        let disk = disk_of(rustix::fs::makedev(major.parse().unwrap(), minor.parse().unwrap())).unwrap();
        assert!(!Path::new(&format!("/sys/dev/block/{}:{}/partition", disk.0, disk.1)).exists(), "{name} {disk:?}");
    }
    assert_eq!(disk_of(rustix::fs::makedev(0, 40)), None);
}
