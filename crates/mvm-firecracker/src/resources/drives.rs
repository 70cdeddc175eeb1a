//! `/drives/{drive_id}`.

use serde::{Deserialize, Serialize};

use super::{RateLimiter, ResourceId};

/// Whether the guest's flushes reach the host's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// They do not: what the guest flushed may be lost when the host loses power.
    Unsafe,
    /// They do.
    Writeback,
}

/// How Firecracker reads and writes the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request after the other.
    Sync,
    /// By `io_uring`; a host kernel newer than 5.10.51.
    Async,
}

/// The body of `PUT /drives/{drive_id}`: a file or block device of the host. Whoever comes first is `/dev/vda`, but that
/// the root device comes before all others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drive {
    /// The name; also in the request's path.
    pub drive_id: ResourceId,
    /// The file, as Firecracker sees it: inside its jail. It is opened at once.
    pub path_on_host: String,
    /// Whether the guest boots from it; only one may say so.
    pub is_root_device: bool,
    /// Whether the guest cannot write.
    pub is_read_only: bool,
    /// The id of the partition to boot from, of a root device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// Whether flushes reach the disk; [`CacheType::Unsafe`] when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_type: Option<CacheType>,
    /// How it is read and written; [`IoEngine::Sync`] when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// Its limits in bytes and operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// The body of `PATCH /drives/{drive_id}`, of a microVM that has booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialDrive {
    /// The name; also in the request's path.
    pub drive_id: ResourceId,
    /// The file to use from now on. The same path opens the file anew, so that the guest sees its new size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// New limits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
