//! What a role means changes what is planned and started.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mvm::agent::desired::DesiredState;
use mvm::agent::execute::Progress;
use mvm::agent::plan::Action;
use mvm::agent::reconciler::{self, Applied, ApplyOptions, ReconcileError};
use mvm::infra::kill_switch::KillSwitch;
use mvm::vm::instance::{StateName, StopMode};
use mvm::vm::tenant::SecretChange;
use mvm_types::PoolAddress;

use crate::world::{World, apply_on, fleet, log, toml};

const MANIFEST: &str = r#"
[meta]
version = 1
[profiles.minimal]
module = "minimal.nix"
[roles.gateway]
module = "gateway.nix"
min_running = 1
[roles.worker]
module = "worker.nix"
[roles.cache]
module = "cache.nix"
priority = 1
requires_secrets_drive = true
min_running_seconds = 300
ports = [{ port = 6379 }]
services = [{ unit = "sync.service", secrets = ["sync-token"] }]
"#;

/// A flake with a manifest; what a rehearsal reads of it.
fn flake(manifest: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("mvm-profiles.toml"), manifest).unwrap();
    for module in ["minimal", "gateway", "worker", "cache"] {
        fs::write(dir.path().join(format!("{module}.nix")), "{ }").unwrap();
    }
    dir
}

fn mixed(flake: &Path, cache: &str) -> DesiredState {
    let mut desired = fleet("running = 1", "running = 1");
    let path = flake.display().to_string();
    let text = format!(
        r#"
        schema_version = 1
        [[tenants]]
        tenant_id = "acme"
        network = {{ tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }}
        [[tenants.pools]]
        pool_id = "aredis"
        role = "cache"
        flake_ref = "{path}"
        desired_counts = {{ running = 1 }}
        {cache}
        "#
    );
    desired.tenants[0].pools.extend(toml(&text).tenants.remove(0).pools);
    for pool in &mut desired.tenants[0].pools {
        pool.flake_ref.clone_from(&path);
    }
    desired
}

fn problems(world: &World, desired: &DesiredState) -> String {
    match mvm::agent::reconciler::look(&world.node(), desired, mvm::agent::plan::Retry::Now) {
        Err(ReconcileError::Invalid(problems)) => problems.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_role_that_only_a_manifest_knows_has_its_place_and_demands() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let desired = mixed(flake.path(), "expose = [{ port = 6379, host_port = 16379 }]");
    world.ready(&desired);
    let starts: Vec<String> = log(&world, "acme").into_iter().filter(|line| line.starts_with("start")).collect();
    let pools: Vec<&str> = starts.iter().map(|line| line.rsplit_once('/').unwrap().0).collect();
    assert_eq!(pools, ["start acme/gw", "start acme/aredis", "start acme/web"]);
    let observed = world.observe();
    let pool = &observed.tenants["acme"].pools["aredis"];
    assert_eq!(pool.doc.role_traits().priority, 1);
    assert_eq!(pool.not_enabled, ["sync.service is not enabled: the tenant has no secret sync-token"]);
    let exposed = observed.ruleset().exposed;
    assert_eq!((exposed[0].host_port, exposed[0].port, exposed[0].targets.len()), (16379, 6379, 1));
    let token = "sync-token".parse().unwrap();
    world.node().secret_set(&"acme".parse().unwrap(), &token, b"x", SecretChange::Set).unwrap();
    assert_eq!(world.observe().tenants["acme"].pools["aredis"].not_enabled, Vec::<String>::new());
    // It runs at least as long as its role says, which is longer than its pool does.
    let mut fewer = desired.clone();
    fewer.tenants[0].pools[2].desired_counts = mvm::vm::pool::DesiredCounts { sleeping: 1, ..Default::default() };
    fewer.tenants[0].pools[2].runtime_policy.min_running_seconds = 0;
    let plan = world.plan(&fewer);
    assert!(plan.deferred.iter().any(|one| one.why.contains("min_running_seconds 300")), "{:?}", plan.deferred);
    world.advance(301);
    world.ready(&fewer);
    assert_eq!(world.observe().ruleset().exposed, []);
}

#[test]
fn what_a_manifest_lacks_or_does_not_allow_is_refused_with_its_place() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let mut desired = mixed(flake.path(), "expose = [{ port = 80 }]");
    assert_eq!(problems(&world, &desired), "tenants[0].pools[2].expose[0]: 80/tcp: role cache may expose 6379/tcp");
    desired = mixed(flake.path(), "");
    desired.tenants[0].pools[2].role = "cahce".parse().unwrap();
    assert!(problems(&world, &desired).starts_with(
        "tenants[0].pools[2].role: role \"cahce\" is not in mvm-profiles.toml; it has: gateway, worker, cache (did you mean cache?)"
    ));
    desired.tenants[0].pools[2] = mixed(flake.path(), "profile = \"pyhton\"").tenants[0].pools[2].clone();
    assert!(problems(&world, &desired).contains("pools[2].profile: profile \"pyhton\" is not in mvm-profiles.toml; it has: minimal"));
    desired = mixed(flake.path(), "");
    desired.tenants[0].pools[0].desired_counts.running = 0;
    assert!(problems(&world, &desired).contains("pools[0].desired_counts.running: 0, and at least 1 run"));
    fs::write(flake.path().join("mvm-profiles.toml"), MANIFEST.replace("version = 1", "version = 2")).unwrap();
    assert!(problems(&world, &mixed(flake.path(), "")).contains("mvm-profiles.toml:3:11: it has version 2"));
    fs::remove_file(flake.path().join("mvm-profiles.toml")).unwrap();
    assert!(problems(&world, &mixed(flake.path(), "")).contains("pools[2].role: \"cache\" is not a role"));
    assert_eq!(world.observe().tenants.len(), 0, "nothing was done");
}

#[test]
fn a_manifest_that_breaks_holds_up_nobody_else_and_its_pools_run_on() {
    let (world, broken) = (World::new(), flake(MANIFEST));
    let desired = mixed(broken.path(), "");
    world.ready(&desired);
    fs::write(broken.path().join("mvm-profiles.toml"), "[meta]\nversion = 2\n").unwrap();
    let mut more = desired.clone();
    let mut other = fleet("running = 1", "running = 1").tenants.remove(0);
    other.tenant_id = "beta".parse().unwrap();
    other.network.tenant_net_id = 8.try_into().unwrap();
    other.network.ipv4_subnet = "10.240.8.0/24".parse().unwrap();
    more.tenants.push(other);
    world.pass(&more);
    assert_eq!(world.states("beta/web"), [1, 0, 0]);
    assert_eq!(world.states("acme/aredis"), [1, 0, 0]);
    assert_eq!(world.observe().tenants["acme"].pools["aredis"].doc.role_traits().priority, 1);
}

#[test]
fn a_manifest_that_changes_changes_what_the_role_means() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let desired = mixed(flake.path(), "");
    world.ready(&desired);
    assert_eq!(world.plan(&desired).visible().count(), 0);
    fs::write(flake.path().join("mvm-profiles.toml"), MANIFEST.replace("priority = 1", "priority = 9")).unwrap();
    let plan = world.plan(&desired);
    let whys: Vec<&str> = plan.visible().map(|step| step.why.as_str()).collect();
    assert_eq!(whys, ["the manifest says something else of role cache"]);
    world.ready(&desired);
    assert_eq!(world.observe().tenants["acme"].pools["aredis"].doc.role_traits().priority, 9);
}

#[test]
fn no_plan_takes_a_gateway_below_its_minimum() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let mut desired = mixed(flake.path(), "");
    desired.tenants[0].pools[0].desired_counts = mvm::vm::pool::DesiredCounts { running: 3, ..Default::default() };
    world.ready(&desired);
    desired.tenants[0].pools[0].desired_counts = mvm::vm::pool::DesiredCounts { running: 1, warm: 1, sleeping: 1 };
    let plan = world.plan(&desired);
    let down =
        plan.steps.iter().filter(|step| matches!(&step.action, Action::Change { target, .. } if target.to_string().contains("/gw/")));
    assert_eq!(down.count(), 2);
    world.ready(&desired);
    assert_eq!(world.states("acme/gw"), [1, 1, 1]);
    // By hand it can be: the next pass brings it up again.
    let node = world.node();
    let gateway = PoolAddress::new("acme".parse().unwrap(), "gw".parse().unwrap());
    let ids = node.instances(&gateway).unwrap();
    let running = ids
        .into_iter()
        .map(|id| mvm_types::InstanceAddress::new(gateway.tenant.clone(), gateway.pool.clone(), id))
        .find(|at| node.instance(at).unwrap().state.name() == StateName::Running)
        .unwrap();
    node.stop(&running, StopMode::Force).unwrap();
    world.ready(&desired);
    assert_eq!(world.states("acme/gw"), [1, 1, 1]);
}

#[test]
fn while_gateways_are_replaced_another_one_stands_in() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let mut desired = mixed(flake.path(), "");
    desired.tenants[0].pools[0].desired_counts.running = 2;
    desired.tenants[0].pools[0].runtime_policy.min_running = 2;
    world.ready(&desired);
    let gateways = || world.vmm.machines().into_iter().filter(|(at, paused)| at.starts_with("acme/gw/") && !paused).count();
    let seen = Mutex::new(Vec::new());
    let progress = |_: Progress<'_>| seen.lock().unwrap().push(gateways());
    let cancel = AtomicBool::new(false);
    let soon = Instant::now() + Duration::from_secs(60);
    desired.tenants[0].pools[0].instance_resources.mem_mib += 16;
    let options = ApplyOptions { deadline: soon, parallel: 4, progress: &progress, cancel: &cancel };
    assert_eq!(reconciler::apply(&world.node(), &desired, &options).unwrap(), Applied::Ready);
    let seen = seen.into_inner().unwrap();
    assert_eq!((seen.iter().min(), seen.iter().max()), (Some(&2), Some(&3)), "{seen:?}");
    world.check();
    let observed = world.observe();
    let pool = &observed.tenants["acme"].pools["gw"];
    assert_eq!(pool.instances.len(), 2);
    assert!(pool.instances.iter().all(|one| !one.doc.stands_in && one.doc.blueprint.resources.mem_mib == 144));
    // Where nothing more may run, they stay as they are, and it is said why.
    desired.tenants[0].pools[0].instance_resources.mem_mib += 16;
    desired.tenants[0].quotas.max_running = Some(4);
    let plan = world.plan(&desired);
    let why = plan.deferred.iter().find(|one| one.object == "acme/gw").unwrap();
    assert!(why.why.starts_with("2 run at least (min_running of role gateway), and one more cannot run meanwhile: "), "{}", why.why);
    assert!(
        !plan.steps.iter().any(|step| matches!(&step.action, Action::Change { target, .. } if target.to_string().starts_with("acme/gw/")))
    );
}

#[test]
fn a_rollout_that_was_cut_off_ends_with_the_wanted_ones() {
    let (world, flake) = (World::new(), flake(MANIFEST));
    let mut desired = mixed(flake.path(), "");
    world.ready(&desired);
    desired.tenants[0].pools[0].instance_resources.mem_mib += 16;
    for effect in 0.. {
        let switch = KillSwitch::at(effect);
        let Ok(node) = world.process(&switch) else { continue };
        let done = apply_on(&node, &desired, 1);
        drop(node);
        let instances = world.observe().tenants["acme"].pools["gw"].instances.len();
        assert!(instances <= 2, "{instances} after effect {effect}");
        if done.is_ok_and(|applied| applied == Applied::Ready) {
            break;
        }
        desired.tenants[0].pools[0].instance_resources.mem_mib ^= 16;
    }
    world.ready(&desired);
    assert_eq!(world.observe().tenants["acme"].pools["gw"].instances.len(), 1);
}

#[test]
fn a_start_without_a_required_drive_is_refused_before_anything_is_made() {
    let world = World::new();
    let mut desired = fleet("running = 0", "running = 1");
    let mut builder = desired.tenants[0].pools[1].clone();
    builder.pool_id = "bld".parse().unwrap();
    builder.role = mvm_types::Role::Builder;
    desired.tenants[0].pools.push(builder);
    let mut none = desired.clone();
    none.tenants[0].pools.iter_mut().for_each(|pool| pool.desired_counts = Default::default());
    world.ready(&none);
    world.node().secret_set(&"acme".parse().unwrap(), &"token".parse().unwrap(), b"x", SecretChange::Set).unwrap();
    // A secret that cannot be opened any more.
    let key = "tenants/acme/secrets.json";
    let text = String::from_utf8(world.store.raw().read(key).unwrap().unwrap()).unwrap();
    let at = text.find("\"sealed\": \"").unwrap() + "\"sealed\": \"".len();
    world.store.raw().write(key, format!("{}zz{}", &text[..at], &text[at..]).as_bytes()).unwrap();
    let before = world.vmm.machines().len();
    let report = world.pass(&desired);
    let failed: Vec<String> = report.failed().map(|(_, error, _)| error.to_owned()).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert!(failed[0].contains("its role worker requires the secrets drive, which cannot be made: cannot open secret token"), "{failed:?}");
    // The builder has nothing to do with secrets, and runs.
    assert_eq!(world.states("acme/bld"), [1, 0, 0]);
    assert_eq!(world.vmm.machines().len(), before + 1);
    let observed = world.observe();
    let failure = observed.tenants["acme"].pools["web"].instances[0].doc.failure.as_ref().unwrap();
    assert!(failure.error.contains("requires the secrets drive"), "{failure:?}");
    world.check();
}
