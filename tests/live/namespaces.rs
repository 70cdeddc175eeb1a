//! The namespaces of a jailed Firecracker, and machines that end with their caller.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::firecracker::{healthy, is_real, stand_in};
use crate::rig::{Driver, ONE, Random, Rig, finish, on_a_host_of, signal};
use crate::wire::run;

/// The drivers of these tests: with the network of the host, and with one of each Firecracker's own.
const BOTH: [Driver; 2] = [Driver::Firecracker, Driver::FirecrackerApart];

fn namespace(pid: impl std::fmt::Display, kind: &str) -> Option<String> {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok().map(|link| link.to_string_lossy().into_owned())
}

/// A process's numbers, from this namespace's to its own.
fn numbers(pid: i32) -> Vec<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap();
    line.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

/// The processes that `is` says yes to.
fn processes(is: impl Fn(i32) -> bool) -> BTreeSet<i32> {
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.filter(|pid| is(*pid)).collect()
}

/// The processes in a PID namespace, without those that have ended and nobody waited for.
fn members(of: &str) -> BTreeSet<i32> {
    processes(|pid| namespace(pid, "pid").as_deref() == Some(of) && mvm::infra::process::ProcessIdentity::of(pid).is_some())
}

/// The keepers that were made on this host.
fn keepers() -> BTreeSet<i32> {
    let here = namespace("thread-self", "net");
    let is_keeper = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "mvm-keeper\n");
    processes(|pid| is_keeper(pid) && namespace(pid, "net") == here)
}

#[test]
fn all_in_a_jail_ends_with_firecracker_which_is_the_first_process_in_it() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let pid = rig.pid_of(&at);
        assert_eq!(numbers(pid), [pid, 1]);
        let inside = namespace(pid, "pid").unwrap();
        assert_ne!(Some(&inside), namespace("thread-self", "pid").as_ref());
        if !is_real() {
            // The stand-in's guest is of processes, and one whose parent has ended has nothing to end with but this.
            rig.sh(&at, "(while :; do :; done) >&- 2>&- &");
            rig.eventually("the guest's process runs", Duration::from_secs(10), || members(&inside).len() >= 3);
        }
        rig.crash(&at);
        assert_eq!(members(&inside), BTreeSet::new());
        rig.apply(ONE);
        assert_eq!(rig.state_of(&at), "Running");
        rig.prune();
    });
}

#[test]
fn what_a_jailed_process_begins_with() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        rig.ok(&["instance", "stop", "--force", &at]);
        let jailer = rig.path("firecracker/jailer");
        let replace = |text: &str, mode: u32| {
            fs::remove_file(&jailer).unwrap();
            fs::write(&jailer, text).unwrap();
            fs::set_permissions(&jailer, fs::Permissions::from_mode(mode)).unwrap();
        };
        let script = "#!/bin/sh\necho \"number $$ in $PWD\" >&2\ngrep -e SigBlk -e SigIgn /proc/self/status | tr -d '\\t' >&2\nexit 3\n";
        replace(script, 0o755);
        let said = rig.fails(1, &["instance", "start", &at]);
        assert!(said.contains("exit code 3: number 1 in /; "), "{said}");
        assert!(said.contains("SigBlk:0000000000000000"), "{said}");
        let ignored = said.split("SigIgn:").nth(1).unwrap();
        let ignored = u64::from_str_radix(&ignored[..16], 16).unwrap();
        assert_eq!(ignored & 1 << (libc::SIGPIPE - 1), 0, "{said}");
        // What the child says that did not become the jailer.
        replace("", 0o644);
        let said = rig.fails(1, &["instance", "start", &at]);
        assert!(said.contains(jailer.to_str().unwrap()) && said.contains("Permission denied"), "{said}");
        let said = rig.fails(1, &["run", "--", "sh", "-c", ":"]);
        assert!(said.contains(jailer.to_str().unwrap()) && said.contains("Permission denied"), "{said}");
        assert_eq!((keepers(), rig.machines()), (BTreeSet::new(), Vec::new()));
        stand_in(rig, &healthy());
        rig.apply(ONE);
        rig.prune();
    });
}

#[test]
fn a_firecracker_that_is_killed_from_outside_while_it_starts_is_said_to_have_been() {
    for driver in BOTH {
        on_a_host_of(driver, 1, |rig| {
            if is_real() {
                return;
            }
            rig.apply(ONE);
            let at = rig.only();
            rig.ok(&["instance", "stop", "--force", &at]);
            let mut script = healthy();
            script["PUT /actions"] = json!({ "do": "slow:3000ms" });
            stand_in(rig, &script);
            // Whether guests boot with it is found out before, and not while it is looked.
            rig.ok(&["instance", "start", &at]);
            rig.ok(&["instance", "stop", "--force", &at]);
            let start = rig.mvm(&["instance", "start", &at]).spawn().unwrap();
            rig.eventually("it is there", Duration::from_secs(30), || rig.machines().len() == 1 && has_tap(rig));
            signal(rig.machines()[0], Signal::KILL);
            let ran = finish(start, "mvm instance start");
            assert!(ran.code() == 1 && ran.err.contains("it was killed"), "{}", ran.err);
            rig.eventually("it is taken off the host", Duration::from_secs(20), || !has_tap(rig));
            stand_in(rig, &healthy());
            rig.apply(ONE);
            rig.prune();
        });
    }
}

/// Whether this host has an instance's interface.
fn has_tap(_: &Rig) -> bool {
    run("ip", &["-o", "link"]).contains(": tn")
}

/// What a program says in the network namespace of a process.
fn within(pid: i32, program: &str, arguments: &[&str]) -> String {
    let target = pid.to_string();
    run("nsenter", &[&["--target", &target, "--net", program][..], arguments].concat())
}

/// The second word of each line of `ip -o`, without what is after it.
fn link_names(listing: &str) -> Vec<String> {
    let mut names: Vec<String> = listing.lines().map(|line| line.split([':', '@']).nth(1).unwrap().trim().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_firecracker_sees_no_network_but_its_guests() {
    on_a_host_of(Driver::FirecrackerApart, 1, |rig| {
        rig.apply(&ONE.replace("drain_timeout_seconds = 5", "drain_timeout_seconds = 5, ready_timeout_seconds = 120"));
        let at = rig.only();
        for verb in ["", "sleep", "wake", "stop", "start"] {
            if !verb.is_empty() {
                rig.ok(&["instance", verb, &at]);
            }
            let there = ["", "wake", "start"].contains(&verb);
            rig.eventually(verb, Duration::from_secs(20), || has_tap(rig) == there);
            if !there {
                assert_eq!(rig.machines(), Vec::<i32>::new());
                continue;
            }
            let pid = rig.pid_of(&at);
            assert_ne!(namespace(pid, "net"), namespace("thread-self", "net"));
            let links = within(pid, "ip", &["-o", "link"]);
            assert_eq!(link_names(&links), ["cable", "joint", "lo", "tn7i0"]);
            let loopback = links.lines().find(|line| line.contains(": lo:")).unwrap();
            assert!(!loopback.contains("UP"), "{loopback}");
            assert_eq!(within(pid, "ip", &["-o", "addr"]), "");
            for bridged in ["cable", "tn7i0"] {
                let line = within(pid, "ip", &["-o", "-d", "link", "show", bridged]);
                assert!(line.contains("master joint") && line.contains("learning off"), "{line}");
            }
            assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "1");
            assert_eq!(within(pid, "cat", &["/proc/sys/net/ipv4/ip_forward"]).trim(), "0");
            let verified = rig.ran(&["net", "verify"]).text();
            let port =
                verified.lines().find(|line| line.contains("TAP tn7i0 is a port of br-tenant-7")).unwrap_or_else(|| panic!("{verified}"));
            assert!(port.contains(" ok "), "{verified}");
            if is_real() {
                // On a slow host a program in the guest may die of it.
                let ping = ["exec", &at, "--", "ping", "-c", "1", "-W", "3", "10.240.7.1"];
                rig.eventually("the guest reaches its gateway", Duration::from_secs(60), || rig.ran(&ping).code() == 0);
            } else {
                assert_eq!(rig.sh(&at, "echo alive"), "alive");
            }
        }
        // Somebody removes it under the machine that uses it.
        let pid = rig.pid_of(&at);
        run("ip", &["link", "del", "tn7i0"]);
        assert_eq!(link_names(&within(pid, "ip", &["-o", "link"])), ["joint", "lo", "tn7i0"]);
        rig.apply(&fs::read_to_string(rig.path("fleet.toml")).unwrap());
        assert_ne!(rig.pid_of(&at), pid);
        assert!(has_tap(rig));
        rig.prune();
    });
}

#[test]
fn machines_with_and_without_a_network_namespace_live_side_by_side() {
    on_a_host_of(Driver::FirecrackerApart, 1, |rig| {
        let here = namespace("thread-self", "net");
        rig.apply(ONE);
        let at = rig.only();
        assert_ne!(namespace(rig.pid_of(&at), "net"), here);
        // The same fleet, by an mvm that was told otherwise: what runs goes on as it is.
        let otherwise = |args: &[&str]| {
            let ran = finish(rig.mvm(args).env_remove("MVM_JAIL_NETNS").spawn().unwrap(), "mvm");
            assert_eq!(ran.code(), 0, "{args:?}: {}{}", ran.text(), ran.err);
        };
        let file = rig.file("fleet.toml", ONE.replace("running = 1", "running = 2"));
        otherwise(&["apply", "-f", &file]);
        let nets: BTreeSet<bool> = rig.machines().into_iter().map(|pid| namespace(pid, "net") == here).collect();
        assert_eq!(nets, BTreeSet::from([false, true]));
        otherwise(&["instance", "sleep", &at]);
        assert_eq!(run("ip", &["-o", "link"]).matches(": tn7i").count(), 1);
        otherwise(&["instance", "wake", &at]);
        assert_eq!(namespace(rig.pid_of(&at), "net"), here, "what begins now is as mvm was told");
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        assert_ne!(namespace(rig.pid_of(&at), "net"), here);
        rig.prune();
    });
}

#[test]
fn mvm_killed_at_any_moment_leaves_one_machine_with_one_interface_after_the_next_pass() {
    on_a_host_of(Driver::FirecrackerApart, 1, |rig| {
        let mut random = Random::new();
        rig.apply(ONE);
        let at = rig.only();
        for round in 0..16 {
            let (before, verb) = if round % 2 == 0 { ("stop", "start") } else { ("sleep", "wake") };
            rig.ok(&["instance", before, &at]);
            let whole = rig.ran(&["instance", verb, &at]).took;
            rig.ok(&["instance", before, &at]);
            let moment = Duration::from_micros(random.below(u64::try_from(whole.as_micros()).unwrap()));
            let mut start = rig.mvm(&["instance", verb, &at]).spawn().unwrap();
            std::thread::sleep(moment);
            start.kill().unwrap();
            start.wait().unwrap();
            rig.apply(ONE);
            let what = format!("round {round}, {verb} killed after {moment:?}");
            assert_eq!(rig.state_of(&at), "Running", "{what}");
            assert_eq!(rig.machines(), [rig.pid_of(&at)], "{what}: exactly one");
            let links = run("ip", &["-o", "link"]);
            assert_eq!(links.matches(": tn").count(), 1, "{what}: {links}");
            assert_eq!(keepers(), BTreeSet::new(), "{what}");
        }
        rig.prune();
    });
}

fn directories(rig: &Rig) -> usize {
    fs::read_dir(rig.run_dir().join("throwaway")).map_or(0, Iterator::count)
}

fn nothing_is_left(rig: &Rig) -> bool {
    rig.machines().is_empty() && keepers().is_empty() && directories(rig) == 0
}

/// Begins a command that waits for a line on its standard input, which is not written.
fn endless(rig: &Rig) -> std::process::Child {
    rig.mvm(&["run", "-i", "--", "sh", "-c", "read line"]).stdin(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_throwaway_machine_runs_on_firecracker_and_is_gone_whatever_happens() {
    for driver in BOTH {
        on_a_host_of(driver, 1, move |rig| {
            let ran = rig.ran(&["run", "--", "sh", "-c", "echo said; exit 3"]);
            assert_eq!((ran.code(), ran.text().as_str(), ran.err.as_str()), (3, "said\n", ""));
            assert!(nothing_is_left(rig));
            let ran = rig.ran_with(&["run", "-i", "--", "sh", "-c", "read line; echo $line"], b"through\n");
            assert_eq!((ran.code(), ran.text().as_str()), (0, "through\n"));
            // One whose guest ends by itself, or that is killed, under the command.
            let child = endless(rig);
            rig.eventually("it runs", Duration::from_secs(90), || rig.machines().len() == 1);
            let (pid, keeper) = (rig.machines()[0], keepers());
            assert_eq!(keeper.len(), 1);
            let inside = namespace(pid, "pid");
            assert!(numbers(pid).len() == 2 && numbers(pid)[1] != 1, "{:?}", numbers(pid));
            let keeper = *keeper.first().unwrap();
            assert_eq!((numbers(keeper), namespace(keeper, "pid")), (vec![keeper, 1], inside.clone()));
            assert_eq!(fs::read_dir(format!("/proc/{keeper}/fd")).unwrap().count(), 1, "it has what it waits for, and nothing of mvm's");
            assert_eq!(namespace(pid, "net") == namespace("thread-self", "net"), driver == Driver::Firecracker);
            if driver == Driver::FirecrackerApart {
                assert_eq!(link_names(&within(pid, "ip", &["-o", "link"])), ["lo"]);
            }
            signal(pid, Signal::KILL);
            let ran = finish(child, "mvm run");
            assert_ne!(ran.code(), 0);
            assert!(nothing_is_left(rig) && members(&inside.unwrap()).is_empty(), "{}", ran.err);

            for how in [Signal::TERM, Signal::INT, Signal::KILL] {
                let child = endless(rig);
                rig.eventually("it runs", Duration::from_secs(90), || rig.machines().len() == 1);
                let inside = namespace(rig.machines()[0], "pid").unwrap();
                signal(i32::try_from(child.id()).unwrap(), how);
                rig.eventually("it is gone", Duration::from_secs(5), || nothing_is_left(rig) && members(&inside).is_empty());
                let ran = finish(child, "mvm run");
                if how != Signal::KILL {
                    assert_eq!(ran.code(), 130, "{}", ran.err);
                }
            }
            rig.assert_nothing_left();
        });
    }
}

#[test]
fn mvm_run_killed_at_any_moment_leaves_nothing() {
    on_a_host_of(Driver::FirecrackerApart, 1, |rig| {
        let mut random = Random::new();
        rig.ok(&["run", "--", "sh", "-c", ":"]);
        let begun = Instant::now();
        rig.ok(&["run", "--", "sh", "-c", ":"]);
        let whole = u64::try_from(begun.elapsed().as_micros()).unwrap();
        for round in 0..16 {
            let moment = Duration::from_micros(random.below(whole));
            let mut running = rig.mvm(&["run", "--", "sh", "-c", ":"]).spawn().unwrap();
            std::thread::sleep(moment);
            running.kill().unwrap();
            running.wait().unwrap();
            rig.eventually(&format!("round {round}, killed after {moment:?}: nothing is left"), Duration::from_secs(10), || {
                nothing_is_left(rig)
            });
        }
        rig.assert_nothing_left();
    });
}
