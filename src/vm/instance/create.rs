//! New instances: ids, places in the subnet, documents.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use mvm_types::{InstanceAddress, InstanceId, PoolAddress};

use super::config::InstanceDoc;
use super::state::InstanceState;
use crate::audit::Entry;
use crate::net::InstanceOffset;
use crate::store::Document;
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::keys;
use crate::vm::node::Node;

/// How many documents are written at the same time: enough that they share the disk's flushes.
const WRITERS: usize = 16;

impl Node {
    /// Writes down new instances of a pool, all or none of them taking room, and returns their addresses.
    pub fn instances_create(&self, pool: &PoolAddress, count: u32) -> Result<Vec<InstanceAddress>, LifecycleError> {
        self.instances_create_with(pool, count, 0)
    }

    /// Writes down new instances of which the last ones stand in while others are replaced.
    pub fn instances_create_with(&self, pool: &PoolAddress, count: u32, standing_in: u32) -> Result<Vec<InstanceAddress>, LifecycleError> {
        let begun = Instant::now();
        // Places in the subnet are the tenant's: one at a time gives them out.
        let _tenant = self.lock(&keys::tenant_dir(&pool.tenant))?;
        let tenant = self.tenant(&pool.tenant)?;
        let doc = self.pool(pool)?;
        let mut problems = Vec::new();
        let existing = self.tenant_instances(&pool.tenant, &mut problems)?;
        if let Some(problem) = problems.first() {
            let why = format!("which addresses of the tenant are taken is not known: {problem}");
            return Err(LifecycleError::Refused { what: format!("create an instance in {pool}"), why });
        }
        let mut taken: BTreeSet<u16> = existing.iter().map(|doc| doc.offset.0).collect();
        // Run directories are named by the instance alone: its id is the node's only one.
        let _ids = self.lock(keys::IDS_LOCK)?;
        let mut ids: BTreeSet<InstanceId> = BTreeSet::new();
        for tenant in self.tenant_dirs()? {
            for pool in self.pool_dirs(&tenant)? {
                ids.extend(self.instances(&pool)?);
            }
        }
        let network = tenant.network.network();
        let mut docs = Vec::new();
        let mut free = (0..=u16::MAX).filter(|offset| !taken.contains(offset)).collect::<Vec<_>>().into_iter();
        let created = self.clock().now();
        for ordinal in 0..count {
            let offset = InstanceOffset(free.next().unwrap_or(u16::MAX));
            let address = network
                .subnet
                .instance(offset)
                .map_err(|error| LifecycleError::Refused { what: format!("create an instance in {pool}"), why: error.to_string() })?;
            docs.push(InstanceDoc {
                version: InstanceDoc::VERSION,
                instance_id: self.fresh_id(&mut ids),
                tenant_id: pool.tenant.clone(),
                pool_id: pool.pool.clone(),
                role: doc.spec.role,
                blueprint: doc.spec.blueprint(),
                revision: doc.revision.clone(),
                net_id: network.net_id,
                offset,
                address,
                config_version: doc.config_version,
                secrets_epoch: tenant.secrets_epoch,
                created: created.clone(),
                stands_in: ordinal >= count.saturating_sub(standing_in),
                state: if doc.revision.is_some() { InstanceState::Ready } else { InstanceState::Created },
                transition: None,
                passing_to: None,
                failure: None,
            });
        }
        taken.clear();
        let disk_mib = doc.spec.instance_resources.data_disk_mib;
        let ask = |before: &crate::vm::usage::Usage| {
            let mut after = before.clone();
            (0..count).for_each(|_| after.add_instance(&pool.pool, disk_mib));
            after
        };
        self.take_room(&tenant, ask, || {
            // Before the documents: none of them may be there without a record.
            docs.iter().try_for_each(|doc| self.audit_create(doc, None, begun.elapsed()))?;
            self.audit().flush(&pool.tenant)?;
            self.write_new(&docs).inspect_err(|error| {
                // Which of them are there is seen by whoever looks; the error itself is what the caller has to hear.
                let why = with_causes(error);
                let noted = docs.iter().try_for_each(|doc| self.audit_create(doc, Some(why.clone()), begun.elapsed()));
                if let Err(failed) = noted.and_then(|()| Ok(self.audit().flush(&pool.tenant)?)) {
                    tracing::warn!(%pool, error = with_causes(&failed), "a failed creation cannot be recorded");
                }
            })
        })?;
        Ok(docs.iter().map(InstanceDoc::at).collect())
    }

    fn audit_create(&self, doc: &InstanceDoc, error: Option<String>, took: Duration) -> Result<(), LifecycleError> {
        let entry = Entry {
            object: doc.at().to_string(),
            role: Some(doc.role),
            action: "create".into(),
            from: None,
            to: error.is_none().then(|| doc.state.name().to_string()),
            error,
            took,
            ..Entry::default()
        };
        Ok(self.audit().note(&doc.tenant_id, entry)?)
    }

    fn write_new(&self, docs: &[InstanceDoc]) -> Result<(), LifecycleError> {
        let share = docs.len().div_ceil(WRITERS).max(1);
        let write = |docs: &[InstanceDoc]| -> Result<(), LifecycleError> {
            docs.iter().try_for_each(|doc| Ok(self.documents().write(&keys::instance_doc(&doc.at()), doc)?))
        };
        let write = &write;
        std::thread::scope(|scope| {
            let writers: Vec<_> = docs.chunks(share).map(|docs| scope.spawn(move || write(docs))).collect();
            // All are joined before the first error is returned.
            let written: Vec<_> = writers.into_iter().map(|writer| writer.join().expect("writing a document does not panic")).collect();
            written.into_iter().collect()
        })
    }

    fn fresh_id(&self, taken: &mut BTreeSet<InstanceId>) -> InstanceId {
        loop {
            let mut bits = [0; 4];
            (self.seams.random)(&mut bits);
            let id = InstanceId::from_bits(u32::from_be_bytes(bits));
            if taken.insert(id.clone()) {
                return id;
            }
        }
    }
}
