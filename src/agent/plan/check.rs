//! What a document may not change about what is there.

use crate::agent::desired::{DesiredState, InvalidDocument, Problem};
use crate::agent::observe::{Observed, Orphan};
use crate::vm::pool::PoolSpec;

/// Checks a document against what is there: what is fixed for an object's life stays, and networks stay apart.
///
/// # Errors
/// Every problem, with its place in the document.
pub fn check_against(desired: &DesiredState, observed: &Observed) -> Result<(), InvalidDocument> {
    let mut problems = Vec::new();
    let mut problem = |place: String, what: String| problems.push(Problem::new(place, what));
    for (t, tenant) in desired.tenants.iter().enumerate() {
        let place = format!("tenants[{t}]");
        let (net_id, subnet) = (tenant.network.tenant_net_id, tenant.network.ipv4_subnet);
        let Some(there) = observed.tenants.get(&tenant.tenant_id) else {
            if let Some(former) = observed.retired_net_ids.get(&net_id).filter(|former| **former != tenant.tenant_id) {
                problem(
                    format!("{place}.network.tenant_net_id"),
                    format!("{net_id} belonged to tenant {former}, which is gone, and is given to nobody else"),
                );
            }
            let (place, remains) = (&place, &observed.orphans);
            let faults = remains.iter().filter_map(|(id, orphan)| match *id == tenant.tenant_id {
                true => tenant.network.check_return(id, &orphan.remains()).err(),
                false => tenant.network.check_beside(id, &orphan.remains()).err(),
            });
            faults.for_each(|(field, why)| problem(format!("{place}.{field}"), why));
            for (id, other) in &observed.tenants {
                let theirs = &other.doc.network;
                if theirs.tenant_net_id == net_id {
                    problem(format!("{place}.network.tenant_net_id"), format!("{net_id} belongs to tenant {id} on this node"));
                }
                if theirs.ipv4_subnet.overlaps(subnet) {
                    let theirs = theirs.ipv4_subnet;
                    problem(format!("{place}.network.ipv4_subnet"), format!("{subnet} overlaps {theirs} of tenant {id} on this node"));
                }
            }
            continue;
        };
        if there.doc.network != tenant.network {
            let (old_id, old) = (there.doc.network.tenant_net_id, there.doc.network.ipv4_subnet);
            problem(
                format!("{place}.network"),
                format!(
                    "a tenant's network is fixed for its life, and {} has {old_id}, {old}: destroy the tenant first, or give the new one another name",
                    tenant.tenant_id
                ),
            );
        }
        for (p, pool) in tenant.pools.iter().enumerate() {
            let place = format!("{place}.pools[{p}]");
            if let Some(orphan) = there.orphans.get(&pool.pool_id) {
                for (field, why) in orphan_problems(pool, orphan) {
                    problem(format!("{place}.{field}"), why);
                }
            }
            let Some(there) = there.pools.get(&pool.pool_id) else { continue };
            let old = &there.doc.spec;
            if old.role != pool.role {
                problem(
                    format!("{place}.role"),
                    format!(
                        "a pool's role is fixed for its life, and {} is a {}: declare a pool of another name, and prune this one",
                        there.doc.address(),
                        old.role
                    ),
                );
            }
            let (was, is) = (old.instance_resources.data_disk_mib, pool.instance_resources.data_disk_mib);
            if is < was && !there.instances.is_empty() {
                problem(
                    format!("{place}.instance_resources.data_disk_mib"),
                    format!("a data disk does not shrink, and the instances of {} have {was} MiB: declare a new pool", there.doc.address()),
                );
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(InvalidDocument { problems }) }
}

/// What a declaration may not change about a pool whose document is gone.
fn orphan_problems(pool: &PoolSpec, orphan: &Orphan) -> Vec<(&'static str, String)> {
    let mut problems = Vec::new();
    if let Some(other) = orphan.instances.iter().find(|doc| doc.role != pool.role) {
        problems.push(("role", format!("a pool's role is fixed for its life, and {} is a {}", other.at(), other.role)));
    }
    let largest = orphan.instances.iter().map(|doc| doc.blueprint.resources.data_disk_mib).max().unwrap_or(0);
    if pool.instance_resources.data_disk_mib < largest {
        problems.push(("instance_resources.data_disk_mib", format!("a data disk does not shrink, and an instance has {largest} MiB")));
    }
    problems
}
