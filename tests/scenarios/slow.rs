//! Guests that are slow, machines that die, TAPs that vanish: nothing is lost that need not be, and the log says what became of it.

use mvm::vm::instance::{InstanceState, StateName};
use mvm::vmm::simulated::SimulatedStep;
use mvm_types::InstanceAddress;

use crate::world::{World, changes, fleet, log, rule};

fn worker(world: &World) -> InstanceAddress {
    world.observe().tenants["acme"].pools["web"].instances[0].doc.at()
}

#[test]
fn a_guest_that_does_not_drain_in_time_runs_on() {
    for (verb, step) in [("warm", SimulatedStep::Drain), ("warm", SimulatedStep::Pause), ("sleep", SimulatedStep::Snapshot)] {
        let mut world = World::new();
        world.ready(&fleet("running = 1", "running = 1"));
        let (at, before) = (worker(&world), world.guests());
        // It is as slow to answer when it is asked to go on as before.
        world.vmm = world.vmm.with_script(&[rule(step, "acme/web", "guest busy", 2), rule(SimulatedStep::Wake, "acme/web", "too slow", 2)]);
        let node = world.node();
        let act = || if verb == "warm" { node.warm(&at) } else { node.sleep(&at) };
        for tries in 1..=2 {
            let error = act().unwrap_err();
            assert!(error.to_string().contains("guest busy"), "{error}");
            assert_eq!(world.guests(), before, "{verb}, {step:?}");
            let doc = node.instance(&at).unwrap();
            let failure = doc.failure.unwrap();
            assert_eq!((failure.step.as_str(), failure.attempts), (verb, tries));
            assert_eq!(changes(&world, &at).last().unwrap(), &format!("{verb} Running -> Running FAILED"));
            world.check();
        }
        act().unwrap();
        world.check();
    }
}

#[test]
fn a_warm_machine_whose_guest_is_slow_keeps_its_memory() {
    let mut world = World::new();
    world.ready(&fleet("running = 1", "warm = 1"));
    let (at, before) = (worker(&world), world.guests());
    world.vmm = world.vmm.with_script(&[rule(SimulatedStep::Wake, "acme/web", "too slow", 2)]);
    let node = world.node();
    node.resume(&at).unwrap_err();
    assert_eq!(changes(&world, &at).last().unwrap(), "resume Warm -> Warm FAILED");
    assert_eq!(node.recover(&at).unwrap(), StateName::Running);
    assert_eq!(world.guests(), before);
    assert_eq!(node.instance(&at).unwrap().failure.unwrap().step, "recover");
    world.check();
}

#[test]
fn the_log_says_what_a_failed_verb_left() {
    let mut world = World::new();
    world.ready(&fleet("running = 1", "sleeping = 1"));
    let at = worker(&world);
    world.vmm = world.vmm.with_script(&[rule(SimulatedStep::Wake, "acme/web", "the guest hangs", 1)]);
    let node = world.node();
    node.wake(&at, StateName::Running).unwrap_err();
    assert!(matches!(node.instance(&at).unwrap().state, InstanceState::Stopped { .. }));
    assert_eq!(changes(&world, &at).last().unwrap(), "wake Sleeping -> Stopped FAILED");
    world.vmm = world.vmm.with_script(&[rule(SimulatedStep::Boot, "acme/web", "no memory", 2)]);
    let node = world.node();
    node.start(&at, StateName::Running).unwrap_err();
    assert_eq!(changes(&world, &at).last().unwrap(), "start Stopped -> Stopped FAILED");
    world.check();
}

#[test]
fn a_death_that_a_verb_finds_is_on_record() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 1"));
    let at = worker(&world);
    world.vmm.crash(&at);
    world.node().start(&at, StateName::Running).unwrap();
    let all = changes(&world, &at);
    assert_eq!(all[all.len() - 2..], ["recover Running -> Stopped", "start Stopped -> Running"]);
    world.vmm.crash(&at);
    // Not legal any more, and found out all the same.
    world.node().warm(&at).unwrap_err();
    assert_eq!(changes(&world, &at).last().unwrap(), "recover Running -> Stopped");
}

#[test]
fn a_lost_tap_is_seen_and_made_again() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 2, warm = 1");
    world.ready(&desired);
    let before = world.guests();
    let observed = world.observe();
    let of = |state: StateName| {
        let all = observed.tenants["acme"].pools["web"].instances.iter();
        all.filter(|one| one.doc.state.name() == state).map(|one| one.doc.at()).next().unwrap()
    };
    let tap = |at: &InstanceAddress| format!("tn7i{}", world.node().instance(at).unwrap().offset);
    let (running, warm) = (of(StateName::Running), of(StateName::Warm));
    world.host.lose_tap(&tap(&warm));
    assert!(world.plan(&desired).is_settled(), "a warm machine needs none until it is resumed");
    world.host.lose_tap(&tap(&running));
    assert_eq!(world.verbs(&desired), ["apply network", "stop", "start"]);
    let plan = world.plan(&desired);
    let why = plan.visible().last().unwrap().why.clone();
    assert_eq!(why, format!("its TAP {} is gone", tap(&running)));
    world.ready(&desired);
    let changed: Vec<_> = before.iter().zip(world.guests()).filter(|(a, b)| *a != b).map(|(a, _)| a.0.clone()).collect();
    assert_eq!(changed, [running.to_string()]);
    // Resumed, it has to be reached.
    let resumed = fleet("running = 1", "running = 3");
    world.ready(&resumed);
    assert!(log(&world, "acme").contains(&format!("stop {warm}")));
}
