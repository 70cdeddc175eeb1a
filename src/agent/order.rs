//! PURE: the order of pools within a tenant.

use mvm_types::Role;

use crate::vm::pool::PoolSpec;

/// Returns the place of a role in the order: lower comes up earlier and goes to sleep later.
pub fn role_priority(role: Role) -> u8 {
    role.priority()
}

/// Returns the pools of the same tenant that must be ready before a pool starts: its `depends_on`, and the gateways for
/// everything that is not one.
pub fn waits_for<'a>(pool: &'a PoolSpec, all: &'a [PoolSpec]) -> impl Iterator<Item = &'a PoolSpec> {
    all.iter().filter(move |other| {
        let behind_gateway = other.role == Role::Gateway && pool.role != Role::Gateway;
        other.pool_id != pool.pool_id && (behind_gateway || pool.depends_on.contains(&other.pool_id))
    })
}

/// Returns the pools in the order in which they come up: by role, critical ones first, then by name, and none before what it
/// waits for. For everything that puts to sleep or stops it is reversed.
///
/// Pools that wait for each other, which a valid document does not have, come last.
pub fn bring_up_order(pools: &[PoolSpec]) -> Vec<&PoolSpec> {
    let mut left: Vec<&PoolSpec> = pools.iter().collect();
    left.sort_by_key(|pool| (role_priority(pool.role), !pool.critical, &pool.pool_id));
    let mut order: Vec<&PoolSpec> = Vec::with_capacity(pools.len());
    while !left.is_empty() {
        let free = left
            .iter()
            .position(|pool| waits_for(pool, pools).all(|other| order.iter().any(|done| done.pool_id == other.pool_id)))
            .unwrap_or(0);
        order.push(left.remove(free));
    }
    order
}

#[cfg(test)]
mod tests {
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
        let order: Vec<&str> = bring_up_order(&pools).iter().map(|pool| pool.pool_id.as_str()).collect();
        assert_eq!(order, ["gw", "bld", "zz", "db", "api", "msg"]);
    }
}
