//! Several `mvm` at once.

use std::time::Duration;

use crate::rig::{ONE, finish, on_a_host};

#[test]
fn two_at_once_wait_are_refused_or_go_side_by_side() {
    on_a_host(2, |rig| {
        let file = rig.file("fleet.toml", ONE.replace("running = 1", "running = 2"));
        let first = rig.mvm(&["apply", "-f", &file]).spawn().unwrap();
        rig.eventually("a machine boots", Duration::from_secs(60), || !rig.machines().is_empty());
        let said = rig.fails(4, &["agent", "reconcile", "--desired", &file]);
        assert!(said.contains("another mvm") || said.contains("reconcile"), "{said}");
        let second = rig.mvm(&["apply", "-f", &file]).spawn().unwrap();
        // Looking is always possible.
        rig.ok(&["status"]);
        rig.ok(&["plan", "-f", &file]);
        for (name, child) in [("first", first), ("second", second)] {
            let ran = finish(child, name);
            assert_eq!(ran.code(), 0, "{name}: {}", ran.err);
        }
        assert_eq!(rig.machines().len(), 2);

        // Commands run while an apply changes the other instance; an instance is put to sleep by hand amid an apply.
        let all = rig.addresses();
        let wider = rig.file("wider.toml", ONE.replace("running = 1", "running = 3"));
        let apply = rig.mvm(&["apply", "-f", &wider]).spawn().unwrap();
        rig.eventually("a third machine boots", Duration::from_secs(60), || rig.machines().len() == 3);
        let mut threads = Vec::new();
        for _ in 0..4 {
            let mut command = rig.mvm(&["exec", &all[0], "--", "sh", "-c", "sleep 0.5; echo done"]);
            threads.push(std::thread::spawn(move || finish(command.spawn().unwrap(), "exec")));
        }
        rig.ok(&["instance", "sleep", &all[1]]);
        for thread in threads {
            let ran = thread.join().unwrap();
            assert_eq!((ran.code(), ran.text().as_str()), (0, "done\n"), "{}", ran.err);
        }
        let ran = finish(apply, "apply");
        assert_eq!(ran.code(), 0, "{}", ran.err);
        // What somebody did by hand meanwhile is seen and put right, by this apply or the next.
        rig.ok(&["apply", "-f", &wider]);
        assert_eq!(rig.instances().iter().filter(|one| one["state"] == "Running").count(), 3);

        // Two hands on one instance: one after the other, and the second finds it done.
        let sleeps: Vec<_> = (0..2).map(|_| rig.mvm(&["instance", "sleep", &all[0]]).spawn().unwrap()).collect();
        let mut codes: Vec<i32> = sleeps.into_iter().map(|child| finish(child, "sleep").code()).collect();
        codes.sort_unstable();
        assert_eq!(codes, [0, 4]);
        assert_eq!(rig.state_of(&all[0]), "Sleeping");
        rig.prune();
    });
}
