//! What is there: documents, virtual machines, host.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{NodeId, PoolId, RevisionId, SecretName, TenantId};

use crate::host::ObservedNetwork;
use crate::net::{Ruleset, TenantNetId};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::instance::{InstanceDoc, exposed, missing_secrets};
use crate::vm::keys;
use crate::vm::node::Node;
use crate::vm::pool::role::Roles;
use crate::vm::pool::{BUILTIN, PoolDoc};
use crate::vm::tenant::{Remains, TenantDoc};
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
    /// Net ids that tenants had who are gone, and which nobody else is given.
    pub retired_net_ids: BTreeMap<TenantNetId, TenantId>,
    /// The tenants that are there.
    pub tenants: BTreeMap<TenantId, ObservedTenant>,
    /// What roles mean, by the manifests of the flakes that they are from.
    pub roles: Roles,
    /// Tenants whose document is gone, or cannot be read: what they have stays, and nobody else gets it.
    pub orphans: BTreeMap<TenantId, Orphan>,
    /// Bridges and rules.
    pub network: ObservedNetwork,
    /// What creations left that were cut off before the first document was whole: tenants, pools and instances.
    pub unfinished: Vec<String>,
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
    /// Pools whose document is gone, or cannot be read.
    pub orphans: BTreeMap<PoolId, Orphan>,
}

/// What there is of a tenant or a pool besides its own document.
#[derive(Debug, Clone, Default)]
pub struct Orphan {
    /// The documents of its instances.
    pub instances: Vec<InstanceDoc>,
    /// Why not all of them are known, where it is so.
    pub unknown: Option<String>,
}

impl Orphan {
    /// What is known of its network.
    pub fn remains(&self) -> Remains {
        Remains { places: self.instances.iter().map(InstanceDoc::place).collect(), unknown: self.unknown.clone() }
    }
}

impl ObservedTenant {
    /// The documents of all its instances.
    pub fn instances(&self) -> impl Iterator<Item = &InstanceDoc> {
        let orphans = self.orphans.values().flat_map(|orphan| &orphan.instances);
        self.pools.values().flat_map(|pool| &pool.instances).map(|one| &one.doc).chain(orphans)
    }
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
    /// Why it does not, in those states, as far as that is known.
    pub died_of: Option<String>,
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
            ruleset.tenants.push((network, tenant.instances().map(|doc| doc.network(&network)).collect()));
            for pool in tenant.pools.values() {
                ruleset.exposed.extend(exposed(&pool.doc, &network, pool.instances.iter().map(|one| &one.doc)));
            }
        }
        ruleset
    }

    /// The bridges of tenants whose document is gone; they stay.
    pub fn kept_bridges(&self) -> BTreeSet<String> {
        self.orphans.values().flat_map(|orphan| &orphan.instances).map(|doc| crate::net::bridge_name(doc.net_id)).collect()
    }

    /// Names the TAP of an instance when its machine runs and the TAP is gone: somebody removed it, and nothing reaches the guest any
    /// more, nor does the guest reach anything.
    pub fn lost_tap(&self, one: &ObservedInstance) -> Option<String> {
        let name = crate::net::tap_name(one.doc.net_id, one.doc.offset);
        let runs = one.doc.state.vm().is_some() && one.liveness == Liveness::Alive && one.doc.transition.is_none();
        (runs && !self.network.taps.contains(&name)).then_some(name)
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
    let mut shared = Shared::default();
    let mut tenants = BTreeMap::new();
    let mut orphans = BTreeMap::new();
    let mut unfinished = Vec::new();
    problems.extend(Node::lost_node_doc(node.documents())?);
    for id in node.tenant_dirs()? {
        match node.documents().read::<TenantDoc>(&keys::tenant_doc(&id)) {
            Ok(Some(doc)) => {
                let tenant = observe_pools(node, doc, &mut shared, &mut problems, &mut unfinished)?;
                tenants.insert(id, tenant);
                continue;
            }
            Ok(None) if node.documents().raw().is_unfinished(&keys::tenant_dir(&id))? => {
                unfinished.push(id.to_string());
                continue;
            }
            // Its document was moved aside.
            Ok(None) if !node.pool_dirs(&id)?.is_empty() => {
                problems.push(format!("tenant {id} has no document; put back the one that was moved aside, or apply the fleet again"));
            }
            Ok(None) => continue,
            Err(error) => problems.push(with_causes(&error)),
        }
        let orphan = adopt(&mut problems, |problems| node.tenant_instances(&id, problems))?;
        orphans.insert(id, orphan);
    }
    let mut roles = Roles::default();
    for doc in tenants.values().flat_map(|tenant: &ObservedTenant| tenant.pools.values()).map(|pool| &pool.doc) {
        if let Some(traits) = &doc.traits {
            roles.learn(&doc.spec.flake_ref, doc.spec.role, traits);
        }
    }
    Ok(Observed {
        node: node.id.clone(),
        roles,
        capacity_mib: node.host().guest_memory_mib()?,
        overhead_mib: node.vmm().overhead_mib(),
        retired_net_ids: node.retired_net_ids()?,
        tenants,
        orphans,
        network: node.host().observe_network()?,
        unfinished,
        problems,
    })
}

/// What is looked at once in a pass, however many pools share it.
#[derive(Default)]
struct Shared {
    /// What the sources of flakes are now.
    flakes: BTreeMap<String, Result<Option<String>, String>>,
    /// Whether images are whole.
    images: BTreeMap<RevisionId, bool>,
}

impl Shared {
    fn image(&mut self, node: &Node, doc: &PoolDoc) -> ImagePresence {
        let Some(revision) = &doc.revision else { return ImagePresence::Missing };
        let whole = match self.images.get(revision) {
            Some(whole) => *whole,
            None => *self.images.entry(revision.clone()).or_insert(node.images().open(revision).is_ok()),
        };
        match whole {
            false => ImagePresence::Missing,
            true if self.is_outdated(node, doc) => ImagePresence::Outdated,
            true => ImagePresence::Present,
        }
    }

    /// Tells whether a pool's newest build is of something else than its flake is now. Its current revision may be an older one.
    fn is_outdated(&mut self, node: &Node, doc: &PoolDoc) -> bool {
        let spec = &doc.spec;
        let Some(built) = &doc.built else { return spec.flake_ref != BUILTIN };
        if !built.is_of(spec) {
            return true;
        }
        if spec.flake_ref == BUILTIN {
            return false;
        }
        match self.flakes.entry(spec.flake_ref.clone()).or_insert_with(|| node.images().fingerprint(&spec.flake_ref)) {
            Ok(Some(now)) => built.fingerprint.as_ref() != Some(now),
            // Only nix can tell, and `mvm pool build` asks it.
            Ok(None) => false,
            // The build says what is wrong.
            Err(_) => true,
        }
    }
}

/// Reads the instances of what has no document of its own.
fn adopt(
    problems: &mut Vec<String>,
    read: impl FnOnce(&mut Vec<String>) -> Result<Vec<InstanceDoc>, LifecycleError>,
) -> Result<Orphan, LifecycleError> {
    let before = problems.len();
    let instances = read(problems)?;
    Ok(Orphan { instances, unknown: problems.get(before).cloned() })
}

fn observe_pools(
    node: &Node,
    tenant: TenantDoc,
    shared: &mut Shared,
    problems: &mut Vec<String>,
    unfinished: &mut Vec<String>,
) -> Result<ObservedTenant, LifecycleError> {
    let (mut pools, mut orphans) = (BTreeMap::new(), BTreeMap::new());
    let (dirs, empty) = node.all_pool_dirs(&tenant.tenant_id)?;
    unfinished.extend(empty.iter().map(ToString::to_string));
    let mut cut_off = Vec::new();
    let secrets = Secrets::of(node, &tenant);
    for pool in dirs {
        let id = pool.pool.clone();
        let read = match node.documents().read::<PoolDoc>(&keys::pool_doc(&pool)) {
            Ok(Some(doc)) => Ok(doc),
            Ok(None) => Err(format!("pool {pool} has no document; put back the one that was moved aside, or apply the fleet again")),
            Err(error) => Err(with_causes(&error)),
        };
        let doc = match read {
            Ok(doc) => doc,
            Err(problem) => {
                problems.push(problem);
                orphans.insert(id, adopt(problems, |problems| node.pool_instances(&pool, problems))?);
                continue;
            }
        };
        let image = shared.image(node, &doc);
        let mut instances = node.all_pool_instances(&pool, problems, &mut cut_off, |doc| observe_instance(node, doc))?;
        instances.sort_unstable_by(|a, b| a.age().cmp(&b.age()));
        let not_enabled = not_enabled(&secrets, &doc);
        pools.insert(id, ObservedPool { doc, image, instances, not_enabled });
    }
    drop(secrets);
    unfinished.extend(cut_off.iter().map(ToString::to_string));
    Ok(ObservedTenant { doc: tenant, pools, orphans })
}

/// A tenant's secrets by name, looked at once for all its pools, and only where something needs one.
struct Secrets<'a> {
    node: &'a Node,
    tenant: &'a TenantDoc,
    names: OnceCell<Result<BTreeSet<SecretName>, String>>,
    lost: OnceCell<Option<String>>,
}

impl<'a> Secrets<'a> {
    fn of(node: &'a Node, tenant: &'a TenantDoc) -> Self {
        Self { node, tenant, names: OnceCell::new(), lost: OnceCell::new() }
    }

    fn were_set(&self) -> bool {
        self.tenant.secrets_epoch > 0
    }

    fn names(&self) -> &Result<BTreeSet<SecretName>, String> {
        self.names.get_or_init(|| self.node.secret_names(self.tenant).map_err(|error| with_causes(&error)))
    }

    /// Why they cannot be had although they were set: tells whether their document is there without reading it.
    fn lost(&self) -> Option<&str> {
        let look = || match self.node.documents().raw().len(&keys::secrets_doc(&self.tenant.tenant_id)) {
            Ok(0) => self.names().as_ref().err().cloned(),
            Ok(_) => None,
            Err(error) => Some(with_causes(&error)),
        };
        self.lost.get_or_init(|| if self.were_set() { look() } else { None }).as_deref()
    }
}

/// What the pool's instances are not started with, or not at all.
fn not_enabled(secrets: &Secrets<'_>, doc: &PoolDoc) -> Vec<String> {
    let has_needs = doc.spec.workload.as_ref().is_some_and(|workload| !workload.secrets.is_empty())
        || doc.traits.as_ref().is_some_and(|traits| traits.services.iter().any(|service| !service.secrets.is_empty()));
    if !has_needs && !secrets.were_set() {
        return Vec::new();
    }
    let traits = doc.role_traits();
    let lacking = |why: &str| vec![format!("its role {} requires the secrets drive: {why}", doc.spec.role)];
    let there = match (traits.requires_secrets_drive, has_needs) {
        (false, _) => None,
        (true, false) => return secrets.lost().map(lacking).unwrap_or_default(),
        (true, true) => match secrets.names() {
            Ok(names) => Some(names),
            Err(why) => return lacking(why),
        },
    };
    let services = traits.services.iter().map(|service| (service.unit.as_str(), service.secrets.as_slice()));
    let workload = doc.spec.workload.iter().map(|workload| ("workload", workload.secrets.as_slice()));
    services.chain(workload).filter_map(|(what, needs)| missing_secrets(what, needs, there)).collect()
}

fn observe_instance(node: &Node, doc: InstanceDoc) -> Result<ObservedInstance, LifecycleError> {
    let liveness = doc.state.vm().map_or(Liveness::Gone, |vm| node.vmm().liveness(vm));
    // Only who is amid a change holds the lock for long.
    let busy = doc.transition.is_some() && node.documents().raw().is_locked(&keys::instance_dir(&doc.at()))?;
    let dead = doc.state.vm().filter(|_| liveness == Liveness::Gone && !busy);
    let died_of = dead.and_then(|vm| node.why_gone(&doc.at(), vm));
    Ok(ObservedInstance { doc, liveness, died_of, busy })
}
