//! `GET /vm/config`.

use serde::{Deserialize, Serialize};

use super::{
    Balloon, BootSource, CacheType, EntropyDevice, IoEngine, Logger, MachineConfiguration, Metrics, NetworkInterface, RateLimiter, Vsock,
};

/// What `GET /vm/config` answers: everything that was configured. A microVM that was loaded from a snapshot has no boot
/// source, and what this crate cannot configure is left as it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FullVmConfiguration {
    /// The balloon.
    pub balloon: Option<Balloon>,
    /// The drives.
    pub drives: Vec<ConfiguredDrive>,
    /// The kernel; with an empty path when there is none.
    pub boot_source: Option<BootSource>,
    /// The CPU's features.
    pub cpu_config: Option<serde_json::Value>,
    /// The log.
    pub logger: Option<Logger>,
    /// vCPUs and memory.
    pub machine_config: Option<MachineConfiguration>,
    /// The metrics.
    pub metrics: Option<Metrics>,
    /// Memory that can be plugged.
    pub memory_hotplug: Option<serde_json::Value>,
    /// The metadata service.
    pub mmds_config: Option<serde_json::Value>,
    /// The network interfaces.
    pub network_interfaces: Vec<NetworkInterface>,
    /// Persistent memory.
    pub pmem: Vec<serde_json::Value>,
    /// The vsock device.
    pub vsock: Option<Vsock>,
    /// The entropy device.
    pub entropy: Option<EntropyDevice>,
}

/// A drive as it is told: of whichever kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfiguredDrive {
    /// The name.
    pub drive_id: String,
    /// Whether the guest boots from it.
    pub is_root_device: bool,
    /// The file, unless another process serves the drive.
    #[serde(default)]
    pub path_on_host: Option<String>,
    /// The socket of the process that serves the drive (vhost-user).
    #[serde(default)]
    pub socket: Option<String>,
    /// Whether the guest cannot write.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The id of the partition to boot from.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether flushes reach the disk.
    #[serde(default)]
    pub cache_type: Option<CacheType>,
    /// How it is read and written.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Its limits.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}
