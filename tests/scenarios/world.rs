//! A node made of fakes, and what must always be true of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mvm::agent::desired::{DesiredState, Format, parse};
use mvm::agent::execute::{ExecuteOptions, Progress};
use mvm::agent::observe::{Observed, observe};
use mvm::agent::plan::{Plan, Retry};
use mvm::agent::reconciler::{self, Applied, ApplyOptions, ReconcileError, Report};
use mvm::audit::Audit;
use mvm::host::FakeHost;
use mvm::infra::clock::ManualClock;
use mvm::infra::kill_switch::KillSwitch;
use mvm::infra::paths::Paths;
use mvm::store::{DocumentStore, Documents, FileStore, MemoryStore, Wait};
use mvm::vm::instance::{InstanceState, StateName};
use mvm::vm::node::{Node, Sealer, Seams, VmmUids};
use mvm::vm::pool::{BuilderChoice, ImageSource, SimulatedImages};
use mvm::vmm::simulated::{Rule, Script, SimulatedStep, SimulatedVmm};
use mvm_types::TenantId;
use tempfile::TempDir;
use zeroize::Zeroizing;

/// Where the documents are.
pub enum Store {
    Memory(MemoryStore),
    Files { store: FileStore, dir: TempDir },
}

impl Store {
    /// Real files, where flushing them costs nothing if there is such a place.
    fn files() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        Store::Files { store: FileStore::new(dir.path().join("state"), dir.path().join("locks")), dir }
    }

    fn next_process(&self, switch: Arc<KillSwitch>) -> Arc<dyn DocumentStore> {
        match self {
            Store::Memory(store) => Arc::new(store.next_process(switch)),
            Store::Files { store, .. } => Arc::new(store.next_process(switch)),
        }
    }

    pub fn raw(&self) -> &dyn DocumentStore {
        match self {
            Store::Memory(store) => store,
            Store::Files { store, .. } => store,
        }
    }

    /// The directory of the documents.
    pub fn dir(&self) -> PathBuf {
        match self {
            Store::Memory(_) => panic!("it has none"),
            Store::Files { dir, .. } => dir.path().join("state"),
        }
    }

    /// Every key with its content, also of what is hidden; a directory with nothing in it is a key that ends with a slash.
    pub fn snapshot(&self) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        match self {
            Store::Memory(store) => return store.snapshot(),
            Store::Files { .. } => walk(&self.dir(), "", &mut all),
        }
        all
    }
}

fn walk(dir: &Path, key: &str, all: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        let key = format!("{key}{}", path.file_name().unwrap().to_str().unwrap());
        if !path.is_dir() {
            all.insert(key, std::fs::read(&path).unwrap());
        } else if std::fs::read_dir(&path).unwrap().next().is_none() {
            all.insert(format!("{key}/"), Vec::new());
        } else {
            walk(&path, &format!("{key}/"), all);
        }
    }
}

/// A host with a state directory, all in memory.
pub struct World {
    pub store: Store,
    pub host: FakeHost,
    pub vmm: SimulatedVmm,
    pub clock: Arc<ManualClock>,
    pub images: Arc<dyn ImageSource>,
    ids: Arc<AtomicU32>,
}

struct Open;

impl Sealer for Open {
    fn seal(&self, _: &TenantId, _: &str, _: u64, secret: &[u8]) -> Result<Vec<u8>, String> {
        Ok(secret.to_vec())
    }
    fn unseal(&self, _: &TenantId, _: &str, _: u64, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
        Ok(Zeroizing::new(sealed.to_vec()))
    }
}

impl World {
    pub fn new() -> Self {
        Self::scripted(&[])
    }

    /// With real documents.
    pub fn on_files() -> Self {
        Self { store: Store::files(), ..Self::new() }
    }

    pub fn scripted(rules: &[Rule]) -> Self {
        Self {
            store: Store::Memory(MemoryStore::new()),
            host: FakeHost::recording(),
            vmm: SimulatedVmm::new(Script { rules: rules.to_vec() }),
            clock: Arc::new(ManualClock::new()),
            images: Arc::new(SimulatedImages),
            ids: Arc::new(AtomicU32::new(1)),
        }
    }

    /// Starts a process of mvm that dies at an effect.
    pub fn process(&self, switch: &Arc<KillSwitch>) -> Result<Node, mvm::vm::error::LifecycleError> {
        let store = self.store.next_process(switch.clone());
        let vmm = self.vmm.next_process(switch.clone());
        let ids = self.ids.clone();
        let seams = Seams {
            documents: Documents::new(store.clone()),
            host: Arc::new(self.host.next_process(switch.clone())),
            vmm: Arc::new(vmm.clone()),
            guests: Arc::new(vmm),
            images: self.images.clone(),
            clock: self.clock.clone(),
            random: Box::new(move |bytes| {
                let n = ids.fetch_add(1, Ordering::SeqCst).to_be_bytes();
                bytes.iter_mut().zip(n.iter().cycle()).for_each(|(byte, n)| *byte = *n);
            }),
            sealer: Arc::new(Open),
            audit: Audit::new(store, self.clock.clone(), "test".into()),
        };
        let mut node = Node::open(Paths::new(PathBuf::from("/nonexistent/mvm"), None), seams, VmmUids::PerInstance)?;
        node.builder = BuilderChoice::Host;
        Ok(node)
    }

    pub fn node(&self) -> Node {
        self.process(&KillSwitch::never()).unwrap()
    }

    pub fn apply(&self, desired: &DesiredState) -> Result<Applied, ReconcileError> {
        apply_on(&self.node(), desired, 4)
    }

    /// Applies, and expects everything to be as declared.
    pub fn ready(&self, desired: &DesiredState) {
        let applied = self.apply(desired).unwrap();
        assert_eq!(applied, Applied::Ready, "{applied:#?}");
        self.check();
    }

    pub fn pass(&self, desired: &DesiredState) -> Report {
        let cancel = AtomicBool::new(false);
        let options = ExecuteOptions { parallel: 4, progress: &|_: Progress<'_>| {}, cancel: &cancel };
        reconciler::pass(&self.node(), desired, Retry::WhenDue, Wait::No, &options).unwrap()
    }

    pub fn plan(&self, desired: &DesiredState) -> Plan {
        reconciler::look(&self.node(), desired, Retry::WhenDue).unwrap().1
    }

    pub fn observe(&self) -> Observed {
        observe(&self.node()).unwrap()
    }

    pub fn advance(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    /// How many instances of a pool are in a state.
    pub fn count(&self, pool: &str, state: StateName) -> usize {
        let observed = self.observe();
        let (tenant, pool) = pool.split_once('/').unwrap();
        let pool = observed.tenants.get(tenant).and_then(|tenant| tenant.pools.get(pool));
        pool.map_or(0, |pool| pool.instances.iter().filter(|one| one.doc.state.name() == state).count())
    }

    pub fn states(&self, pool: &str) -> [usize; 3] {
        [StateName::Running, StateName::Warm, StateName::Sleeping].map(|state| self.count(pool, state))
    }

    /// What must be true whenever no process of mvm is at work: documents, machines and host agree, and nothing is left over.
    pub fn check(&self) {
        assert_eq!(self.vmm.doubles(), Vec::<String>::new(), "two machines for one instance");
        let observed = self.observe();
        let host = self.host.state();
        let machines = self.vmm.machines();
        let instances: Vec<_> = observed.tenants.values().flat_map(|t| t.pools.values()).flat_map(|p| &p.instances).collect();
        let with_machine: BTreeSet<String> =
            instances.iter().filter(|one| one.doc.state.vm().is_some()).map(|one| one.doc.at().to_string()).collect();
        assert_eq!(machines.keys().cloned().collect::<BTreeSet<_>>(), with_machine, "machines and documents");
        for one in &instances {
            assert_eq!(one.doc.transition, None, "{}", one.doc.at());
            let paused = machines.get(&one.doc.at().to_string());
            assert_eq!(paused.copied(), one.doc.state.vm().map(|_| one.doc.state.name() == StateName::Warm), "{}", one.doc.at());
        }
        let expected: BTreeSet<_> =
            instances.iter().filter(|one| one.doc.state.vm().is_some()).map(|one| one.doc.instance_id.clone()).collect();
        assert_eq!(host.run_dirs, expected, "run directories");
        assert_eq!(host.drives, expected, "in-memory drives");
        let bridges: BTreeSet<_> = observed.tenants.values().map(|tenant| tenant.doc.network.network().bridge()).collect();
        assert_eq!(host.bridges, bridges, "bridges");
        let disks: BTreeSet<_> = instances.iter().map(|one| one.doc.at().to_string()).collect();
        assert!(host.data_disks.keys().all(|at| disks.contains(at)), "data disks of instances that are gone");
        if observed.tenants.is_empty() {
            assert_eq!(host.leftovers(), Vec::<String>::new());
            let documents: Vec<_> =
                self.store.snapshot().into_keys().filter(|key| key.starts_with("tenants/") && key != "tenants/").collect();
            assert_eq!(documents, Vec::<String>::new());
        }
        let all = self.store.snapshot();
        // Beside a document may lie the file that its next write begins with.
        let next_write = |key: &str| {
            let (dir, name) = key.rsplit_once('/').unwrap_or(("", key));
            let document = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
            document.is_some_and(|name| all.contains_key(format!("{dir}/{name}").trim_start_matches('/')))
        };
        let left: Vec<_> =
            all.keys().filter(|key| (key.contains(".tmp") || key.contains(".removed")) && !next_write(key)).cloned().collect();
        assert_eq!(left, Vec::<String>::new());
        self.check_log(&observed);
    }

    /// Whatever is there, and whatever state it is in, is on record.
    fn check_log(&self, observed: &Observed) {
        let audit = Audit::new(self.store.next_process(KillSwitch::never()), self.clock.clone(), "check".into());
        for (id, tenant) in &observed.tenants {
            assert!(audit.verify(id).unwrap().is_ok());
            let events = audit.events(id).unwrap();
            let last: BTreeMap<&str, &str> =
                events.iter().filter_map(|event| Some((event.object.as_str(), event.to.as_deref()?))).collect();
            let made: BTreeSet<(&str, &str)> = events.iter().map(|event| (event.object.as_str(), event.action.as_str())).collect();
            assert!(made.contains(&(id.as_str(), "create tenant")), "{id} is not on record");
            for pool in tenant.pools.values() {
                let at = pool.doc.address().to_string();
                assert!(made.contains(&(at.as_str(), "create pool")), "{at} is not on record");
                for one in &pool.instances {
                    let at = one.doc.at().to_string();
                    let state = one.doc.state.name().to_string();
                    assert!(made.contains(&(at.as_str(), "create")), "{at} is not on record");
                    assert_eq!(last.get(at.as_str()), Some(&state.as_str()), "the last record of {at}");
                }
            }
        }
    }

    /// Cuts a document off, as a disk that lies might.
    pub fn tear(&self, key: &str) {
        let whole = self.store.raw().read(key).unwrap().unwrap();
        self.store.raw().write(key, &whole[..40.min(whole.len() - 2)]).unwrap();
    }

    /// The instances of every pool with what their guests booted as, which a restart changes.
    pub fn guests(&self) -> Vec<(String, Option<String>)> {
        let observed = self.observe();
        let instances = observed.tenants.values().flat_map(|tenant| tenant.pools.values()).flat_map(|pool| &pool.instances);
        let boot = |state: &InstanceState| match state {
            InstanceState::Running { guest_boot, .. } | InstanceState::Warm { guest_boot, .. } => Some(guest_boot.clone()),
            _ => None,
        };
        instances.map(|one| (one.doc.at().to_string(), boot(&one.doc.state))).collect()
    }

    pub fn verbs(&self, desired: &DesiredState) -> Vec<&'static str> {
        self.plan(desired).visible().map(|step| step.action.verb()).collect()
    }
}

pub fn apply_on(node: &Node, desired: &DesiredState, parallel: usize) -> Result<Applied, ReconcileError> {
    let cancel = AtomicBool::new(false);
    let options =
        ApplyOptions { deadline: Instant::now() + Duration::from_secs(60), parallel, progress: &|_: Progress<'_>| {}, cancel: &cancel };
    reconciler::apply(node, desired, &options)
}

pub fn rule(step: SimulatedStep, object: &str, fail: &str, times: u32) -> Rule {
    Rule { step, object: object.into(), delay_ms: 0, fail: Some(fail.into()), times: Some(times) }
}

pub fn toml(text: &str) -> DesiredState {
    parse(text, Format::Toml).unwrap_or_else(|error| panic!("{error}"))
}

/// A tenant with a gateway and workers.
pub fn fleet(gateways: &str, workers: &str) -> DesiredState {
    toml(&format!(
        r#"
        schema_version = 1
        prune_unknown_tenants = true
        prune_unknown_pools = true
        [[tenants]]
        tenant_id = "acme"
        network = {{ tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }}
        [[tenants.pools]]
        pool_id = "gw"
        role = "gateway"
        desired_counts = {{ {gateways} }}
        runtime_policy = {{ min_running_seconds = 0, min_warm_seconds = 0 }}
        [[tenants.pools]]
        pool_id = "web"
        desired_counts = {{ {workers} }}
        instance_resources = {{ vcpus = 1, mem_mib = 128, data_disk_mib = 16 }}
        runtime_policy = {{ min_running_seconds = 0, min_warm_seconds = 0 }}
        "#
    ))
}

pub fn nothing() -> DesiredState {
    DesiredState { prune_unknown_tenants: true, ..DesiredState::empty() }
}

/// The changes of an instance's state in the log, in order: `verb from -> to`, and whether it failed.
pub fn changes(world: &World, at: &mvm_types::InstanceAddress) -> Vec<String> {
    let events = world.node().audit().events(&at.tenant).unwrap();
    let of = events.into_iter().filter(|event| event.object == at.to_string());
    of.map(|event| {
        let state = |state: Option<String>| state.unwrap_or_default();
        let failed = if event.result == "ok" { "" } else { " FAILED" };
        format!("{} {} -> {}{failed}", event.action, state(event.from), state(event.to))
    })
    .collect()
}

/// The actions of the log in order, as `verb object`.
pub fn log(world: &World, tenant: &str) -> Vec<String> {
    let node = world.node();
    let events = node.audit().events(&tenant.parse().unwrap()).unwrap();
    events
        .into_iter()
        .map(|event| format!("{} {}{}", event.action, event.object, if event.result == "ok" { "" } else { " FAILED" }))
        .collect()
}
