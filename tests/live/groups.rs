//! Limits of VMMs by cgroup v2. Few hosts that run tests have a hierarchy for them, but each guest's kernel has: the code that mvm
//! sets them with is tried in a microVM. What mvm says of the host that it runs on is true on any.

mod inside;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::leftovers::cycles;
use crate::rig::{Driver, NOTHING, ONE, on_a_host, on_a_host_of};

/// Says that a test is run in a guest, and how often a group is made and ended there.
const INSIDE: &str = "MVM_TEST_INSIDE";

/// Where this program, what it is linked with, and the stand-in for Firecracker are in the guest.
const TRIAL: &str = "/tmp/trial";

#[test]
fn limits_are_kept_by_a_real_kernel_and_nothing_of_them_is_left() {
    if let Ok(cycles) = std::env::var(INSIDE) {
        return inside::groups(cycles.parse().unwrap());
    }
    in_a_guest("limits_are_kept_by_a_real_kernel_and_nothing_of_them_is_left");
}

#[test]
fn a_jailed_process_is_in_a_group_that_ends_with_its_instance() {
    if std::env::var_os(INSIDE).is_some() {
        return inside::driver(Path::new(TRIAL));
    }
    in_a_guest("a_jailed_process_is_in_a_group_that_ends_with_its_instance");
}

/// Runs a test of this file in a guest.
fn in_a_guest(test: &'static str) {
    on_a_host(1, move |rig| {
        rig.apply(&ONE.replace("mem_mib = 128", "mem_mib = 512"));
        let (at, trial) = (rig.only(), rig.path("trial"));
        fs::create_dir(&trial).unwrap();
        for library in libraries() {
            fs::copy(&library, trial.join(library.file_name().unwrap())).unwrap();
        }
        fs::copy(std::env::current_exe().unwrap(), trial.join("live")).unwrap();
        crate::firecracker::stand_in(rig, &crate::firecracker::healthy());
        fs::copy(rig.path("firecracker/firecracker"), trial.join("firecracker")).unwrap();
        fs::copy(rig.path("firecracker/jailer"), trial.join("jailer.real")).unwrap();
        // The guest has no C library in its place, and a root that nothing can be put into.
        for (name, program) in [("start", "live"), ("jailer", "jailer.real")] {
            let line = format!(r#"exec {TRIAL}/ld-linux-x86-64.so.2 --library-path {TRIAL} {TRIAL}/{program} "$@""#);
            fs::write(trial.join(name), format!("#!/bin/sh\n{line}\n")).unwrap();
            fs::set_permissions(trial.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
        rig.ok(&["cp", trial.to_str().unwrap(), &format!("{at}:/tmp/")]);
        let command = format!("{INSIDE}={} {TRIAL}/start --exact groups::{test} --nocapture", cycles());
        let ran = rig.ran(&["exec", &at, "--", "sh", "-c", &command]);
        assert!(ran.status.success() && ran.text().contains("1 passed"), "{}{}", ran.text(), ran.err);
        eprintln!("{}{:?}", ran.text(), ran.took);
        rig.prune();
    });
}

/// What this program is linked with, the dynamic linker included.
fn libraries() -> BTreeSet<PathBuf> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let files = maps.lines().filter_map(|line| Some(&line[line.find('/')?..])).filter(|path| path.contains(".so"));
    // The linker under the name that it is asked for by.
    let linker = PathBuf::from("/lib64/ld-linux-x86-64.so.2");
    files.map(PathBuf::from).chain([linker]).collect()
}

/// The hierarchy of this host that has all controllers, found another way than mvm does.
fn unified() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).filter(|mount| mount[2] == "cgroup2").find_map(|mount| {
        let there = fs::read_to_string(Path::new(mount[1]).join("cgroup.controllers")).ok()?;
        let all = ["cpu", "io", "memory", "pids"].iter().all(|needed| there.split_whitespace().any(|one| one == *needed));
        let writable = mount[3].split(',').any(|option| option == "rw");
        (all && writable && !Path::new(mount[1]).join("cgroup.type").exists()).then(|| mount[1].to_owned())
    })
}

#[test]
fn whether_vmms_are_limited_is_said_plainly() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let row = |args: &[&str]| {
            let ran = rig.ran(args);
            let rows: Vec<serde_json::Value> = serde_json::from_slice(&ran.out).unwrap();
            rows.into_iter().find(|row| row["check"] == "limits").unwrap()
        };
        let usual = row(&["doctor", "--output", "json"]);
        let strict = row(&["doctor", "--production", "--output", "json"]);
        let found = usual["found"].as_str().unwrap();
        let info = rig.ok(&["node", "info"]);
        let started = rig.ran(&["instance", "list", "--production"]);
        assert!(started.status.success() && info.contains(found), "{info}");
        assert_eq!(usual["found"], strict["found"]);
        assert_eq!(usual["ok"], true);
        let at = rig.only();
        rig.ok(&["instance", "stop", "--force", &at]);
        let said = rig.ran(&["instance", "start", &at, "--production"]);
        assert!(said.status.success(), "{}", said.err);
        let own = fs::read_to_string(format!("/proc/{}/cgroup", rig.pid_of(&at))).unwrap();
        match unified() {
            Some(root) => {
                assert!(found.contains(&root) && strict["ok"] == true && usual["remedy"].is_null(), "{usual} {strict}");
                let group = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
                assert!(group.starts_with("/mvm/"), "{own}");
                let group = Path::new(&root).join(group.trim_start_matches('/'));
                let memory: u64 = fs::read_to_string(group.join("memory.max")).unwrap().trim().parse().unwrap();
                assert!(memory > 128 << 20 && memory < 1 << 30, "{memory}");
                assert_eq!(fs::read_to_string(group.join("cpu.max")).unwrap().trim(), "200000 100000");
                rig.apply(NOTHING);
                assert!(!group.exists());
            }
            None => {
                assert!(found.contains("none are set on VMMs"), "{found}");
                assert!(!usual["remedy"].as_str().unwrap().is_empty(), "{usual}");
                assert_eq!(strict["ok"], false, "{strict}");
                assert!(said.err.contains("no limits of memory, CPU, processes and disks are set on VMMs"), "{}", said.err);
                assert!(!own.contains("/mvm/"), "{own}");
            }
        }
        rig.prune();
    });
}
