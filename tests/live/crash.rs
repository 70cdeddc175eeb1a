//! Something dies: `mvm` itself at any moment, a virtual machine, a guest.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::rig::{NOTHING, ONE, Random, Rig, on_a_host, signal};

const VERBS: [&str; 4] = ["apply", "sleep", "wake", "destroy"];

fn arguments<'a>(verb: &'a str, at: &'a str, file: &'a str) -> Vec<&'a str> {
    match verb {
        "apply" => vec!["apply", "-f", file],
        "destroy" => vec!["instance", "destroy", "--yes", at],
        verb => vec!["instance", verb, at],
    }
}

/// The tenant's network id and subnet are given once: a tenant that comes back gets others.
fn document(generation: usize) -> String {
    let id = 7 + generation;
    ONE.replace("tenant_net_id = 7", &format!("tenant_net_id = {id}")).replace("10.240.7.0", &format!("10.240.{id}.0"))
}

/// Makes the world in which the verb has work to do; returns the instance, if there is one already.
fn prepare(rig: &Rig, verb: &str, generation: &mut usize) -> String {
    if verb == "apply" {
        rig.apply(NOTHING);
        *generation += 1;
        rig.file("fleet.toml", document(*generation));
        return String::new();
    }
    rig.apply(&document(*generation));
    let at = rig.only();
    if verb == "wake" {
        rig.ok(&["instance", "sleep", &at]);
    }
    at
}

#[test]
fn mvm_killed_at_ten_random_points_is_finished_by_the_next_apply() {
    on_a_host(1, |rig| {
        let mut random = Random::new();
        let mut generation = 0;
        let file = rig.path("fleet.toml").to_str().unwrap().to_owned();
        let lengths = VERBS.map(|verb| {
            let at = prepare(rig, verb, &mut generation);
            let ran = rig.ran(&arguments(verb, &at, &file));
            assert_eq!(ran.code(), 0, "{verb}: {}", ran.err);
            ran.took
        });
        eprintln!("{VERBS:?} take {lengths:?}");
        for round in 0..10 {
            let which = round % VERBS.len();
            let verb = VERBS[which];
            let at = prepare(rig, verb, &mut generation);
            let moment = Duration::from_micros(random.below(u64::try_from(lengths[which].as_micros()).unwrap()));
            let mut child = rig.mvm(&arguments(verb, &at, &file)).spawn().unwrap();
            std::thread::sleep(moment);
            child.kill().unwrap();
            let ended = child.wait().unwrap();
            let table = rig.ok(&["status"]);
            let begun = Instant::now();
            let ran = rig.ran(&["apply", "-f", &file]);
            eprintln!("round {round}: {verb} killed after {moment:?} ({ended}); apply {:?}\n{table}", begun.elapsed());
            assert_eq!(ran.code(), 0, "{}", ran.err);
            let at = rig.only();
            assert_eq!(rig.state_of(&at), "Running");
            assert_eq!(rig.machines(), [rig.pid_of(&at)], "no process but that of the instance");
            assert_eq!(rig.sh(&at, "echo alive"), "alive");
            rig.ok(&["plan", "-f", &file, "--detailed-exitcode"]);
            rig.ok(&["events", "verify"]);
        }
        rig.prune();
    });
}

/// What has to be true after an instance's machine died in whatever way.
fn is_noticed_and_mended(rig: &Rig, at: &str, pid: i32, how: &str) {
    // A process that ends takes its time to give its memory back; until then it is one.
    rig.eventually(how, Duration::from_secs(20), || !rig.machines().contains(&pid) && rig.ok(&["status"]).contains("died"));
    let said = rig.fails(4, &["exec", at, "--", "true"]);
    assert!(said.contains("died"), "{how}: {said}");
    let file = rig.path("fleet.toml");
    rig.fails(10, &["plan", "-f", file.to_str().unwrap(), "--detailed-exitcode"]);
    rig.ok(&["apply", "-f", file.to_str().unwrap()]);
    assert_eq!(rig.only(), at, "the same instance");
    assert_ne!(rig.pid_of(at), pid);
    assert_eq!(rig.sh(at, "cat /data/mark"), "kept", "{how}");
}

#[test]
fn a_machine_that_died_is_noticed_and_started_again() {
    on_a_host(1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        rig.sh(&at, "echo kept > /data/mark; sync");

        let pid = rig.pid_of(&at);
        signal(pid, Signal::KILL);
        is_noticed_and_mended(rig, &at, pid, "killed from outside");

        for (how, script) in [("panic", "echo c > /proc/sysrq-trigger"), ("poweroff", "poweroff -f"), ("reboot", "reboot -f")] {
            let pid = rig.pid_of(&at);
            let ran = rig.ran(&["exec", &at, "--", "sh", "-c", script]);
            eprintln!("{how}: exec ended with {} {}", ran.status, ran.err.trim());
            is_noticed_and_mended(rig, &at, pid, how);
        }
        // Killed while it is warm.
        rig.ok(&["instance", "warm", &at]);
        let pid = rig.pid_of(&at);
        signal(pid, Signal::KILL);
        is_noticed_and_mended(rig, &at, pid, "killed while warm");
        // A machine that hangs does not keep it from being stopped.
        let pid = rig.pid_of(&at);
        signal(pid, Signal::STOP);
        let ran = rig.ran(&["instance", "stop", "--force", &at]);
        assert_eq!(ran.code(), 0, "{}", ran.err);
        assert!(ran.took < Duration::from_secs(5), "{:?}", ran.took);
        assert_eq!(rig.machines(), Vec::<i32>::new());
        rig.prune();
    });
}
