//! What a document may not change about what is there.

use crate::agent::desired::{DesiredState, InvalidDocument, Problem};
use crate::agent::observe::Observed;

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
            if observed.retired_net_ids.contains(&net_id) {
                problem(
                    format!("{place}.network.tenant_net_id"),
                    format!("{net_id} belonged to a tenant that is gone, and is never given again"),
                );
            }
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
