//! The resources of the API, one module each, with the field names of the API's definition (Firecracker API 1.17).
//!
//! What is sent has no nulls, since Firecracker knows most fields as either there or not. What is received may have
//! fields that are not known here. Sizes in the names are units: `mem_size_mib`, `stats_polling_interval_s`.

mod actions;
mod balloon;
mod boot_source;
mod bounded;
mod drives;
mod entropy;
mod error;
mod hotplug;
mod id;
mod instance_info;
mod logger;
mod machine_config;
mod metrics;
mod network_interfaces;
mod rate_limiter;
mod serial;
mod snapshot;
mod version;
mod vm;
mod vm_config;
mod vsock;

pub use actions::{ActionType, InstanceActionInfo};
pub use balloon::{Balloon, BalloonHintingStatus, BalloonStartCmd, BalloonStats, BalloonStatsUpdate, BalloonUpdate};
pub use boot_source::BootSource;
pub use bounded::{GuestCid, Mtu, OutOfBounds, VcpuCount};
pub use drives::{CacheType, Drive, IoEngine, PartialDrive};
pub use entropy::EntropyDevice;
pub use error::Fault;
pub use hotplug::MemoryHotplugStatus;
pub use id::{InvalidResourceId, ResourceId};
pub use instance_info::{InstanceInfo, InstanceState};
pub use logger::{LogLevel, Logger};
pub use machine_config::{CpuTemplate, HugePages, MachineConfiguration};
pub use metrics::Metrics;
pub use network_interfaces::{NetworkInterface, PartialNetworkInterface};
pub use rate_limiter::{RateLimiter, TokenBucket};
pub use serial::SerialDevice;
pub(crate) use snapshot::SnapshotLoadParams;
pub use snapshot::{
    MemoryBackend, MemoryBackendType, NetworkOverride, RestoredHugePages, SnapshotCreate, SnapshotLoad, SnapshotType, VsockOverride,
};
pub use version::FirecrackerVersion;
pub use vm::{Vm, VmState};
pub use vm_config::{ConfiguredDrive, FullVmConfiguration};
pub use vsock::Vsock;
