//! Sleep and wake of real guests: the same machine goes on, and what is not the same machine is refused.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::rig::{ONE, Rig, finish, on_a_host, text};

const COUNTER: &str = r#"
[tenants.pools.workload]
command = ["sh", "-c", "n=0; while :; do n=$((n+1)); echo $$ $n $(cat /proc/sys/kernel/random/boot_id) > /tmp/counter; sleep 0.2; done"]
"#;

/// How far the guest's clock is off the host's, in milliseconds, and how exactly that is known: half a round trip.
fn clock_error(rig: &Rig, at: &str) -> (f64, f64) {
    let script = "while read x; do adjtimex | grep tv_ | tr -dc '0-9\\n' | tr '\\n' ' '; echo; done";
    let mut child = rig.mvm(&["exec", "-i", at, "--", "sh", "-c", script]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let mut best = (0.0, f64::MAX);
    // On a busy machine an answer takes long, and then says little.
    for _ in 0..200 {
        let asked = now();
        stdin.write_all(b"?\n").unwrap();
        let line = lines.next().unwrap().unwrap();
        let answered = now();
        let numbers: Vec<f64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let guest = numbers[0] + numbers[1] / 1e6;
        let doubt = (answered - asked) / 2.0 * 1000.0;
        if doubt < best.1 {
            best = ((guest - (asked + answered) / 2.0) * 1000.0, doubt);
        }
        if best.1 < 25.0 {
            break;
        }
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
    best
}

fn counter(rig: &Rig, at: &str) -> (String, u64, String) {
    let line = rig.sh(at, "until [ -s /tmp/counter ]; do sleep 0.1; done; cat /tmp/counter");
    let words: Vec<&str> = line.split(' ').collect();
    (words[0].to_owned(), words[1].parse().unwrap(), words[2].to_owned())
}

/// Memory that has no name any more and is still held by somebody, by its owner's uid.
fn memfds(uid: u64) -> Vec<String> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().filter_map(Result::ok) {
            if let Ok(target) = fs::read_link(fd.path())
                && target.to_string_lossy().starts_with("/memfd:")
                && fs::metadata(fd.path()).is_ok_and(|metadata| u64::from(metadata.uid()) == uid)
            {
                found.push(format!("{} {}", fd.path().display(), target.display()));
            }
        }
    }
    found
}

#[test]
fn a_guest_goes_on_where_it_was_three_times() {
    on_a_host(1, |rig| {
        rig.apply(&(ONE.to_owned() + COUNTER));
        let at = rig.only();
        let address = text(&rig.instances()[0]["address"]);
        let uid = 0x7000_0000 + 7 * 65_536;
        let mut before = counter(rig, &at);
        let (error, doubt) = clock_error(rig, &at);
        eprintln!("clock before any sleep: {error:+.1} ms ± {doubt:.1}");
        let mut randoms = vec![rig.sh(&at, "head -c 16 /dev/urandom | xxd -p")];
        for cycle in 1..=3_u64 {
            // A session that is open is cut, and the agent answers afterwards.
            let session = rig.mvm(&["exec", &at, "--", "sleep", "1000"]).spawn().unwrap();
            rig.eventually("the command runs", Duration::from_secs(20), || rig.sh(&at, "pidof sleep || true").split(' ').count() >= 2);
            let slept = rig.ran(&["instance", "sleep", &at]);
            assert_eq!(slept.code(), 0, "{}", slept.err);
            let cut = finish(session, "the session");
            assert_ne!(cut.code(), 0, "{cut:?}");
            assert!(!cut.err.is_empty(), "a session that is cut says why");
            eprintln!("cut session: {} {}", cut.code(), cut.err.trim());

            assert_eq!(rig.state_of(&at), "Sleeping");
            assert_eq!(rig.machines(), Vec::<i32>::new());
            assert_eq!(memfds(uid), Vec::<String>::new());
            assert!(rig.fails(4, &["exec", &at, "--", "true"]).contains("instance wake"));
            // As much time as a clock that is not set right would be off by.
            std::thread::sleep(Duration::from_secs(cycle));
            let woke = rig.ran(&["instance", "wake", &at]);
            assert_eq!(woke.code(), 0, "{}", woke.err);
            let (error, doubt) = clock_error(rig, &at);
            eprintln!("cycle {cycle}: sleep {:?}, wake {:?}, clock {error:+.1} ms ± {doubt:.1}", slept.took, woke.took);
            assert!(error.abs() + doubt <= 100.0, "the clock is {error} ± {doubt} ms off");
            let after = counter(rig, &at);
            assert_eq!((&after.0, &after.2), (&before.0, &before.2), "the same process of the same boot");
            assert!(after.1 > before.1 && after.1 < before.1 + 100, "{before:?} {after:?}");
            before = after;
            assert_eq!(text(&rig.instances()[0]["address"]), address);
            assert!(rig.sh(&at, "ip addr show eth0").contains(&address));
            rig.sh(&at, "ping -c 1 -W 5 10.240.7.1 >/dev/null");
            randoms.push(rig.sh(&at, "head -c 16 /dev/urandom | xxd -p"));
        }
        let different: std::collections::BTreeSet<_> = randoms.iter().collect();
        assert_eq!(different.len(), randoms.len());

        rig.ok(&["instance", "warm", &at]);
        let pid = rig.pid_of(&at);
        assert!(rig.fails(4, &["exec", &at, "--", "true"]).contains("instance resume"));
        std::thread::sleep(Duration::from_secs(1));
        rig.ok(&["instance", "resume", &at]);
        assert_eq!(rig.pid_of(&at), pid);
        let (error, doubt) = clock_error(rig, &at);
        eprintln!("after warm: clock {error:+.1} ms ± {doubt:.1}");
        assert!(error.abs() + doubt <= 100.0, "the clock is {error} ± {doubt} ms off");
        assert_eq!(counter(rig, &at).0, before.0);
        rig.ok(&["instance", "warm", &at]);
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        assert_eq!(counter(rig, &at).0, before.0);
        rig.prune();
    });
}

/// One snapshot woken twice: what both make of randomness must differ, or keys made after a wake would be known.
#[test]
fn two_wakes_of_one_snapshot_differ_in_their_randomness() {
    on_a_host(1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let one = rig.path("state/tenants/acme/pools/web/instances").join(at.rsplit('/').next().unwrap());
        rig.ok(&["instance", "sleep", &at]);
        let copy = rig.path("copy");
        crate::wire::run("cp", &["-a", one.to_str().unwrap(), copy.to_str().unwrap()]);
        rig.ok(&["instance", "wake", &at]);
        let first = rig.sh(&at, "head -c 32 /dev/urandom | xxd -p -c 64; cat /proc/sys/kernel/random/boot_id");
        rig.ok(&["instance", "stop", "--force", &at]);
        fs::remove_dir_all(&one).unwrap();
        fs::rename(&copy, &one).unwrap();
        rig.ok(&["instance", "wake", &at]);
        let second = rig.sh(&at, "head -c 32 /dev/urandom | xxd -p -c 64; cat /proc/sys/kernel/random/boot_id");
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&first)[1], lines(&second)[1], "the same snapshot");
        assert_ne!(lines(&first)[0], lines(&second)[0], "the same random numbers");
        rig.prune();
    });
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_by_name_and_booted_afresh() {
    on_a_host(2, |rig| {
        let document = ONE.replace("running = 1", "running = 2") + COUNTER;
        rig.apply(&document);
        let all = rig.addresses();
        let (at, other) = (all[0].as_str(), all[1].as_str());
        let dir = |at: &str| rig.path("state/tenants/acme/pools/web/instances").join(at.rsplit('/').next().unwrap()).join("snapshot");
        rig.sh(at, "echo precious > /data/mark; sync");
        let boot = counter(rig, at).2;

        // Another build of QEMU.
        rig.ok(&["instance", "sleep", at]);
        let manifest = dir(at).join("manifest.json");
        let was = fs::read_to_string(&manifest).unwrap();
        let mut changed: Value = serde_json::from_str(&was).unwrap();
        changed["stamp"]["build"] = "QEMU emulator version 9.9".into();
        fs::write(&manifest, changed.to_string()).unwrap();
        let said = rig.fails(4, &["instance", "wake", at]);
        assert!(said.contains("QEMU emulator version 9.9") && said.contains("build") && said.contains("instance stop"), "{said}");
        assert_eq!(rig.state_of(at), "Sleeping");
        assert_eq!(rig.machines().len(), 1);
        fs::write(&manifest, &was).unwrap();
        rig.ok(&["instance", "wake", at]);
        assert_eq!(counter(rig, at).2, boot);

        // One byte of memory.
        rig.ok(&["instance", "sleep", at]);
        let memory = fs::File::options().read(true).write(true).open(dir(at).join("memory")).unwrap();
        let place = memory.metadata().unwrap().len() / 4 + 4321;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, place).unwrap();
        memory.write_all_at(&[byte[0] ^ 0x10], place).unwrap();
        let said = rig.fails(4, &["instance", "wake", at]);
        assert!(said.contains("memory") && said.contains("damaged"), "{said}");
        assert_eq!(rig.machines().len(), 1, "nothing runs of it");
        // By hand: stop drops the snapshot, start boots with the same disk.
        rig.ok(&["instance", "stop", at]);
        assert!(!dir(at).exists());
        rig.ok(&["instance", "start", at]);
        assert_eq!(rig.sh(at, "cat /data/mark"), "precious");
        assert_ne!(counter(rig, at).2, boot);

        // The snapshot of another instance; apply boots it afresh by itself.
        rig.ok(&["instance", "sleep", at]);
        rig.ok(&["instance", "sleep", other]);
        let aside = rig.path("aside");
        fs::rename(dir(at), &aside).unwrap();
        crate::wire::run("cp", &["-a", dir(other).to_str().unwrap(), dir(at).to_str().unwrap()]);
        let said = rig.fails(4, &["instance", "wake", at]);
        assert!(said.contains(other), "{said}");
        let boot = |at: &str| counter(rig, at).2;
        let table = rig.apply(&document);
        assert_eq!(table.lines().filter(|line| line.contains("Running")).count(), 2, "{table}");
        assert_eq!(rig.sh(at, "cat /data/mark"), "precious");
        assert_ne!(boot(at), boot(other));

        // Memory cut short, found by apply without anybody having asked before.
        rig.ok(&["instance", "sleep", at]);
        fs::File::options().write(true).open(dir(at).join("memory")).unwrap().set_len(4096).unwrap();
        rig.apply(&document);
        assert_eq!(rig.sh(at, "cat /data/mark"), "precious");
        rig.prune();
    });
}
