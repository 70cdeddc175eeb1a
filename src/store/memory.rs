//! Documents in memory, for tests and simulations; they can be made to fail at the n-th effect.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{DocumentStore, LockGuard, StoreError, Wait};
use crate::infra::kill_switch::KillSwitch;

#[derive(Default)]
struct World {
    documents: Mutex<BTreeMap<String, Vec<u8>>>,
    locks: Mutex<(BTreeSet<String>, HashMap<String, u64>)>,
    released: Condvar,
}

/// Documents in memory. A clone made with [`MemoryStore::next_process`] sees the same documents.
pub struct MemoryStore {
    world: Arc<World>,
    switch: Arc<KillSwitch>,
}

impl MemoryStore {
    /// Starts empty.
    pub fn new() -> Self {
        Self { world: Arc::default(), switch: KillSwitch::never() }
    }

    /// Returns the store as the next process sees it: the same documents, its own fate.
    pub fn next_process(&self, switch: Arc<KillSwitch>) -> Self {
        Self { world: self.world.clone(), switch }
    }

    /// Returns every key with its content.
    pub fn snapshot(&self) -> BTreeMap<String, Vec<u8>> {
        self.documents().clone()
    }

    fn documents(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.world.documents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn effect(&self) -> Result<(), StoreError> {
        self.switch.effect().map_err(StoreError::Killed)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl DocumentStore for MemoryStore {
    fn read(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.documents().get(key).cloned())
    }

    fn read_from(&self, key: &str, from: u64) -> Result<Vec<u8>, StoreError> {
        let from = usize::try_from(from).unwrap_or(usize::MAX);
        Ok(self.documents().get(key).and_then(|content| content.get(from..)).unwrap_or_default().to_vec())
    }

    fn write(&self, key: &str, content: &[u8]) -> Result<(), StoreError> {
        self.effect()?;
        self.documents().insert(key.to_owned(), content.to_vec());
        Ok(())
    }

    fn append(&self, key: &str, lines: &[u8]) -> Result<(), StoreError> {
        self.effect()?;
        self.documents().entry(key.to_owned()).or_default().extend_from_slice(lines);
        Ok(())
    }

    fn sync(&self, _key: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn exists(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.documents().contains_key(key))
    }

    fn len(&self, key: &str) -> Result<u64, StoreError> {
        Ok(self.documents().get(key).map_or(0, |content| content.len() as u64))
    }

    fn truncate(&self, key: &str, len: u64) -> Result<(), StoreError> {
        self.effect()?;
        if let Some(content) = self.documents().get_mut(key) {
            content.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        }
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), StoreError> {
        self.effect()?;
        self.documents().remove(key);
        Ok(())
    }

    fn forget(&self, key: &str) -> Result<(), StoreError> {
        self.remove(key)
    }

    fn remove_tree(&self, key: &str) -> Result<(), StoreError> {
        self.effect()?;
        let prefix = format!("{key}/");
        self.documents().retain(|key, _| !key.starts_with(&prefix));
        Ok(())
    }

    fn clear_removed(&self, _key: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn list(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let prefix = format!("{key}/");
        let documents = self.documents();
        let mut names: Vec<String> = documents
            .range(prefix.clone()..)
            .take_while(|(key, _)| key.starts_with(&prefix))
            .filter_map(|(key, _)| key[prefix.len()..].split('/').next())
            .filter(|name| !name.starts_with('.'))
            .map(str::to_owned)
            .collect();
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    fn is_unfinished(&self, key: &str) -> Result<bool, StoreError> {
        let prefix = format!("{key}/");
        Ok(!self.documents().keys().any(|key| key.starts_with(&prefix)))
    }

    fn place(&self, key: &str) -> String {
        key.to_owned()
    }

    fn quarantine(&self, key: &str) -> Result<String, StoreError> {
        self.effect()?;
        let mut documents = self.documents();
        let content = documents.remove(key).unwrap_or_default();
        let (dir, name) = key.rsplit_once('/').unwrap_or(("", key));
        let to = format!("{dir}/.{name}.quarantined");
        documents.insert(to.clone(), content);
        Ok(to)
    }

    fn moved_aside(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let prefix = format!("{key}/.");
        let documents = self.documents();
        let aside = documents.keys().filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix(".quarantined"));
        Ok(aside.filter(|name| !name.contains('/')).map(|name| format!("{key}/{name}")).collect())
    }

    fn lock(&self, key: &str, wait: Wait) -> Result<Box<dyn LockGuard>, StoreError> {
        let mut locks = self.world.locks.lock().unwrap_or_else(PoisonError::into_inner);
        while !locks.0.insert(key.to_owned()) {
            let left = match wait {
                Wait::No => Duration::ZERO,
                Wait::Until(deadline) => deadline.saturating_duration_since(Instant::now()),
            };
            if left.is_zero() {
                return Err(StoreError::Locked { key: key.to_owned(), holder: None });
            }
            locks = self.world.released.wait_timeout(locks, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(Box::new(MemoryLock { world: self.world.clone(), key: key.to_owned() }))
    }

    fn is_locked(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.world.locks.lock().unwrap_or_else(PoisonError::into_inner).0.contains(key))
    }
}

struct MemoryLock {
    world: Arc<World>,
    key: String,
}

impl LockGuard for MemoryLock {
    fn generation(&self) -> u64 {
        let locks = self.world.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.1.get(&self.key).copied().unwrap_or(0)
    }

    fn set_generation(&mut self, generation: u64) {
        let mut locks = self.world.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.1.insert(self.key.clone(), generation);
    }

    fn retire(self: Box<Self>) {
        self.world.locks.lock().unwrap_or_else(PoisonError::into_inner).1.remove(&self.key);
    }
}

impl Drop for MemoryLock {
    fn drop(&mut self) {
        self.world.locks.lock().unwrap_or_else(PoisonError::into_inner).0.remove(&self.key);
        self.world.released.notify_all();
    }
}
