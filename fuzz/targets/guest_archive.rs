//! Whatever a tar stream of a guest holds, nothing is written outside of the target.

#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mvm_guest_api::archive::unpack;

/// A directory for the whole run, in memory where there is one.
static SCRATCH: LazyLock<tempfile::TempDir> =
    LazyLock::new(|| tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a scratch directory can be made"));

fuzz_target!(|data: &[u8]| {
    let outer = SCRATCH.path().join("outer");
    let target = outer.join("target");
    fs::create_dir_all(&target).expect("the target can be made");
    fs::write(outer.join("witness"), "untouched").expect("the witness can be written");
    // Both ways: below a directory that is there, and as a file of another name.
    let below = unpack(data, &target);
    let named = unpack(data, &outer.join("named"));
    for copied in [below, named].into_iter().flatten() {
        assert!(copied.entries > 0 || copied.bytes == 0);
    }
    let mut names: Vec<_> = fs::read_dir(&outer).expect("the directory is there").flatten().map(|entry| entry.file_name()).collect();
    names.retain(|name| name != "named");
    names.sort();
    assert_eq!(names, ["target", "witness"]);
    assert_eq!(fs::read_to_string(outer.join("witness")).expect("the witness is there"), "untouched");
    // A directory without permissions does not stop root; anybody else would find it in the way.
    fs::remove_dir_all(&outer).expect("everything can be removed again");
});
