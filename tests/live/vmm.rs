//! What users see of the VMM: which one is chosen, what it counts.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::time::{Duration, Instant};

use mvm_firecracker::{Api, Deadlines, Found, Unknown};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::rig::{Driver, ONE, Rig, finish, on_a_host, on_a_host_of};

fn acceleration(rig: &Rig, args: &[&str]) -> String {
    let words = [&["node", "info", "--output", "json"], args].concat();
    let info: Value = serde_json::from_str(&rig.ok(&words)).unwrap();
    info["acceleration"].as_str().unwrap().to_owned()
}

#[test]
fn whoever_gets_software_without_asking_for_it_is_told() {
    on_a_host(1, |rig| {
        let file = rig.file("fleet.toml", ONE);
        let warned = |args: &[&str]| {
            let ran = rig.ran(args);
            assert!(ran.status.success(), "{}", ran.err);
            ran.err.contains("mvm: warning: guests run in software (TCG)")
        };
        // No Firecracker is there: whether this host's KVM boots a guest decides.
        let auto = ["--vmm", "auto", "--firecracker", "/nonexistent"];
        assert!(!warned(&[&["plan", "-f", &file], &auto[..]].concat()), "nothing was started");
        let first = warned(&[&["apply", "-f", &file], &auto[..]].concat());
        assert_eq!(first, acceleration(rig, &auto) == "tcg");
        assert!(!warned(&[&["apply", "-f", &file], &auto[..]].concat()), "nothing was started again");
        let at = rig.only();
        rig.ok(&["instance", "sleep", &at]);
        assert_eq!(warned(&[&["instance", "wake", &at], &auto[..]].concat()), first);
        rig.ok(&["instance", "stop", "--force", &at]);
        assert!(!warned(&["instance", "start", &at, "--vmm", "auto", "--firecracker", "/nonexistent", "--accel", "tcg"]), "it was chosen");
        rig.prune();
    });
}

#[test]
fn a_snapshot_made_in_software_is_not_woken_in_production() {
    on_a_host(1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "sleep", &at]);
        if acceleration(rig, &[]) == "tcg" {
            let said = rig.ran(&["instance", "wake", &at, "--production"]).err;
            assert!(said.contains("no boundary") && said.contains("--production"), "{said}");
            assert_eq!((rig.state_of(&at), rig.machines()), ("Sleeping".to_owned(), vec![]));
        }
        rig.ok(&["instance", "wake", &at]);
        assert_eq!(rig.state_of(&at), "Running");
        rig.prune();
    });
}

#[test]
fn what_firecracker_counts_is_shown_however_full_its_pipe_is() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let shown = || {
            let all: Value = serde_json::from_str(&rig.ok(&["instance", "metrics", &at, "--output", "json"])).unwrap();
            assert!(all["utc_timestamp_ms"].is_u64() && all["seccomp"]["num_faults"] == 0, "{all}");
        };
        shown();
        // Nobody reads it for an hour: it is full, and ends with half a line.
        let path = rig.run_dir().join("instances").join(at.rsplit('/').next().unwrap()).join("jail/metrics");
        let mut pipe = fs::File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        while pipe.write(b"{\"utc_timestamp_ms\":1,\"half").is_ok() {}
        let pid = rig.pid_of(&at);
        shown();
        rig.ok(&["instance", "warm", &at]);
        shown();
        let table = rig.ok(&["instance", "metrics", &at]);
        assert!(table.starts_with("NAME") && !table.contains("num_faults"), "{table}");
        // Something else in its place is not read, and harms nothing.
        fs::remove_file(&path).unwrap();
        symlink("/proc/kmsg", &path).unwrap();
        let said = rig.fails(1, &["instance", "metrics", &at]);
        assert!(said.contains(path.to_str().unwrap()), "{said}");
        rig.ok(&["instance", "resume", &at]);
        assert_eq!(rig.pid_of(&at), pid);
        rig.ok(&["instance", "stop", "--force", &at]);
        let said = rig.fails(4, &["instance", "metrics", &at]);
        assert!(said.contains("is Stopped") && said.contains("mvm instance start"), "{said}");
        rig.prune();
    });
}

#[test]
fn a_vmm_that_counts_nothing_says_so() {
    on_a_host(1, |rig| {
        rig.apply(ONE);
        let said = rig.fails(1, &["instance", "metrics", &rig.only()]);
        assert!(said.contains("qemu keeps none") && said.contains("mvm instance stats"), "{said}");
        rig.prune();
    });
}

#[test]
fn a_node_keeps_the_users_that_it_began_with() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let file = rig.file("fleet.toml", ONE);
        let said = rig.fails(2, &["apply", "-f", &file, "--first-uid", "65534"]);
        assert!(said.contains("not between 65536 and"), "{said}");
        rig.ok(&["apply", "-f", &file, "--first-uid", "1000000"]);
        let at = rig.only();
        // Behind those that build and try: its tenant's net id is 7, and it has the first place.
        let uid = 1_000_000 + 0x90_0000 + 7 * 65_536;
        let owner = || fs::metadata(format!("/proc/{}", rig.pid_of(&at))).unwrap().uid();
        assert_eq!(owner(), uid);
        assert!(rig.ok(&["instance", "info", &at]).contains(&uid.to_string()));
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        assert_eq!(owner(), uid, "without the option");
        let said = rig.fails(4, &["status", "--first-uid", "2000000"]);
        assert!(said.contains("begin at 1000000") && said.contains("--state-dir"), "{said}");
        // One that nobody recorded is found by its user, too.
        rig.ok(&["instance", "stop", "--force", &at]);
        let mut start = rig.mvm(&["instance", "start", &at]).spawn().unwrap();
        rig.eventually("a machine", Duration::from_secs(60), || !rig.machines().is_empty());
        start.kill().unwrap();
        start.wait().unwrap();
        rig.apply(ONE);
        assert_eq!((rig.machines(), owner()), (vec![rig.pid_of(&at)], uid));
        rig.prune();
    });
}

/// Ends the VMM of an instance while a command talks to its guest, and tells how long that command took to notice and what it said.
fn noticed(rig: &Rig, at: &str) -> (Duration, String) {
    let mut exec = rig.mvm(&["exec", at, "--", "sh", "-c", "echo begun; kill -STOP $$"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(exec.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "begun\n");
    let begun = Instant::now();
    kill_process(Pid::from_raw(rig.pid_of(at)).unwrap(), Signal::KILL).unwrap();
    let ran = finish(exec, "mvm exec");
    assert!(!ran.status.success());
    (begun.elapsed(), ran.err)
}

fn an_end_is_noticed_by_whoever_talks_to_the_guest(driver: Driver) {
    on_a_host_of(driver, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let (took, said) = noticed(rig, &at);
        eprintln!("noticed after {took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(said.contains("went away"), "{said}");
        // Its last threads may still be giving back what they have.
        rig.eventually("its end is seen", Duration::from_secs(20), || {
            let rows: Value = serde_json::from_str(&rig.ok(&["instance", "list", "--output", "json"])).unwrap();
            rows[0]["problem"].as_str().is_some_and(|problem| problem.contains("its virtual machine died"))
        });
        rig.apply(ONE);
        assert_eq!(rig.sh(&at, "echo alive"), "alive");
        rig.prune();
    });
}

#[test]
fn an_end_of_qemu_is_noticed() {
    an_end_is_noticed_by_whoever_talks_to_the_guest(Driver::Qemu);
}

#[test]
fn an_end_of_firecracker_is_noticed() {
    an_end_is_noticed_by_whoever_talks_to_the_guest(Driver::Firecracker);
}

#[test]
fn why_a_machine_ended_is_said_until_the_next_pass_by_it_and_on_record() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let socket = rig.run_dir().join("instances").join(at.rsplit('/').next().unwrap()).join("jail/api.sock");
        let Found::Running(mut api) = Api::<Unknown>::attach(&socket, Deadlines::default()).unwrap().find_phase().unwrap() else {
            panic!("it runs")
        };
        api.send_ctrl_alt_del().unwrap();
        let why = "its guest restarted or panicked";
        let said = format!("its virtual machine died: {why}");
        for words in [&["status"][..], &["instance", "info", &at]] {
            rig.eventually(&said, Duration::from_secs(20), || rig.ok(words).contains(&said));
        }
        let ran = rig.ran(&["apply", "-f", &rig.file("fleet.toml", ONE)]);
        assert!(ran.status.success() && ran.err.contains(why), "{}", ran.err);
        assert_eq!(rig.state_of(&at), "Running");
        let events: Vec<Value> = serde_json::from_str(&rig.ok(&["events", "acme", "--output", "json"])).unwrap();
        let ends: Vec<&Value> = events.iter().filter(|event| event["why"].is_string()).collect();
        assert_eq!(ends.len(), 1, "{events:?}");
        assert_eq!((&ends[0]["action"], &ends[0]["result"]), (&"recover".into(), &"ok".into()));
        assert!(ends[0]["why"].as_str().unwrap().starts_with(why), "{}", ends[0]);
        assert!(rig.ok(&["events", "acme"]).contains(&format!("ok: {why}")));
        assert!(rig.ok(&["events", "verify"]).contains("acme"));
        rig.prune();
    });
}
