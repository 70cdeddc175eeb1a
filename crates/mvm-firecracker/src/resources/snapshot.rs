//! `/snapshot/create` and `/snapshot/load`.

use serde::{Deserialize, Serialize};

use super::ResourceId;

/// Which pages a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All.
    Full,
    /// Those that changed since the last snapshot or load; the rest of the file is a hole, or what was in the file before.
    Diff,
}

/// The body of `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotCreate {
    /// Where memory goes. A file that is there and has the size of memory is written in place: a [`SnapshotType::Diff`]
    /// into a full one makes it the next full one.
    pub mem_file_path: String,
    /// Where the state of vCPUs and devices goes; written before memory.
    pub snapshot_path: String,
    /// Which pages.
    pub snapshot_type: SnapshotType,
}

/// Who provides the pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file, mapped privately: it must not change as long as the microVM lives.
    File,
    /// A process that listens on a unix socket and serves page faults.
    Uffd,
}

/// Where the pages of guest memory come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBackend {
    /// What the path is.
    pub backend_type: MemoryBackendType,
    /// The file or socket.
    pub backend_path: String,
}

/// Another TAP device for an interface of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: ResourceId,
    /// The host's TAP device from now on.
    pub host_dev_name: String,
}

/// Another socket for the vsock device of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOverride {
    /// Where Firecracker listens from now on; nothing may be there.
    pub uds_path: String,
}

/// The pages behind restored guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoredHugePages {
    /// As in the snapshot.
    Snapshot,
    /// As the host's default is.
    None,
    /// As the kernel sees fit (`madvise`).
    Transparent,
    /// Pages of 2 MiB; only with [`MemoryBackendType::Uffd`].
    #[serde(rename = "2M")]
    TwoMib,
}

/// What is loaded by `PUT /snapshot/load`. Whether the guest runs afterwards is the choice of the method that sends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotLoad {
    /// The state of vCPUs and devices.
    pub snapshot_path: String,
    /// The memory.
    pub mem_backend: MemoryBackend,
    /// Whether diff snapshots can be made of it; not when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// TAP devices that are others than when the snapshot was made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// The vsock device's socket, if it is another than when the snapshot was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock goes on by the time since the snapshot (x86-64 only); not when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_realtime: Option<bool>,
    /// What is behind its memory; [`RestoredHugePages::Snapshot`] when absent (Firecracker 1.17).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<RestoredHugePages>,
}

/// The body of `PUT /snapshot/load`.
#[derive(Serialize)]
pub(crate) struct SnapshotLoadParams<'a> {
    #[serde(flatten)]
    pub load: &'a SnapshotLoad,
    pub resume_vm: bool,
}
