//! What the types cannot say: PURE checks of a whole document.

use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{PoolId, RoleError};

use super::{DesiredState, DesiredTenant, Problem, SCHEMA_VERSION};
use crate::vm::pool::role::Protocol;
use crate::vm::pool::{BUILTIN, PoolSpec, check_reference};
use crate::vm::tenant::reserved;

/// The port of the host's SSH: who exposes it locks himself out.
const SSH: u16 = 22;
/// The most pools that a tenant can have: what is looked at in pairs stays quick.
const MAX_POOLS: usize = 4096;

/// Returns everything that makes no sense in a document.
pub(super) fn validate(desired: &DesiredState) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut problem = |place: String, what: String| found.push(Problem::new(place, what));
    if desired.schema_version != SCHEMA_VERSION {
        problem("schema_version".into(), format!("this mvm reads version {SCHEMA_VERSION}, not {}", desired.schema_version));
    }
    let mut ids = BTreeMap::new();
    let mut net_ids = BTreeMap::new();
    for (t, tenant) in desired.tenants.iter().enumerate() {
        let place = format!("tenants[{t}]");
        if let Some(first) = ids.insert(&tenant.tenant_id, t) {
            problem(format!("{place}.tenant_id"), format!("{:?} is declared already in tenants[{first}]", tenant.tenant_id));
        }
        let net_id = tenant.network.tenant_net_id;
        if let Some(first) = net_ids.insert(net_id, t) {
            problem(format!("{place}.network.tenant_net_id"), format!("{net_id} is given already to tenants[{first}]"));
        }
        validate_tenant(tenant, &place, &mut problem);
    }
    overlaps(desired, &mut problem);
    exposures(desired, &mut problem);
    found
}

/// Finds ports of the host that are given twice, or that are not there to be given.
fn exposures(desired: &DesiredState, problem: &mut impl FnMut(String, String)) {
    let mut given: BTreeMap<(Protocol, u16), String> = BTreeMap::new();
    for (t, tenant) in desired.tenants.iter().enumerate() {
        for (p, pool) in tenant.pools.iter().enumerate() {
            for (e, exposure) in pool.expose.iter().enumerate() {
                let place = format!("tenants[{t}].pools[{p}].expose[{e}]");
                let (protocol, port) = (exposure.protocol, exposure.on_host());
                if port == 0 || exposure.port == 0 {
                    problem(place, "port 0 is none; ports are 1 to 65535".to_owned());
                } else if (protocol, port) == (Protocol::Tcp, SSH) {
                    problem(place, format!("host port {SSH}/tcp is how the host itself is reached; give another host_port"));
                } else if let Some(first) = given.get(&(protocol, port)) {
                    problem(place, format!("host port {port}/{} is given already to {first}", protocol.as_str()));
                } else {
                    given.insert((protocol, port), place);
                }
            }
        }
    }
}

/// Finds subnets that overlap another one: sorted, each can only overlap the widest of those that begin before it.
fn overlaps(desired: &DesiredState, problem: &mut impl FnMut(String, String)) {
    let mut subnets: Vec<_> = desired.tenants.iter().enumerate().map(|(t, tenant)| (tenant.network.ipv4_subnet, t)).collect();
    subnets.sort_by_key(|(subnet, t)| (subnet.network(), subnet.prefix(), *t));
    let Some(mut widest) = subnets.first().copied() else { return };
    for (subnet, t) in subnets.into_iter().skip(1) {
        if subnet.overlaps(widest.0) {
            let ((later, at), (earlier, other)) = if t > widest.1 { ((subnet, t), widest) } else { (widest, (subnet, t)) };
            problem(format!("tenants[{at}].network.ipv4_subnet"), format!("{later} overlaps {earlier} of tenants[{other}]"));
        } else {
            widest = (subnet, t);
        }
    }
}

fn validate_tenant(tenant: &DesiredTenant, place: &str, problem: &mut impl FnMut(String, String)) {
    if let Some(why) = reserved(&tenant.tenant_id) {
        problem(format!("{place}.tenant_id"), why);
    }
    if tenant.pools.len() > MAX_POOLS {
        return problem(format!("{place}.pools"), format!("{} pools, and a tenant has at most {MAX_POOLS}", tenant.pools.len()));
    }
    let mut ids = BTreeMap::new();
    for (p, pool) in tenant.pools.iter().enumerate() {
        let place = format!("{place}.pools[{p}]");
        if let Some(first) = ids.insert(&pool.pool_id, p) {
            problem(format!("{place}.pool_id"), format!("{:?} is declared already in pools[{first}] of this tenant", pool.pool_id));
        }
        for (what, why) in pool_problems(pool) {
            problem(format!("{place}.{what}"), why);
        }
        for (d, dependency) in pool.depends_on.iter().enumerate() {
            if !tenant.pools.iter().any(|other| other.pool_id == *dependency) {
                problem(format!("{place}.depends_on[{d}]"), format!("there is no pool {dependency:?} in this tenant"));
            }
        }
    }
    let total: u64 = tenant.pools.iter().map(|pool| pool.desired_counts.total()).sum();
    let room = tenant.network.ipv4_subnet.capacity();
    if total > u64::from(room) {
        let subnet = tenant.network.ipv4_subnet;
        problem(format!("{place}.network.ipv4_subnet"), format!("{subnet} has addresses for {room} instances, {total} are declared"));
    }
    if let Some(cycle) = find_cycle(&tenant.pools) {
        problem(format!("{place}.pools"), cycle);
    }
}

/// Returns what makes no sense in one pool alone: the field below the pool, and why.
pub fn pool_problems(pool: &PoolSpec) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let resources = &pool.instance_resources;
    if !(1..=32).contains(&resources.vcpus) {
        found.push(("instance_resources.vcpus".into(), format!("{} is not between 1 and 32", resources.vcpus)));
    }
    if !(64..=1_048_576).contains(&resources.mem_mib) {
        found.push(("instance_resources.mem_mib".into(), format!("{} MiB is not between 64 and 1048576", resources.mem_mib)));
    }
    let disk = resources.data_disk_mib;
    if disk != 0 && !(8..=67_108_864).contains(&disk) {
        found.push(("instance_resources.data_disk_mib".into(), format!("{disk} MiB is neither 0 nor between 8 and 67108864")));
    }
    for (name, rate, most) in [
        ("drive_mib_per_second", resources.drive_mib_per_second, 1_048_576),
        ("drive_iops", resources.drive_iops, 10_000_000),
        ("net_mbit_per_second", resources.net_mbit_per_second, 100_000),
    ] {
        if let Some(rate) = rate.filter(|rate| !(1..=most).contains(rate)) {
            found.push((format!("instance_resources.{name}"), format!("{rate} is not between 1 and {most}; left out, there is no limit")));
        }
    }
    if pool.runtime_policy.ready_timeout_seconds == 0 {
        found.push(("runtime_policy.ready_timeout_seconds".into(), "no guest is ready in 0 seconds".into()));
    }
    if !pool.role.is_built_in() && pool.flake_ref == BUILTIN {
        found.push(("role".into(), RoleError::unknown(pool.role).to_string()));
    }
    if pool.flake_ref != BUILTIN {
        if let Err(why) = check_reference(&pool.flake_ref) {
            found.push(("flake_ref".into(), format!("{why}; {BUILTIN:?} needs no flake")));
        }
    } else if pool.profile.as_str() != "minimal" {
        found.push(("profile".into(), format!("{:?} is not in the built-in image; it has: minimal", pool.profile)));
    }
    if let Some(workload) = &pool.workload {
        if workload.command.first().is_none_or(String::is_empty) {
            found.push(("workload.command".into(), "the program is missing".into()));
        }
        for (index, argument) in workload.command.iter().enumerate().filter(|(_, argument)| argument.contains('\0')) {
            found.push((format!("workload.command[{index}]"), format!("{argument:?} has a NUL character")));
        }
        for (name, value) in &workload.env {
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                found.push((
                    format!("workload.env.{}", name.escape_debug()),
                    "an environment variable cannot have such a name or value".into(),
                ));
            }
        }
    }
    let mut seen = BTreeSet::new();
    for (index, dependency) in pool.depends_on.iter().enumerate() {
        if *dependency == pool.pool_id {
            found.push((format!("depends_on[{index}]"), "a pool cannot depend on itself".into()));
        } else if !seen.insert(dependency) {
            found.push((format!("depends_on[{index}]"), format!("{dependency:?} is there already")));
        }
    }
    found
}

/// Finds a cycle among what pools wait for: `depends_on`, and gateways before everything else.
fn find_cycle(pools: &[PoolSpec]) -> Option<String> {
    use crate::agent::order::waits_for;

    let by_id: BTreeMap<&PoolId, &PoolSpec> = pools.iter().map(|pool| (&pool.pool_id, pool)).collect();
    let mut done: BTreeSet<&PoolId> = BTreeSet::new();
    for start in pools {
        // Depth first, with the path so far; an explicit stack, since the depth is the document's to choose.
        let mut path: Vec<(&PoolId, Vec<&PoolId>)> = Vec::new();
        let open = |id| (id, waits_for(by_id[id], pools).map(|pool| &pool.pool_id).collect::<Vec<_>>());
        if !done.contains(&start.pool_id) {
            path.push(open(&start.pool_id));
        }
        while let Some((id, next)) = path.last_mut() {
            let id = *id;
            match next.pop() {
                None => {
                    done.insert(id);
                    path.pop();
                }
                Some(dependency) if done.contains(dependency) => {}
                Some(dependency) => {
                    if let Some(begin) = path.iter().position(|(id, _)| *id == dependency) {
                        let mut names: Vec<&str> = path[begin..].iter().map(|(id, _)| id.as_str()).collect();
                        names.push(dependency.as_str());
                        return Some(format!("these pools wait for each other: {}", names.join(" -> ")));
                    }
                    path.push(open(dependency));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use mvm_types::Role;

    use super::*;
    use crate::vm::tenant::{NetworkSpec, Quotas};

    fn tenant(id: &str, net_id: u16, subnet: &str, pools: Vec<PoolSpec>) -> DesiredTenant {
        DesiredTenant {
            tenant_id: id.parse().unwrap(),
            network: NetworkSpec { tenant_net_id: u64::from(net_id).try_into().unwrap(), ipv4_subnet: subnet.parse().unwrap() },
            quotas: Quotas::default(),
            pools,
        }
    }

    fn problems(tenants: Vec<DesiredTenant>) -> Vec<String> {
        let desired = DesiredState { tenants, ..DesiredState::empty() };
        validate(&desired).into_iter().map(|problem| format!("{}: {}", problem.place, problem.what)).collect()
    }

    fn pool(id: &str, depends_on: &[&str]) -> PoolSpec {
        PoolSpec {
            depends_on: depends_on.iter().map(|id| id.parse().unwrap()).collect(),
            ..PoolSpec::new(id.parse().unwrap(), Role::Worker)
        }
    }

    #[test]
    fn a_limit_that_is_none_is_refused() {
        let with = |change: fn(&mut crate::vm::pool::InstanceResources)| {
            let mut spec = pool("web", &[]);
            change(&mut spec.instance_resources);
            pool_problems(&spec)
        };
        assert_eq!(with(|all| (all.drive_iops, all.net_mbit_per_second) = (Some(1), Some(100_000))), []);
        for (place, found) in [
            ("drive_mib_per_second", with(|all| all.drive_mib_per_second = Some(0))),
            ("drive_iops", with(|all| all.drive_iops = Some(0))),
            ("net_mbit_per_second", with(|all| all.net_mbit_per_second = Some(100_001))),
        ] {
            assert_eq!(found.len(), 1, "{place}");
            assert!(found[0].0.ends_with(place) && found[0].1.contains("left out, there is no limit"), "{found:?}");
        }
    }

    #[test]
    fn shared_networks_are_refused() {
        let found = problems(vec![
            tenant("a", 1, "10.240.0.0/22", vec![]),
            tenant("b", 1, "10.240.2.0/24", vec![]),
            tenant("a", 2, "10.240.8.0/24", vec![]),
        ]);
        for expected in [
            "tenants[1].network.tenant_net_id: 1 is given already to tenants[0]",
            "tenants[1].network.ipv4_subnet: 10.240.2.0/24 overlaps 10.240.0.0/22 of tenants[0]",
            "tenants[2].tenant_id: a is declared already in tenants[0]",
        ] {
            assert!(found.contains(&expected.to_owned()), "{expected}\n{found:#?}");
        }
        assert_eq!(found.len(), 3);
    }

    #[test]
    fn cycles_are_shown() {
        let found = problems(vec![tenant("a", 1, "10.240.0.0/24", vec![pool("x", &["y"]), pool("y", &["z"]), pool("z", &["x"])])]);
        assert_eq!(found, ["tenants[0].pools: these pools wait for each other: x -> y -> z -> x"]);
        let gateway = PoolSpec { depends_on: vec!["x".parse().unwrap()], ..PoolSpec::new("gw".parse().unwrap(), Role::Gateway) };
        let found = problems(vec![tenant("a", 1, "10.240.0.0/24", vec![gateway, pool("x", &[])])]);
        assert_eq!(found, ["tenants[0].pools: these pools wait for each other: gw -> x -> gw"]);
    }

    #[test]
    fn counts_cannot_overflow() {
        let mut big = pool("x", &[]);
        big.desired_counts = crate::vm::pool::DesiredCounts { running: u32::MAX, warm: u32::MAX, sleeping: u32::MAX };
        let found = problems(vec![tenant("a", 1, "10.240.0.0/24", vec![big])]);
        assert_eq!(found, ["tenants[0].network.ipv4_subnet: 10.240.0.0/24 has addresses for 252 instances, 12884901885 are declared"]);
    }
}
