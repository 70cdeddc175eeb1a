//! What an operator declares comes about, stays, and changes.

use mvm::agent::plan::Action;
use mvm::agent::reconciler::{Applied, describe};
use mvm::vm::instance::{StateName, Verb};
use mvm::vmm::simulated::SimulatedStep;

use crate::world::{World, fleet, log, nothing, rule, toml};

#[test]
fn a_declared_fleet_comes_about_and_the_next_pass_does_nothing() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 2, warm = 1, sleeping = 1");
    world.ready(&desired);
    assert_eq!(world.states("acme/gw"), [1, 0, 0]);
    assert_eq!(world.states("acme/web"), [2, 1, 1]);
    let before = world.store.snapshot();
    world.host.take_effects();
    let report = world.pass(&desired);
    assert!(report.plan.is_settled(), "{:#?}", report.plan);
    assert_eq!(world.store.snapshot(), before);
    assert_eq!(world.host.take_effects(), Vec::<String>::new());
    let described = describe(&world.observe());
    assert!(world.plan(&described).is_settled());
}

#[test]
fn counts_move_between_the_states_without_new_instances() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 3"));
    let ids = |world: &World| {
        let observed = world.observe();
        observed.tenants["acme"].pools["web"].instances.iter().map(|one| one.doc.instance_id.clone()).collect::<Vec<_>>()
    };
    let first = ids(&world);
    for counts in ["running = 1, warm = 1, sleeping = 1", "sleeping = 3", "warm = 3", "running = 2, sleeping = 1", "running = 3"] {
        let desired = fleet("running = 1", counts);
        world.ready(&desired);
        assert_eq!(ids(&world), first, "{counts}");
    }
    world.ready(&fleet("running = 1", "running = 1"));
    assert_eq!(ids(&world), first[..1]);
    world.ready(&nothing());
}

#[test]
fn up_wakes_then_resumes_then_starts_then_creates() {
    let world = World::new();
    world.ready(&fleet("running = 1", "warm = 1, sleeping = 1"));
    let plan = world.plan(&fleet("running = 1", "running = 3"));
    let verbs: Vec<&str> = plan.visible().map(|step| step.action.verb()).collect();
    assert_eq!(verbs, ["update pool", "create", "apply network", "wake", "resume", "start"]);
}

#[test]
fn a_changed_document_is_applied_as_planned() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 2"));
    let mut desired = fleet("running = 1", "running = 2");
    desired.tenants[0].quotas.max_running = Some(9);
    desired.tenants[0].pools[1].instance_resources.mem_mib = 256;
    let plan = world.plan(&desired);
    let shown: Vec<String> = plan.visible().map(|step| step.action.verb().to_owned()).collect();
    let replace = ["stop", "rebuild", "start"];
    assert_eq!(shown, [&["update tenant", "update pool", "apply network"], &replace[..], &replace[..]].concat());
    world.ready(&desired);
    let observed = world.observe();
    assert!(observed.tenants["acme"].pools["web"].instances.iter().all(|one| one.doc.blueprint.resources.mem_mib == 256));
    assert_eq!(observed.tenants["acme"].doc.quotas.max_running, Some(9));
}

#[test]
fn a_died_machine_is_noticed_and_started_again() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 2");
    world.ready(&desired);
    let victim = world.observe().tenants["acme"].pools["web"].instances[0].doc.at();
    world.vmm.crash(&victim);
    world.ready(&desired);
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
    assert!(log(&world, "acme").contains(&format!("recover {victim}")));
}

#[test]
fn quotas_defer_what_they_leave_no_room_for() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 4");
    desired.tenants[0].quotas.max_running = Some(3);
    let applied = world.apply(&desired).unwrap();
    let Applied::Partly { deferred, failed } = applied else { panic!("{applied:?}") };
    assert!(failed.is_empty());
    assert_eq!(deferred.len(), 1);
    assert_eq!(deferred[0].object, "acme/web");
    assert_eq!(deferred[0].what, "start 2 instances");
    assert_eq!(deferred[0].why, "acme would have 4 running instances, and its quota max_running is 3");
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
    // And again at the effect, by hand.
    let node = world.node();
    let at = node.instances_create(&"acme/web".parse().unwrap(), 1).unwrap().remove(0);
    let error = node.start(&at, StateName::Running).unwrap_err();
    assert_eq!(error.to_string(), "acme would have 4 running instances, and its quota max_running is 3");
}

#[test]
fn a_minimum_time_running_is_kept() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 2");
    desired.tenants[0].pools[1].runtime_policy.min_running_seconds = 60;
    world.ready(&desired);
    world.advance(20);
    desired.tenants[0].pools[1].desired_counts.running = 1;
    desired.tenants[0].pools[1].desired_counts.sleeping = 1;
    let report = world.pass(&desired);
    assert_eq!(report.plan.deferred[0].why, "Running for 20 s of min_running_seconds 60");
    assert_eq!(report.plan.deferred[0].in_ms, Some(40_000));
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
    world.advance(40);
    world.ready(&desired);
    assert_eq!(world.states("acme/web"), [1, 0, 1]);
}

#[test]
fn a_pinned_pool_keeps_what_is_too_much() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 2");
    desired.tenants[0].pools[1].pinned = true;
    world.ready(&desired);
    desired.tenants[0].pools[1].desired_counts.running = 0;
    world.ready(&desired);
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
}

#[test]
fn a_failure_waits_longer_each_time_and_holds_nobody_else() {
    let world = World::scripted(&[rule(SimulatedStep::Ready, "acme/web", "no disk", 1)]);
    let desired = fleet("running = 1", "running = 2");
    let report = world.pass(&desired);
    assert_eq!(report.failed().count(), 1);
    assert_eq!(world.states("acme/web"), [1, 0, 0]);
    let plan = world.plan(&desired);
    assert_eq!(plan.deferred[0].why, "start failed once: wait until ready: no disk");
    world.advance(1);
    world.ready(&desired);
}

#[test]
fn a_refused_snapshot_leads_to_a_boot_afresh() {
    let world = World::scripted(&[rule(SimulatedStep::Wake, "acme/web", "the guest hangs", 1)]);
    world.ready(&fleet("running = 1", "sleeping = 1"));
    let desired = fleet("running = 1", "running = 1");
    let report = world.pass(&desired);
    assert_eq!(report.failed().count(), 1);
    assert_eq!(world.count("acme/web", StateName::Stopped), 1);
    world.advance(1);
    let plan = world.plan(&desired);
    assert!(plan.visible().any(|step| matches!(step.action, Action::Change { verb: Verb::Start, .. })), "{plan:#?}");
    world.ready(&desired);
}

#[test]
fn what_is_not_declared_goes_only_when_pruned() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 1");
    world.ready(&desired);
    let mut kept = desired.clone();
    kept.prune_unknown_pools = false;
    kept.tenants[0].pools.pop();
    assert!(world.plan(&kept).is_settled());
    let mut pruned = kept.clone();
    pruned.prune_unknown_pools = true;
    world.ready(&pruned);
    assert_eq!(world.observe().tenants["acme"].pools.len(), 1);
    world.ready(&nothing());
    // Its net id is given to nobody else.
    let mut other = desired.clone();
    other.tenants[0].tenant_id = "beta".parse().unwrap();
    let again = world.apply(&other).unwrap_err().to_string();
    assert_eq!(again, "tenants[0].network.tenant_net_id: 7 belonged to tenant acme, which is gone, and is given to nobody else");
    world.ready(&desired);
}

#[test]
fn a_rebooted_host_gets_its_network_and_its_machines_back() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 1, sleeping = 1");
    world.ready(&desired);
    world.host.reboot();
    for at in world.vmm.machines().into_keys() {
        let (pool, id) = at.rsplit_once('/').unwrap();
        let pool: mvm_types::PoolAddress = pool.parse().unwrap();
        world.vmm.crash(&mvm_types::InstanceAddress::new(pool.tenant, pool.pool, id.parse().unwrap()));
    }
    world.ready(&desired);
    assert_eq!(world.states("acme/web"), [1, 0, 1]);
}

#[test]
fn a_role_is_fixed_and_disks_do_not_shrink() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 1");
    world.ready(&desired);
    desired.tenants[0].pools[1].role = mvm_types::Role::Builder;
    desired.tenants[0].pools[1].instance_resources.data_disk_mib = 8;
    let error = world.apply(&desired).unwrap_err().to_string();
    assert_eq!(
        error,
        "tenants[0].pools[1].role: a pool's role is fixed for its life, and acme/web is a worker: \
         declare a pool of another name, and prune this one\n\
         tenants[0].pools[1].instance_resources.data_disk_mib: a data disk does not shrink, and the instances of acme/web have 16 MiB: \
         declare a new pool"
    );
}

#[test]
fn generations_only_grow() {
    let world = World::new();
    let mut desired = toml("schema_version = 1\ngeneration = 4");
    world.ready(&desired);
    desired.prune_unknown_tenants = true;
    assert!(world.apply(&desired).unwrap_err().to_string().starts_with("generation: another document of generation 4"));
    desired.generation = Some(3);
    assert_eq!(world.apply(&desired).unwrap_err().to_string(), "generation: 3 is older than 4, which this node has admitted already");
    desired.generation = Some(5);
    world.ready(&desired);
}

#[test]
fn a_rollout_stops_at_the_first_that_does_not_come_up() {
    let mut world = World::new();
    world.ready(&fleet("running = 1", "running = 3"));
    let mut broken = fleet("running = 1", "running = 3");
    broken.tenants[0].pools[1].instance_resources.mem_mib = 256;
    world.vmm = world.vmm.with_script(&[rule(SimulatedStep::Boot, "acme/web", "no memory", 1000)]);
    for _ in 0..4 {
        world.pass(&broken);
    }
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
    let plan = world.plan(&broken);
    assert!(plan.deferred.iter().any(|one| one.why.starts_with("the rollout waits for acme/web/")), "{:#?}", plan.deferred);
}

#[test]
fn nothing_is_stopped_that_there_is_no_room_to_start_again() {
    let world = World::new();
    let mut desired = fleet("running = 0", "running = 2");
    desired.tenants[0].quotas.max_mem_mib = Some(300);
    world.ready(&desired);
    desired.tenants[0].pools[1].instance_resources.mem_mib = 256;
    for _ in 0..3 {
        let report = world.pass(&desired);
        assert_eq!(report.failed().count(), 0);
    }
    assert_eq!(world.states("acme/web"), [2, 0, 0]);
    assert_eq!(world.plan(&desired).deferred[0].why, "acme would have 384 MiB of memory, and its quota max_mem_mib is 300");
}

#[test]
fn what_is_there_is_described_as_it_is() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 3"));
    let victim = world.observe().tenants["acme"].pools["web"].instances[2].doc.at();
    world.node().sleep(&victim).unwrap();
    let described = describe(&world.observe());
    assert_eq!(described.tenants[0].pools[1].desired_counts.sleeping, 1);
    world.ready(&described);
    assert_eq!(world.states("acme/web"), [2, 0, 1]);
}
