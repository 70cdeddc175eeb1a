//! `/machine-config`.

use serde::{Deserialize, Serialize};

use super::VcpuCount;

/// A set of CPU features that guests see on whatever host, so that snapshots can move. Firecracker takes those that its
/// host's CPU can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "names of EC2 instance types")]
pub enum CpuTemplate {
    C3,
    T2,
    T2S,
    T2CL,
    T2A,
    V1N1,
    None,
}

/// The pages behind guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Pages of 4 KiB.
    None,
    /// As the kernel sees fit (`madvise`).
    Transparent,
    /// Pages of 2 MiB, of those that the host set aside; the memory size is then even.
    #[serde(rename = "2M")]
    TwoMib,
}

/// The body of `PUT /machine-config`, and what `GET /machine-config` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineConfiguration {
    /// How many vCPUs.
    pub vcpu_count: VcpuCount,
    /// Guest memory, in MiB.
    pub mem_size_mib: u32,
    /// Whether two vCPUs are threads of one core; not when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    /// Whether diff snapshots can be made; not when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    /// What the guest sees of the CPU; all of it when absent. Deprecated by Firecracker.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// What is behind its memory; [`HugePages::None`] when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}
