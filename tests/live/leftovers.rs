//! What is left of jailed machines: nothing after many of them, and exactly one after a killed mvm.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::firecracker::{healthy, stand_in};
use crate::jail::{UIDS, files_of, names, processes_of, run_dir};
use crate::misbehaviour::misbehaving;
use crate::rig::{Driver, ONE, Random, Rig, on_a_host_of};
use crate::wire::run;

/// How many times an instance is started and stopped; each is as good as any other.
pub fn cycles() -> usize {
    std::env::var("MVM_TEST_CYCLES").map_or(200, |number| number.parse().unwrap())
}

/// What may be left behind of a machine on this host.
#[derive(Debug, PartialEq, Eq)]
struct Leftovers {
    mounts: String,
    links: BTreeSet<String>,
    run: BTreeSet<PathBuf>,
    instance: BTreeSet<PathBuf>,
    cgroups: BTreeSet<PathBuf>,
    owned: Vec<PathBuf>,
    processes: Vec<String>,
    shared_memory: BTreeSet<String>,
}

fn tree(dir: &Path) -> BTreeSet<PathBuf> {
    let (mut found, mut dirs) = (BTreeSet::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                dirs.push(entry.path());
            }
            found.insert(entry.path());
        }
    }
    found
}

fn leftovers(rig: &Rig, at: &str) -> Leftovers {
    let links = run("ip", &["-o", "link"]);
    let cgroups = tree(Path::new("/sys/fs/cgroup"));
    Leftovers {
        mounts: fs::read_to_string("/proc/thread-self/mountinfo").unwrap(),
        links: links.lines().filter_map(|line| line.split(": ").nth(1)).map(str::to_owned).collect(),
        run: tree(&rig.run_dir()),
        instance: tree(&rig.instance_dir(at)),
        cgroups: cgroups
            .into_iter()
            .filter(|path| ["mvm", "firecracker"].iter().any(|name| path.to_string_lossy().contains(name)))
            .collect(),
        owned: files_of(&UIDS, &[rig.run_dir(), rig.state()]),
        processes: processes_of(&(0..u32::MAX)),
        // Other tests that run meanwhile have directories there, too.
        shared_memory: names("/dev/shm").into_iter().filter(|name| !name.starts_with(".tmp")).collect(),
    }
}

#[test]
fn nothing_is_left_after_many_starts_and_stops() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "stop", "--force", &at]);
        let before = leftovers(rig, &at);
        // The test itself is one of them.
        assert!(before.processes.len() <= 1, "{:?}", before.processes);
        let begun = Instant::now();
        for cycle in 0..cycles() {
            rig.ok(&["instance", "start", &at]);
            rig.ok(&["instance", "stop", "--force", &at]);
            // Seen at once where it would add up slowly.
            assert!(!run_dir(rig, &at).exists() && processes_of(&UIDS).is_empty(), "cycle {cycle}");
        }
        eprintln!("{} starts and stops in {:?}", cycles(), begun.elapsed());
        assert_eq!(leftovers(rig, &at), before);
        rig.prune();
        assert_eq!(files_of(&UIDS, &[rig.run_dir(), rig.state()]), Vec::<PathBuf>::new());
    });
}

/// The process of an instance, while nobody has written it down.
fn unrecorded(rig: &Rig, moment: &str) -> i32 {
    rig.eventually(moment, Duration::from_secs(20), || rig.machines().len() == 1);
    rig.machines()[0]
}

#[test]
fn mvm_killed_at_any_moment_of_a_start_leaves_one_machine_after_the_next_pass() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let mut random = Random::new();
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "stop", "--force", &at]);
        let whole = rig.ran(&["instance", "start", &at]).took;
        for round in 0..16 {
            rig.ok(&["instance", "stop", "--force", &at]);
            let moment = Duration::from_micros(random.below(u64::try_from(whole.as_micros()).unwrap()));
            let mut start = rig.mvm(&["instance", "start", &at]).spawn().unwrap();
            std::thread::sleep(moment);
            start.kill().unwrap();
            start.wait().unwrap();
            rig.apply(ONE);
            assert_eq!(rig.state_of(&at), "Running", "round {round}");
            assert_eq!(rig.machines(), [rig.pid_of(&at)], "round {round}, killed after {moment:?}: exactly one");
            let links = run("ip", &["-o", "link"]);
            assert_eq!(links.lines().filter(|line| line.contains(": tn")).count(), 1, "round {round}, {moment:?}: {links}");
        }
        rig.prune();
    });
}

#[test]
fn a_machine_whose_mvm_was_killed_is_found_by_the_next() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        // Every command is another process: what one started the others drive.
        let pid = rig.pid_of(&at);
        for (verb, state) in [("warm", "Warm"), ("resume", "Running"), ("warm", "Warm"), ("resume", "Running")] {
            rig.ok(&["instance", verb, &at]);
            assert_eq!((rig.state_of(&at), rig.pid_of(&at)), (state.to_owned(), pid), "{verb}");
        }
        for call in ["PUT /vsock", "PUT /actions", "listen"] {
            rig.ok(&["instance", "stop", "--force", &at]);
            stand_in(rig, &misbehaving(call, json!({ "do": "slow:1500ms" })));
            // Whether guests boot with it is found out before, and not while it is looked.
            rig.ran(&["instance", "start", &at]);
            rig.ok(&["instance", "stop", "--force", &at]);
            let mut start = rig.mvm(&["instance", "start", &at]).spawn().unwrap();
            let orphan = unrecorded(rig, call);
            start.kill().unwrap();
            start.wait().unwrap();
            assert_eq!(rig.machines(), [orphan], "{call}: it lives on");
            stand_in(rig, &healthy());
            rig.apply(ONE);
            assert_eq!(rig.state_of(&at), "Running", "{call}");
            assert_eq!(rig.machines(), [rig.pid_of(&at)], "{call}: exactly one");
            assert_ne!(rig.pid_of(&at), orphan, "{call}: which nobody knows the state of");
            let links = run("ip", &["-o", "link"]);
            assert_eq!(links.lines().filter(|line| line.contains(": tn")).count(), 1, "{links}");
        }
        rig.prune();
    });
}
