//! PURE: the order of pools within a tenant.

use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{PoolId, Role};

use crate::vm::pool::PoolSpec;
use crate::vm::pool::role::Roles;

/// Tells whether a pool starts only when another one of its tenant is ready: its `depends_on`, and the gateways for everything that is
/// not one.
pub fn waits_on(pool: &PoolSpec, other: &PoolSpec) -> bool {
    let behind_gateway = other.role == Role::Gateway && pool.role != Role::Gateway;
    other.pool_id != pool.pool_id && (behind_gateway || pool.depends_on.contains(&other.pool_id))
}

/// Returns the pools of the same tenant that must be ready before a pool starts.
pub fn waits_for<'a>(pool: &'a PoolSpec, all: &'a [PoolSpec]) -> impl Iterator<Item = &'a PoolSpec> {
    all.iter().filter(move |other| waits_on(pool, other))
}

/// Returns the pools in the order in which they come up: by role, critical ones first, then by name, and none before what it
/// waits for. For everything that puts to sleep or stops it is reversed.
///
/// Pools that wait for each other, which a valid document does not have, come last.
pub fn bring_up_order<'a>(pools: &'a [PoolSpec], roles: &Roles) -> Vec<&'a PoolSpec> {
    let mut sorted: Vec<&PoolSpec> = pools.iter().collect();
    sorted.sort_by_cached_key(|pool| (roles.priority(pool), !pool.critical, pool.pool_id.clone()));
    let place: BTreeMap<&PoolId, usize> = sorted.iter().enumerate().map(|(place, pool)| (&pool.pool_id, place)).collect();
    let mut gateways_left = sorted.iter().filter(|pool| pool.role == Role::Gateway).count();
    let behind_gateways = |pool: &PoolSpec| pool.role != Role::Gateway;
    // For each pool how much it still waits for, all gateways together counting as one, and who waits for it by name.
    let mut waits: Vec<usize> = vec![0; sorted.len()];
    let mut followers: Vec<Vec<usize>> = vec![Vec::new(); sorted.len()];
    for (mine, pool) in sorted.iter().enumerate() {
        let named: BTreeSet<usize> =
            pool.depends_on.iter().filter_map(|id| place.get(id).copied()).filter(|other| *other != mine).collect();
        waits[mine] = named.len() + usize::from(behind_gateways(pool) && gateways_left > 0);
        for other in named {
            followers[other].push(mine);
        }
    }
    let mut left: BTreeSet<usize> = (0..sorted.len()).collect();
    let mut free: BTreeSet<usize> = left.iter().copied().filter(|pool| waits[*pool] == 0).collect();
    let mut order = Vec::with_capacity(sorted.len());
    while let Some(next) = free.pop_first().or_else(|| left.first().copied()) {
        left.remove(&next);
        order.push(sorted[next]);
        let mut freed = std::mem::take(&mut followers[next]);
        if sorted[next].role == Role::Gateway {
            gateways_left -= 1;
            if gateways_left == 0 {
                freed.extend(left.iter().filter(|pool| behind_gateways(sorted[**pool])));
            }
        }
        for pool in freed {
            waits[pool] -= 1;
            if waits[pool] == 0 && left.contains(&pool) {
                free.insert(pool);
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use crate::vm::pool::role::{RoleTraits, role_priority};

    use super::*;

    fn pool(id: &str, role: Role, depends_on: &[&str]) -> PoolSpec {
        PoolSpec { depends_on: depends_on.iter().map(|id| id.parse().unwrap()).collect(), ..PoolSpec::new(id.parse().unwrap(), role) }
    }

    #[test]
    fn roles_then_critical_then_names_and_dependencies_first() {
        let mut pools = vec![
            pool("msg", Role::CapabilityImessage, &[]),
            pool("api", Role::Worker, &["db"]),
            pool("db", Role::Worker, &[]),
            pool("zz", Role::Worker, &[]),
            pool("gw", Role::Gateway, &[]),
            pool("bld", Role::Builder, &[]),
        ];
        pools[3].critical = true;
        let order: Vec<&str> = bring_up_order(&pools, &Roles::default()).iter().map(|pool| pool.pool_id.as_str()).collect();
        assert_eq!(order, ["gw", "bld", "zz", "db", "api", "msg"]);
    }

    /// The order by its definition: of those left, the first that waits for nothing left.
    fn by_definition(pools: &[PoolSpec]) -> Vec<&PoolSpec> {
        let mut left: Vec<&PoolSpec> = pools.iter().collect();
        left.sort_by_key(|pool| (role_priority(pool.role), !pool.critical, &pool.pool_id));
        let mut order: Vec<&PoolSpec> = Vec::new();
        while !left.is_empty() {
            let is_done = |other: &PoolSpec| order.iter().any(|done| done.pool_id == other.pool_id);
            let free = left.iter().position(|pool| waits_for(pool, pools).all(is_done)).unwrap_or(0);
            order.push(left.remove(free));
        }
        order
    }

    proptest! {
        #[test]
        fn the_order_is_that_of_its_definition(roles in proptest::collection::vec((0usize..4, any::<bool>(), proptest::collection::vec(0usize..8, 0..3)), 0..8)) {
            let mut pools: Vec<PoolSpec> = Vec::new();
            for (index, (role, critical, depends_on)) in roles.iter().enumerate() {
                // Only on earlier ones, so that there is no cycle among the names; a gateway behind a worker makes one.
                let depends_on = depends_on.iter().filter(|other| **other < index).map(|other| format!("p{other}").parse().unwrap()).collect();
                let spec = PoolSpec { critical: *critical, depends_on, ..PoolSpec::new(format!("p{index}").parse().unwrap(), Role::ALL[*role]) };
                pools.push(spec);
            }
            let ids = |order: Vec<&PoolSpec>| order.iter().map(|pool| pool.pool_id.to_string()).collect::<Vec<_>>();
            prop_assume!(by_definition(&pools).iter().enumerate().all(|(at, pool)| waits_for(pool, &pools).all(|other| by_definition(&pools)[..at].iter().any(|done| done.pool_id == other.pool_id))));
            prop_assert_eq!(ids(bring_up_order(&pools, &Roles::default())), ids(by_definition(&pools)));
        }
    }

    #[test]
    fn a_manifest_gives_its_roles_their_places() {
        let cache: Role = "cache".parse().unwrap();
        let pools = vec![pool("web", Role::Worker, &[]), pool("gw", Role::Gateway, &[]), pool("redis", cache, &[])];
        let ids = |roles: &Roles| bring_up_order(&pools, roles).iter().map(|pool| pool.pool_id.to_string()).collect::<Vec<_>>();
        assert_eq!(ids(&Roles::default()), ["gw", "redis", "web"]);
        let mut roles = Roles::default();
        roles.learn("builtin", cache, &Arc::new(RoleTraits { priority: 7, ..RoleTraits::built_in(cache) }));
        assert_eq!(ids(&roles), ["gw", "web", "redis"]);
    }

    #[test]
    fn thousands_of_pools_in_a_chain_are_ordered() {
        let name = |n: usize| format!("p{n}");
        let pools: Vec<PoolSpec> = (0..4000)
            .map(|n| {
                pool(
                    &name(n),
                    Role::Worker,
                    if n == 0 { vec![] } else { vec![name(n - 1)] }.iter().map(String::as_str).collect::<Vec<_>>().as_slice(),
                )
            })
            .collect();
        let order = bring_up_order(&pools, &Roles::default());
        assert!(order.iter().enumerate().all(|(at, pool)| pool.pool_id.as_str() == name(at)));
    }
}
