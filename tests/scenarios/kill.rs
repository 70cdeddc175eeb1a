//! mvm is killed at every store write and every effect on host and machines; the next one finishes or undoes what was begun.

use mvm::agent::desired::DesiredState;
use mvm::infra::kill_switch::KillSwitch;
use mvm::vm::instance::InstanceState;

use crate::world::{World, apply_on, fleet, nothing};

/// Brings a fleet from one declaration to another, killed at each effect in turn; then another process applies the same.
fn killed_everywhere(from: Option<&DesiredState>, to: &DesiredState) {
    killed_everywhere_in(World::new, from, to);
}

fn killed_everywhere_in(make: impl Fn() -> World, from: Option<&DesiredState>, to: &DesiredState) {
    let prepare = || {
        let world = make();
        if let Some(from) = from {
            world.ready(from);
        }
        world
    };
    let count = {
        let world = prepare();
        let switch = KillSwitch::never();
        let node = world.process(&switch).unwrap();
        apply_on(&node, to, 1).unwrap();
        switch.count()
    };
    assert!(count >= 10, "only {count} effects");
    for n in 0..count {
        let world = prepare();
        if let Ok(node) = world.process(&KillSwitch::at(n)) {
            // Whatever it says: it is dead.
            let _ = apply_on(&node, to, 1);
        }
        assert_eq!(world.vmm.doubles(), Vec::<String>::new(), "killed at {n} of {count}");
        let applied = world.apply(to);
        assert_eq!(applied.as_ref().ok(), Some(&mvm::agent::reconciler::Applied::Ready), "killed at {n} of {count}: {applied:#?}");
        world.check();
        assert!(world.plan(to).is_settled(), "killed at {n} of {count}");
        world.ready(&nothing());
    }
}

#[test]
fn while_a_fleet_is_created_and_started() {
    killed_everywhere(None, &fleet("running = 1", "running = 2"));
}

#[test]
fn while_instances_are_put_to_sleep() {
    killed_everywhere(Some(&fleet("running = 1", "running = 2")), &fleet("running = 1", "sleeping = 2"));
}

#[test]
fn while_instances_are_woken() {
    killed_everywhere(Some(&fleet("running = 1", "sleeping = 2")), &fleet("running = 1", "running = 2"));
}

#[test]
fn while_instances_are_warmed_and_resumed() {
    killed_everywhere(Some(&fleet("running = 1", "running = 2")), &fleet("running = 1", "warm = 2"));
    killed_everywhere(Some(&fleet("running = 1", "warm = 2")), &fleet("running = 1", "running = 2"));
    killed_everywhere(Some(&fleet("running = 1", "warm = 2")), &fleet("running = 1", "sleeping = 2"));
}

#[test]
fn while_instances_are_replaced() {
    let mut bigger = fleet("running = 1", "running = 2, sleeping = 1");
    bigger.tenants[0].pools[1].instance_resources.mem_mib = 256;
    killed_everywhere(Some(&fleet("running = 1", "running = 2, sleeping = 1")), &bigger);
}

#[test]
fn while_everything_is_destroyed() {
    killed_everywhere(Some(&fleet("running = 1", "running = 1, warm = 1, sleeping = 1")), &nothing());
}

#[test]
fn while_there_are_fewer_wanted() {
    killed_everywhere(Some(&fleet("running = 1", "running = 3")), &fleet("running = 1", "running = 1"));
}

/// A warm machine has the only copy of its memory: whatever happens to mvm, it is the same machine afterwards.
#[test]
fn while_a_warm_machine_is_resumed_by_hand() {
    for n in 0..12 {
        let world = World::new();
        world.ready(&fleet("running = 1", "warm = 1"));
        let at = world.observe().tenants["acme"].pools["web"].instances[0].doc.at();
        let boot = |world: &World| match world.node().instance(&at).unwrap().state {
            InstanceState::Running { guest_boot, .. } | InstanceState::Warm { guest_boot, .. } => guest_boot,
            other => panic!("killed at {n}: {other:?}"),
        };
        let before = boot(&world);
        let _ = world.process(&KillSwitch::at(n)).and_then(|node| node.resume(&at));
        world.ready(&fleet("running = 1", "running = 1"));
        assert_eq!(boot(&world), before, "killed at {n}");
    }
}

/// On real files a write is several effects: a directory, a temporary file, its flush, its name, the flush of the directory.
mod on_files {
    use super::*;

    #[test]
    fn while_a_fleet_is_created_and_started() {
        killed_everywhere_in(World::on_files, None, &fleet("running = 1", "running = 1"));
    }

    #[test]
    fn while_instances_are_put_to_sleep_and_made() {
        killed_everywhere_in(
            World::on_files,
            Some(&fleet("running = 1", "running = 1")),
            &fleet("running = 1", "running = 1, sleeping = 1"),
        );
    }

    #[test]
    fn while_everything_is_destroyed() {
        killed_everywhere_in(World::on_files, Some(&fleet("running = 1", "running = 1, sleeping = 1")), &nothing());
    }

    /// Whatever a killed creation leaves, the fleet can be taken down at once.
    #[test]
    fn and_then_everything_is_destroyed() {
        let to = fleet("running = 1", "running = 1");
        let count = {
            let world = World::on_files();
            let switch = KillSwitch::never();
            apply_on(&world.process(&switch).unwrap(), &to, 1).unwrap();
            switch.count()
        };
        for n in 0..count {
            let world = World::on_files();
            if let Ok(node) = world.process(&KillSwitch::at(n)) {
                let _ = apply_on(&node, &to, 1);
            }
            world.ready(&nothing());
        }
    }
}
