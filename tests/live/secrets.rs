//! Secrets: in the guest, and nowhere else.

use std::fs;

use crate::rig::{ONE, Rig, contains, on_a_host};

const FIRST: &[u8] = b"correct-horse-battery-staple-0001";
const SECOND: &[u8] = b"another-horse-another-staple-0002";

/// Nothing below the state or run directory, in any process's arguments or environment, or in what mvm tells holds the value.
#[track_caller]
fn assert_nowhere(rig: &Rig, value: &[u8], when: &str) {
    assert_eq!(rig.files_with(value), Vec::<std::path::PathBuf>::new(), "{when}");
    for process in fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(process.path().join(file)).unwrap_or_default();
            assert!(!contains(&bytes, value), "{when}: {} of {}", file, process.path().display());
        }
    }
    for args in [&["events", "-o", "json"][..], &["status", "-o", "json"], &["tenant", "secrets", "list", "acme", "-o", "json"]] {
        assert!(!contains(rig.ok(args).as_bytes(), value), "{when}: {args:?}");
    }
}

#[test]
fn a_secret_is_in_the_guest_and_nowhere_else() {
    on_a_host(1, |rig| {
        rig.ok(&["tenant", "create", "acme", "--net-id", "7", "--subnet", "10.240.7.0/24"]);
        let set = rig.ran_with(&["tenant", "secrets", "set", "acme", "api-token"], FIRST);
        assert_eq!((set.code(), set.text().as_str()), (0, ""), "{}", set.err);
        rig.apply(ONE);
        let at = rig.only();
        let read = |rig: &Rig| rig.sh(&at, "cat /run/secrets/api-token").into_bytes();
        assert!(read(rig) == FIRST);
        assert_eq!(rig.sh(&at, "stat -c '%a %u %g' /run/secrets/api-token"), "400 0 0");
        assert_eq!(rig.sh(&at, "touch /run/secrets/x 2>/dev/null; echo $?"), "1");
        assert_ne!(rig.ran(&["exec", "-u", "65534", &at, "--", "cat", "/run/secrets/api-token"]).code(), 0);
        assert_nowhere(rig, FIRST, "while it runs");

        rig.ok(&["instance", "sleep", &at]);
        assert_nowhere(rig, FIRST, "asleep");
        rig.ok(&["instance", "wake", &at]);
        assert!(read(rig) == FIRST);

        // A new value comes with a wake.
        let file = rig.path("value");
        fs::write(&file, SECOND).unwrap();
        rig.ok(&["tenant", "secrets", "rotate", "acme", "api-token", "--from-file", file.to_str().unwrap()]);
        fs::remove_file(&file).unwrap();
        assert!(read(rig) == FIRST, "a guest that runs keeps what it has");
        assert_nowhere(rig, SECOND, "rotated");
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        assert!(read(rig) == SECOND);
        rig.ok(&["instance", "sleep", &at]);
        assert_nowhere(rig, FIRST, "asleep again");
        assert_nowhere(rig, SECOND, "asleep again");
        rig.ok(&["instance", "wake", &at]);
        rig.prune();
        assert_eq!(rig.files_with(SECOND), Vec::<std::path::PathBuf>::new());
    });
}
