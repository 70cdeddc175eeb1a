//! Gateways before workers on the way up, workers before gateways on the way down.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};

use mvm::agent::desired::DesiredState;
use mvm::agent::plan::{Action, Need, Plan, Target};
use mvm::agent::reconciler::Applied;
use mvm::vm::instance::Verb;
use mvm::vmm::simulated::SimulatedStep;
use proptest::prelude::*;

use crate::world::{World, fleet, log, rule};

#[test]
fn workers_start_when_the_gateway_is_ready_and_sleep_before_it() {
    let world = World::new();
    world.ready(&fleet("running = 2", "running = 3"));
    world.ready(&fleet("sleeping = 2", "sleeping = 3"));
    let log: Vec<String> = log(&world, "acme").into_iter().filter(|line| line.starts_with("start") || line.starts_with("sleep")).collect();
    let pools: Vec<&str> = log.iter().map(|line| line.rsplit_once('/').unwrap().0).collect();
    assert_eq!(pools, [vec!["start acme/gw"; 2], vec!["start acme/web"; 3], vec!["sleep acme/web"; 3], vec!["sleep acme/gw"; 2]].concat());
}

#[test]
fn a_gateway_that_does_not_come_up_holds_its_tenant_and_no_other() {
    let world = World::scripted(&[rule(SimulatedStep::Boot, "acme/gw", "no such device", 100)]);
    let mut desired = fleet("running = 1", "running = 1");
    let mut other = fleet("running = 1", "running = 1").tenants.remove(0);
    other.tenant_id = "beta".parse().unwrap();
    other.network.tenant_net_id = 8.try_into().unwrap();
    other.network.ipv4_subnet = "10.240.8.0/24".parse().unwrap();
    desired.tenants.push(other);
    let report = world.pass(&desired);
    let failed: Vec<_> = report.failed().map(|(_, error, _)| error.to_owned()).collect();
    assert_eq!(failed, ["boot: no such device"]);
    assert_eq!(world.states("acme/web"), [0, 0, 0]);
    assert_eq!(world.states("beta/web"), [1, 0, 0]);
    let plan = world.plan(&desired);
    let held = plan.deferred.iter().find(|one| one.object == "acme/web").unwrap();
    assert_eq!(held.why, "it waits for another pool: gateway pool acme/gw has 0 of 1 ready");
    let over = AtomicBool::new(false);
    let applied = std::thread::scope(|scope| {
        // The clock goes on, so that the tries come due.
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                world.advance(1);
                std::thread::yield_now();
            }
        });
        let applied = world.apply(&desired).unwrap();
        over.store(true, Ordering::SeqCst);
        applied
    });
    assert!(matches!(applied, Applied::Partly { .. }), "{applied:?}");
}

#[test]
fn depends_on_refines_the_order() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 1");
    let mut db = desired.tenants[0].pools[1].clone();
    db.pool_id = "zdb".parse().unwrap();
    desired.tenants[0].pools[1].depends_on = vec![db.pool_id.clone()];
    desired.tenants[0].pools.push(db);
    world.ready(&desired);
    let starts: Vec<String> = log(&world, "acme").into_iter().filter(|line| line.starts_with("start")).collect();
    let pools: Vec<&str> = starts.iter().map(|line| line.rsplit_once('/').unwrap().0).collect();
    assert_eq!(pools, ["start acme/gw", "start acme/zdb", "start acme/web"]);
}

/// All steps that have to be over before a step begins.
fn ancestors(plan: &Plan, step: usize) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut open = vec![step];
    while let Some(step) = open.pop() {
        for edge in &plan.steps[step].after {
            assert!(edge.step < step, "an edge points forward");
            if found.insert(edge.step) {
                open.push(edge.step);
            }
        }
    }
    found
}

fn pool_of(target: &Target) -> String {
    match target {
        Target::Existing(at) => at.pool_address().to_string(),
        Target::New { pool, .. } => pool.to_string(),
    }
}

/// The rules of order that every plan keeps.
fn check_order(plan: &Plan, desired: &DesiredState) {
    let changes = |verbs: &'static [Verb]| {
        plan.steps.iter().enumerate().filter_map(move |(index, step)| match &step.action {
            Action::Change { verb, target, .. } if verbs.contains(verb) => Some((index, pool_of(target))),
            _ => None,
        })
    };
    for tenant in &desired.tenants {
        let pools = |gateway: bool| {
            let of = tenant.pools.iter().filter(move |pool| (pool.role == mvm_types::Role::Gateway) == gateway);
            of.map(|pool| format!("{}/{}", tenant.tenant_id, pool.pool_id)).collect::<BTreeSet<_>>()
        };
        let (gateways, others) = (pools(true), pools(false));
        for (index, pool) in changes(&[Verb::Start, Verb::Wake, Verb::Resume]) {
            if others.contains(&pool) {
                let before = ancestors(plan, index);
                for (gateway, of) in changes(&[Verb::Start, Verb::Wake, Verb::Resume]) {
                    // Those that are brought up only to sleep again serve nobody.
                    let serves = matches!(&plan.steps[gateway].action, Action::Change { goal, .. } if *goal == mvm::vm::instance::StateName::Running);
                    assert!(!gateways.contains(&of) || !serves || before.contains(&gateway), "{pool} comes up before {of}");
                }
            }
        }
        let down = &[Verb::Warm, Verb::Sleep, Verb::Stop];
        let ups: BTreeSet<usize> = changes(&[Verb::Start, Verb::Wake, Verb::Resume, Verb::Rebuild]).map(|(index, _)| index).collect();
        let is_down = |index: usize| {
            let Action::Change { target, .. } = &plan.steps[index].action else { return false };
            // A stop that a rebuild follows, or a sleep after a start, is part of a way up.
            !ups.iter().any(|up| matches!(&plan.steps[*up].action, Action::Change { target: other, .. } if other == target))
        };
        for (index, pool) in changes(down).filter(|(index, _)| is_down(*index)) {
            if gateways.contains(&pool) {
                let before = ancestors(plan, index);
                for (worker, of) in changes(down).filter(|(index, _)| is_down(*index)) {
                    assert!(!others.contains(&of) || before.contains(&worker), "{pool} goes down before {of}");
                }
            }
        }
    }
    for step in &plan.steps {
        assert!(step.after.iter().all(|edge| matches!(edge.need, Need::Success | Need::End)));
    }
}

fn counts() -> impl Strategy<Value = String> {
    (0_u32..3, 0_u32..3, 0_u32..3)
        .prop_map(|(running, warm, sleeping)| format!("running = {running}, warm = {warm}, sleeping = {sleeping}"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_keeps_the_order_and_every_fleet_settles(steps in proptest::collection::vec((counts(), counts(), 0_usize..3), 1..5)) {
        let world = World::new();
        for (gateways, workers, crashes) in steps {
            let desired = fleet(&gateways, &workers);
            let running = world.vmm.machines().into_keys().take(crashes);
            for at in running {
                let (pool, id) = at.rsplit_once('/').unwrap();
                let pool: mvm_types::PoolAddress = pool.parse().unwrap();
                world.vmm.crash(&mvm_types::InstanceAddress::new(pool.tenant, pool.pool, id.parse().unwrap()));
            }
            check_order(&world.plan(&desired), &desired);
            world.ready(&desired);
            let settled = world.plan(&desired);
            prop_assert!(settled.is_settled(), "{:#?}", settled);
        }
    }
}
