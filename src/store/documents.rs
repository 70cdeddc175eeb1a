//! Typed documents: versions, and what happens to a torn one.

use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{DocumentStore, StoreError};

/// A type that is kept as a document. Its JSON has a `version` field.
pub trait Document: Serialize + DeserializeOwned {
    /// What it is called in errors.
    const KIND: &'static str;
    /// The version that is written.
    const VERSION: u32;
    /// What becomes of one that cannot be read.
    const TORN: Torn = Torn::MovedAside;

    /// The version that this value was read with.
    fn version(&self) -> u32;
}

/// What becomes of a document that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Torn {
    /// It is moved aside, and what it described goes on as if it had none: others say what it was, or it can be declared again.
    MovedAside,
    /// It stays where it is, and whatever needs it is refused: nothing else knows what was in it.
    Refused {
        /// What to do besides restoring it from a backup.
        otherwise: &'static str,
    },
}

/// Why a document could not be had.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It is not what it should be, and was moved aside.
    #[error("the {kind} {key} cannot be read and was moved to {moved_to}; restore it from a backup, or remove what it described")]
    Quarantined {
        /// What it was.
        kind: &'static str,
        /// Where it was.
        key: String,
        /// Where it is now.
        moved_to: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// It is not what it should be, and nothing can take its place.
    #[error("the {kind} {path} cannot be read: restore it from a backup; {otherwise}")]
    Torn {
        /// What it is.
        kind: &'static str,
        /// Where it is.
        path: String,
        /// What to do without a backup.
        otherwise: &'static str,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// A newer mvm wrote it.
    #[error("the {kind} {key} has version {found}, this mvm knows {known}: use the mvm that wrote it, or a newer one")]
    Newer {
        /// What it is.
        kind: &'static str,
        /// Where it is.
        key: String,
        /// Its version.
        found: u64,
        /// The newest version that this program knows.
        known: u32,
    },
}

/// Typed access to a store.
#[derive(Clone)]
pub struct Documents {
    store: Arc<dyn DocumentStore>,
}

impl Documents {
    /// Wraps a store.
    pub fn new(store: Arc<dyn DocumentStore>) -> Self {
        Self { store }
    }

    /// Returns the store itself, for locks, lists and logs.
    pub fn raw(&self) -> &dyn DocumentStore {
        &*self.store
    }

    /// Reads a document; `None` when it is absent.
    ///
    /// # Errors
    /// [`DocumentError::Newer`] leaves it where it is; a document that does not parse is moved aside and named, once, or stays and is
    /// refused each time, as [`Document::TORN`] says.
    pub fn read<T: Document>(&self, key: &str) -> Result<Option<T>, DocumentError> {
        let Some(content) = self.store.read(key)? else { return Ok(None) };
        let newer = |found| DocumentError::Newer { kind: T::KIND, key: key.to_owned(), found, known: T::VERSION };
        match serde_json::from_slice::<T>(&content) {
            Ok(value) if value.version() > T::VERSION => Err(newer(value.version().into())),
            Ok(value) => Ok(Some(value)),
            Err(source) => {
                let version = serde_json::from_slice::<serde_json::Value>(&content).ok().and_then(|v| v["version"].as_u64());
                if let Some(found) = version.filter(|found| *found > T::VERSION.into()) {
                    return Err(newer(found));
                }
                if let Torn::Refused { otherwise } = T::TORN {
                    return Err(DocumentError::Torn { kind: T::KIND, path: self.store.place(key), otherwise, source });
                }
                let moved_to = self.store.quarantine(key)?;
                Err(DocumentError::Quarantined { kind: T::KIND, key: key.to_owned(), moved_to, source })
            }
        }
    }

    /// Writes a document durably.
    pub fn write<T: Document>(&self, key: &str, value: &T) -> Result<(), DocumentError> {
        debug_assert_eq!(value.version(), T::VERSION);
        let mut content = serde_json::to_vec_pretty(value).expect("documents have string keys and no failing serializers");
        content.push(b'\n');
        Ok(self.store.write(key, &content)?)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::MemoryStore;
    use super::*;

    #[derive(Debug, Serialize, Deserialize)]
    struct Thing {
        version: u32,
        name: String,
    }

    impl Document for Thing {
        const KIND: &'static str = "thing";
        const VERSION: u32 = 1;
        fn version(&self) -> u32 {
            self.version
        }
    }

    #[test]
    fn a_document_cut_at_any_byte_is_quarantined_and_the_rest_goes_on() {
        let store = Arc::new(MemoryStore::new());
        let documents = Documents::new(store.clone());
        let thing = Thing { version: 1, name: "a".into() };
        documents.write("d/thing.json", &thing).unwrap();
        let whole = store.read("d/thing.json").unwrap().unwrap();
        // The last byte is the newline, without which the document is still whole.
        for cut in 0..whole.len() - 1 {
            store.write("d/thing.json", &whole[..cut]).unwrap();
            let error = documents.read::<Thing>("d/thing.json").unwrap_err();
            assert!(matches!(error, DocumentError::Quarantined { .. }), "{cut}: {error}");
            assert!(documents.read::<Thing>("d/thing.json").unwrap().is_none());
        }
    }

    #[derive(Debug, Serialize, Deserialize)]
    struct Only {
        version: u32,
    }

    impl Document for Only {
        const KIND: &'static str = "only thing";
        const VERSION: u32 = 1;
        const TORN: Torn = Torn::Refused { otherwise: "without one, give up" };
        fn version(&self) -> u32 {
            self.version
        }
    }

    #[test]
    fn what_nothing_can_replace_stays_and_is_refused_each_time() {
        let store = Arc::new(MemoryStore::new());
        let documents = Documents::new(store.clone());
        store.write("d/only.json", b"{\"vers").unwrap();
        for _ in 0..2 {
            let error = documents.read::<Only>("d/only.json").unwrap_err();
            assert_eq!(error.to_string(), "the only thing d/only.json cannot be read: restore it from a backup; without one, give up");
        }
        assert_eq!(store.read("d/only.json").unwrap().unwrap(), b"{\"vers");
    }

    #[test]
    fn a_newer_document_is_refused_and_stays() {
        let store = Arc::new(MemoryStore::new());
        let documents = Documents::new(store.clone());
        for newer in [&br#"{"version":2,"name":"a"}"#[..], br#"{"version":3,"title":"a"}"#] {
            store.write("d/thing.json", newer).unwrap();
            assert!(matches!(documents.read::<Thing>("d/thing.json"), Err(DocumentError::Newer { .. })));
            assert!(store.read("d/thing.json").unwrap().is_some());
        }
    }
}
