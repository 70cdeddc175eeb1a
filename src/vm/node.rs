//! One node: the state directory and the seams that its tenants, pools and instances live on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mvm_types::{InstanceAddress, InstanceId, NodeId, PoolAddress, PoolId, TenantId};
use serde::{Deserialize, Serialize};

use super::builder::EgressChoice;
use super::error::LifecycleError;
use super::instance::InstanceDoc;
use super::keys;
use super::ledger::{Batch, Ledger};
use super::pool::{BuilderChoice, ImageSource, PoolDoc};
use super::tenant::TenantDoc;
use super::usage::Usage;
use crate::audit::Audit;
use crate::guest::GuestChannel;
use crate::host::Host;
use crate::infra::clock::Clock;
use crate::infra::paths::Paths;
use crate::net::{InstanceNetwork, TenantNetId, UidRange};
use crate::store::{Document, Documents, LockGuard, Torn, Wait};
use crate::vmm::Vmm;

/// How long a verb waits for another mvm that changes the same object.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(20);

/// How to go on with a node whose document is lost.
const REBUILD_NODE: &str = "without one, write {\"version\": 1, \"node_id\": \"ID\"} into it, with the ID that `ip -details link show \
     type bridge` gives as `alias mvm:ID`; the net ids of tenants that are gone, which document was admitted last, and a `first_uid` of its own are forgotten then";

/// `node.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDoc {
    /// The document's version.
    pub version: u32,
    /// The node.
    pub node_id: NodeId,
    /// Net ids of tenants that are gone, with their names: given to nobody else.
    #[serde(default)]
    pub retired_net_ids: BTreeMap<u16, TenantId>,
    /// The users of its VMMs.
    #[serde(default, rename = "first_uid", skip_serializing_if = "is_default")]
    pub uids: UidRange,
    /// The desired-state document that was admitted last: its generation and hash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admitted: Option<Admitted>,
}

fn is_default(range: &UidRange) -> bool {
    *range == UidRange::default()
}

/// What was admitted last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Admitted {
    /// The document's generation.
    pub generation: u64,
    /// The BLAKE3 hash of its canonical JSON, in hex.
    pub hash: String,
}

impl Document for NodeDoc {
    const KIND: &'static str = "node";
    const VERSION: u32 = 1;
    const TORN: Torn = Torn::Refused { otherwise: REBUILD_NODE };
    fn version(&self) -> u32 {
        self.version
    }
}

/// Seals what must not lie in the clear on a persistent file system.
pub trait Sealer: Send + Sync {
    /// Seals a secret so that it opens only for the same tenant, name and epoch.
    fn seal(&self, tenant: &TenantId, name: &str, epoch: u64, secret: &[u8]) -> Result<Vec<u8>, String>;

    /// Opens a sealed secret.
    fn unseal(&self, tenant: &TenantId, name: &str, epoch: u64, sealed: &[u8]) -> Result<zeroize::Zeroizing<Vec<u8>>, String>;
}

/// Fills a buffer with random bytes.
pub type Random = Box<dyn Fn(&mut [u8]) + Send + Sync>;

/// The parts that a node is put together from.
pub struct Seams {
    /// Documents.
    pub documents: Documents,
    /// What needs root.
    pub host: Arc<dyn Host>,
    /// The driver.
    pub vmm: Arc<dyn Vmm>,
    /// The way to guests.
    pub guests: Arc<dyn GuestChannel>,
    /// Where images come from.
    pub images: Arc<dyn ImageSource>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// Random bytes.
    pub random: Random,
    /// Seals secrets.
    pub sealer: Arc<dyn Sealer>,
    /// What was done.
    pub audit: Audit,
}

/// Whether each VMM runs under a uid of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmmUids {
    /// Each has its own; mvm runs as root.
    PerInstance,
    /// They run as mvm does.
    Own,
}

/// One node.
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Its directories.
    pub paths: Paths,
    /// Whose uid VMMs have.
    pub uids: VmmUids,
    /// Which ones those are, where each has its own.
    pub uid_range: UidRange,
    /// Name servers that guests are told of.
    pub dns: Vec<std::net::Ipv4Addr>,
    /// How long a guest may take from boot to ready.
    pub boot_timeout: Duration,
    /// Where flakes are built.
    pub builder: BuilderChoice,
    /// What microVMs reach in which flakes are built.
    pub builder_egress: EgressChoice,
    pub(crate) seams: Seams,
    ledgers: Mutex<HashMap<TenantId, Arc<Ledger>>>,
}

impl Node {
    /// Opens the node of a state directory; a new directory gets a new node id.
    pub fn open(paths: Paths, seams: Seams, uids: VmmUids) -> Result<Self, LifecycleError> {
        let doc = match seams.documents.read::<NodeDoc>(keys::NODE)? {
            Some(doc) => doc,
            None => Self::ensure_doc(&seams.documents, &*seams.random, None, UidRange::default())?,
        };
        Ok(Self {
            id: doc.node_id,
            paths,
            uids,
            uid_range: doc.uids,
            dns: Vec::new(),
            boot_timeout: Duration::from_secs(60),
            builder: BuilderChoice::Auto,
            builder_egress: EgressChoice::None,
            seams,
            ledgers: Mutex::default(),
        })
    }

    /// Opens the node for looking only: a state directory that is not there yet is not made.
    pub fn open_to_look(paths: Paths, seams: Seams, uids: VmmUids) -> Result<Self, LifecycleError> {
        let doc = seams.documents.read::<NodeDoc>(keys::NODE)?;
        let uid_range = doc.as_ref().map(|doc| doc.uids).unwrap_or_default();
        Ok(Self {
            id: doc.map_or_else(Self::unborn, |doc| doc.node_id),
            paths,
            uids,
            uid_range,
            dns: Vec::new(),
            boot_timeout: Duration::from_secs(60),
            builder: BuilderChoice::Auto,
            builder_egress: EgressChoice::None,
            seams,
            ledgers: Mutex::default(),
        })
    }

    /// The id that a node is looked at under before it has one.
    pub fn unborn() -> NodeId {
        "unborn".parse().expect("unborn is a node id")
    }

    /// Tells what is wrong when there are tenants and the document of the node that they are on is gone.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub fn lost_node_doc(documents: &Documents) -> Result<Option<String>, LifecycleError> {
        let is_tenant = |name: &String| name.parse::<TenantId>().is_ok();
        let raw = documents.raw();
        if raw.exists(keys::NODE)? || !raw.list(keys::TENANTS)?.iter().any(is_tenant) {
            return Ok(None);
        }
        Ok(Some(format!("the node {} is gone, and there are tenants: restore it from a backup; {REBUILD_NODE}", raw.place(keys::NODE))))
    }

    /// Returns the node's document, which a new state directory gets here: with the id that is wanted, or one of its own, and with the
    /// users that its VMMs have from now on.
    ///
    /// # Errors
    /// When there is none and there are tenants: their bridges and machines bear the id of a node that they would be taken from.
    pub fn ensure_doc(
        documents: &Documents,
        random: &(dyn Fn(&mut [u8]) + Send + Sync),
        wanted: Option<&NodeId>,
        uids: UidRange,
    ) -> Result<NodeDoc, LifecycleError> {
        let _guard = documents.raw().lock(keys::NODE, Wait::Until(Instant::now() + LOCK_PATIENCE))?;
        if let Some(doc) = documents.read::<NodeDoc>(keys::NODE)? {
            return Ok(doc);
        }
        if let Some(why) = Self::lost_node_doc(documents)? {
            return Err(LifecycleError::Refused { what: "take a new node id".to_owned(), why });
        }
        let node_id = wanted.cloned().unwrap_or_else(|| {
            let mut bits = [0; 4];
            random(&mut bits);
            format!("n{:08x}", u32::from_be_bytes(bits)).parse().expect("n and eight hex digits are a node id")
        });
        let doc = NodeDoc { version: NodeDoc::VERSION, node_id, retired_net_ids: BTreeMap::new(), uids, admitted: None };
        documents.write(keys::NODE, &doc)?;
        Ok(doc)
    }

    /// The user of a VMM, which is also its group; `None` where they run as mvm does.
    pub fn vmm_uid(&self, of: impl FnOnce(UidRange) -> u32) -> Option<u32> {
        (self.uids == VmmUids::PerInstance).then(|| of(self.uid_range))
    }

    /// The user of an instance's VMM.
    pub fn instance_uid(&self, network: &InstanceNetwork) -> Option<u32> {
        self.vmm_uid(|range| range.instance(network.tenant.net_id, network.offset))
    }

    /// Returns the documents.
    pub fn documents(&self) -> &Documents {
        &self.seams.documents
    }

    /// Returns the host.
    pub fn host(&self) -> &dyn Host {
        &*self.seams.host
    }

    /// Returns the driver.
    pub fn vmm(&self) -> &dyn Vmm {
        &*self.seams.vmm
    }

    /// Returns the way to guests.
    pub fn guests(&self) -> &dyn GuestChannel {
        &*self.seams.guests
    }

    /// Returns where images come from.
    pub fn images(&self) -> &dyn ImageSource {
        &*self.seams.images
    }

    /// Returns the clock.
    pub fn clock(&self) -> &dyn Clock {
        &*self.seams.clock
    }

    /// Returns the log of what was done.
    pub fn audit(&self) -> &Audit {
        &self.seams.audit
    }

    /// Reads `node.json`.
    pub fn node_doc(&self) -> Result<NodeDoc, LifecycleError> {
        let unborn = NodeDoc {
            version: NodeDoc::VERSION,
            node_id: self.id.clone(),
            retired_net_ids: BTreeMap::new(),
            uids: self.uid_range,
            admitted: None,
        };
        Ok(self.documents().read(keys::NODE)?.unwrap_or(unborn))
    }

    /// Changes `node.json` under its lock.
    pub fn update_node_doc(&self, change: impl FnOnce(&mut NodeDoc)) -> Result<(), LifecycleError> {
        let _guard = self.lock(keys::NODE)?;
        let mut doc = self.node_doc()?;
        let before = doc.clone();
        change(&mut doc);
        if doc != before {
            self.documents().write(keys::NODE, &doc)?;
        }
        Ok(())
    }

    pub(crate) fn lock(&self, key: &str) -> Result<Box<dyn LockGuard>, LifecycleError> {
        Ok(self.documents().raw().lock(key, Wait::Until(Instant::now() + LOCK_PATIENCE))?)
    }

    /// Reads a tenant.
    ///
    /// # Errors
    /// [`LifecycleError::NotFound`], which lists the tenants that there are.
    pub fn tenant(&self, tenant: &TenantId) -> Result<TenantDoc, LifecycleError> {
        match self.documents().read(&keys::tenant_doc(tenant))? {
            Some(doc) => Ok(doc),
            None => {
                let known = self.tenants()?.iter().map(ToString::to_string).collect();
                Err(LifecycleError::NotFound { kind: "tenant", name: tenant.to_string(), known })
            }
        }
    }

    /// Reads a pool.
    ///
    /// # Errors
    /// [`LifecycleError::NotFound`], which lists the pools that there are.
    pub fn pool(&self, pool: &PoolAddress) -> Result<PoolDoc, LifecycleError> {
        self.tenant(&pool.tenant)?;
        match self.documents().read(&keys::pool_doc(pool))? {
            Some(doc) => Ok(doc),
            None => {
                let known = self.pools(&pool.tenant)?.iter().map(|id| format!("{}/{id}", pool.tenant)).collect();
                Err(LifecycleError::NotFound { kind: "pool", name: pool.to_string(), known })
            }
        }
    }

    /// Reads an instance.
    ///
    /// # Errors
    /// [`LifecycleError::NotFound`], which lists the instances that there are.
    pub fn instance(&self, at: &InstanceAddress) -> Result<InstanceDoc, LifecycleError> {
        match self.documents().read(&keys::instance_doc(at))? {
            Some(doc) => Ok(doc),
            None => {
                let pool = at.pool_address();
                self.pool(&pool)?;
                let known = self.instances(&pool)?.iter().map(|id| format!("{pool}/{id}")).collect();
                Err(LifecycleError::NotFound { kind: "instance", name: at.to_string(), known })
            }
        }
    }

    /// Lists the tenants in order.
    pub fn tenants(&self) -> Result<Vec<TenantId>, LifecycleError> {
        self.with_document(self.tenant_dirs()?, keys::tenant_doc)
    }

    /// Lists the tenants that have a directory, also one whose document is not there: moved aside, or never finished.
    pub(crate) fn tenant_dirs(&self) -> Result<Vec<TenantId>, LifecycleError> {
        self.ids(keys::TENANTS)
    }

    /// Lists a tenant's pools in order.
    pub fn pools(&self, tenant: &TenantId) -> Result<Vec<PoolId>, LifecycleError> {
        self.with_document(self.ids(&keys::pools_dir(tenant))?, |id| keys::pool_doc(&PoolAddress::new(tenant.clone(), id.clone())))
    }

    /// Lists the pools that have a directory with something in it, also one whose document is not there.
    pub(crate) fn pool_dirs(&self, tenant: &TenantId) -> Result<Vec<PoolAddress>, LifecycleError> {
        Ok(self.all_pool_dirs(tenant)?.0)
    }

    /// Lists the pools that have a directory: those with something in it, and those that were never finished.
    pub(crate) fn all_pool_dirs(&self, tenant: &TenantId) -> Result<(Vec<PoolAddress>, Vec<PoolAddress>), LifecycleError> {
        let ids: Vec<PoolId> = self.ids(&keys::pools_dir(tenant))?;
        let (mut dirs, mut unfinished) = (Vec::new(), Vec::new());
        for id in ids {
            let pool = PoolAddress::new(tenant.clone(), id);
            match self.documents().raw().is_unfinished(&keys::pool_dir(&pool))? {
                true => unfinished.push(pool),
                false => dirs.push(pool),
            }
        }
        Ok((dirs, unfinished))
    }

    /// Lists a pool's instances in order of their ids, also one whose document is not there.
    pub fn instances(&self, pool: &PoolAddress) -> Result<Vec<InstanceId>, LifecycleError> {
        self.ids(&keys::instances_dir(pool))
    }

    /// Leaves out directories without a document: an object that was never finished, or whose end was cut off.
    fn with_document<T>(&self, ids: Vec<T>, key: impl Fn(&T) -> String) -> Result<Vec<T>, LifecycleError> {
        let mut with = Vec::new();
        for id in ids {
            if self.documents().raw().len(&key(&id))? > 0 {
                with.push(id);
            }
        }
        Ok(with)
    }

    /// Names that are no ids are not mvm's: a quarantined document, an editor's copy.
    fn ids<T: std::str::FromStr>(&self, dir: &str) -> Result<Vec<T>, LifecycleError> {
        let names = self.documents().raw().list(dir)?;
        Ok(names.into_iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Reads every instance of a tenant; those whose document cannot be read are named in `problems`.
    pub fn tenant_instances(&self, tenant: &TenantId, problems: &mut Vec<String>) -> Result<Vec<InstanceDoc>, LifecycleError> {
        let mut docs = Vec::new();
        for pool in self.pool_dirs(tenant)? {
            docs.extend(self.pool_instances(&pool, problems)?);
        }
        Ok(docs)
    }

    /// Reads every instance of a pool; those whose document cannot be read are named in `problems`.
    pub fn pool_instances(&self, pool: &PoolAddress, problems: &mut Vec<String>) -> Result<Vec<InstanceDoc>, LifecycleError> {
        self.all_pool_instances(pool, problems, &mut Vec::new(), Ok)
    }

    /// Reads every instance of a pool, makes of each what is wanted, and names also those that a killed creation left without a document.
    pub(crate) fn all_pool_instances<T>(
        &self,
        pool: &PoolAddress,
        problems: &mut Vec<String>,
        unfinished: &mut Vec<InstanceAddress>,
        mut make: impl FnMut(InstanceDoc) -> Result<T, LifecycleError>,
    ) -> Result<Vec<T>, LifecycleError> {
        let ids = self.instances(pool)?;
        let mut made = Vec::with_capacity(ids.len());
        for id in ids {
            let at = InstanceAddress::new(pool.tenant.clone(), pool.pool.clone(), id);
            match self.documents().read(&keys::instance_doc(&at)) {
                Ok(Some(doc)) => made.push(make(doc)?),
                // A killed creation: nothing was made yet.
                Ok(None) if self.documents().raw().is_unfinished(&keys::instance_dir(&at))? => unfinished.push(at),
                Ok(None) => problems.push(format!(
                    "instance {at} has no document; put back the one that was moved aside, or remove {} if its data is not needed",
                    self.paths.instance(&at).display()
                )),
                Err(error) => problems.push(super::error::with_causes(&error)),
            }
        }
        Ok(made)
    }

    /// Takes room in a tenant's quotas, and keeps it by an effect that makes it visible to others: a document written.
    ///
    /// `ask` gets the usage as it is and returns it as it would be; `keep` runs while no other process can take room. Those of this
    /// process go on meanwhile, so that they share the disk's flushes: what each may take is counted before the next one asks.
    ///
    /// # Errors
    /// The quota that leaves no room; whatever `keep` says.
    pub(crate) fn take_room<T>(
        &self,
        tenant: &TenantDoc,
        ask: impl FnOnce(&Usage) -> Usage,
        keep: impl FnOnce() -> Result<T, LifecycleError>,
    ) -> Result<T, LifecycleError> {
        let ledger = self.ledger(&tenant.tenant_id);
        let mut books = ledger.turn();
        let mut batch = match books.batch.take() {
            Some(batch) => batch,
            None => {
                let guard = self.lock(&keys::admission_lock(&tenant.tenant_id))?;
                let usage = match books.known.take() {
                    Some((generation, usage)) if generation == guard.generation() => usage,
                    _ => Usage::of(&self.tenant_instances(&tenant.tenant_id, &mut Vec::new())?),
                };
                Batch::new(guard, usage)
            }
        };
        let after = ask(&batch.usage);
        let refused = tenant.quotas.check(&tenant.tenant_id, &batch.usage, &after).err();
        if refused.is_none() {
            batch.begin(after);
        }
        books.batch = Some(batch);
        if let Some(refused) = refused {
            ledger.settle(books);
            return Err(refused.into());
        }
        drop(books);
        let kept = keep();
        let mut books = ledger.lock();
        if let Some(batch) = &mut books.batch {
            batch.end(kept.is_ok());
        }
        ledger.settle(books);
        kept
    }

    /// Counts a change that gives room back, after its document was written.
    pub(crate) fn give_back_room(&self, tenant: &TenantId, change: impl FnOnce(&mut Usage)) -> Result<(), LifecycleError> {
        let ledger = self.ledger(tenant);
        let mut books = ledger.lock();
        if let Some(batch) = &mut books.batch {
            batch.change(change);
            return Ok(());
        }
        let mut guard = self.lock(&keys::admission_lock(tenant))?;
        let generation = guard.generation().wrapping_add(1);
        books.known = books.known.take().filter(|(known, _)| *known == guard.generation()).map(|(_, mut usage)| {
            change(&mut usage);
            (generation, usage)
        });
        guard.set_generation(generation);
        Ok(())
    }

    fn ledger(&self, tenant: &TenantId) -> Arc<Ledger> {
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).entry(tenant.clone()).or_default().clone()
    }

    /// Forgets what this process knows of a tenant that is gone.
    pub(crate) fn forget_tenant(&self, tenant: &TenantId) {
        self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).remove(tenant);
    }

    /// Returns net ids that were given to tenants that are gone, with these.
    pub fn retired_net_ids(&self) -> Result<BTreeMap<TenantNetId, TenantId>, LifecycleError> {
        let retired = self.node_doc()?.retired_net_ids;
        Ok(retired.into_iter().filter_map(|(id, tenant)| Some((u64::from(id).try_into().ok()?, tenant))).collect())
    }
}
