//! `/balloon`, `/balloon/statistics` and `/balloon/hinting/*`.

use serde::{Deserialize, Serialize};

/// The body of `PUT /balloon`, and what `GET /balloon` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balloon {
    /// Memory taken from the guest, in MiB; less than the guest has.
    pub amount_mib: u32,
    /// Whether the balloon gives memory back when the guest has too little.
    pub deflate_on_oom: bool,
    /// Seconds between two looks at the guest's statistics; absent or 0 is never, which cannot change after the boot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats_polling_interval_s: Option<u16>,
    /// Whether the guest can be asked which pages are free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_hinting: Option<bool>,
    /// Whether the guest says by itself which pages are free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub free_page_reporting: Option<bool>,
}

/// The body of `PATCH /balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonUpdate {
    /// Memory taken from the guest, in MiB.
    pub amount_mib: u32,
}

/// The body of `PATCH /balloon/statistics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatsUpdate {
    /// Seconds between two looks at the guest's statistics.
    pub stats_polling_interval_s: u16,
}

/// The body of `PATCH /balloon/hinting/start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStartCmd {
    /// Whether Firecracker acknowledges by itself that the guest is done.
    pub acknowledge_on_stop: bool,
}

/// What `GET /balloon/hinting/status` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonHintingStatus {
    /// The last command of the host.
    pub host_cmd: u32,
    /// The last command of the guest, if there was one.
    #[serde(default)]
    pub guest_cmd: Option<u32>,
}

/// What `GET /balloon/statistics` answers. What the guest does not report is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStats {
    /// Pages the balloon is to hold, of 4 KiB.
    pub target_pages: u64,
    /// Pages the balloon holds, of 4 KiB.
    pub actual_pages: u64,
    /// Memory the balloon is to hold, in MiB.
    pub target_mib: u64,
    /// Memory the balloon holds, in MiB.
    pub actual_mib: u64,
    /// Memory that was swapped in, in bytes.
    #[serde(default)]
    pub swap_in: Option<u64>,
    /// Memory that was swapped out, in bytes.
    #[serde(default)]
    pub swap_out: Option<u64>,
    /// Major page faults since the boot.
    #[serde(default)]
    pub major_faults: Option<u64>,
    /// Minor page faults since the boot.
    #[serde(default)]
    pub minor_faults: Option<u64>,
    /// Memory used for nothing, in bytes.
    #[serde(default)]
    pub free_memory: Option<u64>,
    /// All memory, in bytes.
    #[serde(default)]
    pub total_memory: Option<u64>,
    /// Memory that programs could get without swapping, in bytes.
    #[serde(default)]
    pub available_memory: Option<u64>,
    /// Memory that caches files, in bytes.
    #[serde(default)]
    pub disk_caches: Option<u64>,
    /// Huge pages that were allocated.
    #[serde(default)]
    pub hugetlb_allocations: Option<u64>,
    /// Huge pages that could not be allocated.
    #[serde(default)]
    pub hugetlb_failures: Option<u64>,
    /// Processes that the guest's kernel killed for want of memory.
    #[serde(default)]
    pub oom_kill: Option<u64>,
    /// Allocations that had to wait for memory.
    #[serde(default)]
    pub alloc_stall: Option<u64>,
    /// Pages scanned in the background.
    #[serde(default)]
    pub async_scan: Option<u64>,
    /// Pages scanned by who wanted memory.
    #[serde(default)]
    pub direct_scan: Option<u64>,
    /// Pages reclaimed in the background.
    #[serde(default)]
    pub async_reclaim: Option<u64>,
    /// Pages reclaimed by who wanted memory.
    #[serde(default)]
    pub direct_reclaim: Option<u64>,
}
