//! The pool's declaration and its document.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_types::{PoolAddress, PoolId, ProfileName, RevisionId, Role, SecretName, TenantId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::revision::LastBuild;
use super::role::{self, Port, Protocol, RoleTraits};
use crate::infra::clock::Moment;
use crate::infra::failure::Failure;
use crate::store::Document;
use crate::vmm::Rates;

/// The flake reference of the image that mvm carries itself.
pub const BUILTIN: &str = "builtin";

/// What each instance of a pool gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InstanceResources {
    /// Virtual CPUs, 1 to 32.
    #[schemars(range(min = 1, max = 32))]
    pub vcpus: u8,
    /// Memory in MiB, at least 64.
    #[schemars(range(min = 64, max = 1_048_576))]
    pub mem_mib: u32,
    /// The persistent data disk in MiB, 0 for none, else at least 8.
    #[serde(default)]
    #[schemars(range(min = 0, max = 67_108_864))]
    pub data_disk_mib: u64,
    /// What each of its drives may move in a second, in MiB; unbounded when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub drive_mib_per_second: Option<u32>,
    /// How often in a second it may read from or write to each of its drives; unbounded when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub drive_iops: Option<u32>,
    /// What its network interface may move in a second and each direction, in Mbit (10^6 bits); unbounded when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub net_mbit_per_second: Option<u32>,
    /// Whether memory that the guest frees goes back to the host while it runs, where the VMM can do that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reclaim_memory: bool,
}

impl Default for InstanceResources {
    fn default() -> Self {
        Self {
            vcpus: 1,
            mem_mib: 128,
            data_disk_mib: 0,
            drive_mib_per_second: None,
            drive_iops: None,
            net_mbit_per_second: None,
            reclaim_memory: false,
        }
    }
}

impl InstanceResources {
    /// What bounds its devices, in words; empty when nothing does.
    pub fn limits(&self) -> String {
        let drives = self.drive_mib_per_second.map(|rate| format!("{rate} MiB/s for each drive"));
        let times = self.drive_iops.map(|rate| format!("{rate} requests/s for each drive"));
        let net = self.net_mbit_per_second.map(|rate| format!("{rate} Mbit/s each way"));
        let memory = self.reclaim_memory.then(|| "freed memory goes back".to_owned());
        [drives, times, net, memory].into_iter().flatten().collect::<Vec<_>>().join(", ")
    }

    /// What its devices may move.
    pub fn rates(&self) -> Rates {
        Rates { drive_mib: self.drive_mib_per_second, drive_iops: self.drive_iops, net_mbit: self.net_mbit_per_second }
    }
}

/// How many instances should be in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DesiredCounts {
    /// Instances that run.
    pub running: u32,
    /// Instances whose virtual CPUs are paused, in memory.
    pub warm: u32,
    /// Instances on disk as a snapshot.
    pub sleeping: u32,
}

impl DesiredCounts {
    /// Returns how many instances there should be; `u64`, so that it cannot overflow.
    pub fn total(self) -> u64 {
        u64::from(self.running) + u64::from(self.warm) + u64::from(self.sleeping)
    }
}

/// How long instances keep a state, and how long they are waited for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RuntimePolicy {
    /// Seconds that an instance runs at least before it is warmed, put to sleep or stopped by a plan because other counts are
    /// wanted; a changed declaration replaces it at once.
    pub min_running_seconds: u32,
    /// Seconds that an instance is warm at least before it is put to sleep or stopped by a plan.
    pub min_warm_seconds: u32,
    /// Seconds that a guest may take to end running work before it sleeps or stops.
    pub drain_timeout_seconds: u32,
    /// Seconds that a guest may take to shut down before its VMM is killed.
    pub graceful_shutdown_seconds: u32,
    /// Seconds that a guest may take from its start until it is ready; what waits for the pool is held no longer than that by each.
    pub ready_timeout_seconds: u32,
    /// How many instances a plan leaves running whatever else is wanted, as long as the pool is declared; its role may demand more.
    #[serde(skip_serializing_if = "is_zero")]
    pub min_running: u32,
}

impl Default for RuntimePolicy {
    fn default() -> Self {
        Self {
            min_running_seconds: 60,
            min_warm_seconds: 30,
            drain_timeout_seconds: 30,
            graceful_shutdown_seconds: 15,
            ready_timeout_seconds: 60,
            min_running: 0,
        }
    }
}

/// When a workload that ended is started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Whenever it ends.
    #[default]
    Always,
    /// When it ends with another exit code than 0, or by a signal.
    OnFailure,
    /// Never.
    Never,
}

/// A command that the guest agent runs and supervises.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The program and its arguments; no shell is involved.
    #[schemars(length(min = 1))]
    pub command: Vec<String>,
    /// Its environment, besides `PATH` and `HOME`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// When it is started again.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Secrets of the tenant without which it is not started.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretName>,
}

/// A port of a pool's instances that is reachable from outside the tenant, through the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exposure {
    /// The port in the guest.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// The port of the host; the same number unless another is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub host_port: Option<u16>,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
}

impl Exposure {
    /// The port of the host.
    pub fn on_host(self) -> u16 {
        self.host_port.unwrap_or(self.port)
    }

    /// The port in the guest.
    pub fn in_guest(self) -> Port {
        Port { port: self.port, protocol: self.protocol }
    }
}

/// A pool as declared: one homogeneous workload of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// The pool's name within its tenant.
    pub pool_id: PoolId,
    /// Its role; fixed for the pool's life.
    #[serde(default)]
    pub role: Role,
    /// Where its image comes from.
    #[serde(default = "builtin")]
    pub flake_ref: String,
    /// The image's profile.
    #[serde(default = "minimal")]
    pub profile: ProfileName,
    /// What each instance gets.
    #[serde(default)]
    pub instance_resources: InstanceResources,
    /// How many instances should be in each state.
    #[serde(default)]
    pub desired_counts: DesiredCounts,
    /// How long instances keep a state.
    #[serde(default)]
    pub runtime_policy: RuntimePolicy,
    /// Pools of the same tenant that must be ready before this one starts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub depends_on: Vec<PoolId>,
    /// No plan warms, puts to sleep, stops or destroys an instance of a pinned pool because there are too many.
    #[serde(default, skip_serializing_if = "is_false")]
    pub pinned: bool,
    /// A critical pool comes before the others of its role: it gets room first and gives it up last.
    #[serde(default, skip_serializing_if = "is_false")]
    pub critical: bool,
    /// What its instances run besides what is in their image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// Ports that are reachable from outside, as far as its role allows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expose: Vec<Exposure>,
}

fn builtin() -> String {
    BUILTIN.to_owned()
}

fn minimal() -> ProfileName {
    "minimal".parse().expect("minimal is a profile name")
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature is serde's.
fn is_zero(value: &u32) -> bool {
    *value == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature is serde's.
fn is_false(value: &bool) -> bool {
    !*value
}

impl PoolSpec {
    /// Declares a pool with the defaults of the desired-state document.
    pub fn new(pool_id: PoolId, role: Role) -> Self {
        Self {
            pool_id,
            role,
            flake_ref: builtin(),
            profile: minimal(),
            instance_resources: InstanceResources::default(),
            desired_counts: DesiredCounts::default(),
            runtime_policy: RuntimePolicy::default(),
            depends_on: Vec::new(),
            pinned: false,
            critical: false,
            workload: None,
            expose: Vec::new(),
        }
    }

    /// Returns what an instance is made from; an instance made from something else has to be replaced.
    pub fn blueprint(&self) -> Blueprint {
        Blueprint { resources: self.instance_resources.clone(), profile: self.profile.clone(), workload: self.workload.clone() }
    }
}

/// What an instance is made from, besides its image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blueprint {
    /// CPUs, memory and disk.
    pub resources: InstanceResources,
    /// The profile of its image.
    pub profile: ProfileName,
    /// What it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
}

/// `tenants/<t>/pools/<p>/pool.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDoc {
    /// The document's version.
    pub version: u32,
    /// The tenant.
    pub tenant_id: TenantId,
    /// What was declared.
    pub spec: PoolSpec,
    /// The image that instances are made from; none before the first build.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<RevisionId>,
    /// What its newest build was of; none before the first, and where an older mvm built it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built: Option<LastBuild>,
    /// Counts changes of the declaration; config drives carry it.
    pub config_version: u64,
    /// When it was made.
    pub created: Moment,
    /// What its role means by the manifest of its flake; none where it is one of mvm's own without a manifest.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "role::shared")]
    pub traits: Option<Arc<RoleTraits>>,
    /// What last went wrong with its image, until it goes right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

impl PoolDoc {
    /// Returns the pool's address.
    pub fn address(&self) -> PoolAddress {
        PoolAddress::new(self.tenant_id.clone(), self.spec.pool_id.clone())
    }

    /// Returns what its role means.
    pub fn role_traits(&self) -> Cow<'_, RoleTraits> {
        self.traits.as_ref().map_or_else(|| Cow::Owned(RoleTraits::built_in(self.spec.role)), |traits| Cow::Borrowed(&**traits))
    }
}

impl Document for PoolDoc {
    const KIND: &'static str = "pool";
    const VERSION: u32 = 1;
    fn version(&self) -> u32 {
        self.version
    }
}
