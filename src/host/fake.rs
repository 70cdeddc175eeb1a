//! A host that only remembers: for scenarios, for scale runs, and for killing mvm at every effect.
//!
//! What it holds outlives the processes that it simulates: [`FakeHost::next_process`] is what the next process of mvm finds.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_hostd::cgroup;
use mvm_types::{InstanceAddress, InstanceId};
use serde::{Deserialize, Serialize};

use super::{Ability, DriveFile, DriveLabel, Host, HostError, HostExpectations, HostFacts, NetworkCheck, ObservedNetwork};
use crate::infra::kill_switch::KillSwitch;
use crate::net::{BuilderNetwork, InstanceNetwork, Ruleset, TenantNetwork, parse_tap_name};

/// What the simulated host holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FakeState {
    /// Bridges by name.
    pub bridges: BTreeSet<String>,
    /// The fingerprint of the rules that are loaded.
    pub ruleset: Option<String>,
    /// The TAPs that were made, also of machines that ended since: it does not see them end.
    #[serde(default)]
    pub taps: BTreeSet<String>,
    /// The TAPs that the loaded rules list.
    pub listed_taps: BTreeSet<String>,
    /// Whether the host forwards.
    pub forwards: bool,
    /// Instances with a run directory.
    pub run_dirs: BTreeSet<InstanceId>,
    /// Sizes of data disks, in MiB.
    pub data_disks: BTreeMap<String, u64>,
    /// Instances with in-memory drives.
    pub drives: BTreeSet<InstanceId>,
}

impl FakeState {
    /// Lists in words what is there; nothing when a fleet was removed whole.
    pub fn leftovers(&self) -> Vec<String> {
        let bridges = self.bridges.iter().map(|name| format!("bridge {name}"));
        let taps = self.listed_taps.iter().map(|name| format!("rule for {name}"));
        let runs = self.run_dirs.iter().map(|instance| format!("run directory of {instance}"));
        let disks = self.data_disks.keys().map(|at| format!("data disk of {at}"));
        let drives = self.drives.iter().map(|instance| format!("drives of {instance}"));
        bridges.chain(taps).chain(runs).chain(disks).chain(drives).collect()
    }
}

#[derive(Debug, Default)]
struct Inner {
    state: FakeState,
    effects: Vec<String>,
    record: bool,
    count: usize,
    failures: BTreeMap<usize, String>,
}

/// The simulated host; clones are the same host.
#[derive(Debug, Clone)]
pub struct FakeHost {
    inner: Arc<Mutex<Inner>>,
    switch: Arc<KillSwitch>,
    file: Option<PathBuf>,
}

impl Default for FakeHost {
    fn default() -> Self {
        Self { inner: Arc::default(), switch: KillSwitch::never(), file: None }
    }
}

impl FakeHost {
    /// Makes a host on which there is nothing, and which does not record effects: for scale runs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a host that records every effect.
    pub fn recording() -> Self {
        let host = Self::default();
        host.lock().record = true;
        host
    }

    /// Goes on with the host of a file, in which it is kept when [`FakeHost::save`] is called.
    ///
    /// # Errors
    /// When there is a file and it cannot be read.
    pub fn kept_in(file: PathBuf) -> std::io::Result<Self> {
        let host = Self { file: Some(file.clone()), ..Self::default() };
        match std::fs::read(&file) {
            Ok(content) => host.lock().state = serde_json::from_slice(&content)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(host)
    }

    /// Writes the host down, if there was any effect on it.
    pub fn save(&self) -> std::io::Result<()> {
        let (Some(file), inner) = (&self.file, self.lock()) else { return Ok(()) };
        if inner.count > 0 {
            let dir = file.parent().unwrap_or(std::path::Path::new("."));
            std::fs::create_dir_all(dir)?;
            let mut new = tempfile::NamedTempFile::new_in(dir)?;
            new.write_all(&serde_json::to_vec(&inner.state)?)?;
            new.persist(file)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the same host as the next process of mvm finds it, which has its own fate; the count begins at 0.
    pub fn next_process(&self, switch: Arc<KillSwitch>) -> Self {
        self.lock().count = 0;
        Self { inner: self.inner.clone(), switch, file: self.file.clone() }
    }

    /// Makes the effect of that number fail with a message; nothing of it happens.
    pub fn fail_at(&self, effect: usize, why: impl Into<String>) {
        self.lock().failures.insert(effect, why.into());
    }

    /// Simulates a reboot of the host: bridges, rules and run directories are gone, disks are not.
    pub fn reboot(&self) {
        let mut inner = self.lock();
        let data_disks = std::mem::take(&mut inner.state.data_disks);
        inner.state = FakeState { data_disks, ..FakeState::default() };
    }

    /// Removes a TAP under the machine that holds it, as somebody's `ip link del` would.
    pub fn lose_tap(&self, name: &str) {
        self.lock().state.taps.remove(name);
    }

    /// How many effects there were since the host was made or revived.
    pub fn count(&self) -> usize {
        self.lock().count
    }

    /// Takes the effects recorded so far, in words: `create_tap tn5i0`.
    pub fn take_effects(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().effects)
    }

    /// Copies what the host holds.
    pub fn state(&self) -> FakeState {
        self.lock().state.clone()
    }

    /// Looks without an effect.
    fn look<T>(&self, read: impl FnOnce(&FakeState) -> T) -> Result<T, HostError> {
        Ok(read(&self.lock().state))
    }

    /// Does one effect, or dies of it.
    fn effect<T>(&self, words: impl FnOnce() -> String, apply: impl FnOnce(&mut FakeState) -> Result<T, String>) -> Result<T, HostError> {
        let mut inner = self.lock();
        let number = inner.count;
        inner.count += 1;
        self.switch.effect().map_err(HostError::Killed)?;
        let words = words();
        let result = match inner.failures.remove(&number) {
            Some(why) => Err(why),
            None => apply(&mut inner.state),
        };
        if result.is_ok() && inner.record {
            inner.effects.push(words.clone());
        }
        result.map_err(|why| HostError::Failed { what: words, why })
    }
}

/// A descriptor that takes and gives nothing.
fn null() -> Result<OwnedFd, HostError> {
    let file = std::fs::File::options().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|source| HostError::Io { what: "cannot open /dev/null".into(), source })
}

impl Host for FakeHost {
    fn ensure_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError> {
        self.effect(
            || format!("ensure_tenant_network {}", network.bridge()),
            |state| {
                state.bridges.insert(network.bridge());
                state.forwards = true;
                Ok(())
            },
        )
    }

    fn remove_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError> {
        self.effect(
            || format!("remove_tenant_network {}", network.bridge()),
            |state| {
                state.bridges.remove(&network.bridge());
                state.taps.retain(|name| parse_tap_name(name).is_none_or(|(net_id, _)| net_id != network.net_id));
                Ok(())
            },
        )
    }

    fn create_tap(&self, network: &InstanceNetwork, _uid: Option<u32>) -> Result<OwnedFd, HostError> {
        self.effect(
            || format!("create_tap {}", network.tap()),
            |state| {
                if !state.bridges.contains(&network.tenant.bridge()) {
                    return Err(format!("there is no bridge {}", network.tenant.bridge()));
                }
                if !state.listed_taps.contains(&network.tap()) {
                    return Err("no loaded rule lists it, so it would pass nothing".into());
                }
                state.taps.insert(network.tap());
                Ok(())
            },
        )?;
        null()
    }

    fn create_builder_tap(&self, network: &BuilderNetwork, _uid: Option<u32>) -> Result<OwnedFd, HostError> {
        self.effect(
            || format!("create_builder_tap {}", network.tap()),
            |state| match (state.bridges.contains(&network.tenant.bridge()), &state.ruleset) {
                (true, Some(_)) => Ok(()),
                (true, None) => Err("no rules are loaded".into()),
                (false, _) => Err(format!("there is no bridge {}", network.tenant.bridge())),
            },
        )?;
        null()
    }

    fn apply_ruleset(&self, ruleset: &Ruleset) -> Result<(), HostError> {
        let fingerprint = ruleset
            .fingerprint()
            .map_err(|error| HostError::Failed { what: "cannot render the packet filter rules".into(), why: error.to_string() })?;
        if self.look(|state| state.ruleset.as_ref() == Some(&fingerprint))? {
            return Ok(());
        }
        let taps = ruleset.tenants.iter().flat_map(|(_, instances)| instances.iter().map(InstanceNetwork::tap)).collect();
        self.effect(
            || "apply_ruleset".into(),
            |state| {
                state.ruleset = Some(fingerprint);
                state.listed_taps = taps;
                Ok(())
            },
        )
    }

    fn remove_ruleset(&self) -> Result<(), HostError> {
        self.effect(
            || "remove_ruleset".into(),
            |state| {
                state.ruleset = None;
                state.listed_taps.clear();
                state.forwards = false;
                Ok(())
            },
        )
    }

    fn verify_network(&self, ruleset: &Ruleset) -> Result<Vec<NetworkCheck>, HostError> {
        self.look(|state| {
            let bridges = ruleset.tenants.iter().map(|(tenant, _)| {
                let missing = !state.bridges.contains(&tenant.bridge());
                NetworkCheck { what: format!("bridge {} is there", tenant.bridge()), fault: missing.then(|| "it is missing".to_owned()) }
            });
            let stale = ruleset.fingerprint().ok() != state.ruleset;
            let rules = NetworkCheck {
                what: "packet filter rules are loaded and unchanged".into(),
                fault: stale.then(|| "they are not".to_owned()),
            };
            std::iter::once(rules).chain(bridges).collect()
        })
    }

    fn guest_memory_mib(&self) -> Result<u64, HostError> {
        Ok(1 << 30)
    }

    fn facts(&self) -> Result<HostFacts, HostError> {
        let simulated = || Ability::Yes("simulated".into());
        self.look(|state| HostFacts {
            kernel: "simulated".into(),
            boot_id: "00000000-0000-0000-0000-000000000000".into(),
            cpus: 64,
            memory_total_mib: 1 << 20,
            memory_available_mib: 1 << 20,
            swap_total_mib: 0,
            is_root: true,
            tun: simulated(),
            cgroup2_controllers: Vec::new(),
            cgroup2_mount: None,
            limits: Ability::No("nothing runs in a simulation".into()),
            limits_remedy: None,
            nftables: simulated(),
            nft: simulated(),
            mke2fs: simulated(),
            ip_forward: state.forwards,
            bridge_netfilter: false,
            run_in_memory: true,
            state_free_mib: 1 << 30,
            state_total_mib: 1 << 30,
        })
    }

    fn observe_network(&self) -> Result<ObservedNetwork, HostError> {
        self.look(|state| ObservedNetwork {
            bridges: state.bridges.clone(),
            ruleset: state.ruleset.clone(),
            forwards: state.forwards,
            taps: state.taps.clone(),
            loose: BTreeSet::new(),
        })
    }

    fn ensure_run_dir(&self, instance: &InstanceId) -> Result<PathBuf, HostError> {
        self.effect(
            || format!("ensure_run_dir {instance}"),
            |state| {
                state.run_dirs.insert(instance.clone());
                Ok(PathBuf::from("/nonexistent").join(instance.as_str()))
            },
        )
    }

    fn limits_of(&self, _instance: &InstanceId) -> Result<Option<cgroup::Place>, HostError> {
        Ok(None)
    }

    fn remove_run_dir(&self, instance: &InstanceId) -> Result<(), HostError> {
        self.effect(
            || format!("remove_run_dir {instance}"),
            |state| {
                state.run_dirs.remove(instance);
                state.drives.remove(instance);
                Ok(())
            },
        )
    }

    fn ensure_data_disk(&self, at: &InstanceAddress, size_mib: u64) -> Result<(), HostError> {
        self.effect(
            || format!("ensure_data_disk {at}"),
            |state| {
                let disk = state.data_disks.entry(at.to_string()).or_insert(size_mib);
                if *disk > size_mib {
                    return Err(format!("it has {disk} MiB and cannot shrink to {size_mib} MiB"));
                }
                *disk = size_mib;
                Ok(())
            },
        )
    }

    fn open_data_disk(&self, at: &InstanceAddress) -> Result<OwnedFd, HostError> {
        if self.look(|state| state.data_disks.contains_key(&at.to_string()))? {
            return null();
        }
        Err(HostError::Failed { what: format!("cannot open the data disk of {at}"), why: "it was not made".into() })
    }

    fn build_drive(&self, instance: &InstanceId, label: DriveLabel, _files: &[DriveFile]) -> Result<OwnedFd, HostError> {
        self.effect(
            || format!("build_drive {} of {instance}", label.as_str()),
            |state| {
                state.drives.insert(instance.clone());
                Ok(())
            },
        )?;
        null()
    }

    fn remove_instance_files(&self, at: &InstanceAddress) -> Result<(), HostError> {
        self.effect(
            || format!("remove_instance_files {at}"),
            |state| {
                state.data_disks.remove(&at.to_string());
                Ok(())
            },
        )
    }

    fn trim_logs(&self, _at: &InstanceAddress) -> Result<(), HostError> {
        Ok(())
    }

    fn ensure_snapshot_dir(&self, at: &InstanceAddress) -> Result<(), HostError> {
        self.effect(|| format!("ensure_snapshot_dir {at}"), |_| Ok(()))
    }

    fn remove_snapshot(&self, at: &InstanceAddress) -> Result<(), HostError> {
        self.effect(|| format!("remove_snapshot {at}"), |_| Ok(()))
    }

    fn reattach(&self, _: &Ruleset) -> Result<(), HostError> {
        // Its TAPs are never loose.
        Ok(())
    }

    fn sweep(&self, expected: &HostExpectations) -> Result<Vec<String>, HostError> {
        let stray = self.look(|state| {
            let bridges: Vec<String> = state.bridges.difference(&expected.bridges).cloned().collect();
            let runs: Vec<InstanceId> = state.run_dirs.difference(&expected.instances).cloned().collect();
            (bridges, runs)
        })?;
        let (bridges, runs) = stray;
        if bridges.is_empty() && runs.is_empty() {
            return Ok(Vec::new());
        }
        self.effect(
            || "sweep".into(),
            |state| {
                state.bridges.retain(|name| !bridges.contains(name));
                state.run_dirs.retain(|instance| !runs.contains(instance));
                let bridges = bridges.iter().map(|name| format!("bridge {name}"));
                Ok(bridges.chain(runs.iter().map(|instance| format!("directory of {instance}"))).collect())
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> TenantNetwork {
        TenantNetwork { net_id: 5.try_into().unwrap(), subnet: "10.240.5.0/24".parse().unwrap() }
    }

    #[test]
    fn a_kill_stops_the_process_and_not_the_host() {
        let host = FakeHost::recording();
        let process = host.next_process(KillSwitch::at(2));
        process.ensure_tenant_network(&network()).unwrap();
        let instance = InstanceId::from_bits(1);
        process.ensure_run_dir(&instance).unwrap();
        assert!(matches!(process.remove_run_dir(&instance), Err(HostError::Killed(2))));
        assert_eq!(host.take_effects(), ["ensure_tenant_network br-tenant-5", "ensure_run_dir i-00000001"]);
        assert_eq!(host.state().leftovers(), ["bridge br-tenant-5", "run directory of i-00000001"]);
        assert_eq!(host.sweep(&HostExpectations::default()).unwrap().len(), 2);
        assert!(host.state().leftovers().is_empty());
        assert!(host.sweep(&HostExpectations::default()).unwrap().is_empty());
    }

    #[test]
    fn a_port_needs_its_bridge_and_its_rules_first() {
        let host = FakeHost::new();
        let instance = InstanceNetwork { tenant: network(), offset: crate::net::InstanceOffset(0), forwards: false, mbit: None };
        host.ensure_tenant_network(&network()).unwrap();
        assert!(host.create_tap(&instance, None).is_err());
        host.apply_ruleset(&Ruleset { tenants: vec![(network(), vec![instance])], ..Ruleset::default() }).unwrap();
        host.create_tap(&instance, None).unwrap();
        host.reboot();
        assert!(host.create_tap(&instance, None).is_err());
    }

    #[test]
    fn a_scripted_failure_happens_once_and_does_nothing() {
        let host = FakeHost::new();
        host.fail_at(0, "no space left");
        assert_eq!(host.ensure_tenant_network(&network()).unwrap_err().to_string(), "ensure_tenant_network br-tenant-5: no space left");
        assert!(host.state().leftovers().is_empty());
        host.ensure_tenant_network(&network()).unwrap();
    }
}
