//! `GET /hotplug/memory`.

use serde::{Deserialize, Serialize};

/// What `GET /hotplug/memory` answers, of a guest whose memory can grow. All sizes are in MiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryHotplugStatus {
    /// The most that can be plugged.
    #[serde(default)]
    pub total_size_mib: Option<u64>,
    /// The grain of the host.
    #[serde(default)]
    pub slot_size_mib: Option<u64>,
    /// The grain of the guest.
    #[serde(default)]
    pub block_size_mib: Option<u64>,
    /// What is plugged.
    #[serde(default)]
    pub plugged_size_mib: Option<u64>,
    /// What was asked for.
    #[serde(default)]
    pub requested_size_mib: Option<u64>,
}
