//! Many instances.

use crate::world::{World, toml};

#[test]
fn ten_thousand_instances_come_about_and_settle() {
    let world = World::new();
    let desired = toml(
        r#"
        schema_version = 1
        [[tenants]]
        tenant_id = "big"
        network = { tenant_net_id = 1, ipv4_subnet = "10.241.0.0/18" }
        [[tenants.pools]]
        pool_id = "gw"
        role = "gateway"
        desired_counts = { running = 1 }
        [[tenants.pools]]
        pool_id = "web"
        desired_counts = { running = 9998, warm = 1 }
        instance_resources = { vcpus = 1, mem_mib = 64 }
        "#,
    );
    world.ready(&desired);
    assert_eq!(world.states("big/web"), [9998, 1, 0]);
    assert!(world.pass(&desired).plan.is_settled());
}
