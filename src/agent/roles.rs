//! What the roles of a document mean, and whether its pools may be what they are declared as.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_types::{ProfileName, Role, RoleError, TenantId};

use crate::agent::desired::{DesiredState, InvalidDocument, Problem};
use crate::agent::observe::ObservedTenant;
use crate::vm::error::with_causes;
use crate::vm::node::Node;
use crate::vm::pool::nix_manifest::ManifestError;
use crate::vm::pool::role::{Ports, RoleTraits, Roles};
use crate::vm::pool::{BUILTIN, ImageError, PoolSpec};
use crate::vm::sleep_policy;

/// Reads the manifests of the flakes that a document names, each once, and holds its pools against them.
///
/// A pool that is there already, declared as before, keeps what its role meant when its manifest cannot be used any more: one tenant's
/// broken flake holds up nobody else, and its build says what is wrong.
///
/// # Errors
/// Every problem, with its place in the document.
pub fn learn(
    node: &Node,
    desired: &DesiredState,
    there: &BTreeMap<TenantId, ObservedTenant>,
    roles: &mut Roles,
) -> Result<(), InvalidDocument> {
    type Known<'a> = BTreeMap<(&'a str, Role, &'a ProfileName), Result<Option<Arc<RoleTraits>>, (&'static str, String)>>;
    let mut known: Known<'_> = BTreeMap::new();
    let mut problems = Vec::new();
    for (t, tenant) in desired.tenants.iter().enumerate() {
        for (p, pool) in tenant.pools.iter().enumerate() {
            let found = known.entry((&pool.flake_ref, pool.role, &pool.profile)).or_insert_with(|| read(node, pool));
            let mut problem = |field: String, what: String| problems.push(Problem::new(format!("tenants[{t}].pools[{p}].{field}"), what));
            match found {
                Err(_) if is_there(there, &tenant.tenant_id, pool) => {}
                Err((field, why)) => problem((*field).to_owned(), why.clone()),
                Ok(traits) => {
                    if let Some(traits) = traits {
                        roles.learn(&pool.flake_ref, pool.role, traits);
                    }
                    for (field, what) in demands(pool, &roles.of(pool)) {
                        problem(field, what);
                    }
                }
            }
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(InvalidDocument { problems }) }
}

/// Holds one pool that is to be made against the manifest of its flake.
///
/// # Errors
/// Every problem in a line of its own, with the field that it is about.
pub fn check(node: &Node, pool: &PoolSpec) -> Result<(), String> {
    let problems = match read(node, pool) {
        Err((field, why)) => vec![(field.to_owned(), why)],
        Ok(traits) => demands(pool, &traits.unwrap_or_else(|| Arc::new(RoleTraits::built_in(pool.role)))),
    };
    if problems.is_empty() {
        return Ok(());
    }
    Err(problems.iter().map(|(field, what)| format!("{field}: {what}")).collect::<Vec<_>>().join("\n"))
}

/// Tells whether a pool is there with the same flake, role and profile.
fn is_there(there: &BTreeMap<TenantId, ObservedTenant>, tenant: &TenantId, pool: &PoolSpec) -> bool {
    let known = there.get(tenant).and_then(|tenant| tenant.pools.get(&pool.pool_id));
    known.is_some_and(|known| {
        let spec = &known.doc.spec;
        (&spec.flake_ref, spec.role, &spec.profile) == (&pool.flake_ref, pool.role, &pool.profile)
    })
}

fn read(node: &Node, pool: &PoolSpec) -> Result<Option<Arc<RoleTraits>>, (&'static str, String)> {
    match node.images().role_traits(pool) {
        // For the built-in image the check of the document alone has refused it already; where a flake is not on this host, its build says
        // whether it defines the role.
        Ok(None) if !pool.role.is_built_in() && pool.flake_ref != BUILTIN && node.images().is_here(&pool.flake_ref) => {
            Err(("role", format!("{}, and the flake has no manifest that defines it", RoleError::unknown(pool.role))))
        }
        Ok(traits) => Ok(traits.map(Arc::new)),
        Err(ImageError::Manifest { source, .. }) if matches!(*source, ManifestError::Unknown { kind: "role", .. }) => {
            Err(("role", source.to_string()))
        }
        Err(ImageError::Manifest { source, .. }) if matches!(*source, ManifestError::Unknown { .. }) => {
            Err(("profile", source.to_string()))
        }
        Err(error) => Err(("flake_ref", with_causes(&error))),
    }
}

/// What a pool asks for that its role does not allow, and what its role demands that the pool does not have: the field, and why.
fn demands(pool: &PoolSpec, traits: &RoleTraits) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (index, exposure) in pool.expose.iter().enumerate().filter(|(_, exposure)| !traits.may_expose(exposure.in_guest())) {
        let allowed: Vec<String> = match &traits.ports {
            Ports::Any => Vec::new(),
            Ports::Only(ports) => ports.iter().map(|port| format!("{}/{}", port.port, port.protocol.as_str())).collect(),
        };
        let allowed = if allowed.is_empty() { "nothing".to_owned() } else { allowed.join(", ") };
        let what = format!("{}/{}: role {} may expose {allowed}", exposure.port, exposure.protocol.as_str(), pool.role);
        found.push((format!("expose[{index}]"), what));
    }
    let (running, least) = (pool.desired_counts.running, sleep_policy::effective(&pool.runtime_policy, traits).min_running);
    if running < least {
        let what = format!("{running}, and at least {least} run: runtime_policy.min_running, or that of role {}", pool.role);
        found.push(("desired_counts.running".to_owned(), what));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::pool::Exposure;
    use crate::vm::pool::role::{Port, Protocol};

    #[test]
    fn a_role_allows_and_demands() {
        let expose = vec![Exposure { port: 443, host_port: None, protocol: Protocol::Tcp }];
        let mut pool = PoolSpec { expose, ..PoolSpec::new("web".parse().unwrap(), Role::Worker) };
        let worker = RoleTraits::built_in(Role::Worker);
        assert_eq!(demands(&pool, &worker), [("expose[0]".into(), "443/tcp: role worker may expose nothing".into())]);
        let ports = Ports::Only(vec![Port { port: 443, protocol: Protocol::Tcp }]);
        let web = RoleTraits { ports, min_running: 2, ..worker };
        let what = "1, and at least 2 run: runtime_policy.min_running, or that of role worker".to_owned();
        pool.desired_counts.running = 1;
        assert_eq!(demands(&pool, &web), [("desired_counts.running".into(), what)]);
        pool.desired_counts.running = 2;
        assert_eq!(demands(&pool, &web), []);
        assert_eq!(demands(&pool, &RoleTraits::built_in(Role::Gateway)), []);
    }
}
