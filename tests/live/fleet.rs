//! The example fleet: what a newcomer does first.

use std::fs;

use crate::rig::{ONE, on_a_host, text};

const QUICKSTART: &str = include_str!("../../examples/quickstart.toml");

#[test]
fn the_quickstart_fleet_is_applied_used_and_changed() {
    on_a_host(3, |rig| {
        let table = rig.apply(QUICKSTART);
        assert_eq!(table.lines().filter(|line| line.contains("Running")).count(), 3, "{table}");
        let all = rig.instances();
        assert!(all.iter().all(|one| one["state"] == "Running" && one["problem"].is_null()), "{all:?}");
        let worker = text(&all.iter().find(|one| one["role"] == "worker").unwrap()["instance"]);

        // Nothing is left to do.
        let file = rig.path("fleet.toml").to_str().unwrap().to_owned();
        assert_eq!(rig.ok(&["plan", "-f", &file, "--detailed-exitcode"]), "Nothing to do: everything is as declared.\n");
        assert_eq!(rig.ok(&["agent", "reconcile", "--desired", &file]), "Nothing to do: everything is as declared.\n");
        let described = rig.ok(&["agent", "desired"]);
        let described = rig.file("described.toml", described);
        assert_eq!(rig.ok(&["plan", "-f", &described, "--detailed-exitcode"]), "Nothing to do: everything is as declared.\n");

        // Commands: streams, codes, environment.
        assert!(rig.ok(&["exec", &worker, "--", "uname", "-r"]).contains("-cloud-"));
        assert_eq!(rig.ran(&["exec", &worker, "--", "sh", "-c", "exit 7"]).code(), 7);
        assert_eq!(rig.ran(&["exec", &worker, "--", "sh", "-c", "kill -9 $$"]).code(), 137);
        let unknown = rig.ran(&["exec", &worker, "--", "no-such-program"]);
        assert_eq!((unknown.code(), unknown.err.contains("no-such-program")), (127, true), "{unknown:?}");
        let both = rig.ran(&["exec", &worker, "-e", "NAME=value", "-w", "/tmp", "--", "sh", "-c", "pwd; echo $NAME >&2"]);
        assert_eq!((both.text().as_str(), both.err.as_str()), ("/tmp\n", "value\n"));
        let (_, prefix) = worker.rsplit_once("/i-").unwrap();
        let by_prefix = worker.replace(&format!("i-{prefix}"), &prefix[..4]);
        assert_eq!(rig.ok(&["exec", &by_prefix, "--", "hostname"]).trim(), format!("web-i-{prefix}"));

        // 300 KB through both ways, in one command and in pieces.
        let blob: Vec<u8> = (0..300_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let echoed = rig.ran_with(&["exec", "-i", &worker, "--", "cat"], &blob);
        assert_eq!(echoed.code(), 0, "{}", echoed.err);
        assert!(echoed.out == blob, "{} bytes came back", echoed.out.len());
        assert_eq!(rig.ok(&["exec", &worker, "--", "cat"]), "", "without -i a command reads nothing");

        // Files and directories both ways.
        let source = rig.path("tree");
        fs::create_dir_all(source.join("sub")).unwrap();
        fs::write(source.join("sub/blob"), &blob).unwrap();
        fs::write(source.join("empty"), "").unwrap();
        std::os::unix::fs::symlink("blob", source.join("sub/link")).unwrap();
        rig.ok(&["cp", source.to_str().unwrap(), &format!("{worker}:/data/")]);
        assert_eq!(
            rig.sh(&worker, "cd /data/tree && find . | sort && wc -c < sub/link"),
            ".\n./empty\n./sub\n./sub/blob\n./sub/link\n300000"
        );
        let back = rig.path("back");
        rig.ok(&["cp", &format!("{worker}:/data/tree"), back.to_str().unwrap()]);
        assert!(fs::read(back.join("sub/blob")).unwrap() == blob);
        assert_eq!(fs::read_link(back.join("sub/link")).unwrap().to_str(), Some("blob"));
        rig.fails(1, &["cp", &format!("{worker}:/no/such"), back.to_str().unwrap()]);
        rig.fails(3, &["cp", "/no/such/file", &format!("{worker}:/data/")]);

        // Logs.
        assert!(rig.ok(&["logs", &worker, "--source", "agent"]).contains("ready"));
        assert!(!rig.ok(&["logs", &worker, "--source", "console"]).is_empty());
        rig.ok(&["logs", &worker, "--source", "vmm"]);

        // A gateway forwards; a worker does not.
        let gateway = text(&all.iter().find(|one| one["role"] == "gateway").unwrap()["instance"]);
        assert_eq!(rig.sh(&gateway, "cat /proc/sys/net/ipv4/ip_forward"), "1");
        assert_eq!(rig.sh(&worker, "cat /proc/sys/net/ipv4/ip_forward"), "0");
        rig.prune();
    });
}

#[test]
fn an_edited_file_does_what_its_plan_said_and_data_survives() {
    on_a_host(2, |rig| {
        let document = |mem: u32, running: u32, sleeping: u32, warm: u32, says: &str| {
            crate::rig::ONE
                .replace("mem_mib = 128", &format!("mem_mib = {mem}"))
                .replace("{ running = 1 }", &format!("{{ running = {running}, sleeping = {sleeping}, warm = {warm} }}"))
                + &format!("[tenants.pools.workload]\ncommand = [\"sh\", \"-c\", \"echo I say {says}; sleep 100000\"]\n")
        };
        rig.apply(&document(128, 2, 0, 0, "one"));
        for at in rig.addresses() {
            rig.sh(&at, &format!("echo {at} > /data/mark"));
            assert_eq!(rig.ok(&["logs", &at]), "I say one\n");
        }
        for (mem, running, sleeping, warm, says) in
            [(128, 1, 1, 0, "one"), (128, 1, 0, 1, "one"), (160, 1, 0, 0, "two"), (160, 2, 0, 0, "two")]
        {
            let file = rig.file("fleet.toml", document(mem, running, sleeping, warm, says));
            rig.fails(10, &["plan", "-f", &file, "--detailed-exitcode"]);
            let planned = rig.json(&["plan", "-f", &file]);
            assert_eq!(planned["deferred"].as_array().map(Vec::len), Some(0), "{planned}");
            let known = rig.addresses();
            let mut expected: Vec<(String, String)> = planned["steps"]
                .as_array()
                .unwrap()
                .iter()
                .map(|step| (text(&step["action"]), text(&step["object"])))
                .filter(|(_, object)| known.contains(object))
                .collect();
            let before = rig.json(&["events", "acme"]).as_array().unwrap().len();
            rig.ok(&["apply", "-f", &file]);
            let events = rig.json(&["events", "acme"]);
            let mut done: Vec<(String, String)> = events.as_array().unwrap()[before..]
                .iter()
                .map(|event| (text(&event["action"]), text(&event["object"])))
                .filter(|(_, object)| known.contains(object))
                .collect();
            expected.sort();
            done.sort();
            assert_eq!(done, expected, "{planned}");
            rig.ok(&["plan", "-f", &file, "--detailed-exitcode"]);
            let count = |state: &str| rig.instances().iter().filter(|one| one["state"] == state).count() as u32;
            assert_eq!((count("Running"), count("Sleeping"), count("Warm")), (running, sleeping, warm));
            for one in rig.instances().iter().filter(|one| one["state"] == "Running") {
                let at = text(&one["instance"]);
                let total: u32 = rig.sh(&at, "awk '/MemTotal/ {print $2}' /proc/meminfo").parse().unwrap();
                assert!(total < mem * 1024 && total > (mem - 48) * 1024, "{total} KiB of {mem} MiB");
                assert_eq!(rig.ok(&["logs", &at]), format!("I say {says}\n"));
                if known.contains(&at) {
                    assert_eq!(rig.sh(&at, "cat /data/mark"), at, "the data disk is the instance's own, and stays");
                }
            }
        }
        rig.prune();
    });
}

#[test]
fn a_guest_that_its_image_is_too_large_for_is_refused_before_anything_starts() {
    on_a_host(1, |rig| {
        let file = rig.file("fleet.toml", ONE.replace("mem_mib = 128", "mem_mib = 104"));
        let said = rig.fails(6, &["apply", "-f", &file]);
        assert!(said.contains("needs at least 112 MiB of memory, and it has 104") && said.contains("--mem-mib 112"), "{said}");
        assert_eq!(rig.machines(), Vec::<i32>::new());
        // What it says is enough is enough.
        rig.apply(&ONE.replace("mem_mib = 128", "mem_mib = 112"));
        rig.prune();
    });
}
