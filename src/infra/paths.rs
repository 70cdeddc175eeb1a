//! Where everything lies; the only place that puts a path together.

use std::path::{Path, PathBuf};

use mvm_types::{InstanceAddress, InstanceId, PoolAddress, RevisionId, TenantId};

/// The two directories of a node: state that survives a reboot, and sockets and drives that must not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    state: PathBuf,
    run: PathBuf,
}

/// The state directory when none is named.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/mvm";

impl Paths {
    /// Takes the state directory, and the run directory where one is named.
    ///
    /// Without one it is `/run/mvm` for the default state directory, and `/run/mvm-<hash>` for any other, so that two state
    /// directories never share sockets.
    pub fn new(state: PathBuf, run: Option<PathBuf>) -> Self {
        let run = run.unwrap_or_else(|| {
            if state == Path::new(DEFAULT_STATE_DIR) {
                PathBuf::from("/run/mvm")
            } else {
                let hash = blake3::hash(state.as_os_str().as_encoded_bytes());
                PathBuf::from(format!("/run/mvm-{}", &hash.to_hex()[..8]))
            }
        });
        Self { state, run }
    }

    /// The state directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The run directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// A document or directory named relative to the state directory, as [`crate::store`] keys are.
    pub fn in_state(&self, key: &str) -> PathBuf {
        self.state.join(key)
    }

    /// `images/`: built-in images, shared by all pools of the node.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// One built image.
    pub fn image(&self, revision: &RevisionId) -> PathBuf {
        self.images().join(revision.as_str())
    }

    /// `tenants/<t>/`.
    pub fn tenant(&self, tenant: &TenantId) -> PathBuf {
        self.state.join("tenants").join(tenant.as_str())
    }

    /// `tenants/<t>/pools/<p>/`.
    pub fn pool(&self, pool: &PoolAddress) -> PathBuf {
        self.tenant(&pool.tenant).join("pools").join(pool.pool.as_str())
    }

    /// The log of the pool's last build.
    pub fn build_log(&self, pool: &PoolAddress) -> PathBuf {
        self.pool(pool).join("build.log")
    }

    /// `tenants/<t>/pools/<p>/instances/<i>/`.
    pub fn instance(&self, at: &InstanceAddress) -> PathBuf {
        self.pool(&at.pool_address()).join("instances").join(at.instance.as_str())
    }

    /// The instance's persistent volumes.
    pub fn volumes(&self, at: &InstanceAddress) -> PathBuf {
        self.instance(at).join("volumes")
    }

    /// The instance's data disk.
    pub fn data_disk(&self, at: &InstanceAddress) -> PathBuf {
        self.volumes(at).join("data.img")
    }

    /// The instance's snapshot.
    pub fn snapshot(&self, at: &InstanceAddress) -> PathBuf {
        self.instance(at).join("snapshot")
    }

    /// What the instance's VMM itself writes to: beside the snapshot, below what is root's only.
    pub fn vmm_scratch(&self, at: &InstanceAddress) -> PathBuf {
        self.instance(at).join("vmm")
    }

    /// The guest's console, bounded.
    pub fn console_log(&self, at: &InstanceAddress) -> PathBuf {
        self.instance(at).join("console.log")
    }

    /// What the VMM itself says.
    pub fn vmm_log(&self, at: &InstanceAddress) -> PathBuf {
        self.instance(at).join("vmm.log")
    }

    /// The instance's sockets: `<run>/instances/<i>/`.
    pub fn run_instance(&self, instance: &InstanceId) -> PathBuf {
        self.run.join("instances").join(instance.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_state_directory_gets_another_run_directory() {
        assert_eq!(Paths::new("/var/lib/mvm".into(), None).run(), Path::new("/run/mvm"));
        let a = Paths::new("/tmp/a".into(), None);
        let b = Paths::new("/tmp/b".into(), None);
        assert_ne!(a.run(), b.run());
    }
}
