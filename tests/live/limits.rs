//! Limits of VMMs by cgroup v2. Few hosts that run tests have a hierarchy for them, but each guest's kernel has: the code that mvm
//! sets them with is tried in a microVM. What mvm says of the host that it runs on is true on any.

use std::fs;
use std::path::Path;

use crate::jail::cycles;
use crate::rig::{Driver, NOTHING, ONE, on_a_host, on_a_host_of};

/// What the trial writes when all of it went well (crates/mvm-hostd/src/bin/cgroup-trial.rs).
const SHOWN: [&str; 8] = ["found: ", "written: ", "memory: ", "tasks: ", "ended: ", "swept: ", "cycles: ", "left: nothing"];

#[test]
fn limits_are_kept_by_a_real_kernel_and_nothing_of_them_is_left() {
    let trial = Path::new(env!("CARGO_BIN_EXE_mvm")).with_file_name("cgroup-trial.static");
    assert!(trial.exists(), "the trial is built before the live tests run: {}", trial.display());
    on_a_host(1, move |rig| {
        rig.apply(&ONE.replace("mem_mib = 128", "mem_mib = 256"));
        let at = rig.only();
        rig.ok(&["cp", trial.to_str().unwrap(), &format!("{at}:/tmp/cgroup-trial")]);
        let ran = rig.ran(&["exec", &at, "--", "/tmp/cgroup-trial", "try", &cycles().to_string()]);
        assert!(ran.status.success(), "{}{}", ran.text(), ran.err);
        let said = ran.text();
        eprintln!("{said}{:?}", ran.took);
        assert!(said.lines().count() == SHOWN.len() && said.lines().zip(SHOWN).all(|(line, begin)| line.starts_with(begin)), "{said}");
        rig.prune();
    });
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
                assert!(memory > 128 << 20 && memory < 256 << 20, "{memory}");
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
