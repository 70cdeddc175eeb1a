//! What a tenant uses, as one process knows it while it takes room.
//!
//! Room is taken under a lock that other processes see, and kept by writing a document, which takes a flush of the disk. So that many
//! do not wait for as many flushes, those of one process hold the lock together: a batch. What each takes is counted before the next
//! one asks, and the lock is let go when the last of them has written.
//!
//! ```text
//!  first asks ── lock ── count ──> second asks ──> ...          last has written ── unlock
//!                          └─ writes ───────┘ └─ writes ───────┘
//! ```

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::usage::Usage;
use crate::store::LockGuard;

/// How many may join a batch: then it ends before the next one begins, so that other processes come to their turn.
const MOST: usize = 256;

/// A tenant's books.
#[derive(Default)]
pub(super) struct Ledger {
    books: Mutex<Books>,
    over: Condvar,
}

/// What is known, and who is at it.
#[derive(Default)]
pub(super) struct Books {
    /// The usage, and the lock's generation for which it is right.
    pub known: Option<(u64, Usage)>,
    /// Those who take room at this moment.
    pub batch: Option<Batch>,
}

/// Changes that hold the lock together.
pub(super) struct Batch {
    guard: Box<dyn LockGuard>,
    /// The usage with all that was taken so far.
    pub usage: Usage,
    writing: usize,
    begun: usize,
    changed: bool,
    failed: bool,
}

impl Ledger {
    /// Opens the books.
    pub fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the books for somebody who takes room, once a batch that has gone on for long is over.
    pub fn turn(&self) -> MutexGuard<'_, Books> {
        let is_full = |books: &mut Books| books.batch.as_ref().is_some_and(|batch| batch.begun >= MOST);
        self.over.wait_while(self.lock(), is_full).unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the batch when nobody of it is writing any more.
    pub fn settle(&self, mut books: MutexGuard<'_, Books>) {
        if let Some(batch) = books.batch.take_if(|batch| batch.writing == 0) {
            books.known = batch.close();
            self.over.notify_all();
        }
    }
}

impl Batch {
    /// Begins one with the lock held.
    pub fn new(guard: Box<dyn LockGuard>, usage: Usage) -> Self {
        Self { guard, usage, writing: 0, begun: 0, changed: false, failed: false }
    }

    /// Counts somebody who writes from now on.
    pub fn begin(&mut self, usage: Usage) {
        self.usage = usage;
        self.announce();
        self.writing += 1;
        self.begun += 1;
    }

    /// Counts what was given back meanwhile.
    pub fn change(&mut self, change: impl FnOnce(&mut Usage)) {
        change(&mut self.usage);
        self.announce();
    }

    /// Puts what other processes know out of date, before anything is written: whoever is killed then has told them.
    fn announce(&mut self) {
        if !self.changed {
            self.changed = true;
            self.guard.set_generation(self.guard.generation().wrapping_add(1));
        }
    }

    /// Counts somebody who has written, or tried to.
    pub fn end(&mut self, written: bool) {
        self.writing -= 1;
        self.failed |= !written;
    }

    /// Lets the lock go. Returns what this process knows.
    fn close(self) -> Option<(u64, Usage)> {
        // What was written may or may not be there after an error: it is counted again next time.
        (!self.failed).then(|| (self.guard.generation(), self.usage))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{DocumentStore, FileStore, MemoryStore, Wait};

    #[test]
    fn one_that_is_killed_while_it_writes_has_told_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let files = FileStore::new(dir.path().join("state"), dir.path().join("locks"));
        for store in [&files as &dyn DocumentStore, &MemoryStore::new()] {
            let lock = || store.lock("admission", Wait::No).unwrap();
            let before = lock().generation();
            let mut batch = Batch::new(lock(), Usage::default());
            batch.begin(Usage::default());
            drop(batch);
            assert_ne!(lock().generation(), before);
            // One that changes nothing tells nothing.
            let before = lock().generation();
            assert_eq!(Batch::new(lock(), Usage::default()).close(), Some((before, Usage::default())));
            assert_eq!(lock().generation(), before);
        }
    }
}
