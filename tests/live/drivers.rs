//! One suite for all drivers: the same documents and commands, and the same answers.

use std::time::Duration;

use crate::rig::{Driver, NOTHING, ONE, Rig, on_a_host_of, text};

/// Each of these for each driver.
macro_rules! for_all_drivers {
    ($($scenario:ident: $guests:literal,)*) => {
        mod simulated {
            $(#[test]
            fn $scenario() {
                super::on_a_host_of(super::Driver::Simulated, 1, super::$scenario);
            })*
        }
        mod qemu {
            $(#[test]
            fn $scenario() {
                super::on_a_host_of(super::Driver::Qemu, $guests, super::$scenario);
            })*
        }
        mod firecracker {
            $(#[test]
            fn $scenario() {
                super::on_a_host_of(super::Driver::Firecracker, 1, super::$scenario);
            })*
        }
        mod firecracker_apart {
            $(#[test]
            fn $scenario() {
                super::on_a_host_of(super::Driver::FirecrackerApart, 1, super::$scenario);
            })*
        }
    };
}

for_all_drivers! {
    an_instance_goes_through_all_its_states: 1,
    a_machine_that_died_is_noticed_and_started_again: 1,
    a_gateway_comes_up_first_and_goes_down_last: 2,
    a_changed_declaration_replaces_an_instance_in_place: 1,
    counts_of_all_three_states_are_reached: 2,
    a_snapshot_of_another_instance_is_refused_and_its_own_boots_afresh: 1,
}

/// For real guests on a host that executes them slowly.
const PATIENT: &str = "ready_timeout_seconds = 120";

fn one() -> String {
    ONE.replace("drain_timeout_seconds = 5", &format!("drain_timeout_seconds = 5, {PATIENT}"))
}

fn an_instance_goes_through_all_its_states(rig: &Rig) {
    rig.apply(&one());
    let at = rig.only();
    assert_eq!(rig.state_of(&at), "Running");
    for (verb, state) in [("warm", "Warm"), ("resume", "Running"), ("sleep", "Sleeping"), ("wake", "Running")] {
        rig.ok(&["instance", verb, &at]);
        assert_eq!(rig.state_of(&at), state, "{verb}");
    }
    // A second time: what the snapshot says now is what happened since the first.
    rig.ok(&["instance", "warm", &at]);
    rig.ok(&["instance", "sleep", &at]);
    rig.ok(&["instance", "wake", &at]);
    assert_eq!(rig.state_of(&at), "Running");
    rig.fails(4, &["instance", "wake", &at]);
    rig.ok(&["instance", "stop", &at]);
    assert_eq!(rig.state_of(&at), "Stopped");
    rig.ok(&["instance", "start", &at]);
    rig.ok(&["instance", "stop", "--force", &at]);
    assert_eq!(rig.machines(), Vec::<i32>::new());
    rig.apply(&one());
    assert_eq!((rig.only(), rig.state_of(&at)), (at.clone(), "Running".to_owned()));
    rig.prune();
}

fn a_machine_that_died_is_noticed_and_started_again(rig: &Rig) {
    rig.apply(&one());
    let at = rig.only();
    rig.crash(&at);
    let seen = rig.json(&["instance", "info", &at]);
    assert!(text(&seen["problem"]).contains("its virtual machine died"), "{seen}");
    rig.apply(&one());
    assert_eq!((rig.only(), rig.state_of(&at)), (at.clone(), "Running".to_owned()));
    // Also where its memory was to be kept.
    rig.ok(&["instance", "warm", &at]);
    rig.crash(&at);
    rig.apply(&one());
    assert_eq!(rig.state_of(&at), "Running");
    rig.prune();
}

fn a_gateway_comes_up_first_and_goes_down_last(rig: &Rig) {
    let fleet = |counts: &str| {
        let pool = |id: &str, role: &str| {
            format!(
                "[[tenants.pools]]\npool_id = \"{id}\"\nrole = \"{role}\"\ninstance_resources = {{ vcpus = 1, mem_mib = 128 }}\n\
                 desired_counts = {{ {counts} = 1 }}\nruntime_policy = {{ min_running_seconds = 0, drain_timeout_seconds = 5, {PATIENT} }}\n"
            )
        };
        let network = "network = { tenant_net_id = 7, ipv4_subnet = \"10.240.7.0/24\" }";
        format!("schema_version = 1\n[[tenants]]\ntenant_id = \"acme\"\n{network}\n{}{}", pool("app", "worker"), pool("gw", "gateway"))
    };
    rig.apply(&fleet("running"));
    rig.apply(&fleet("sleeping"));
    let events = rig.json(&["events"]);
    let order = |action: &str| -> Vec<String> {
        let events = events.as_array().unwrap().iter().filter(|event| event["action"] == action);
        events.map(|event| text(&event["object"]).rsplit_once('/').unwrap().0.to_owned()).collect()
    };
    assert_eq!(order("start"), ["acme/gw", "acme/app"]);
    assert_eq!(order("sleep"), ["acme/app", "acme/gw"]);
    rig.apply(&fleet("running"));
    rig.prune();
}

fn a_changed_declaration_replaces_an_instance_in_place(rig: &Rig) {
    rig.apply(&one());
    let at = rig.only();
    rig.apply(&one().replace("mem_mib = 128", "mem_mib = 160"));
    assert_eq!((rig.only(), rig.state_of(&at)), (at.clone(), "Running".to_owned()));
    assert_eq!(rig.json(&["instance", "info", &at])["mem_mib"], 160);
    rig.prune();
}

fn counts_of_all_three_states_are_reached(rig: &Rig) {
    rig.apply(&one().replace("running = 1", "running = 1, warm = 1, sleeping = 1"));
    let mut states: Vec<String> = rig.instances().iter().map(|one| text(&one["state"])).collect();
    states.sort();
    assert_eq!(states, ["Running", "Sleeping", "Warm"]);
    rig.apply(&one().replace("running = 1", "running = 3"));
    assert!(rig.instances().iter().all(|one| one["state"] == "Running"), "{:?}", rig.instances());
    rig.apply(NOTHING);
    rig.eventually("nothing is left", Duration::from_secs(5), || rig.machines().is_empty());
    rig.assert_nothing_left();
}

fn a_snapshot_of_another_instance_is_refused_and_its_own_boots_afresh(rig: &Rig) {
    rig.apply(&one());
    let at = rig.only();
    rig.ok(&["instance", "sleep", &at]);
    rig.swap_snapshot(&at);
    let said = rig.ran(&["instance", "wake", &at]).err;
    assert!(said.contains("the instance was \"acme/web/i-ffffffff\""), "{said}");
    rig.apply(&one());
    assert_eq!(rig.state_of(&at), "Running");
    rig.prune();
}
