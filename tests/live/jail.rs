//! Firecracker's jail from outside and inside: what it is, what is planted in it, and a Firecracker that misbehaves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::firecracker::stand_in;
use crate::rig::{Driver, ONE, Ran, Rig, finish, on_a_host_of};
use crate::wire::run;

/// The uids of the instances of the tenant in [`ONE`].
pub const UIDS: std::ops::Range<u32> = 0x7007_0000..0x7008_0000;
/// How long the driver waits for an answer to most calls.
pub const CALL_DEADLINE: Duration = Duration::from_secs(10);
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
pub fn processes_of(uids: &std::ops::Range<u32>) -> Vec<String> {
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
pub fn files_of(uids: &std::ops::Range<u32>, dirs: &[PathBuf]) -> Vec<PathBuf> {
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

pub fn run_dir(rig: &Rig, at: &str) -> PathBuf {
    rig.run_dir().join("instances").join(at.rsplit('/').next().unwrap())
}

/// Everything that tells whether a file was touched.
fn likeness(path: &Path) -> (Vec<u8>, u32, u32, u32) {
    let meta = fs::symlink_metadata(path).unwrap();
    (fs::read(path).unwrap(), meta.uid(), meta.gid(), meta.mode())
}

pub fn names(dir: impl AsRef<Path>) -> BTreeSet<String> {
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
