//! The host itself, in this process, which must be root.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use mvm_hostd::cgroup::{Hierarchy, Place};
use mvm_hostd::dir::Dir;
use mvm_hostd::drive::{self, ImageFile};
use mvm_hostd::netlink::{BridgeSpec, Netlink};
use mvm_hostd::tap::{self, TapSpec};
use mvm_hostd::{HostdError, facts, nft, sysctl};
use mvm_types::{InstanceAddress, InstanceId, NodeId};

use super::{DriveFile, DriveLabel, Host, HostError, HostExpectations, HostFacts, MAX_LOG, NetworkCheck, ObservedNetwork, verify};
use crate::infra::paths::Paths;
use crate::net::{BRIDGE_PREFIX, BuilderNetwork, InstanceNetwork, Mac, Ruleset, TenantNetId, TenantNetwork, bridge_mac};

const DATA_DISK: &str = "data.img";
/// The largest packet on a tenant's network, in bytes; what a guest's interface has when it is told nothing.
const MTU: u32 = 1500;

/// Does what needs root in this process.
pub struct LocalHost {
    paths: Paths,
    node: NodeId,
    alias: String,
    /// Looked for on first use; `None` where there is none.
    cgroups: OnceLock<Option<Hierarchy>>,
    /// Opened on first use, in the network namespace of the thread that uses it first.
    netlink: Mutex<Option<std::sync::Arc<Netlink>>>,
}

impl LocalHost {
    /// Works on the node's directories; what it makes carries the node's mark, `mvm:<node id>`. Opens nothing yet.
    pub fn new(paths: Paths, node: &NodeId) -> Self {
        Self { paths, node: node.clone(), alias: format!("mvm:{node}"), cgroups: OnceLock::new(), netlink: Mutex::new(None) }
    }

    pub(super) fn netlink(&self) -> Result<std::sync::Arc<Netlink>, HostError> {
        let mut netlink = self.netlink.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(open) = netlink.as_ref() {
            return Ok(open.clone());
        }
        let open = std::sync::Arc::new(Netlink::open()?);
        *netlink = Some(open.clone());
        Ok(open)
    }

    pub(super) fn alias(&self) -> &str {
        &self.alias
    }

    fn cgroups(&self) -> Option<&Hierarchy> {
        let find = || Hierarchy::find().inspect_err(|why| tracing::debug!(%why, "VMMs run without limits")).ok();
        self.cgroups.get_or_init(find).as_ref()
    }

    fn run(&self) -> Result<Dir, HostError> {
        Ok(Dir::ensure(self.paths.run(), 0o700)?)
    }

    /// The run directory, if it is there: looking must not make it.
    pub(super) fn try_run(&self) -> Result<Option<Dir>, HostError> {
        match Dir::open(self.paths.run()) {
            Ok(run) => Ok(Some(run)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn state(&self) -> Result<Dir, HostError> {
        Ok(Dir::ensure(self.paths.state(), 0o700)?)
    }

    fn below_state<'a>(&self, path: &'a Path) -> Result<&'a Path, HostError> {
        path.strip_prefix(self.paths.state()).map_err(|_| HostError::Failed {
            what: format!("cannot use {}", path.display()),
            why: format!("it is not below {}", self.paths.state().display()),
        })
    }

    fn make_tap(&self, name: &str, tenant: &TenantNetwork, mac: Mac, owner: Option<u32>) -> Result<OwnedFd, HostError> {
        if !nft::was_loaded(&self.run()?)? {
            return Err(HostError::Failed {
                what: format!("cannot make TAP {name}"),
                why:
                    "no packet filter rules have been loaded since the host booted, and a guest without them could spoof and reach anything"
                        .into(),
            });
        }
        let spec = TapSpec { name, bridge: &tenant.bridge(), guest_mac: mac.0, owner, alias: &self.alias };
        Ok(tap::create_tap(&*self.netlink()?, &spec)?)
    }

    fn instance_dir(&self, at: &InstanceAddress) -> Result<Option<Dir>, HostError> {
        Ok(self.state()?.try_dir(self.below_state(&self.paths.instance(at))?)?)
    }
}

impl Host for LocalHost {
    fn ensure_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError> {
        // Before the bridge: turning forwarding on resets settings of the interfaces that are there.
        sysctl::ensure_forwarding(&self.run()?)?;
        let name = network.bridge();
        let spec = BridgeSpec {
            name: &name,
            mac: network.bridge_mac().0,
            address: network.subnet.gateway(),
            prefix: network.subnet.prefix(),
            mtu: MTU,
            alias: &self.alias,
        };
        self.netlink()?.ensure_bridge(&spec)?;
        Ok(())
    }

    fn remove_tenant_network(&self, network: &TenantNetwork) -> Result<(), HostError> {
        Ok(self.netlink()?.remove_bridge(&network.bridge(), &self.alias, network.bridge_mac().0)?)
    }

    fn create_tap(&self, network: &InstanceNetwork, uid: Option<u32>) -> Result<OwnedFd, HostError> {
        self.make_tap(&network.tap(), &network.tenant, network.mac(), uid)
    }

    fn create_builder_tap(&self, network: &BuilderNetwork, uid: Option<u32>) -> Result<OwnedFd, HostError> {
        self.make_tap(&network.tap(), &network.tenant, network.mac(), uid)
    }

    fn apply_ruleset(&self, ruleset: &Ruleset) -> Result<(), HostError> {
        let text = ruleset
            .render()
            .map_err(|error| HostError::Failed { what: "cannot render the packet filter rules".into(), why: error.to_string() })?;
        nft::apply(&self.run()?, &text, &Ruleset::name_of(&text))?;
        Ok(())
    }

    fn remove_ruleset(&self) -> Result<(), HostError> {
        let run = self.run()?;
        nft::remove(&run)?;
        sysctl::restore_forwarding(&run)?;
        Ok(())
    }

    fn verify_network(&self, ruleset: &Ruleset) -> Result<Vec<NetworkCheck>, HostError> {
        verify::verify(self, ruleset)
    }

    fn guest_memory_mib(&self) -> Result<u64, HostError> {
        let info = rustix::system::sysinfo();
        let total_mib = info.totalram as u64 * u64::from(info.mem_unit) / (1024 * 1024);
        // A sixteenth, and at least 256 MiB, for the host itself and for the VMMs' own memory.
        Ok(total_mib.saturating_sub((total_mib / 16).max(256)))
    }

    fn facts(&self) -> Result<HostFacts, HostError> {
        Ok(facts::gather(self.paths.state(), self.paths.run())?)
    }

    fn observe_network(&self) -> Result<ObservedNetwork, HostError> {
        let links = self.netlink()?.list_links()?;
        let ours = || links.iter().filter(|link| link.alias.as_ref() == Some(&self.alias));
        let bridges = ours().filter(|link| link.is_bridge && link.up).map(|link| link.name.clone()).collect();
        let taps = ours().filter(|link| !link.is_bridge).map(|link| link.name.clone()).collect();
        // A builder's TAP is not made a port again: its build ends before long, and is then repeated.
        let is_instances = |name: &str| crate::net::parse_tap_name(name).is_some();
        let loose = ours()
            .filter(|link| !link.is_bridge && link.master.is_none() && is_instances(&link.name))
            .map(|link| link.name.clone())
            .collect();
        let ruleset = match self.try_run()? {
            Some(run) => nft::loaded(&run)?,
            None => None,
        };
        Ok(ObservedNetwork { bridges, ruleset, forwards: sysctl::forwards()?, taps, loose })
    }

    fn ensure_run_dir(&self, instance: &InstanceId) -> Result<PathBuf, HostError> {
        let path = Path::new("instances").join(instance.as_str());
        self.run()?.ensure_dir(path, 0o700)?;
        Ok(self.paths.run_instance(instance))
    }

    fn limits_of(&self, instance: &InstanceId) -> Result<Option<Place>, HostError> {
        let Some(cgroups) = self.cgroups() else { return Ok(None) };
        Ok(Some(cgroups.place(self.node.as_str(), instance.as_str())?))
    }

    fn remove_run_dir(&self, instance: &InstanceId) -> Result<(), HostError> {
        if let Some(place) = self.limits_of(instance)? {
            place.end()?;
        }
        let Some(run) = self.try_run()? else { return Ok(()) };
        if let Some(instances) = run.try_dir("instances")? {
            instances.remove_tree(instance.as_str())?;
        }
        Ok(())
    }

    fn ensure_data_disk(&self, at: &InstanceAddress, size_mib: u64) -> Result<(), HostError> {
        let size = size_mib.checked_mul(1 << 20).ok_or_else(|| HostError::Failed {
            what: format!("cannot make a data disk for {at}"),
            why: format!("{size_mib} MiB is more than a file can have"),
        })?;
        let volumes = self.state()?.ensure_dir(self.below_state(&self.paths.volumes(at))?, 0o700)?;
        drive::ensure_data_disk(&volumes, DATA_DISK, "mvm-data", size)?;
        Ok(())
    }

    fn open_data_disk(&self, at: &InstanceAddress) -> Result<OwnedFd, HostError> {
        let volumes = self.state()?.try_dir(self.below_state(&self.paths.volumes(at))?)?;
        let volumes = volumes
            .ok_or_else(|| HostError::Failed { what: format!("cannot open the data disk of {at}"), why: "it was not made".into() })?;
        Ok(drive::open_data_disk(&volumes, DATA_DISK)?)
    }

    fn build_drive(&self, _instance: &InstanceId, label: DriveLabel, files: &[DriveFile]) -> Result<OwnedFd, HostError> {
        let images: Vec<_> = files
            .iter()
            .map(|file| ImageFile { name: &file.name, content: &file.content, mode: u16::try_from(file.mode & 0o7777).unwrap_or(0o400) })
            .collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        Ok(drive::build_drive(label.as_str(), &images, u32::try_from(now).unwrap_or(u32::MAX))?)
    }

    fn remove_instance_files(&self, at: &InstanceAddress) -> Result<(), HostError> {
        let Some(dir) = self.instance_dir(at)? else { return Ok(()) };
        for entry in dir.entries()? {
            // The document, and one that was put aside because it was torn.
            if !entry.as_encoded_bytes().starts_with(b"instance.json") {
                dir.remove_tree(entry)?;
            }
        }
        Ok(())
    }

    fn trim_logs(&self, at: &InstanceAddress) -> Result<(), HostError> {
        for path in [self.paths.console_log(at), self.paths.vmm_log(at)] {
            match std::fs::metadata(&path) {
                Ok(metadata) if metadata.len() > MAX_LOG => trim(&path, metadata.len())
                    .map_err(|source| HostError::Io { what: format!("cannot trim {}", path.display()), source })?,
                _ => {}
            }
        }
        Ok(())
    }

    fn ensure_snapshot_dir(&self, at: &InstanceAddress) -> Result<(), HostError> {
        self.state()?.ensure_dir(self.below_state(&self.paths.snapshot(at))?, 0o700)?;
        Ok(())
    }

    fn remove_snapshot(&self, at: &InstanceAddress) -> Result<(), HostError> {
        if let Some(dir) = self.instance_dir(at)? {
            dir.remove_tree("snapshot")?;
            // What a VMM that was ended while it wrote one has left of it.
            dir.remove_tree("vmm")?;
        }
        Ok(())
    }

    fn reattach(&self, ruleset: &Ruleset) -> Result<(), HostError> {
        let loose = self.observe_network()?.loose;
        let netlink = self.netlink()?;
        for (network, instances) in &ruleset.tenants {
            for instance in instances.iter().filter(|instance| loose.contains(&instance.tap())) {
                netlink.attach(&instance.tap(), &network.bridge(), instance.mac().0, &self.alias)?;
            }
        }
        Ok(())
    }

    fn sweep(&self, expected: &HostExpectations) -> Result<Vec<String>, HostError> {
        let [first, second, ..] = bridge_mac(TenantNetId::MAX).0;
        let bridges = self.netlink()?.sweep_bridges(&self.alias, BRIDGE_PREFIX, [first, second], |name| expected.bridges.contains(name))?;
        let mut removed: Vec<String> = bridges.into_iter().map(|name| format!("bridge {name}")).collect();
        // A TAP ends with its VMM, but for one whose way from mvm to a Firecracker was cut off.
        let is_instances = |name: &str| crate::net::parse_tap_name(name).is_some();
        if let Some(taps) = &expected.taps {
            let swept = self.netlink()?.sweep_ports(&self.alias, is_instances, |name| taps.contains(name))?;
            removed.extend(swept.into_iter().map(|name| format!("TAP {name}")));
        }
        let keep: BTreeSet<&str> = expected.instances.iter().map(InstanceId::as_str).collect();
        if let Some(cgroups) = self.cgroups() {
            let swept = cgroups.sweep(self.node.as_str(), |instance| keep.contains(instance))?;
            removed.extend(swept.into_iter().map(|path| format!("cgroup {}", path.display())));
        }
        let Some(run) = self.try_run()? else { return Ok(removed) };
        removed.extend(run.remove_stale_temporaries()?.into_iter().map(|name| format!("file {}", run.path().join(name).display())));
        let Some(instances) = run.try_dir("instances")? else { return Ok(removed) };
        for entry in instances.entries()? {
            let stray = entry.to_str().is_some_and(|name| name.parse::<InstanceId>().is_ok() && !keep.contains(name));
            if stray && instances.remove_tree(&entry)? {
                removed.push(format!("directory {}", instances.path().join(&entry).display()));
            }
        }
        Ok(removed)
    }
}

/// Keeps the last quarter of [`MAX_LOG`]; the VMM appends, so it goes on behind that. What it writes meanwhile may be lost.
fn trim(path: &Path, len: u64) -> std::io::Result<()> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let no_links = i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0);
    let file = std::fs::File::options().read(true).write(true).custom_flags(no_links).open(path)?;
    let mut end = vec![0; usize::try_from(MAX_LOG / 4).unwrap_or(0)];
    file.read_exact_at(&mut end, len - MAX_LOG / 4)?;
    file.set_len(0)?;
    file.write_all_at(&end, 0)
}

impl From<HostdError> for HostError {
    fn from(error: HostdError) -> Self {
        match error {
            HostdError::Io { what, source } => HostError::Io { what, source },
            HostdError::Refused { what, why } => HostError::Failed { what, why },
        }
    }
}
