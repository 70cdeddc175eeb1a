//! Ends a simulated process at one of its effects on the world.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts effects on the world and ends them all at the n-th: what a killed process looks like to the world.
///
/// The effect with that number does not happen, and neither does any after it, so nothing that the program does on its way out
/// (undoing, cleaning up) can hide what a kill leaves behind.
#[derive(Debug)]
pub struct KillSwitch {
    done: AtomicUsize,
    kill_at: usize,
}

impl KillSwitch {
    /// Counts only.
    pub fn never() -> Arc<Self> {
        Self::at(usize::MAX)
    }

    /// Lets `n` effects happen and no more.
    pub fn at(n: usize) -> Arc<Self> {
        Arc::new(Self { done: AtomicUsize::new(0), kill_at: n })
    }

    /// Counts one effect.
    ///
    /// # Errors
    /// The number of the effect, when the program is dead.
    pub fn effect(&self) -> Result<(), usize> {
        let n = self.done.fetch_add(1, Ordering::SeqCst);
        if n >= self.kill_at { Err(self.kill_at) } else { Ok(()) }
    }

    /// Returns how many effects were asked for.
    pub fn count(&self) -> usize {
        self.done.load(Ordering::SeqCst)
    }
}
