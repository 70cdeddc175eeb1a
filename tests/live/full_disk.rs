//! A disk without room.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::rig::{ONE, on_a_host};
use crate::wire::run;

/// Every document below a directory is whole.
fn assert_whole(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            assert_whole(&path);
        } else if path.extension().is_some_and(|extension| extension == "json") {
            serde_json::from_slice::<Value>(&fs::read(&path).unwrap()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        } else {
            let name = path.file_name().unwrap().to_str().unwrap();
            // What the next write begins with is empty.
            let is_spare = name.ends_with(".json.tmp") && entry.metadata().unwrap().len() == 0;
            assert!(is_spare || !name.contains("quarantine") && !name.contains(".tmp"), "{}", path.display());
        }
    }
}

fn free_kib(dir: &Path) -> u64 {
    let stat = rustix::fs::statvfs(dir).unwrap();
    stat.f_bavail * stat.f_frsize / 1024
}

/// Leaves so much room.
fn fill(dir: &Path, leave_kib: u64) {
    let ballast = dir.join("ballast");
    let _ = fs::remove_file(&ballast);
    let size = free_kib(dir).saturating_sub(leave_kib) * 1024;
    fs::write(&ballast, vec![1; usize::try_from(size).unwrap()]).unwrap();
}

#[test]
fn a_full_disk_tears_nothing_and_the_next_apply_goes_on() {
    on_a_host(1, |rig| {
        let state = rig.state();
        let aside = rig.path("images-aside");
        fs::rename(state.join("images"), &aside).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=160m,mode=700", "tmpfs", state.to_str().unwrap()]);
        // That of builds is not needed, and larger than the disk.
        let _ = fs::remove_dir_all(aside.join("builder"));
        run("cp", &["-a", aside.to_str().unwrap(), state.join("images").to_str().unwrap()]);
        let file = rig.file("fleet.toml", ONE);

        for leave in [0, 4, 8, 16, 24, 32, 48] {
            fill(&state, leave);
            let ran = rig.ran(&["apply", "-f", &file, "--timeout", "30s"]);
            eprintln!("{leave} KiB: {} {}", ran.status, ran.err.trim());
            assert!(ran.code() == 0 || ran.err.contains("No space left"), "{leave}: {}", ran.err);
            fs::remove_file(state.join("ballast")).unwrap();
            assert_whole(&state);
        }
        rig.ok(&["apply", "-f", &file]);
        let at = rig.only();
        assert_eq!(rig.machines(), [rig.pid_of(&at)]);

        // No room for a snapshot: the guest goes on as before.
        rig.sh(&at, "echo $$ > /tmp/mark");
        fill(&state, 4096);
        let ran = rig.ran(&["instance", "sleep", &at]);
        assert_eq!(ran.code(), 1, "{}", ran.err);
        assert!(ran.err.contains("No space left"), "{}", ran.err);
        assert_eq!(rig.state_of(&at), "Running");
        rig.sh(&at, "cat /tmp/mark");
        // No room at all: stop, status and logs still do.
        fill(&state, 0);
        rig.ok(&["status"]);
        rig.sh(&at, "true");
        fs::remove_file(state.join("ballast")).unwrap();
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        rig.sh(&at, "cat /tmp/mark");

        // Memory of a woken guest is mapped from its snapshot, and a tmpfs allocates what is only read: afresh, for what comes now.
        rig.ok(&["instance", "stop", &at]);
        rig.ok(&["instance", "start", &at]);

        // A data disk for which there is no room: the guest sees an error, or goes on when there is room again.
        fill(&state, 0);
        let ran = rig.ran(&["exec", &at, "--", "sh", "-c", "timeout 10 dd if=/dev/urandom of=/data/big bs=1M count=8 conv=fsync"]);
        eprintln!("dd: {} {}", ran.status, ran.err.trim());
        fs::remove_file(state.join("ballast")).unwrap();
        rig.sh(&at, "echo alive");
        rig.ok(&["instance", "stop", &at]);
        rig.ok(&["apply", "-f", &file]);
        rig.sh(&at, "echo x > /data/after; sync; cat /data/after");
        rig.ok(&["apply", "-f", &rig.file("nothing.toml", crate::rig::NOTHING)]);
        assert_eq!(rig.machines(), Vec::<i32>::new());
        run("umount", &[state.to_str().unwrap()]);
        rig.assert_nothing_left();
    });
}
