//! What is there: documents, virtual machines, host.

use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{NodeId, PoolId, TenantId};

use crate::host::ObservedNetwork;
use crate::net::{Ruleset, TenantNetId};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::instance::{InstanceDoc, exposed, missing_secrets};
use crate::vm::keys;
use crate::vm::node::Node;
use crate::vm::pool::role::Roles;
use crate::vm::pool::{BUILTIN, PoolDoc};
use crate::vm::tenant::TenantDoc;
use crate::vmm::Liveness;

/// Everything that a plan depends on besides what is desired, the time and the options.
#[derive(Debug, Clone)]
pub struct Observed {
    /// This node.
    pub node: NodeId,
    /// Memory that guests may have altogether, in MiB.
    pub capacity_mib: u64,
    /// Memory that a virtual machine needs besides its guest's, in MiB.
    pub overhead_mib: u32,
    /// Net ids that tenants had who are gone, and which are never given again.
    pub retired_net_ids: BTreeSet<TenantNetId>,
    /// The tenants that are there.
    pub tenants: BTreeMap<TenantId, ObservedTenant>,
    /// What roles mean, by the manifests of the flakes that they are from.
    pub roles: Roles,
    /// Bridges and rules.
    pub network: ObservedNetwork,
    /// Bridges of tenants whose document was moved aside; they stay.
    pub kept_bridges: BTreeSet<String>,
    /// What could not be read: quarantined documents and the like, in words.
    pub problems: Vec<String>,
}

/// One tenant that is there.
#[derive(Debug, Clone)]
pub struct ObservedTenant {
    /// Its document.
    pub doc: TenantDoc,
    /// Its pools.
    pub pools: BTreeMap<PoolId, ObservedPool>,
}

/// One pool that is there.
#[derive(Debug, Clone)]
pub struct ObservedPool {
    /// Its document.
    pub doc: PoolDoc,
    /// Whether its image is there, whole as far as sizes tell.
    pub image: ImagePresence,
    /// Its instances, oldest first.
    pub instances: Vec<ObservedInstance>,
    /// What is not enabled in them because a secret is missing, in words.
    pub not_enabled: Vec<String>,
}

/// Whether a pool's image is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImagePresence {
    /// It is.
    Present,
    /// It is, and the flake has changed since the pool's newest build.
    Outdated,
    /// It is not, or was never built.
    Missing,
}

/// One instance that is there.
#[derive(Debug, Clone)]
pub struct ObservedInstance {
    /// Its document.
    pub doc: InstanceDoc,
    /// Whether its virtual machine runs, in the states that have one.
    pub liveness: Liveness,
    /// Whether another process of mvm is changing it at this moment.
    pub busy: bool,
}

impl ObservedInstance {
    /// The key that sorts instances by age, oldest first.
    pub fn age(&self) -> (i64, &str) {
        (self.doc.created.wall_ms, self.doc.instance_id.as_str())
    }

    /// Tells whether the document and the world disagree: a change of state was cut off, or the virtual machine died.
    pub fn needs_recovery(&self) -> bool {
        self.doc.transition.is_some() || self.doc.passing_to.is_some() || (self.doc.state.vm().is_some() && self.liveness == Liveness::Gone)
    }
}

impl Observed {
    /// Returns what the packet filter rules are rendered from.
    pub fn ruleset(&self) -> Ruleset {
        let mut ruleset = Ruleset::default();
        for tenant in self.tenants.values() {
            let network = tenant.doc.network.network();
            let instances = tenant.pools.values().flat_map(|pool| &pool.instances).map(|one| one.doc.network(&network)).collect();
            ruleset.tenants.push((network, instances));
            for pool in tenant.pools.values() {
                ruleset.exposed.extend(exposed(&pool.doc, &network, pool.instances.iter().map(|one| &one.doc)));
            }
        }
        ruleset
    }

    /// Returns the hash of the rules that the documents give; `None` without tenants, who need no rules.
    pub fn ruleset_hash(&self) -> Option<String> {
        if self.tenants.is_empty() { None } else { self.ruleset().fingerprint().ok() }
    }
}

/// Looks at everything. Spawns no process and writes nothing, unless a torn document has to be moved aside.
///
/// # Errors
/// When the state directory or the host cannot be read at all. One document that cannot be read is a problem, and the others go on.
pub fn observe(node: &Node) -> Result<Observed, LifecycleError> {
    let mut problems = Vec::new();
    let mut flakes = Flakes::new();
    let mut tenants = BTreeMap::new();
    let mut kept_bridges = BTreeSet::new();
    for id in node.tenant_dirs()? {
        match node.documents().read::<TenantDoc>(&keys::tenant_doc(&id)) {
            Ok(Some(doc)) => {
                let pools = observe_pools(node, &id, &mut flakes, &mut problems)?;
                tenants.insert(id, ObservedTenant { doc, pools });
            }
            // A directory without a document: a tenant that was never finished, or whose document was moved aside.
            Ok(None) => {
                let docs = node.tenant_instances(&id, &mut problems)?;
                kept_bridges.extend(docs.iter().map(|doc| crate::net::bridge_name(doc.net_id)));
                if !docs.is_empty() {
                    problems.push(format!("tenant {id} has no document; put back the one that was moved aside, or apply the fleet again"));
                }
            }
            Err(error) => problems.push(with_causes(&error)),
        }
    }
    let mut roles = Roles::default();
    for doc in tenants.values().flat_map(|tenant: &ObservedTenant| tenant.pools.values()).map(|pool| &pool.doc) {
        if let Some(traits) = &doc.traits {
            roles.learn(&doc.spec.flake_ref, doc.spec.role, traits.clone());
        }
    }
    Ok(Observed {
        node: node.id.clone(),
        roles,
        capacity_mib: node.host().guest_memory_mib()?,
        overhead_mib: node.vmm().overhead_mib(),
        retired_net_ids: node.retired_net_ids()?,
        tenants,
        network: node.host().observe_network()?,
        kept_bridges,
        problems,
    })
}

/// What the sources of flakes are now: each is looked at once in a pass, however many pools share it.
type Flakes = BTreeMap<String, Result<Option<String>, String>>;

fn observe_pools(
    node: &Node,
    tenant: &TenantId,
    flakes: &mut Flakes,
    problems: &mut Vec<String>,
) -> Result<BTreeMap<PoolId, ObservedPool>, LifecycleError> {
    let mut pools = BTreeMap::new();
    for pool in node.pool_dirs(tenant)? {
        let id = pool.pool.clone();
        let doc = match node.documents().read::<PoolDoc>(&keys::pool_doc(&pool)) {
            Ok(Some(doc)) => doc,
            Ok(None) => {
                problems.push(format!("pool {pool} has no document; put back the one that was moved aside, or apply the fleet again"));
                continue;
            }
            Err(error) => {
                problems.push(with_causes(&error));
                continue;
            }
        };
        let image = match &doc.revision {
            Some(revision) if node.images().open(revision).is_ok() => match is_outdated(node, &doc, flakes) {
                true => ImagePresence::Outdated,
                false => ImagePresence::Present,
            },
            _ => ImagePresence::Missing,
        };
        let mut instances = Vec::new();
        for doc in node.pool_instances(&pool, problems)? {
            instances.push(observe_instance(node, doc)?);
        }
        instances.sort_by(|a, b| a.age().cmp(&b.age()));
        let not_enabled = not_enabled(node, &doc)?;
        pools.insert(id, ObservedPool { doc, image, instances, not_enabled });
    }
    Ok(pools)
}

/// Tells whether a pool's newest build is of something else than its flake is now. Its current revision may be an older one.
fn is_outdated(node: &Node, doc: &PoolDoc, flakes: &mut Flakes) -> bool {
    let spec = &doc.spec;
    let Some(built) = &doc.built else { return spec.flake_ref != BUILTIN };
    if !built.is_of(spec) {
        return true;
    }
    if spec.flake_ref == BUILTIN {
        return false;
    }
    match flakes.entry(spec.flake_ref.clone()).or_insert_with(|| node.images().fingerprint(&spec.flake_ref)) {
        Ok(Some(now)) => built.fingerprint.as_ref() != Some(now),
        // Only nix can tell, and `mvm pool build` asks it.
        Ok(None) => false,
        // The build says what is wrong.
        Err(_) => true,
    }
}

/// What the pool's instances would be started without; secrets are only looked at where something needs one.
fn not_enabled(node: &Node, doc: &PoolDoc) -> Result<Vec<String>, LifecycleError> {
    let traits = doc.role_traits();
    let services = traits.services.iter().map(|service| (service.unit.as_str(), service.secrets.as_slice()));
    let workload = doc.spec.workload.iter().map(|workload| ("workload", workload.secrets.as_slice()));
    let needs: Vec<_> = services.chain(workload).filter(|(_, secrets)| !secrets.is_empty()).collect();
    if needs.is_empty() {
        return Ok(Vec::new());
    }
    let there = if traits.requires_secrets_drive { node.secret_names(&doc.tenant_id)? } else { BTreeSet::new() };
    Ok(needs.into_iter().filter_map(|(what, secrets)| missing_secrets(what, secrets, &there)).collect())
}

fn observe_instance(node: &Node, doc: InstanceDoc) -> Result<ObservedInstance, LifecycleError> {
    let liveness = doc.state.vm().map_or(Liveness::Gone, |vm| node.vmm().liveness(vm));
    // Only who is amid a change holds the lock for long.
    let busy = doc.transition.is_some() && node.documents().raw().is_locked(&keys::instance_dir(&doc.at()))?;
    Ok(ObservedInstance { doc, liveness, busy })
}
