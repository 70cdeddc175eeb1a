//! The real sealer: a key in the state directory, kept by root.

use std::path::PathBuf;
use std::sync::OnceLock;

use mvm_hostd::dir::Dir;
use mvm_hostd::seal::{NodeKey, SealContext};
use mvm_types::TenantId;
use zeroize::Zeroizing;

use crate::vm::node::Sealer;

/// Seals under `secrets.key` of the state directory, which is made when the first secret is set.
pub struct NodeSealer {
    state: PathBuf,
    key: OnceLock<Result<NodeKey, String>>,
}

impl NodeSealer {
    /// Takes the state directory; nothing is read or made yet.
    pub fn new(state: PathBuf) -> Self {
        Self { state, key: OnceLock::new() }
    }

    fn key(&self) -> Result<&NodeKey, String> {
        let load = || NodeKey::load_or_create(&Dir::ensure(self.state.clone(), 0o700)?, "secrets.key");
        let key = self.key.get_or_init(|| load().map_err(|error| crate::vm::error::with_causes(&error)));
        key.as_ref().map_err(Clone::clone)
    }
}

impl Sealer for NodeSealer {
    fn seal(&self, tenant: &TenantId, name: &str, epoch: u64, secret: &[u8]) -> Result<Vec<u8>, String> {
        let context = SealContext { tenant: tenant.as_str(), name, epoch };
        self.key()?.seal(context, secret).map_err(|error| crate::vm::error::with_causes(&error))
    }

    fn unseal(&self, tenant: &TenantId, name: &str, epoch: u64, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, String> {
        let context = SealContext { tenant: tenant.as_str(), name, epoch };
        self.key()?.unseal(context, sealed).map_err(|error| crate::vm::error::with_causes(&error))
    }
}
