//! Tenants come, change their quotas, and go.

use std::collections::BTreeSet;

use mvm_types::TenantId;

use super::config::{NetworkSpec, Quotas, Remains, TenantDoc};
use crate::audit::Entry;
use crate::host::HostExpectations;
use crate::net::Ruleset;
use crate::store::{Document, LockGuard, StoreError, Wait};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::keys;
use crate::vm::node::Node;

/// Says why no tenant can have a name: it has a meaning of its own somewhere.
pub fn reserved(tenant: &TenantId) -> Option<String> {
    let meaning = match tenant.as_str() {
        "verify" => "`mvm events verify` checks the log",
        "throwaway" => "it is whose machines `mvm run` makes",
        _ => return None,
    };
    Some(format!("{tenant:?} cannot name a tenant: {meaning}"))
}

impl Node {
    /// Writes down a tenant with its network; refuses one whose network is not its own alone.
    pub fn tenant_create(&self, tenant: &TenantId, network: NetworkSpec, quotas: Quotas) -> Result<(), LifecycleError> {
        // One at a time, so that two tenants cannot take the same network.
        let _network = self.lock(keys::NETWORK_LOCK)?;
        let _guard = self.lock(&keys::tenant_dir(tenant))?;
        if self.documents().read::<TenantDoc>(&keys::tenant_doc(tenant))?.is_some() {
            return Err(LifecycleError::Exists { kind: "tenant", name: tenant.to_string() });
        }
        self.check_network(tenant, &network)?;
        let doc = TenantDoc {
            version: TenantDoc::VERSION,
            tenant_id: tenant.clone(),
            network,
            quotas,
            secrets_epoch: self.last_secrets_epoch(tenant)?,
            created: self.clock().now(),
        };
        self.audited("create tenant", tenant, || Ok(self.documents().write(&keys::tenant_doc(tenant), &doc)?))
    }

    /// The epoch that the secrets of a tenant had whose document is gone; 0 for a new one.
    fn last_secrets_epoch(&self, tenant: &TenantId) -> Result<u64, LifecycleError> {
        let sealed = self.secrets_doc(tenant)?.into_iter().flat_map(|doc| doc.secrets.into_values()).map(|secret| secret.epoch).max();
        let given = self.tenant_instances(tenant, &mut Vec::new())?.iter().map(|doc| doc.secrets_epoch).max();
        Ok(sealed.max(given).unwrap_or(0))
    }

    fn check_network(&self, tenant: &TenantId, network: &NetworkSpec) -> Result<(), LifecycleError> {
        let refused = |field: &str, why: String| LifecycleError::Invalid { place: format!("{tenant}: {field}"), why };
        let invalid = |field: &str, why: String| Err(refused(&format!("network.{field}"), why));
        if let Some(why) = reserved(tenant) {
            return Err(LifecycleError::Invalid { place: "tenant_id".to_owned(), why });
        }
        let (net_id, subnet) = (network.tenant_net_id, network.ipv4_subnet);
        if let Some(former) = self.node_doc()?.retired_net_ids.get(&net_id.get()).filter(|former| *former != tenant) {
            return invalid("tenant_net_id", format!("{net_id} belonged to tenant {former}, which is gone, and is given to nobody else"));
        }
        for other in self.tenant_dirs()? {
            let Some(doc) = self.documents().read::<TenantDoc>(&keys::tenant_doc(&other))? else {
                // Moved aside: what its machines have is still theirs.
                let remains = self.remains(&other)?;
                let checked =
                    if other == *tenant { network.check_return(tenant, &remains) } else { network.check_beside(&other, &remains) };
                checked.map_err(|(field, why)| refused(field, why))?;
                continue;
            };
            let theirs = doc.network;
            if theirs.tenant_net_id == net_id {
                return invalid("tenant_net_id", format!("{net_id} belongs to tenant {other}"));
            }
            if theirs.ipv4_subnet.overlaps(subnet) {
                return invalid("ipv4_subnet", format!("{subnet} overlaps {} of tenant {other}", theirs.ipv4_subnet));
            }
        }
        Ok(())
    }

    /// What is known of the network of a tenant whose document is gone.
    fn remains(&self, tenant: &TenantId) -> Result<Remains, LifecycleError> {
        let mut problems = Vec::new();
        let places = self.tenant_instances(tenant, &mut problems)?.iter().map(|doc| doc.place()).collect();
        Ok(Remains { places, unknown: problems.into_iter().next() })
    }

    /// Changes a tenant's quotas; they hold for whatever is begun from then on.
    pub fn tenant_update(&self, tenant: &TenantId, quotas: Quotas) -> Result<(), LifecycleError> {
        let _guard = self.lock(&keys::tenant_dir(tenant))?;
        let mut doc = self.tenant(tenant)?;
        if doc.quotas == quotas {
            return Ok(());
        }
        doc.quotas = quotas;
        self.audited("update tenant", tenant, || Ok(self.documents().write(&keys::tenant_doc(tenant), &doc)?))
    }

    /// Removes a tenant that has no pools, with its network and its secrets; its net id is given to nobody else, its log stays.
    pub fn tenant_destroy(&self, tenant: &TenantId) -> Result<(), LifecycleError> {
        let guard = self.lock(&keys::tenant_dir(tenant))?;
        let doc = match self.tenant(tenant) {
            Ok(doc) => doc,
            Err(error) => {
                guard.retire();
                return Err(error);
            }
        };
        // Also those whose document was moved aside: what they have is not ours to lose.
        let pools = self.pool_dirs(tenant)?;
        if !pools.is_empty() {
            let why = format!("it has pools: {}", pools.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
            return Err(LifecycleError::Refused { what: format!("destroy tenant {tenant}"), why });
        }
        let result = self.audited("destroy tenant", tenant, || self.tenant_end(&doc));
        if result.is_ok() {
            guard.retire();
            self.lock(&keys::admission_lock(tenant))?.retire();
            // A build that still uses the network meets its own end.
            if let Ok(builder) = self.documents().raw().lock(&keys::builder_lock(tenant), Wait::No) {
                builder.retire();
            }
            self.forget_tenant(tenant);
        }
        result
    }

    fn tenant_end(&self, doc: &TenantDoc) -> Result<(), LifecycleError> {
        let tenant = &doc.tenant_id;
        // First, so that a kill in between cannot lose it.
        self.update_node_doc(|node| {
            node.retired_net_ids.insert(doc.network.tenant_net_id.get(), tenant.clone());
        })?;
        self.host().remove_tenant_network(&doc.network.network())?;
        Ok(self.documents().raw().remove_tree(&keys::tenant_dir(tenant))?)
    }

    /// Makes bridges and packet filter rules what the documents say, and removes what is left of tenants that are gone.
    pub fn apply_network(&self) -> Result<(), LifecycleError> {
        let _network = self.lock(keys::NETWORK_LOCK)?;
        let mut ruleset = Ruleset::default();
        let mut bridges = BTreeSet::new();
        let mut instances = BTreeSet::new();
        let (mut taps, mut unread) = (BTreeSet::new(), false);
        let mut missing = Vec::new();
        let observed = self.host().observe_network()?;
        self.documents().raw().clear_removed(keys::TENANTS)?;
        for tenant in self.tenant_dirs()? {
            let (pools, unfinished) = self.all_pool_dirs(&tenant)?;
            let mut unfinished: Vec<String> = unfinished.iter().map(keys::pool_dir).collect();
            let mut docs = Vec::new();
            for pool in pools {
                let mut cut_off = Vec::new();
                let before = docs.len();
                docs.extend(self.all_pool_instances(&pool, &mut Vec::new(), &mut cut_off, Ok)?);
                unfinished.extend(cut_off.iter().map(keys::instance_dir));
                // Also those whose document was moved aside: what they have stays until somebody decides.
                let ids = self.instances(&pool)?;
                unread |= ids.len() != docs.len() - before;
                instances.extend(ids);
                self.documents().raw().clear_removed(&keys::instances_dir(&pool))?;
            }
            self.documents().raw().clear_removed(&keys::pools_dir(&tenant))?;
            if self.sweep_unfinished(&tenant, &unfinished)? {
                continue;
            }
            taps.extend(docs.iter().map(|doc| crate::net::tap_name(doc.net_id, doc.offset)));
            let doc = match self.tenant(&tenant) {
                Ok(doc) => doc,
                // Its document was moved aside: no packet of it passes without rules, but its bridge stays.
                Err(LifecycleError::NotFound { .. } | LifecycleError::Document(_)) => {
                    bridges.extend(docs.iter().map(|doc| crate::net::bridge_name(doc.net_id)));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let network = doc.network.network();
            bridges.insert(network.bridge());
            if !observed.bridges.contains(&network.bridge()) || !observed.forwards {
                missing.push(network);
            }
            ruleset.tenants.push((network, docs.iter().map(|doc| doc.network(&network)).collect()));
            ruleset.exposed.extend(self.exposed(&tenant, &network, &docs)?);
        }
        // Rules first: a bridge never stands without them.
        if !ruleset.tenants.is_empty() {
            self.host().apply_ruleset(&ruleset)?;
        } else if observed.ruleset.is_some() || !observed.bridges.is_empty() {
            self.host().remove_ruleset()?;
        }
        for network in &missing {
            self.host().ensure_tenant_network(network)?;
        }
        if !observed.loose.is_empty() {
            self.host().reattach(&ruleset)?;
        }
        for what in self.host().sweep(&HostExpectations { bridges, instances, taps: (!unread).then_some(taps) })? {
            tracing::warn!(what, "removed what nothing declares");
        }
        Ok(())
    }

    /// Removes what creations left that were cut off before the first document was whole: of these pools and instances, and of their
    /// tenant. Returns whether the tenant was such a one.
    fn sweep_unfinished(&self, tenant: &TenantId, dirs: &[String]) -> Result<bool, LifecycleError> {
        let raw = self.documents().raw();
        let whole = !raw.is_unfinished(&keys::tenant_dir(tenant))?;
        if whole && dirs.is_empty() {
            return Ok(false);
        }
        // Whoever creates something in a tenant holds the tenant's lock, and is not finished rather than cut off.
        let Some(guard) = self.try_lock(&keys::tenant_dir(tenant))? else { return Ok(false) };
        for dir in dirs {
            let Some(own) = self.try_lock(dir)? else { continue };
            if raw.is_unfinished(dir)? {
                raw.remove_tree(dir)?;
                tracing::warn!(dir, "removed what a creation left that was cut off");
                own.retire();
            }
        }
        if whole || !raw.is_unfinished(&keys::tenant_dir(tenant))? {
            return Ok(false);
        }
        raw.remove_tree(&keys::tenant_dir(tenant))?;
        guard.retire();
        Ok(true)
    }

    fn try_lock(&self, key: &str) -> Result<Option<Box<dyn LockGuard>>, LifecycleError> {
        match self.documents().raw().lock(key, Wait::No) {
            Ok(guard) => Ok(Some(guard)),
            Err(StoreError::Locked { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Does something to a tenant, of which there is a record before it is done: whoever is killed in between leaves a record too
    /// many and never one too few.
    pub(crate) fn audited(
        &self,
        action: &str,
        tenant: &TenantId,
        act: impl FnOnce() -> Result<(), LifecycleError>,
    ) -> Result<(), LifecycleError> {
        self.audit_tenant(action, tenant, &Ok(()))?;
        let result = act();
        if result.as_ref().is_err_and(|error| !error.is_killed()) {
            self.audit_tenant(action, tenant, &result)?;
        }
        result
    }

    pub(super) fn audit_tenant(&self, action: &str, tenant: &TenantId, result: &Result<(), LifecycleError>) -> Result<(), LifecycleError> {
        let error = result.as_ref().err().map(|error| with_causes(error));
        let entry = Entry { object: tenant.to_string(), action: action.to_owned(), error, ..Entry::default() };
        Ok(self.audit().record(tenant, entry)?)
    }
}
