//! Pools come, change, get their image, and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mvm_types::{InstanceAddress, PoolAddress, Role, TenantId};

use super::build::BuildRequest;
use super::config::{BUILTIN, PoolDoc, PoolSpec};
use super::revision::{LastBuild, Origin, RevisionDoc};
use crate::audit::Entry;
use crate::image::nix::{BuildWatch, BuilderKind, FlakeBuilder, HostBuilder, Limits};
use crate::infra::failure::Failure;
use crate::store::Document;
use crate::vm::builder::{Egress, EgressChoice, VmBuilder};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::keys;
use crate::vm::node::Node;

/// Where flakes are built.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BuilderChoice {
    /// On this host for its only tenant, in a microVM otherwise.
    #[default]
    Auto,
    /// On this host.
    Host,
    /// In a microVM.
    Vm,
}

/// How a pool's image is built.
pub struct BuildOptions<'a> {
    /// Follows the build, and can end it.
    pub watch: &'a dyn BuildWatch,
    /// What the build may use.
    pub limits: Limits,
    /// Whether other tenants come besides those that are there: whose flake may be built on this host is decided by all of them.
    pub others_come: bool,
}

/// Follows a build without a word, to its end.
pub struct Quiet;

impl BuildWatch for Quiet {
    fn line(&self, _line: &str) {}

    fn cancelled(&self) -> bool {
        false
    }
}

impl Node {
    /// Writes down a pool of a role, which is fixed for the pool's life.
    pub fn pool_create(&self, tenant: &TenantId, role: Role, spec: PoolSpec) -> Result<(), LifecycleError> {
        let pool = PoolAddress::new(tenant.clone(), spec.pool_id.clone());
        let _tenant = self.lock(&keys::tenant_dir(tenant))?;
        let quotas = self.tenant(tenant)?.quotas;
        let _guard = self.lock(&keys::pool_dir(&pool))?;
        if self.documents().read::<PoolDoc>(&keys::pool_doc(&pool))?.is_some() {
            return Err(LifecycleError::Exists { kind: "pool", name: pool.to_string() });
        }
        quotas.check_pools(tenant, self.pools(tenant)?.len() + 1)?;
        let traits = self.images().role_traits(&PoolSpec { role, ..spec.clone() })?.map(Arc::new);
        // Of a pool whose document is gone: what they are stays.
        let there = self.pool_instances(&pool, &mut Vec::new())?;
        if let Some(other) = there.iter().find(|doc| doc.role != role) {
            let why = format!("a pool's role is fixed for its life, and {} is a {}", other.at(), other.role);
            return Err(LifecycleError::Refused { what: format!("make {pool} a {role}"), why });
        }
        let doc = PoolDoc {
            version: PoolDoc::VERSION,
            tenant_id: tenant.clone(),
            spec: PoolSpec { role, ..spec },
            revision: None,
            built: None,
            config_version: there.iter().map(|doc| doc.config_version).max().map_or(1, |last| last + 1),
            created: self.clock().now(),
            traits,
            failure: None,
        };
        self.audited_pool("create pool", &pool, role, || Ok(self.documents().write(&keys::pool_doc(&pool), &doc)?))
    }

    /// Changes a pool's declaration.
    ///
    /// # Errors
    /// When the role would change.
    pub fn pool_update(&self, pool: &PoolAddress, spec: PoolSpec) -> Result<(), LifecycleError> {
        let _guard = self.lock(&keys::pool_dir(pool))?;
        let mut doc = self.pool(pool)?;
        let role = doc.spec.role;
        if role != spec.role {
            let why =
                format!("a pool's role is fixed for its life, and it is a {role}: create a pool of another name, and destroy this one");
            return Err(LifecycleError::Refused { what: format!("make {pool} a {}", spec.role), why });
        }
        if let Some(traits) = self.images().role_traits(&spec)? {
            doc.traits = Some(Arc::new(traits));
        } else if spec.flake_ref != doc.spec.flake_ref {
            doc.traits = None;
        }
        doc.spec = spec;
        doc.config_version += 1;
        self.audited_pool("update pool", pool, role, || Ok(self.documents().write(&keys::pool_doc(pool), &doc)?))
    }

    /// Builds the pool's image, unless it is there, and makes it the one that instances are made from.
    ///
    /// On failure, and when somebody ends the build, the pool keeps the image that it has.
    pub fn pool_build(&self, pool: &PoolAddress, options: &BuildOptions<'_>) -> Result<Origin, LifecycleError> {
        let begun = Instant::now();
        let spec = self.pool(pool)?.spec;
        // Without the pool's lock: a build takes its time, and nothing else of the pool needs to wait for it.
        let built = self.build(pool, &spec, options);
        let _guard = self.lock(&keys::pool_dir(pool))?;
        let mut doc = self.pool(pool)?;
        let before = doc.clone();
        let built = match built {
            // It was declared otherwise meanwhile, and the image of what it was is not wanted.
            Ok(origin) if (&doc.spec.flake_ref, &doc.spec.profile) != (&origin.flake_ref, &origin.profile) => {
                let why = "its declaration was changed while it was built".to_owned();
                return Err(LifecycleError::Unready { what: format!("use the image built for {pool}"), why });
            }
            Ok(origin) => self.give(pool, &mut doc, &origin).map(|()| origin),
            Err(error) => Err(error),
        };
        match &built {
            Ok(_) => {}
            Err(LifecycleError::Image(error)) if error.is_interrupted() => {}
            Err(error) => {
                let now = self.clock().now();
                doc.failure = Some(Failure::again(doc.failure.as_ref(), "build image", with_causes(error), &now));
            }
        }
        let outcome = match &built {
            Ok(_) => Ok(()),
            Err(error) => Err(LifecycleError::Refused { what: "build image".into(), why: with_causes(error) }),
        };
        self.audit_pool("build image", pool, spec.role, &outcome, begun.elapsed())?;
        if doc != before {
            let written = self.documents().write(&keys::pool_doc(pool), &doc).map_err(LifecycleError::from);
            if written.as_ref().is_err_and(|error| !error.is_killed()) {
                self.audit_pool("build image", pool, spec.role, &written, begun.elapsed())?;
            }
            written?;
        }
        built
    }

    /// Writes down that a pool's image cannot be built, where that was found out for another pool of the same flake.
    pub fn pool_build_failed(&self, pool: &PoolAddress, error: &str) -> Result<(), LifecycleError> {
        let _guard = self.lock(&keys::pool_dir(pool))?;
        let mut doc = self.pool(pool)?;
        let failure = Failure::again(doc.failure.as_ref(), "build image", error.to_owned(), &self.clock().now());
        doc.failure = Some(failure);
        Ok(self.documents().write(&keys::pool_doc(pool), &doc)?)
    }

    fn build(&self, pool: &PoolAddress, spec: &PoolSpec, options: &BuildOptions<'_>) -> Result<Origin, LifecycleError> {
        let builder =
            if spec.flake_ref == BUILTIN { Box::new(HostBuilder) } else { self.flake_builder(&pool.tenant, options.others_come)? };
        let request = BuildRequest {
            spec,
            builder: &*builder,
            limits: options.limits.clone(),
            watch: options.watch,
            log: (spec.flake_ref != BUILTIN).then(|| self.paths.build_log(pool)),
        };
        Ok(self.images().ensure(&request)?)
    }

    /// Gives a pool an image, with the document that says where it came from; the pool's own document is the caller's to write.
    fn give(&self, pool: &PoolAddress, doc: &mut PoolDoc, origin: &Origin) -> Result<(), LifecycleError> {
        // Nobody takes the image away before the documents refer to it.
        let _images = self.lock(keys::IMAGES_LOCK)?;
        self.images().open(&origin.revision)?;
        let key = keys::revision_doc(pool, &origin.revision);
        let last =
            LastBuild { flake_ref: origin.flake_ref.clone(), profile: origin.profile.clone(), fingerprint: origin.fingerprint.clone() };
        let known = self.documents().read::<RevisionDoc>(&key)?;
        // Built again, it is the newest; found again, it is what it was.
        if known.is_none_or(|known| known.origin != *origin || doc.revision.as_ref() != Some(&origin.revision)) {
            let built = self.clock().now();
            self.documents().write(&key, &RevisionDoc { version: RevisionDoc::VERSION, origin: origin.clone(), built })?;
        }
        doc.revision = Some(origin.revision.clone());
        doc.traits.clone_from(&origin.traits);
        doc.built = Some(last);
        doc.failure = None;
        Ok(())
    }

    /// Who builds a tenant's flakes: as was chosen, or by how many tenants there are.
    fn flake_builder(&self, tenant: &TenantId, others_come: bool) -> Result<Box<dyn FlakeBuilder + '_>, LifecycleError> {
        let kind = match self.builder {
            BuilderChoice::Host => BuilderKind::Host,
            BuilderChoice::Vm => BuilderKind::Vm,
            BuilderChoice::Auto if !others_come && self.tenants()?.iter().all(|other| other == tenant) => BuilderKind::Host,
            BuilderChoice::Auto => BuilderKind::Vm,
        };
        match kind {
            BuilderKind::Host => Ok(Box::new(HostBuilder)),
            BuilderKind::Vm => {
                let egress = match self.builder_egress {
                    EgressChoice::None => Egress::None,
                    EgressChoice::Internet => Egress::Internet(tenant.clone()),
                };
                Ok(Box::new(VmBuilder::new(self, egress)))
            }
        }
    }

    /// Removes a pool that has no instances.
    pub fn pool_destroy(&self, pool: &PoolAddress) -> Result<(), LifecycleError> {
        let _tenant = self.lock(&keys::tenant_dir(&pool.tenant))?;
        let guard = self.lock(&keys::pool_dir(pool))?;
        let doc = match self.pool(pool) {
            Ok(doc) => doc,
            Err(error) => {
                guard.retire();
                return Err(error);
            }
        };
        let mut instances = Vec::new();
        for id in self.instances(pool)? {
            let at = InstanceAddress::new(pool.tenant.clone(), pool.pool.clone(), id);
            if !self.documents().raw().is_unfinished(&keys::instance_dir(&at))? {
                instances.push(at);
            }
        }
        if let Some(first) = instances.first() {
            let why = format!("it has {} instances, {first} among them", instances.len());
            return Err(LifecycleError::Refused { what: format!("destroy pool {pool}"), why });
        }
        let result =
            self.audited_pool("destroy pool", pool, doc.spec.role, || Ok(self.documents().raw().remove_tree(&keys::pool_dir(pool))?));
        if result.is_ok() {
            guard.retire();
        }
        result
    }

    /// Does something to a pool, of which there is a record before it is done.
    pub(super) fn audited_pool(
        &self,
        action: &str,
        pool: &PoolAddress,
        role: Role,
        act: impl FnOnce() -> Result<(), LifecycleError>,
    ) -> Result<(), LifecycleError> {
        self.audit_pool(action, pool, role, &Ok(()), Duration::ZERO)?;
        let result = act();
        if result.as_ref().is_err_and(|error| !error.is_killed()) {
            self.audit_pool(action, pool, role, &result, Duration::ZERO)?;
        }
        result
    }

    fn audit_pool(
        &self,
        action: &str,
        pool: &PoolAddress,
        role: Role,
        result: &Result<(), LifecycleError>,
        took: Duration,
    ) -> Result<(), LifecycleError> {
        let entry = Entry {
            object: pool.to_string(),
            role: Some(role),
            action: action.to_owned(),
            error: result.as_ref().err().map(|error| with_causes(error)),
            took,
            ..Entry::default()
        };
        Ok(self.audit().record(&pool.tenant, entry)?)
    }
}
