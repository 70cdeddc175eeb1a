//! A tenant's secrets: sealed at rest, opened only into the drive that a guest gets.

use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{SecretName, TenantId};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::config::TenantDoc;
use crate::host::DriveFile;
use crate::store::{Document, Torn};
use crate::vm::error::LifecycleError;
use crate::vm::keys;
use crate::vm::node::Node;

/// The most bytes of one secret: 64 KiB.
pub const MAX_SECRET: usize = 64 * 1024;

/// The most bytes of all secrets of a tenant, so that they fit on the drive with their file system: 512 KiB.
pub const MAX_SECRETS: usize = 512 * 1024;

/// `tenants/<t>/secrets.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretsDoc {
    /// The document's version.
    pub version: u32,
    /// The secrets by name.
    pub secrets: BTreeMap<SecretName, SealedSecret>,
}

const NO_SECRETS: SecretsDoc = SecretsDoc { version: SecretsDoc::VERSION, secrets: BTreeMap::new() };

/// One secret, sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedSecret {
    /// The epoch at which it was set; part of what it is sealed for.
    pub epoch: u64,
    /// Its length in bytes when opened.
    pub len: usize,
    /// The sealed bytes in hex.
    pub sealed: String,
}

impl Document for SecretsDoc {
    const KIND: &'static str = "secrets document";
    const VERSION: u32 = 1;
    const TORN: Torn = Torn::Refused { otherwise: "without one, remove it and set every secret again (mvm tenant secrets set)" };
    fn version(&self) -> u32 {
        self.version
    }
}

/// Whether a secret of that name has to be there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretChange {
    /// It may or may not be: `set`.
    Set,
    /// It has to be: `rotate`.
    Rotate,
}

impl Node {
    /// Sets or rotates a secret and returns the new epoch. Instances get it at their next start or wake.
    pub fn secret_set(&self, tenant: &TenantId, name: &SecretName, value: &[u8], change: SecretChange) -> Result<u64, LifecycleError> {
        let _guard = self.lock(&keys::tenant_dir(tenant))?;
        let action = match change {
            SecretChange::Set => format!("set secret {name}"),
            SecretChange::Rotate => format!("rotate secret {name}"),
        };
        let (doc, secrets) = match self.with_secret(tenant, name, value, change) {
            Err(error) if !matches!(error, LifecycleError::NotFound { kind: "tenant", .. }) => {
                let refused = Err(LifecycleError::Refused { what: action.clone(), why: error.to_string() });
                self.audit_tenant(&action, tenant, &refused)?;
                return Err(error);
            }
            other => other?,
        };
        self.audited(&action, tenant, || {
            self.documents().write(&keys::secrets_doc(tenant), &secrets)?;
            Ok(self.documents().write(&keys::tenant_doc(tenant), &doc)?)
        })?;
        Ok(doc.secrets_epoch)
    }

    /// Returns the documents as they are with a secret set.
    fn with_secret(
        &self,
        tenant: &TenantId,
        name: &SecretName,
        value: &[u8],
        change: SecretChange,
    ) -> Result<(TenantDoc, SecretsDoc), LifecycleError> {
        let mut doc = self.tenant(tenant)?;
        let mut secrets = match change {
            SecretChange::Set => self.secrets_doc(tenant)?.unwrap_or(NO_SECRETS),
            SecretChange::Rotate => self.secrets(&doc)?,
        };
        if change == SecretChange::Rotate && !secrets.secrets.contains_key(name) {
            let known = secrets.secrets.keys().map(ToString::to_string).collect();
            return Err(LifecycleError::NotFound { kind: "secret", name: format!("{name} of tenant {tenant}"), known });
        }
        let others: usize = secrets.secrets.iter().filter(|(other, _)| *other != name).map(|(_, secret)| secret.len).sum();
        if value.len() > MAX_SECRET || others + value.len() > MAX_SECRETS {
            let why = format!("{} bytes are too many: a secret has at most {MAX_SECRET}, all of a tenant {MAX_SECRETS}", value.len());
            return Err(LifecycleError::Invalid { place: format!("secret {name}"), why });
        }
        let epoch = doc.secrets_epoch + 1;
        let refused = |why| LifecycleError::Refused { what: format!("seal secret {name} of {tenant}"), why };
        let sealed = self.seams.sealer.seal(tenant, name.as_str(), epoch, value).map_err(refused)?;
        secrets.secrets.insert(name.clone(), SealedSecret { epoch, len: value.len(), sealed: to_hex(&sealed) });
        doc.secrets_epoch = epoch;
        Ok((doc, secrets))
    }

    /// Returns the names of a tenant's secrets.
    pub fn secret_names(&self, tenant: &TenantDoc) -> Result<BTreeSet<SecretName>, LifecycleError> {
        Ok(self.secrets(tenant)?.secrets.into_keys().collect())
    }

    /// Returns a tenant's secrets, sealed.
    ///
    /// # Errors
    /// When secrets were set and their document is gone: a guest must not start without them.
    pub fn secrets(&self, tenant: &TenantDoc) -> Result<SecretsDoc, LifecycleError> {
        let id = &tenant.tenant_id;
        match self.secrets_doc(id)? {
            None if tenant.secrets_epoch > 0 => {
                let path = self.documents().raw().place(&keys::secrets_doc(id));
                let why = format!(
                    "they were set {} times, and {path} is gone: restore it from a backup, or set every secret again (mvm tenant secrets \
                     set {id} NAME < FILE)",
                    tenant.secrets_epoch
                );
                Err(LifecycleError::Refused { what: format!("open the secrets of {id}"), why })
            }
            found => Ok(found.unwrap_or(NO_SECRETS)),
        }
    }

    /// Reads `secrets.json`.
    pub(super) fn secrets_doc(&self, tenant: &TenantId) -> Result<Option<SecretsDoc>, LifecycleError> {
        Ok(self.documents().read(&keys::secrets_doc(tenant))?)
    }
}

/// Opens a tenant's secrets as the files of its secrets drive.
pub fn unsealed(node: &Node, tenant: &TenantDoc) -> Result<Vec<DriveFile>, LifecycleError> {
    let secrets = node.secrets(tenant)?.secrets;
    let tenant = &tenant.tenant_id;
    let mut files = Vec::new();
    for (name, secret) in secrets {
        let refused = |why| LifecycleError::Refused { what: format!("open secret {name} of {tenant}"), why };
        let sealed = from_hex(&secret.sealed).ok_or_else(|| refused("its document is damaged; set the secret again".to_owned()))?;
        let content: Zeroizing<Vec<u8>> = node.seams.sealer.unseal(tenant, name.as_str(), secret.epoch, &sealed).map_err(refused)?;
        files.push(DriveFile { name: name.to_string(), content, mode: 0o400 });
    }
    Ok(files)
}

fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok().filter(|pair| pair.len() == 2)?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_reads_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        assert_eq!(from_hex("abc"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
