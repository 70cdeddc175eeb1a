//! Documents that are torn or lost: what they described keeps what it has, and nobody else gets it.

use mvm::vm::error::LifecycleError;
use mvm::vm::instance::StateName;
use mvm::vm::tenant::{NetworkSpec, Quotas, SecretChange};
use mvm_types::{PoolAddress, Role, TenantId};

use crate::world::{World, changes, fleet, nothing, toml};

const TENANT: &str = "tenants/acme/tenant.json";
const POOL: &str = "tenants/acme/pools/web/pool.json";

fn network(net_id: u64, subnet: &str) -> NetworkSpec {
    NetworkSpec { tenant_net_id: net_id.try_into().unwrap(), ipv4_subnet: subnet.parse().unwrap() }
}

fn id(tenant: &str) -> TenantId {
    tenant.parse().unwrap()
}

#[test]
fn nobody_gets_the_network_of_a_tenant_whose_document_is_gone() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 1"));
    world.tear(TENANT);
    let node = world.node();
    let create = |tenant: &str, net_id, subnet| node.tenant_create(&id(tenant), network(net_id, subnet), Quotas::default());
    let says = |result: Result<(), LifecycleError>| result.unwrap_err().to_string();
    // Whoever reads it first moves it aside.
    assert!(says(create("evil", 7, "10.240.7.0/24")).contains("was moved to"));
    assert_eq!(says(create("evil", 7, "10.240.9.0/24")), "evil: network.tenant_net_id: 7 belongs to tenant acme, whose document is gone");
    assert_eq!(
        says(create("evil", 8, "10.240.0.0/16")),
        "evil: network.ipv4_subnet: 10.240.0.0/16 holds the address 10.240.7.3 of tenant acme, whose document is gone"
    );
    let fixed =
        "acme: network: a tenant's network is fixed for its life, and acme has an instance 10.240.7.3 (the one at offset 0) in net id 7";
    assert_eq!(says(create("acme", 9, "10.240.7.0/24")), fixed);
    assert_eq!(says(create("acme", 7, "10.240.9.0/24")), fixed);
    create("good", 8, "10.240.8.0/24").unwrap();
    create("acme", 7, "10.240.7.0/24").unwrap();
}

#[test]
fn nor_does_a_declared_one() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 1"));
    world.tear(TENANT);
    let evil = |net_id: u16, subnet: &str| {
        toml(&format!(
            "schema_version = 1\n[[tenants]]\ntenant_id = \"evil\"\nnetwork = {{ tenant_net_id = {net_id}, ipv4_subnet = \"{subnet}\" }}"
        ))
    };
    for _ in 0..2 {
        let error = world.apply(&evil(7, "10.240.9.0/24")).unwrap_err().to_string();
        assert_eq!(error, "tenants[0].network.tenant_net_id: 7 belongs to tenant acme, whose document is gone");
        let error = world.apply(&evil(9, "10.240.7.0/28")).unwrap_err().to_string();
        assert!(error.starts_with("tenants[0].network.ipv4_subnet: 10.240.7.0/28 holds the address"), "{error}");
    }
    let mut moved = fleet("running = 1", "running = 1");
    moved.tenants[0].network = network(9, "10.240.9.0/24");
    assert!(world.apply(&moved).unwrap_err().to_string().starts_with("tenants[0].network: a tenant's network is fixed for its life"));
    assert!(world.host.state().bridges.contains("br-tenant-7"));
}

#[test]
fn a_network_of_which_not_everything_is_known_is_not_given_away() {
    let world = World::new();
    world.ready(&fleet("running = 1", "running = 0"));
    let at = world.observe().tenants["acme"].pools["gw"].instances[0].doc.at();
    world.tear(TENANT);
    world.tear(&format!("tenants/acme/pools/gw/instances/{}/instance.json", at.instance));
    world.observe();
    let error = world.node().tenant_create(&id("evil"), network(7, "10.240.7.0/24"), Quotas::default()).unwrap_err().to_string();
    assert!(
        error.starts_with("evil: network: whether it is apart from that of tenant acme, whose document is gone, is not known"),
        "{error}"
    );
}

#[test]
fn a_torn_document_makes_no_second_set_of_machines() {
    for key in [TENANT, POOL, "tenants/acme/pools/gw/pool.json"] {
        let world = World::new();
        let desired = fleet("running = 1", "running = 1, warm = 1, sleeping = 1");
        world.ready(&desired);
        let before = world.guests();
        world.tear(key);
        let create = if key == TENANT { "create tenant" } else { "create pool" };
        // On the pass that finds it, and on the next.
        for _ in 0..2 {
            assert_eq!(world.verbs(&desired), [create], "{key}");
        }
        let report = world.pass(&desired);
        assert_eq!(report.failed().count(), 0);
        assert_eq!(world.guests(), before, "{key}");
        world.ready(&desired);
        assert_eq!(world.guests(), before, "{key}");
        world.ready(&nothing());
    }
}

#[test]
fn what_a_pool_is_outlives_its_document() {
    let world = World::new();
    let desired = fleet("running = 1", "running = 1");
    world.ready(&desired);
    world.tear(POOL);
    let mut other = desired.clone();
    other.tenants[0].pools[1].role = Role::Builder;
    other.tenants[0].pools[1].instance_resources.data_disk_mib = 8;
    let error = world.apply(&other).unwrap_err().to_string();
    assert!(error.contains("tenants[0].pools[1].role: a pool's role is fixed for its life, and acme/web/i-"), "{error}");
    assert!(error.contains("tenants[0].pools[1].instance_resources.data_disk_mib: a data disk does not shrink"), "{error}");
    let spec = other.tenants[0].pools[1].clone();
    let error = world.node().pool_create(&id("acme"), Role::Builder, spec).unwrap_err().to_string();
    assert!(error.starts_with("cannot make acme/web a builder: a pool's role is fixed for its life"), "{error}");
    // Its machines are behind their rules all the same.
    assert_eq!(world.observe().ruleset_hash(), world.host.state().ruleset);
}

#[test]
fn a_torn_node_keeps_its_name_and_what_it_remembers() {
    let world = World::new();
    let mut desired = fleet("running = 1", "running = 1");
    desired.generation = Some(4);
    world.ready(&desired);
    let whole = world.store.raw().read("node.json").unwrap().unwrap();
    world.tear("node.json");
    let torn = world.store.raw().read("node.json").unwrap().unwrap();
    for _ in 0..2 {
        let error = world.process(&mvm::infra::kill_switch::KillSwitch::never()).err().unwrap().to_string();
        assert!(error.starts_with("the node node.json cannot be read: restore it from a backup; without one, write"), "{error}");
        assert_eq!(world.store.raw().read("node.json").unwrap().unwrap(), torn);
    }
    world.store.raw().remove("node.json").unwrap();
    let error = world.process(&mvm::infra::kill_switch::KillSwitch::never()).err().unwrap().to_string();
    assert!(error.starts_with("cannot take a new node id: the node node.json is gone, and there are tenants"), "{error}");
    assert_eq!(world.store.raw().read("node.json").unwrap(), None);
    world.store.raw().write("node.json", &whole).unwrap();
    world.ready(&desired);
    desired.generation = Some(3);
    assert!(world.apply(&desired).is_err());
}

#[test]
fn no_guest_starts_without_the_secrets_that_were_set() {
    let world = World::new();
    let desired = fleet("running = 0", "running = 1");
    world.ready(&desired);
    let (node, acme) = (world.node(), id("acme"));
    let at = world.observe().tenants["acme"].pools["web"].instances[0].doc.at();
    let set = || node.secret_set(&acme, &"token".parse().unwrap(), b"value", SecretChange::Set);
    set().unwrap();
    node.stop(&at, mvm::vm::instance::StopMode::Force).unwrap();
    world.tear("tenants/acme/secrets.json");
    for _ in 0..2 {
        let error = node.start(&at, StateName::Running).unwrap_err().to_string();
        assert!(error.starts_with("the secrets document tenants/acme/secrets.json cannot be read: restore it from a backup"), "{error}");
        assert!(set().unwrap_err().to_string().contains("cannot be read"));
    }
    world.store.raw().remove("tenants/acme/secrets.json").unwrap();
    let lost = "cannot open the secrets of acme: they were set 1 times, and tenants/acme/secrets.json is gone: restore it from a backup, \
                or set every secret again (mvm tenant secrets set acme NAME < FILE)";
    assert_eq!(node.start(&at, StateName::Running).unwrap_err().to_string(), lost);
    assert_eq!(node.secrets(&node.tenant(&acme).unwrap()).unwrap_err().to_string(), lost);
    assert_eq!(changes(&world, &at).last().unwrap(), "start Stopped -> Stopped FAILED");
    assert_eq!(set().unwrap(), 2);
    node.start(&at, StateName::Running).unwrap();
    // And when the tenant's document goes as well.
    world.tear(TENANT);
    world.ready(&desired);
    assert_eq!(node.tenant(&acme).unwrap().secrets_epoch, 2);
}

#[test]
fn what_was_never_finished_is_in_nobodys_way() {
    let world = World::on_files();
    let desired = fleet("running = 1", "running = 1");
    world.ready(&desired);
    let leave = |dir: &str, file: Option<&str>| {
        let dir = world.store.dir().join(dir);
        std::fs::create_dir_all(&dir).unwrap();
        if let Some(file) = file {
            std::fs::write(dir.join(file), "{\"vers").unwrap();
        }
    };
    let leave_all = || {
        leave("tenants/acme/pools/web/instances/i-0000aaaa", None);
        leave("tenants/acme/pools/web/instances/i-0000bbbb", Some(".instance.json.tmp"));
        leave("tenants/acme/pools/half", Some(".pool.json.tmp"));
        leave("tenants/half", Some(".tenant.json.tmp"));
    };
    leave_all();
    let plan = world.plan(&desired);
    let why: Vec<&str> = plan.visible().map(|step| step.why.as_str()).collect();
    assert_eq!(why, ["never finished, and removed: acme/half, acme/web/i-0000aaaa, acme/web/i-0000bbbb, half"]);
    let guests = world.guests();
    world.ready(&desired);
    assert_eq!(world.guests(), guests);
    let left = world
        .store
        .snapshot()
        .into_keys()
        .filter(|key| key.contains("0000aaaa") || key.contains("0000bbbb") || key.contains("half"))
        .count();
    assert_eq!(left, 0);
    // By hand, a pool goes with what is not an instance.
    let node = world.node();
    leave_all();
    let web: PoolAddress = "acme/web".parse().unwrap();
    for one in node.pool_instances(&web, &mut Vec::new()).unwrap() {
        node.destroy(&one.at()).unwrap();
    }
    node.pool_destroy(&web).unwrap();
}
