//! Firecracker's jail from outside and inside: what it is, what is planted in it, and a Firecracker that misbehaves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::firecracker::{healthy, pack, stand_in};
use crate::rig::{Driver, ONE, Ran, Random, Rig, finish, on_a_host_of};
use crate::wire::run;

/// The uids of the instances of the tenant in [`ONE`].
const UIDS: std::ops::Range<u32> = 0x7007_0000..0x7008_0000;
/// How long the driver waits for an answer to most calls.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// The bytes of the guest memory in [`ONE`].
const MEMORY: u64 = 128 << 20;

/// The device state in a snapshot's directory.
const STATE: &str = "device.state";

/// A field of `/proc/PID/status`.
fn status(pid: i32, field: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap_or_else(|| panic!("{field} in {text}"));
    line.split_whitespace().map(str::to_owned).collect()
}

/// The processes of users on this host, which is this thread's network namespace.
fn processes_of(uids: &std::ops::Range<u32>) -> Vec<String> {
    let here = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let of_them = entries.filter(|entry| {
        let is_of_them = entry.metadata().is_ok_and(|meta| uids.contains(&meta.uid()));
        is_of_them && fs::read_link(entry.path().join("ns/net")).is_ok_and(|net| net == here)
    });
    let named = of_them.filter_map(|entry| {
        let words = fs::read_to_string(entry.path().join("cmdline")).ok().filter(|words| !words.is_empty())?;
        Some(format!("{} {}", entry.path().display(), words.replace('\0', " ")))
    });
    named.collect()
}

/// What belongs to a user below a directory.
fn files_of(uids: &std::ops::Range<u32>, dirs: &[PathBuf]) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), dirs.to_vec());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
            let Ok(meta) = entry.path().symlink_metadata() else { continue };
            if uids.contains(&meta.uid()) {
                found.push(entry.path());
            }
            if meta.is_dir() {
                dirs.push(entry.path());
            }
        }
    }
    found
}

fn run_dir(rig: &Rig, at: &str) -> PathBuf {
    rig.run_dir().join("instances").join(at.rsplit('/').next().unwrap())
}

/// Everything that tells whether a file was touched.
fn likeness(path: &Path) -> (Vec<u8>, u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (fs::read(path).unwrap(), meta.uid(), meta.gid(), meta.mode())
}

fn names(dir: impl AsRef<Path>) -> BTreeSet<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Tries to connect as another user, and tells what came of it.
fn connect_as(uid: u32, path: &Path) -> std::io::Result<()> {
    let path = path.to_owned();
    let tried = std::thread::spawn(move || {
        // Of this thread only.
        rustix::thread::set_thread_groups(&[]).unwrap();
        let (user, group) = (rustix::process::Uid::from_raw(uid), rustix::process::Gid::from_raw(uid));
        rustix::thread::set_thread_res_gid(group, group, group).unwrap();
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        UnixStream::connect(path).map(drop)
    });
    tried.join().unwrap()
}

#[test]
fn a_jail_is_closed_on_all_sides_and_nothing_of_it_stays() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let own_mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        rig.apply(ONE);
        let at = rig.only();
        let pid = rig.pid_of(&at);

        let uids = status(pid, "Uid");
        assert!(UIDS.contains(&uids[0].parse().unwrap()) && uids.iter().all(|uid| *uid == uids[0]), "{uids:?}");
        assert_eq!(status(pid, "Gid"), uids);
        assert_eq!(status(pid, "Groups"), Vec::<String>::new());
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(pid, set), ["0000000000000000"], "{set}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), ["1"]);
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{limits}"));
            let both: Vec<u64> = line.split_whitespace().take(2).map(|number| number.parse().unwrap()).collect();
            (both[0], both[1])
        };
        assert_eq!(limit("Max core file size"), (0, 0));
        assert_eq!(limit("Max file size"), (256 << 20, 256 << 20), "room for a log of years, which is more than its memory and its disk");
        assert_eq!(limit("Max open files"), (2048, 2048));
        assert_eq!(limit("Max processes"), (512, 512));
        assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"");

        // A root of its own.
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        assert_ne!(fs::metadata(&root).unwrap().dev(), fs::metadata("/").unwrap().dev());
        let needed = ["dev", "drives", "firecracker", "firecracker.pid", "host", "image", "run", "scratch"];
        let guest_of_stand_in = ["bin"];
        let extra: Vec<String> = names(&root).into_iter().filter(|name| !needed.contains(&name.as_str())).collect();
        assert!(extra.iter().all(|name| !crate::firecracker::is_real() && guest_of_stand_in.contains(&name.as_str())), "{extra:?}");
        assert_eq!(names(root.join("drives")), BTreeSet::from(["config", "data", "root", "secrets"].map(str::to_owned)));
        for (path, kind) in [("dev/kvm", "device"), ("dev/net/tun", "device"), ("drives/root", "file")] {
            let found = fs::symlink_metadata(root.join(path)).unwrap().file_type();
            assert_eq!(found.is_char_device(), kind == "device", "{path}");
        }
        // Mounts of its own, which the host does not have.
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
        assert_ne!(namespace(&pid.to_string()), namespace("thread-self"));
        assert_eq!(fs::read_to_string("/proc/thread-self/mountinfo").unwrap(), own_mounts);
        assert_eq!(names(rig.run_dir().join("jails")), BTreeSet::new());
        let inside = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let options = |place: &str| {
            let line = inside.lines().find(|line| line.split(' ').nth(4) == Some(place)).unwrap_or_else(|| panic!("{place}: {inside}"));
            line.split(' ').nth(5).unwrap().split(',').map(str::to_owned).collect::<BTreeSet<_>>()
        };
        for place in ["/drives/root", "/image/kernel"] {
            assert!(options(place).is_superset(&["ro", "nosuid", "nodev", "noexec"].map(str::to_owned).into()), "{place}");
        }
        for place in ["/drives/data", "/host", "/scratch"] {
            assert!(options(place).is_superset(&["rw", "nosuid", "nodev", "noexec"].map(str::to_owned).into()), "{place}");
        }
        assert!(inside.lines().all(|line| line.split(' ').nth(4).is_some_and(|place| place == "/" || !place.contains("old_root"))));

        // Nobody else reaches its API, from whatever side.
        let api = run_dir(rig, &at).join("jail/api.sock");
        UnixStream::connect(&api).unwrap();
        let neighbour = uids[0].parse::<u32>().unwrap() + 1;
        for uid in [12_345, neighbour] {
            for path in [&api, &root.join("host/api.sock"), &run_dir(rig, &at).join("jail/v.sock")] {
                let error = connect_as(uid, path).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{uid} {}: {error}", path.display());
            }
        }

        rig.ok(&["instance", "stop", &at]);
        assert_eq!(processes_of(&UIDS), Vec::<String>::new());
        assert!(!run_dir(rig, &at).exists());
        assert_eq!(names(rig.run_dir().join("jails")), BTreeSet::new());
        assert_eq!(fs::read_to_string("/proc/thread-self/mountinfo").unwrap(), own_mounts);
        assert!(!run("ip", &["-o", "link"]).contains(": tn"));
        assert_eq!(files_of(&UIDS, &[rig.run_dir()]), Vec::<PathBuf>::new());
        rig.prune();
        assert_eq!(files_of(&UIDS, &[rig.run_dir(), rig.state()]), Vec::<PathBuf>::new());
    });
}

/// What may be put in a socket's place.
const PLANTS: [&str; 5] = ["a symlink", "a hard link", "a symlink to another's", "a hard link to another's", "a file"];

#[test]
fn what_is_planted_in_place_of_a_socket_is_never_spoken_to() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let document = ONE.replace("running = 1", "running = 2");
        rig.apply(&document);
        let all = rig.addresses();
        let (at, other) = (all[0].as_str(), all[1].as_str());
        let own = rig.path("listener");
        let listener = UnixListener::bind(&own).unwrap();
        listener.set_nonblocking(true).unwrap();
        for socket in ["v.sock", "api.sock"] {
            for how in PLANTS {
                let (place, others) = (run_dir(rig, at).join("jail").join(socket), run_dir(rig, other).join("jail").join(socket));
                let aside = place.with_file_name("aside");
                fs::rename(&place, &aside).unwrap();
                match how {
                    "a symlink" => symlink(&own, &place).unwrap(),
                    "a hard link" => fs::hard_link(&own, &place).unwrap(),
                    "a symlink to another's" => symlink(&others, &place).unwrap(),
                    "a hard link to another's" => fs::hard_link(&others, &place).unwrap(),
                    _ => fs::write(&place, "no socket").unwrap(),
                }
                let args: &[&str] = if socket == "v.sock" { &["exec", at, "--", "true"] } else { &["instance", "warm", at] };
                let ran = rig.ran(args);
                assert_ne!(ran.code(), 0, "{socket} {how}");
                assert!(
                    ran.err.contains(socket) && ran.err.contains("socket of user") | ran.err.contains("is no socket"),
                    "{how}: {}",
                    ran.err
                );
                assert!(ran.took < CALL_DEADLINE, "{socket} {how}: {:?}", ran.took);
                fs::remove_file(&place).ok();
                if socket == "v.sock" {
                    fs::rename(&aside, &place).unwrap();
                } else {
                    // Whether it runs can only be asked through the socket: it is ended, and started anew.
                    rig.apply(&document);
                }
                assert_eq!(rig.sh(at, "echo here"), "here");
                assert_eq!(rig.state_of(other), "Running");
                let error = listener.accept().unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock, "{socket} {how}: somebody came");
            }
        }
        // The directory that they are in.
        let jail = run_dir(rig, at).join("jail");
        fs::rename(&jail, rig.path("aside")).unwrap();
        symlink(run_dir(rig, other).join("jail"), &jail).unwrap();
        rig.fails(1, &["exec", at, "--", "true"]);
        fs::remove_file(&jail).unwrap();
        fs::rename(rig.path("aside"), &jail).unwrap();
        assert_eq!((rig.sh(at, "echo here"), rig.sh(other, "echo there")), ("here".into(), "there".into()));
        rig.prune();
    });
}

/// Begins to put an instance to sleep, and returns when Firecracker has written all and not said so yet.
fn sleep_begun(rig: &Rig, at: &str) -> std::process::Child {
    let sleep = rig.mvm(&["instance", "sleep", at]).spawn().unwrap();
    let scratch = rig.instance_dir(at).join("vmm");
    let length = |name: &str| fs::symlink_metadata(scratch.join(name)).map_or(0, |meta| meta.len());
    rig.eventually("the snapshot is written", Duration::from_secs(20), || length("state") > 0 && length("memory") == MEMORY);
    sleep
}

#[test]
fn nothing_planted_while_a_snapshot_is_written_is_taken() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        stand_in(rig, &json!({ "kernel": "any", "PUT /snapshot/create": { "do": "slow:400ms", "when": "after" } }));
        rig.apply(ONE);
        let at = rig.only();
        let (pid, dir) = (rig.pid_of(&at), rig.instance_dir(&at));
        let (scratch, foreign) = (dir.join("vmm"), rig.path("foreign"));
        fs::File::create(&foreign).unwrap().set_len(MEMORY).unwrap();
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o600)).unwrap();
        let before = likeness(&foreign);
        let goes_on = |ran: Ran, expected: &[&str]| {
            assert_ne!(ran.code(), 0, "{}", ran.text());
            assert!(expected.iter().any(|one| ran.err.contains(one)), "{expected:?}: {}", ran.err);
            assert_eq!((rig.state_of(&at), rig.pid_of(&at)), ("Running".into(), pid));
            assert_eq!(rig.sh(&at, "echo alive"), "alive");
            assert!(likeness(&foreign) == before, "the foreign file was touched");
            assert!(!dir.join("snapshot/manifest.json").exists());
        };
        for name in ["state", "memory"] {
            for how in ["symlink", "hard link", "directory", "pipe"] {
                let sleep = sleep_begun(rig, &at);
                let place = scratch.join(name);
                fs::remove_file(&place).unwrap();
                match how {
                    "symlink" => symlink(&foreign, &place).unwrap(),
                    "hard link" => fs::hard_link(&foreign, &place).unwrap(),
                    "directory" => fs::create_dir(&place).unwrap(),
                    _ => drop(run("mkfifo", &[place.to_str().unwrap()])),
                }
                goes_on(finish(sleep, how), &[name, "cannot write a snapshot"]);
                if how == "directory" {
                    fs::remove_dir(&place).unwrap();
                }
                assert_eq!(names(&scratch), BTreeSet::new(), "{how}");
            }
        }
        // The directory itself, before and during.
        let (aside, elsewhere) = (rig.path("aside"), rig.path("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("memory"), "of somebody else").unwrap();
        fs::rename(&scratch, &aside).unwrap();
        symlink(&elsewhere, &scratch).unwrap();
        goes_on(rig.ran(&["instance", "sleep", &at]), &["cannot write a snapshot"]);
        assert_eq!(names(&elsewhere), BTreeSet::from(["memory".to_owned()]));
        fs::remove_file(&scratch).unwrap();
        fs::rename(&aside, &scratch).unwrap();
        // Where it is to be put: a link there is replaced, not followed.
        fs::create_dir_all(dir.join("snapshot")).unwrap();
        for name in [STATE, "memory"] {
            fs::remove_file(dir.join("snapshot").join(name)).ok();
            symlink(&foreign, dir.join("snapshot").join(name)).unwrap();
        }
        rig.ok(&["instance", "sleep", &at]);
        assert!(likeness(&foreign) == before);
        rig.ok(&["instance", "wake", &at]);
        // The memory that the next one is put onto.
        let memory = dir.join("snapshot/memory");
        let pid = rig.pid_of(&at);
        for how in ["symlink", "hard link"] {
            let kept = rig.path("kept");
            fs::rename(&memory, &kept).unwrap();
            if how == "symlink" {
                symlink(&foreign, &memory).unwrap()
            } else {
                fs::hard_link(&foreign, &memory).unwrap()
            }
            let ran = rig.ran(&["instance", "sleep", &at]);
            assert!(likeness(&foreign) == before, "{how}: the foreign file was touched");
            match how {
                // The changed pages are put onto what is there, which is not what they changed.
                "symlink" => {
                    assert_ne!(ran.code(), 0);
                    assert!(ran.err.contains("cannot write a snapshot"), "{}", ran.err);
                    assert_eq!((rig.state_of(&at), rig.pid_of(&at)), ("Running".into(), pid));
                }
                // From now on it is whole, and replaces what is there.
                _ => assert_eq!(ran.code(), 0, "{}", ran.err),
            }
        }
        rig.ok(&["instance", "wake", &at]);
        assert_eq!(rig.sh(&at, "echo alive"), "alive");
        rig.prune();
    });
}

#[test]
fn nothing_planted_in_an_instances_directory_is_opened_for_its_machine() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let (dir, foreign) = (rig.instance_dir(&at), rig.path("foreign"));
        rig.ok(&["instance", "stop", "--force", &at]);
        fs::write(&foreign, "foreign").unwrap();
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o600)).unwrap();
        let before = likeness(&foreign);
        let disk = names(dir.join("volumes")).into_iter().next().unwrap();
        for name in ["console.log", "vmm.log", &format!("volumes/{disk}")] {
            for how in ["symlink", "hard link"] {
                let (place, aside) = (dir.join(name), rig.path("aside"));
                fs::rename(&place, &aside).unwrap();
                if how == "symlink" {
                    symlink(&foreign, &place).unwrap()
                } else {
                    fs::hard_link(&foreign, &place).unwrap()
                }
                let said = rig.fails(1, &["instance", "start", &at]);
                assert!(said.contains(place.to_str().unwrap()), "{name} {how}: {said}");
                assert!(likeness(&foreign) == before, "{name} {how}: it was touched");
                assert_eq!(rig.machines(), Vec::<i32>::new());
                fs::remove_file(&place).unwrap();
                fs::rename(&aside, &place).unwrap();
            }
        }
        rig.ok(&["instance", "start", &at]);
        rig.prune();
    });
}

/// Two instances of one tenant and one of another.
fn three() -> String {
    let pool = "[[tenants.pools]]\npool_id = \"web\"\ninstance_resources = { vcpus = 1, mem_mib = 128, data_disk_mib = 64 }\n\
                desired_counts = { running = 1 }\nruntime_policy = { min_running_seconds = 0 }\n";
    let evil = "[[tenants]]\ntenant_id = \"evil\"\nnetwork = { tenant_net_id = 8, ipv4_subnet = \"10.240.8.0/24\" }\n";
    ONE.replace("running = 1", "running = 2") + evil + pool
}

#[test]
fn no_snapshot_wakes_but_the_last_one_of_this_very_instance() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let document = three();
        rig.apply(&document);
        let all = rig.addresses();
        let (at, sibling, stranger) = (all[0].as_str(), all[1].as_str(), all[2].as_str());
        assert!(stranger.starts_with("evil/"), "{all:?}");
        let dir = |at: &str| rig.instance_dir(at).join("snapshot");
        let copy = |from: &Path, to: &Path| {
            if to.exists() {
                fs::remove_dir_all(to).unwrap();
            }
            run("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
        };
        let flip = |file: &Path, place: u64| {
            use std::os::unix::fs::FileExt;
            let file = fs::File::options().read(true).write(true).open(file).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, place).unwrap();
            file.write_all_at(&[byte[0] ^ 4], place).unwrap();
        };
        rig.sh(at, "true");
        // One from before, whole, with its manifest.
        rig.ok(&["instance", "sleep", at]);
        let (older, lent, foreign) = (rig.path("older"), rig.path("lent"), rig.path("foreign"));
        copy(&dir(at), &older);
        rig.ok(&["instance", "wake", at]);
        fs::write(&foreign, "foreign").unwrap();
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o600)).unwrap();
        let before = likeness(&foreign);
        let tamper = |how: &str| {
            let (state, memory) = (dir(at).join(STATE), dir(at).join("memory"));
            let other = if how.contains("stranger") { dir(stranger) } else { dir(sibling) };
            match how {
                "memory with another byte" => flip(&memory, MEMORY / 3),
                "state with another byte" => flip(&state, 100),
                "memory of before" => copy_file(&older.join("memory"), &memory),
                "state of before" => copy_file(&older.join(STATE), &state),
                "all of before" => copy(&older, &dir(at)),
                "memory of the sibling" | "memory of the stranger" => copy_file(&other.join("memory"), &memory),
                "all of the sibling" | "all of the stranger" => copy(&other, &dir(at)),
                "memory as a symlink to a foreign file" | "state as a symlink to a foreign file" => {
                    let place = if how.starts_with("memory") { &memory } else { &state };
                    fs::remove_file(place).unwrap();
                    symlink(&foreign, place).unwrap();
                }
                "state as a hard link to a foreign file" => {
                    fs::remove_file(&state).unwrap();
                    fs::hard_link(&foreign, &state).unwrap();
                }
                "memory with a second name" => fs::hard_link(&memory, &lent).unwrap(),
                "state as a symlink to itself elsewhere" => {
                    fs::rename(&state, &lent).unwrap();
                    symlink(&lent, &state).unwrap();
                }
                "the directory as a symlink to the sibling's" => {
                    fs::remove_dir_all(dir(at)).unwrap();
                    symlink(dir(sibling), dir(at)).unwrap();
                }
                "memory cut short" => fs::File::options().write(true).open(&memory).unwrap().set_len(MEMORY / 2).unwrap(),
                other => panic!("{other}"),
            }
        };
        let cases = [
            ("memory with another byte", "memory is not what was written"),
            ("state with another byte", "state is not what was written"),
            ("memory of before", "memory is not what was written"),
            ("state of before", "state is not what was written"),
            ("all of before", "not the one that it went to sleep with"),
            ("memory of the sibling", "memory is not what was written"),
            ("memory of the stranger", "memory is not what was written"),
            ("all of the sibling", sibling),
            ("all of the stranger", stranger),
            ("memory as a symlink to a foreign file", "memory"),
            ("state as a symlink to a foreign file", "state"),
            ("state as a hard link to a foreign file", "state"),
            ("memory with a second name", "memory"),
            ("state as a symlink to itself elsewhere", "state"),
            ("the directory as a symlink to the sibling's", "snapshot"),
            ("memory cut short", "memory is not what was written"),
        ];
        for (how, expected) in cases {
            for one in &all {
                rig.ok(&["instance", "sleep", one]);
            }
            let marked = likeness(&dir(sibling).join("manifest.json"));
            tamper(how);
            let ran = rig.ran(&["instance", "wake", at]);
            assert_ne!(ran.code(), 0, "{how}");
            assert!(ran.err.contains(expected) && ran.err.contains(at), "{how}: {}", ran.err);
            assert_eq!(rig.machines(), Vec::<i32>::new(), "{how}: nothing runs of it");
            assert!(likeness(&foreign) == before, "{how}: the foreign file was touched");
            assert!(likeness(&dir(sibling).join("manifest.json")) == marked, "{how}: another's snapshot was touched");
            if how.starts_with("the directory") {
                // Whose directory that is only an administrator knows.
                fs::remove_file(dir(at)).unwrap();
            }
            rig.apply(&document);
            assert!(rig.instances().iter().all(|one| one["state"] == "Running"), "{how}: {:?}", rig.instances());
            assert_eq!(rig.sh(at, "echo alive"), "alive", "{how}");
            fs::remove_file(&lent).ok();
        }
        rig.prune();
    });
}

fn copy_file(from: &Path, to: &Path) {
    run("cp", &["-a", "--sparse=always", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// How a call goes wrong, and what is said of it.
const WORDS: [(&str, &str); 5] = [
    ("die", "Firecracker ended"),
    ("close", "closed before the answer"),
    ("garbage", "not one of Firecracker"),
    ("cut", "closed before the answer"),
    ("fault:not today", "not today"),
];

fn misbehaving(call: &str, rule: Value) -> Value {
    let mut script = healthy();
    script[call] = rule;
    script
}

/// What has to be true after a command at which Firecracker misbehaved.
#[track_caller]
fn failed(ran: &Ran, call: &str, word: &str, expected: &[&str]) {
    assert!([1, 5].contains(&ran.code()), "{call} {word}: {} {}", ran.text(), ran.err);
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
        // Which of the calls that wait for each other is named, is open.
        assert!(ran.err.contains("PUT /") && ran.err.contains("no answer within 10000 ms"), "{}", ran.err);
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

/// A release's archive, made of the stand-ins, and its SHA-256.
fn release(rig: &Rig, version: &str) -> (String, String) {
    let (dir, arch) = (rig.path(&format!("release-{version}")), std::env::consts::ARCH);
    fs::create_dir_all(&dir).unwrap();
    let mut script = healthy();
    script["version"] = version.into();
    pack(&rig.path("packed"), &script);
    fs::rename(rig.path("packed"), dir.join(format!("firecracker-v{version}-{arch}"))).unwrap();
    fs::copy(rig.path("firecracker/jailer"), dir.join(format!("jailer-v{version}-{arch}"))).unwrap();
    fs::write(dir.join("SHA256SUMS"), "not looked at").unwrap();
    let archive = rig.path(&format!("firecracker-v{version}-{arch}.tgz"));
    let place = rig.path("").to_str().unwrap().to_owned();
    run("tar", &["-czf", archive.to_str().unwrap(), "-C", &place, &format!("release-{version}")]);
    let sum = run("sha256sum", &[archive.to_str().unwrap()]);
    (archive.to_str().unwrap().to_owned(), sum.split(' ').next().unwrap().to_owned())
}

/// Runs `mvm` with the versions that are side by side, and none besides.
fn with_versions(rig: &Rig, args: &[&str]) -> Ran {
    let mut command = rig.mvm(args);
    command.env_remove("MVM_FIRECRACKER").env("MVM_VMM", "firecracker");
    finish(command.spawn().unwrap(), &format!("mvm {args:?}"))
}

#[track_caller]
fn right(ran: Ran) -> String {
    assert_eq!(ran.code(), 0, "{}{}", ran.text(), ran.err);
    ran.text()
}

#[test]
fn releases_are_installed_side_by_side_and_a_snapshot_wakes_with_its_own() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        let versions = rig.path("versions");
        let install =
            |(archive, sum): &(String, String)| with_versions(rig, &["node", "install-firecracker", "--from", archive, "--sha256", sum]);
        let (older, newer) = (release(rig, "1.16.1"), release(rig, "1.17.0"));
        // None is there yet.
        let file = rig.file("fleet.toml", ONE);
        let said = with_versions(rig, &["apply", "-f", &file]).err;
        assert!(said.contains("install-firecracker"), "{said}");
        // With the sum of another one, or none.
        let ran = install(&(older.0.clone(), newer.1.clone()));
        assert!(ran.code() == 1 && ran.err.contains(&older.1) && ran.err.contains("SHA256SUMS"), "{}", ran.err);
        assert_eq!(install(&(older.0.clone(), "abc".into())).code(), 2);
        assert!(!versions.exists() || names(&versions).is_empty());
        let place = versions.join("1.16.1");
        for _ in 0..2 {
            assert_eq!(right(install(&older)).trim(), place.to_str().unwrap());
            assert_eq!(names(&versions), BTreeSet::from(["1.16.1".to_owned()]));
            assert_eq!(names(&place), BTreeSet::from(["firecracker", "jailer"].map(str::to_owned)));
        }
        right(with_versions(rig, &["apply", "-f", &file]));
        let at = rig.only();
        let build = |at: &str| {
            let manifest = fs::read(rig.instance_dir(at).join("snapshot/manifest.json")).unwrap();
            serde_json::from_slice::<Value>(&manifest).unwrap()["stamp"]["build"].as_str().unwrap().to_owned()
        };
        let version_of = |pid: i32| {
            let program = fs::read(format!("/proc/{pid}/root/firecracker")).unwrap();
            ["1.16.1", "1.17.0"].into_iter().find(|version| program == fs::read(versions.join(version).join("firecracker")).unwrap())
        };
        right(with_versions(rig, &["instance", "sleep", &at]));
        assert!(build(&at).starts_with("Firecracker 1.16.1 "), "{}", build(&at));
        // A newer one beside it, which others start with.
        right(install(&newer));
        let doctor = with_versions(rig, &["doctor"]).text();
        assert!(doctor.contains("1.17.0") && doctor.contains("also 1.16.1"), "{doctor}");
        right(with_versions(rig, &["instance", "wake", &at]));
        assert_eq!(version_of(rig.pid_of(&at)), Some("1.16.1"));
        right(with_versions(rig, &["instance", "sleep", &at]));
        assert!(build(&at).starts_with("Firecracker 1.16.1 "), "{}", build(&at));
        right(with_versions(rig, &["instance", "wake", &at]));
        right(with_versions(rig, &["instance", "stop", &at]));
        right(with_versions(rig, &["instance", "start", &at]));
        assert_eq!(version_of(rig.pid_of(&at)), Some("1.17.0"));
        // The maker of a snapshot goes.
        right(with_versions(rig, &["instance", "sleep", &at]));
        let kept = rig.path("kept");
        fs::rename(versions.join("1.17.0"), &kept).unwrap();
        let ran = with_versions(rig, &["instance", "wake", &at]);
        assert_eq!(ran.code(), 4, "{}", ran.err);
        assert!(ran.err.contains("Firecracker 1.17.0 ") && ran.err.contains("Firecracker 1.16.1 "), "{}", ran.err);
        right(with_versions(rig, &["apply", "-f", &file]));
        fs::rename(&kept, versions.join("1.17.0")).unwrap();
        assert_eq!(version_of(rig.pid_of(&at)), Some("1.16.1"), "booted afresh with what is there");
        // The same version with another content is not taken for the one that is there.
        fs::write(place.join("jailer"), "other").unwrap();
        let ran = install(&older);
        assert!(ran.code() == 1 && ran.err.contains("is there already with another content"), "{}", ran.err);
        rig.prune();
    });
}

#[test]
fn a_firecracker_that_cannot_be_used_is_named_with_its_remedy() {
    on_a_host_of(Driver::StandIn, 1, |rig| {
        let file = rig.file("fleet.toml", ONE);
        let (program, jailer) = (rig.path("firecracker/firecracker"), rig.path("firecracker/jailer"));
        let refused = |expected: &[&str]| {
            for args in [&["apply", "-f", &file, "--no-wait", "--vmm", "firecracker"][..], &["doctor"]] {
                let begun = Instant::now();
                let ran = rig.ran(args);
                let said = ran.text() + &ran.err;
                assert!(begun.elapsed() < CALL_DEADLINE, "{args:?}: {:?}", begun.elapsed());
                assert!(args[0] == "doctor" || ran.code() != 0, "{said}");
                assert!(expected.iter().all(|one| said.contains(one)), "{args:?} {expected:?}: {said}");
            }
            assert_eq!(rig.machines(), Vec::<i32>::new());
        };
        let script = |text: &str| {
            fs::remove_file(&program).ok();
            fs::write(&program, text).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        };
        stand_in(rig, &json!({ "kernel": "any", "version": "1.15.0" }));
        refused(&["is version 1.15.0, and 1.16.1 or later", "--allow-old-firecracker"]);
        rig.ok(&["apply", "-f", &file, "--allow-old-firecracker"]);
        let at = rig.only();
        assert_eq!(rig.sh(&at, "echo alive"), "alive");
        rig.ok(&["instance", "stop", "--force", &at]);
        script("#!/bin/sh\necho busybox v1\n");
        refused(&["which is not Firecracker"]);
        script("#!/bin/sh\nexec sleep 60\n");
        refused(&["did not end within 5 s"]);
        script("\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x07\0");
        refused(&["cannot be run: Exec format error"]);
        script("");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        refused(&["cannot be run: Permission denied"]);
        fs::remove_file(&program).unwrap();
        refused(&[program.to_str().unwrap(), "No such file"]);
        // No jailer: not with Firecracker, and not in production.
        stand_in(rig, &healthy());
        fs::remove_file(&jailer).unwrap();
        refused(&["no jailer beside"]);
        let said = rig.ran(&["apply", "-f", &file, "--no-wait", "--vmm", "auto", "--production"]);
        let said = said.text() + &said.err;
        assert!(said.contains("no jailer beside") && said.contains("--production") && said.contains("install-firecracker"), "{said}");
        stand_in(rig, &healthy());
        // What is no boundary.
        let said = rig.fails(2, &["apply", "-f", &file, "--production", "--firecracker-args=--no-seccomp"]);
        assert!(said.contains("--firecracker-args") && said.contains("--production"), "{said}");
        let said = rig.ran(&["apply", "-f", &file, "--no-wait", "--production", "--vmm", "qemu", "--accel", "tcg"]);
        let said = said.text() + &said.err;
        assert!(said.contains("no boundary") && said.contains("--production") && said.contains("/dev/kvm"), "{said}");
        assert_eq!(rig.machines(), Vec::<i32>::new());
        rig.ok(&["apply", "-f", &file, "--production"]);
        assert_eq!(rig.state_of(&at), "Running");
        rig.prune();
    });
}

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
