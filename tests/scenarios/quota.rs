//! Whatever is declared, a tenant never uses more than its quotas say.

use mvm::vm::instance::InstanceDoc;
use mvm::vm::tenant::Quotas;
use mvm::vm::usage::Usage;
use proptest::option;
use proptest::prelude::*;

use crate::world::{World, fleet, nothing};

fn quotas() -> impl Strategy<Value = Quotas> {
    let few = || option::of(0_u32..5);
    (few(), option::of(0_u64..700), few(), few(), option::of(1_u64..3)).prop_map(
        |(max_vcpus, max_mem_mib, max_running, max_warm, max_disk_gib)| Quotas {
            max_vcpus,
            max_mem_mib,
            max_running,
            max_warm,
            max_pools: None,
            max_instances_per_pool: None,
            max_disk_gib,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_pass_exceeds_a_quota(quotas in quotas(), running in 0_u32..4, warm in 0_u32..3, sleeping in 0_u32..3, disk in 1_u64..900) {
        let world = World::new();
        let mut desired = fleet("running = 1", &format!("running = {running}, warm = {warm}, sleeping = {sleeping}"));
        desired.tenants[0].quotas = quotas.clone();
        desired.tenants[0].pools[1].instance_resources.data_disk_mib = disk.max(16);
        for _ in 0..3 {
            let report = world.pass(&desired);
            prop_assert_eq!(report.failed().map(|(_, error, _)| error.to_owned()).collect::<Vec<_>>(), Vec::<String>::new());
            world.check();
            let observed = world.observe();
            let docs: Vec<InstanceDoc> =
                observed.tenants["acme"].pools.values().flat_map(|pool| &pool.instances).map(|one| one.doc.clone()).collect();
            let usage = Usage::of(&docs);
            prop_assert_eq!(quotas.check(&"acme".parse().unwrap(), &Usage::default(), &usage), Ok(()));
            // What is missing is deferred, with the quota as the reason.
            let whole = docs.len() as u32 == 1 + running + warm + sleeping && usage.running == u64::from(1 + running);
            prop_assert!(whole || !report.plan.deferred.is_empty(), "{:#?}", report.plan);
        }
        let settled = world.plan(&desired);
        prop_assert_eq!(settled.visible().count(), 0, "{:#?}", settled);
        world.ready(&nothing());
    }
}
