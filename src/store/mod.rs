//! Documents: versioned JSON, written atomically and durably, one lock per object.
//!
//! [`DocumentStore`] is the seam: bytes under keys. [`Documents`] puts types, versions and quarantine on top of it, so that
//! both stores behave the same. A key is a relative path made of ids, e.g. `tenants/acme/tenant.json`.

mod documents;
mod files;
mod memory;

use std::time::Instant;

pub use documents::{Document, DocumentError, Documents, Torn};
pub use files::FileStore;
pub use memory::MemoryStore;

/// How long to wait for a lock that somebody else holds.
#[derive(Debug, Clone, Copy)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until then.
    Until(Instant),
}

/// A held lock; dropping it releases it, and so does the end of the process.
pub trait LockGuard: Send + Sync {
    /// A number kept beside the lock, 0 at first; lost when the host reboots.
    ///
    /// Whoever changes what a cache was computed from sets another one, and so invalidates the caches of other processes.
    fn generation(&self) -> u64;

    /// Sets that number.
    fn set_generation(&mut self, generation: u64);

    /// Releases the lock of an object that is gone, and leaves nothing of the lock behind.
    fn retire(self: Box<Self>);
}

/// Bytes under keys, written all or nothing.
pub trait DocumentStore: Send + Sync {
    /// Returns the content, or `None` when there is none.
    fn read(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError>;

    /// Replaces the content atomically and durably, making directories as needed. The caller holds the object's lock.
    ///
    /// # Errors
    /// After an error the old content is there, whole; a failed fsync is an error and never retried.
    fn write(&self, key: &str, content: &[u8]) -> Result<(), StoreError>;

    /// Appends whole lines; durable when [`DocumentStore::sync`] has returned.
    fn append(&self, key: &str, lines: &[u8]) -> Result<(), StoreError>;

    /// Makes what was appended durable.
    fn sync(&self, key: &str) -> Result<(), StoreError>;

    /// Returns what was appended from this byte on, nothing where there is less.
    fn read_from(&self, key: &str, from: u64) -> Result<Vec<u8>, StoreError>;

    /// Tells whether there is a document.
    fn exists(&self, key: &str) -> Result<bool, StoreError>;

    /// Returns the length in bytes of what was appended, 0 when there is nothing.
    fn len(&self, key: &str) -> Result<u64, StoreError>;

    /// Cuts what was appended to this many bytes.
    fn truncate(&self, key: &str, len: u64) -> Result<(), StoreError>;

    /// Removes the document; absent is fine.
    fn remove(&self, key: &str) -> Result<(), StoreError>;

    /// Removes a document that others already make void, and does not wait for the disk: after a power cut it may be there again.
    /// Absent is fine.
    fn forget(&self, key: &str) -> Result<(), StoreError>;

    /// Removes a directory with all documents below it, out of sight in one step; absent is fine.
    fn remove_tree(&self, key: &str) -> Result<(), StoreError>;

    /// Removes what a killed [`DocumentStore::remove_tree`] left directly below a directory.
    fn clear_removed(&self, key: &str) -> Result<(), StoreError>;

    /// Returns the names directly below a directory in order; none when it is absent. Names starting with a dot are left out.
    fn list(&self, key: &str) -> Result<Vec<String>, StoreError>;

    /// Tells whether a directory has nothing in it but what a killed writer left before its first document was whole.
    fn is_unfinished(&self, key: &str) -> Result<bool, StoreError>;

    /// Returns where a document is, for people.
    fn place(&self, key: &str) -> String;

    /// Moves a document aside, so that it is never read again, and returns where it is now.
    fn quarantine(&self, key: &str) -> Result<String, StoreError>;

    /// Returns the keys of documents directly below a directory that were moved aside, in order.
    fn moved_aside(&self, key: &str) -> Result<Vec<String>, StoreError>;

    /// Takes the lock named by a key: an object's directory, or a word for a node-wide lock.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when it is still held by somebody else at the deadline.
    fn lock(&self, key: &str, wait: Wait) -> Result<Box<dyn LockGuard>, StoreError>;

    /// Tells whether somebody holds the lock now.
    fn is_locked(&self, key: &str) -> Result<bool, StoreError>;
}

/// Why a store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {what} {key}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The document, with the state directory.
        key: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{key} is in use by another mvm{}", holder.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Locked {
        /// What is locked.
        key: String,
        /// Who holds it, where that is known.
        holder: Option<u32>,
    },
    /// The program was ended by a test here.
    #[error("killed at effect {0}")]
    Killed(usize),
}
