//! A Firecracker that misbehaves: at each call of a start, a pause, a snapshot and a wake, and on the way to its guest.

use std::collections::BTreeSet;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use mvm::vm::instance::MOST_REFUSALS;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::firecracker::{healthy, stand_in};
use crate::jail::{CALL_DEADLINE, names};
use crate::rig::{Driver, ONE, Ran, Rig, finish, on_a_host_of, signal};
use crate::wire::run;

/// How a call goes wrong, and what is said of it.
const WORDS: [(&str, &str); 5] = [
    ("die", "Firecracker ended"),
    ("close", "closed before the answer"),
    ("garbage", "not one of Firecracker"),
    ("cut", "closed before the answer"),
    ("fault:not today", "not today"),
];

pub fn misbehaving(call: &str, rule: Value) -> Value {
    let mut script = healthy();
    script[call] = rule;
    script
}

/// What has to be true after a command at which Firecracker misbehaved.
#[track_caller]
fn failed(ran: &Ran, call: &str, word: &str, expected: &[&str]) {
    assert!([1, 4, 5].contains(&ran.code()), "{call} {word}: {} {}", ran.text(), ran.err);
    assert!(expected.iter().any(|one| ran.err.contains(one)), "{call} {word} {expected:?}: {}", ran.err);
    assert!(ran.took < CALL_DEADLINE, "{call} {word}: {:?}", ran.took);
}

/// The next pass brings it to run, with a Firecracker that behaves.
#[track_caller]
fn recovers(rig: &Rig, at: &str, what: &str) {
    stand_in(rig, &healthy());
    rig.apply(ONE);
    assert_eq!((rig.only(), rig.state_of(at)), (at.to_owned(), "Running".to_owned()), "{what}");
    assert_eq!(rig.machines(), [rig.pid_of(at)], "{what}: exactly its own");
    assert_eq!(rig.sh(at, "echo alive"), "alive", "{what}");
}

#[track_caller]
fn nothing_runs(rig: &Rig, what: &str) {
    assert_eq!(rig.machines(), Vec::<i32>::new(), "{what}");
    assert!(!run("ip", &["-o", "link"]).contains(": tn"), "{what}: its TAP is left");
    assert_eq!(names(rig.run_dir().join("instances")), BTreeSet::new(), "{what}");
}

#[test]
fn a_start_that_goes_wrong_at_any_call_is_undone_and_done_again() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let calls = [
            "PUT /logger",
            "PUT /metrics",
            "PUT /machine-config",
            "PUT /boot-source",
            "PUT /drives/root",
            "PUT /drives/data",
            "PUT /drives/secrets",
            "PUT /drives/config",
            "PUT /network-interfaces/eth0",
            "PUT /vsock",
            "PUT /entropy",
            "PUT /actions",
        ];
        for (number, call) in calls.into_iter().enumerate() {
            rig.ok(&["instance", "stop", "--force", &at]);
            for (word, expected) in WORDS {
                stand_in(rig, &misbehaving(call, json!({ "do": word, "when": if number % 2 == 0 { "before" } else { "after" } })));
                let ran = rig.ran(&["instance", "start", &at]);
                // Calls that are under way beside it fail of its death too.
                failed(&ran, call, word, &[expected]);
                assert!(ran.err.contains("PUT /"), "{call} {word}: {}", ran.err);
                assert!(word == "die" || word == "close" || word == "cut" || ran.err.contains(call), "{call} {word}: {}", ran.err);
                nothing_runs(rig, call);
            }
            recovers(rig, &at, call);
        }
        // An answer without end, and an end before there is a socket.
        for (call, word, expected) in [
            ("PUT /vsock", "flood", "65536"),
            ("PUT /actions", "flood", "65536"),
            ("listen", "exit:7", "exit code 7"),
            ("listen", "die", "it was ended by signal"),
            // Before or after mvm has let go of its TAP.
            ("running", "exit:148", "ended"),
            // Its first thread is a zombie while the others still have the TAP.
            ("PUT /actions", "leave:100ms exit:148", "system call filter"),
        ] {
            rig.ok(&["instance", "stop", "--force", &at]);
            stand_in(rig, &misbehaving(call, json!({ "do": word.split(' ').collect::<Vec<_>>() })));
            failed(&rig.ran(&["instance", "start", &at]), call, word, &[expected]);
            nothing_runs(rig, call);
            recovers(rig, &at, call);
        }
        rig.prune();
    });
}

#[test]
fn a_firecracker_that_hangs_is_given_up() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "stop", "--force", &at]);
        let call = "PUT /network-interfaces/eth0";
        stand_in(rig, &misbehaving(call, json!({ "do": "hang" })));
        let ran = rig.ran(&["instance", "start", &at]);
        assert_eq!(ran.code(), 5, "{}", ran.err);
        // With those that wait behind it, if any do.
        assert!(ran.err.contains(call) && ran.err.contains(": no answer within 10000 ms"), "{}", ran.err);
        assert!(ran.took < CALL_DEADLINE + Duration::from_secs(5), "{:?}", ran.took);
        nothing_runs(rig, call);
        recovers(rig, &at, call);
        rig.prune();
    });
}

#[test]
fn a_firecracker_that_hangs_at_a_pause_is_ended() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        stand_in(rig, &misbehaving("PATCH /vm", json!({ "do": "hang" })));
        rig.apply(ONE);
        let at = rig.only();
        let ran = rig.ran(&["instance", "warm", &at]);
        assert_eq!(ran.code(), 5, "{}", ran.err);
        assert!(ran.err.contains("PATCH /vm") && ran.err.contains("no answer within 10000 ms"), "{}", ran.err);
        // Once to pause it, and once to find out whether it runs.
        assert!(ran.took < 2 * CALL_DEADLINE + Duration::from_secs(5), "{:?}", ran.took);
        nothing_runs(rig, "it does not answer any more");
        recovers(rig, &at, "after a hang");
        rig.prune();
    });
}

#[test]
fn a_pause_a_resume_and_a_snapshot_that_go_wrong_leave_what_the_next_pass_mends() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        // What is done before, the call, how many of it are right first, the command that fails.
        let steps: [(&[&str], &str, u32, &str); 6] = [
            (&[], "GET /", 0, "warm"),
            (&[], "PATCH /vm", 0, "warm"),
            (&["warm"], "PATCH /vm", 1, "resume"),
            (&[], "PATCH /vm", 0, "sleep"),
            (&[], "PUT /snapshot/create", 0, "sleep"),
            (&["warm"], "PUT /snapshot/create", 0, "sleep"),
        ];
        for (before, call, skip, verb) in steps {
            for (word, expected) in WORDS.into_iter().chain([("flood", "65536")]) {
                rig.ok(&["instance", "stop", "--force", &at]);
                let rule =
                    json!({ "do": word, "skip": skip, "times": 1, "when": if call.contains("create") { "middle" } else { "before" } });
                stand_in(rig, &misbehaving(call, rule));
                rig.ok(&["instance", "start", &at]);
                let pid = rig.pid_of(&at);
                before.iter().for_each(|verb| drop(rig.ok(&["instance", verb, &at])));
                let ran = rig.ran(&["instance", verb, &at]);
                let what = format!("{verb}, {call} {word}");
                failed(&ran, call, word, &[expected, "the virtual machine is gone"]);
                assert_eq!(ran.err.contains("is gone"), word == "die", "{what}: {}", ran.err);
                assert!(!rig.instance_dir(&at).join("snapshot/manifest.json").exists(), "{what}: half a snapshot");
                // The stand-in goes on; nothing is lost but where the process is.
                rig.apply(ONE);
                assert_eq!(rig.state_of(&at), "Running", "{what}");
                assert_eq!(rig.pid_of(&at) == pid, word != "die", "{what}");
                assert_eq!(rig.machines(), [rig.pid_of(&at)], "{what}");
                assert_eq!(rig.sh(&at, "echo alive"), "alive", "{what}");
            }
        }
        rig.prune();
    });
}

#[test]
fn a_wake_that_goes_wrong_at_any_call_is_refused_and_the_next_pass_boots_afresh() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        for call in ["PUT /snapshot/load", "PATCH /drives/config", "PATCH /vm"] {
            for (word, expected) in WORDS.into_iter().chain([("flood", "65536")]) {
                let what = format!("{call} {word}");
                // The first one of a life: of the first life that is the pause, of which nothing would be left to wake.
                let is_pause = call == "PATCH /vm";
                if is_pause && word == "die" {
                    continue;
                }
                rig.ok(&["instance", "stop", "--force", &at]);
                stand_in(rig, &misbehaving(call, json!({ "do": word, "times": 1 })));
                rig.ok(&["instance", "start", &at]);
                if is_pause {
                    assert_ne!(rig.ran(&["instance", "sleep", &at]).code(), 0, "{what}");
                }
                rig.ok(&["instance", "sleep", &at]);
                failed(&rig.ran(&["instance", "wake", &at]), call, word, &[expected]);
                nothing_runs(rig, &what);
                recovers(rig, &at, &what);
            }
        }
        rig.prune();
    });
}

#[test]
fn a_snapshot_that_is_refused_again_and_again_is_given_up() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        stand_in(rig, &misbehaving("PUT /snapshot/load", json!({ "do": "fault:not this one" })));
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "sleep", &at]);
        for time in 1..=MOST_REFUSALS {
            let ran = rig.ran(&["instance", "wake", &at]);
            failed(&ran, "PUT /snapshot/load", "fault", &["PUT /snapshot/load: refused with status 400: not this one"]);
            assert!(ran.err.contains("`mvm instance stop` and `start` boot it afresh with its data disk"), "{}", ran.err);
            assert_eq!(rig.state_of(&at), "Sleeping", "{time}: the host may be at fault");
            nothing_runs(rig, "a refused wake");
        }
        rig.apply(ONE);
        assert_eq!((rig.only(), rig.state_of(&at)), (at.clone(), "Running".to_owned()));
        assert_eq!(rig.sh(&at, "echo alive"), "alive");
        rig.prune();
    });
}

#[test]
fn why_a_machine_ended_in_the_middle_of_its_wake_is_said_and_kept() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        stand_in(rig, &misbehaving("PATCH /vm", json!({ "do": "slow:1500ms" })));
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "sleep", &at]);
        let waking = rig.mvm(&["instance", "wake", &at]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let document = rig.instance_dir(&at).join("instance.json");
        rig.eventually("it is being resumed", Duration::from_secs(10), || fs::read_to_string(&document).unwrap().contains("resumed"));
        signal(rig.machines()[0], Signal::KILL);
        let ran = finish(waking, "a wake");
        assert_eq!(ran.code(), 1, "{}", ran.err);
        assert!(ran.err.contains("the guest did not come back") && ran.err.contains("it was killed"), "{}", ran.err);
        for words in [&["instance", "info", &at][..], &["events", "acme"]] {
            assert!(rig.ok(words).contains("it was killed"), "{words:?}: {}", rig.ok(words));
        }
        nothing_runs(rig, "a wake that was cut off");
        recovers(rig, &at, "a wake that was cut off");
        rig.prune();
    });
}

#[test]
fn a_guest_channel_that_goes_wrong_is_given_up_in_time() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        let document = ONE.replace("drain_timeout_seconds = 5", "drain_timeout_seconds = 5, ready_timeout_seconds = 1");
        rig.apply(&document);
        let at = rig.only();
        for word in ["close", "garbage", "flood", "hang", "die"] {
            rig.ok(&["instance", "stop", "--force", &at]);
            stand_in(rig, &misbehaving("CONNECT 5200", json!({ "do": word })));
            let ran = rig.ran(&["instance", "start", &at]);
            failed(
                &ran,
                "CONNECT",
                word,
                &[
                    "nobody listens in the guest",
                    "instead of OK and a port",
                    "out of turn",
                    "does not answer",
                    "ended before its guest was ready",
                ],
            );
            nothing_runs(rig, word);
            stand_in(rig, &healthy());
            rig.apply(&document);
            assert_eq!(rig.state_of(&at), "Running", "{word}");
        }
        rig.prune();
    });
}
