//! Takes away images and revisions that nothing refers to.
//!
//! In use is what a pool's current revision, an instance, or a snapshot refers to, and the built-in image of this mvm. Where one of these
//! documents cannot be read, nothing is taken away.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use mvm_types::{PoolAddress, RevisionId};

use super::error::LifecycleError;
use super::instance::{SnapshotManifest, manifest_key};
use super::keys;
use super::node::Node;
use super::pool::{PoolDoc, RevisionDoc};

/// Whether something is really taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Collect {
    /// It is.
    Remove,
    /// It is only told.
    Tell,
}

/// Something that is taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// `image`, `revision` or `leftover`.
    pub kind: &'static str,
    /// The image's revision, or what else it is.
    pub name: String,
    /// The pool, for a revision.
    pub pool: Option<PoolAddress>,
    /// What it takes, in bytes.
    pub size: u64,
    /// Why.
    pub why: String,
}

/// What refers to images.
#[derive(Default)]
struct References {
    /// What is in use.
    used: BTreeSet<RevisionId>,
    /// The revisions of each pool, the newest first.
    revisions: BTreeMap<PoolAddress, Vec<RevisionDoc>>,
}

impl Node {
    /// Takes away a pool's revisions but the newest `keep` and those in use, and images that nothing refers to then.
    pub fn pool_collect(&self, pool: &PoolAddress, keep: usize, collect: Collect) -> Result<Vec<Collected>, LifecycleError> {
        self.pool(pool)?;
        let _images = self.lock(keys::IMAGES_LOCK)?;
        let mut references = self.references(&format!("collect revisions of {pool}"))?;
        let mut found = Vec::new();
        let mine = references.revisions.remove(pool).unwrap_or_default();
        let mut kept = Vec::new();
        for (place, doc) in mine.into_iter().enumerate() {
            if place < keep || references.used.contains(&doc.origin.revision) {
                kept.push(doc);
                continue;
            }
            let why = format!("it is not one of the newest {keep}, and nothing uses it");
            self.collect_revision(pool, &doc, why, collect, &mut found)?;
        }
        references.revisions.insert(pool.clone(), kept);
        let gone: BTreeSet<RevisionId> = found.iter().filter_map(|one| one.name.parse().ok()).collect();
        self.collect_images(&references, |revision, _| gone.contains(revision), "no pool has it", collect, &mut found)?;
        Ok(found)
    }

    /// Takes away images that nothing uses and that no pool got within `older_than`, their revisions, and what killed builds left.
    pub fn node_collect(&self, older_than: Duration, collect: Collect) -> Result<Vec<Collected>, LifecycleError> {
        let _images = self.lock(keys::IMAGES_LOCK)?;
        let mut references = self.references("collect images")?;
        let now = self.clock().now();
        let mut found = Vec::new();
        for (pool, docs) in &mut references.revisions {
            let (young, old): (Vec<_>, Vec<_>) = std::mem::take(docs)
                .into_iter()
                .partition(|doc| references.used.contains(&doc.origin.revision) || doc.built.elapsed(&now) < older_than);
            *docs = young;
            for doc in old {
                let why = format!("it is older than {} s, and nothing uses it", older_than.as_secs());
                self.collect_revision(pool, &doc, why, collect, &mut found)?;
            }
        }
        let old = |_: &RevisionId, made: SystemTime| made.elapsed().is_ok_and(|age| age >= older_than);
        self.collect_images(&references, old, "no pool has it", collect, &mut found)?;
        if collect == Collect::Remove {
            let swept = self.images().sweep()?;
            let leftover = |name| Collected { kind: "leftover", name, pool: None, size: 0, why: "its maker was killed".to_owned() };
            found.extend(swept.into_iter().map(leftover));
        }
        Ok(found)
    }

    fn collect_revision(
        &self,
        pool: &PoolAddress,
        doc: &RevisionDoc,
        why: String,
        collect: Collect,
        found: &mut Vec<Collected>,
    ) -> Result<(), LifecycleError> {
        if collect == Collect::Remove {
            self.documents().raw().remove(&keys::revision_doc(pool, &doc.origin.revision))?;
        }
        found.push(Collected { kind: "revision", name: doc.origin.revision.to_string(), pool: Some(pool.clone()), size: 0, why });
        Ok(())
    }

    fn collect_images(
        &self,
        references: &References,
        wanted: impl Fn(&RevisionId, SystemTime) -> bool,
        why: &str,
        collect: Collect,
        found: &mut Vec<Collected>,
    ) -> Result<(), LifecycleError> {
        let kept: BTreeSet<&RevisionId> = references.revisions.values().flatten().map(|doc| &doc.origin.revision).collect();
        for image in self.images().stored()? {
            if image.pinned
                || references.used.contains(&image.revision)
                || kept.contains(&image.revision)
                || !wanted(&image.revision, image.made)
            {
                continue;
            }
            if collect == Collect::Remove {
                self.images().remove(&image.revision)?;
            }
            found.push(Collected { kind: "image", name: image.revision.to_string(), pool: None, size: image.size, why: why.to_owned() });
        }
        Ok(())
    }

    /// Gathers what refers to images.
    ///
    /// # Errors
    /// When a document that may refer to one cannot be read.
    fn references(&self, what: &str) -> Result<References, LifecycleError> {
        let mut references = References::default();
        let mut problems = Vec::new();
        for tenant in self.tenant_dirs()? {
            for pool in self.pool_dirs(&tenant)? {
                match self.documents().read::<PoolDoc>(&keys::pool_doc(&pool))? {
                    Some(doc) => references.used.extend(doc.revision),
                    None => problems.push(format!("pool {pool} has no document")),
                }
                for instance in self.pool_instances(&pool, &mut problems)? {
                    let snapshot = self.documents().read::<SnapshotManifest>(&manifest_key(&instance.at()))?;
                    references.used.extend(snapshot.and_then(|snapshot| snapshot.revision));
                    references.used.extend(instance.revision.clone());
                    self.lost_documents(&format!("{}/snapshot", keys::instance_dir(&instance.at())), &mut problems)?;
                }
                let revisions = self.pool_revisions(&pool, &mut problems)?;
                self.lost_documents(&keys::revisions_dir(&pool), &mut problems)?;
                references.revisions.insert(pool, revisions);
            }
        }
        match problems.first() {
            None => Ok(references),
            Some(problem) => Err(LifecycleError::Refused { what: what.to_owned(), why: format!("what is in use is not known: {problem}") }),
        }
    }

    /// Names documents of a directory that were torn and moved aside, by whomever and whenever, and have not been written anew.
    fn lost_documents(&self, dir: &str, problems: &mut Vec<String>) -> Result<(), LifecycleError> {
        let store = self.documents().raw();
        for key in store.moved_aside(dir)? {
            if store.read(&key)?.is_none() {
                let place = store.place(&key);
                problems.push(format!(
                    "{place} was torn and moved aside; put it back, or remove it in {} if it is not needed",
                    store.place(dir)
                ));
            }
        }
        Ok(())
    }
}
