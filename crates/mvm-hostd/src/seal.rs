//! Seals secrets for the state directory: XChaCha20-Poly1305 under a key of this node.
//!
//! A sealed secret is bound to its tenant, its name and its epoch: one moved to another name, or an older one put back,
//! does not open.

use std::io::Write;

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use rustix::fs::{AtFlags, OFlags};
use zeroize::Zeroizing;

use crate::dir::Dir;
use crate::error::{During, HostdError};

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
/// The first byte of everything sealed: the algorithm and layout.
const VERSION: u8 = 1;

/// What a sealed secret is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealContext<'a> {
    /// The tenant's id.
    pub tenant: &'a str,
    /// The secret's name.
    pub name: &'a str,
    /// The tenant's secrets epoch, which a rotation raises.
    pub epoch: u64,
}

impl SealContext<'_> {
    /// Each part with its length before it, so that no two contexts have the same bytes.
    fn associated_data(&self) -> Vec<u8> {
        let mut data = b"mvm secret 1".to_vec();
        for part in [self.tenant, self.name] {
            data.extend((part.len() as u64).to_le_bytes());
            data.extend(part.as_bytes());
        }
        data.extend(self.epoch.to_le_bytes());
        data
    }
}

/// The key that this node's secrets are sealed with; wiped from memory when dropped.
pub struct NodeKey(Zeroizing<[u8; KEY_BYTES]>);

impl std::fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NodeKey(…)")
    }
}

impl NodeKey {
    /// Reads the key from `name` in `dir`, after making it there if there is none; whoever is first makes it.
    ///
    /// Errors when the file is readable by others than its owner, or is not a key: a damaged key is never replaced, since
    /// all that is sealed with it would be lost.
    pub fn load_or_create(dir: &Dir, name: &str) -> Result<Self, HostdError> {
        if let Some(key) = Self::load(dir, name)? {
            return Ok(key);
        }
        let path = dir.path().join(name);
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        fill_random(&mut key[..])?;
        let mut tag = [0; 4];
        fill_random(&mut tag)?;
        let temporary = format!(".{name}.{:08x}", u32::from_ne_bytes(tag));
        let mut file = dir.open_file(&temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, 0o600)?;
        file.write_all(&key[..]).and_then(|()| file.sync_all()).during(|| format!("cannot write {}", path.display()))?;
        // Unlike a rename, a link never replaces a key that another process made meanwhile.
        let linked = rustix::fs::linkat(dir, &temporary, dir, name, AtFlags::empty());
        dir.remove_file(&temporary)?;
        match linked {
            Ok(()) => {
                dir.sync()?;
                Ok(Self(key))
            }
            Err(rustix::io::Errno::EXIST) => Self::load(dir, name)?
                .ok_or_else(|| HostdError::refused(format!("cannot read {}", path.display()), "it was removed as soon as it was made")),
            Err(error) => Err(error).during(|| format!("cannot make {}", path.display())),
        }
    }

    fn load(dir: &Dir, name: &str) -> Result<Option<Self>, HostdError> {
        let what = || format!("cannot use the node's key {}", dir.path().join(name).display());
        if dir.kind_of(name)?.is_none() {
            return Ok(None);
        }
        let file = dir.open_file(name, OFlags::RDONLY, 0)?;
        let stat = rustix::fs::fstat(&file).during(what)?;
        if stat.st_mode & 0o077 != 0 {
            return Err(HostdError::refused(
                what(),
                format!("others may access it (mode {:04o}); chmod 600 it, and rotate the secrets", stat.st_mode & 0o7777),
            ));
        }
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        if u64::try_from(stat.st_size) != Ok(KEY_BYTES as u64) {
            return Err(HostdError::refused(
                what(),
                format!("it has {} bytes instead of {KEY_BYTES}; put back the original from a backup", stat.st_size),
            ));
        }
        std::io::Read::read_exact(&mut { file }, &mut key[..]).during(what)?;
        Ok(Some(Self(key)))
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&(*self.0).into())
    }

    /// Seals a secret.
    pub fn seal(&self, context: SealContext<'_>, secret: &[u8]) -> Result<Vec<u8>, HostdError> {
        let mut nonce = [0; NONCE_BYTES];
        fill_random(&mut nonce)?;
        let payload = Payload { msg: secret, aad: &context.associated_data() };
        let sealed = self.cipher().encrypt(&XNonce::from(nonce), payload);
        let sealed = sealed.map_err(|_| HostdError::refused(format!("cannot seal secret {}", context.name), "it is too large"))?;
        Ok([&[VERSION], &nonce[..], &sealed].concat())
    }

    /// Opens a sealed secret.
    ///
    /// Errors when it was changed, belongs to another tenant, name or epoch, or was sealed with another node's key.
    pub fn unseal(&self, context: SealContext<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, HostdError> {
        let what = || format!("cannot open sealed secret {} of tenant {}", context.name, context.tenant);
        let (nonce, body) = match sealed.split_first() {
            Some((&VERSION, rest)) if rest.len() > NONCE_BYTES => rest.split_at(NONCE_BYTES),
            _ => return Err(HostdError::refused(what(), "it is damaged; set the secret again")),
        };
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().expect("the split was made at just that length");
        let payload = Payload { msg: body, aad: &context.associated_data() };
        let secret = self.cipher().decrypt(&XNonce::from(nonce), payload);
        let secret = secret.map_err(|_| {
            HostdError::refused(
                what(),
                "it was changed, moved from another name or epoch, or sealed with another key; set the secret again",
            )
        })?;
        Ok(Zeroizing::new(secret))
    }
}

fn fill_random(buffer: &mut [u8]) -> Result<(), HostdError> {
    let mut filled = 0;
    while filled < buffer.len() {
        filled += rustix::rand::getrandom(&mut buffer[filled..], rustix::rand::GetRandomFlags::empty())
            .during(|| "cannot get random bytes".to_owned())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    const CONTEXT: SealContext<'static> = SealContext { tenant: "acme", name: "token", epoch: 3 };

    #[test]
    fn a_secret_opens_only_where_it_belongs() {
        let top = tempfile::tempdir().unwrap();
        let dir = Dir::open(top.path()).unwrap();
        let key = NodeKey::load_or_create(&dir, "node.key").unwrap();
        let sealed = key.seal(CONTEXT, b"hunter2").unwrap();
        assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
        let again = NodeKey::load_or_create(&dir, "node.key").unwrap();
        assert_eq!(&again.unseal(CONTEXT, &sealed).unwrap()[..], b"hunter2");
        for other in [
            SealContext { tenant: "other", ..CONTEXT },
            SealContext { name: "tokem", ..CONTEXT },
            SealContext { epoch: 4, ..CONTEXT },
            SealContext { tenant: "acmet", name: "oken", ..CONTEXT },
        ] {
            assert!(again.unseal(other, &sealed).is_err(), "{other:?}");
        }
        std::fs::remove_file(top.path().join("node.key")).unwrap();
        assert!(NodeKey::load_or_create(&dir, "node.key").unwrap().unseal(CONTEXT, &sealed).is_err());
    }

    #[test]
    fn a_doubtful_key_is_refused_and_kept() {
        let top = tempfile::tempdir().unwrap();
        let dir = Dir::open(top.path()).unwrap();
        let path = top.path().join("node.key");
        NodeKey::load_or_create(&dir, "node.key").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(dir.entries().unwrap(), ["node.key"]);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(NodeKey::load_or_create(&dir, "node.key").unwrap_err().to_string().contains("mode 0640"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, b"short").unwrap();
        assert!(NodeKey::load_or_create(&dir, "node.key").unwrap_err().to_string().contains("5 bytes instead of 32"));
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
    }

    #[test]
    fn all_who_ask_at_once_get_one_key() {
        let top = tempfile::tempdir().unwrap();
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| *NodeKey::load_or_create(&Dir::open(top.path()).unwrap(), "node.key").unwrap().0)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(secret in prop::collection::vec(any::<u8>(), 0..100), at: prop::sample::Index, bit in 0u8..8) {
            let key = NodeKey(Zeroizing::new([7; KEY_BYTES]));
            let mut sealed = key.seal(CONTEXT, &secret).unwrap();
            prop_assert_eq!(&key.unseal(CONTEXT, &sealed).unwrap()[..], &secret[..]);
            let at = at.index(sealed.len());
            sealed[at] ^= 1 << bit;
            prop_assert!(key.unseal(CONTEXT, &sealed).is_err());
            prop_assert!(key.unseal(CONTEXT, &sealed[..at]).is_err());
        }
    }
}
