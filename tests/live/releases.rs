//! Versions of Firecracker: installed side by side, and refused with a remedy where they cannot be used.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use serde_json::{Value, json};

use crate::firecracker::{healthy, pack, stand_in};
use crate::jail::{CALL_DEADLINE, names};
use crate::rig::{Driver, ONE, Ran, Rig, finish, on_a_host_of};
use crate::wire::run;

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
        // What QEMU would do is QEMU's, and no word on what guests run in.
        let row = |name: &str| doctor.lines().find(|line| line.split_whitespace().next() == Some(name));
        assert!(row("qemu").is_some_and(|row| row.contains("QEMU emulator version")) && row("vmm").is_none(), "{doctor}");
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
