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
        self.changed = true;
        self.writing += 1;
        self.begun += 1;
    }

    /// Counts what was given back meanwhile.
    pub fn change(&mut self, change: impl FnOnce(&mut Usage)) {
        change(&mut self.usage);
        self.changed = true;
    }

    /// Counts somebody who has written, or tried to.
    pub fn end(&mut self, written: bool) {
        self.writing -= 1;
        self.failed |= !written;
    }

    /// Lets the lock go; what other processes know is out of date. Returns what this one knows.
    fn close(mut self) -> Option<(u64, Usage)> {
        let mut generation = self.guard.generation();
        if self.changed {
            generation = generation.wrapping_add(1);
            self.guard.set_generation(generation);
        }
        // What was written may or may not be there after an error: it is counted again next time.
        (!self.failed).then_some((generation, self.usage))
    }
}
