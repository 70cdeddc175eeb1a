//! What the lifecycle asks of a guest, and the client that asks it.
//!
//! Whatever a guest says is hostile input: capped in size, with a deadline, never part of a path.

mod channel;
mod client;
mod copy;
mod exec;
mod line;
mod terminal;

pub use channel::SerialChannel;
pub use client::{Follow, GuestClient, LogSource};
pub use exec::{ExecEnd, ExecRequest};
pub use line::Purpose;
pub use mvm_guest_api::proto::{Tty, TtySize};

use std::time::{Duration, Instant};

use crate::vmm::VmHandle;

/// What a guest says of itself once it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestReady {
    /// The guest agent's version.
    pub agent_version: String,
    /// The guest kernel's boot id; the same after a wake, another after a boot.
    pub boot_id: String,
    /// The guest's wall clock, in nanoseconds since 1970, when it answered.
    pub clock_ns: i128,
}

/// How a drain ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drained {
    /// Nothing was running any more.
    Idle,
    /// The deadline passed; these were still busy.
    Busy(Vec<String>),
}

/// What a guest needs after its clock stood still and its random pool was copied.
#[derive(Debug, Clone)]
pub struct WakeFixup {
    /// Fresh random bytes.
    pub entropy: [u8; 64],
}

/// One conversation with a guest.
pub trait GuestControl: Send {
    /// Waits until the guest says that it is ready.
    ///
    /// # Errors
    /// [`GuestError::NotReady`] with what is missing when the deadline passes.
    fn wait_ready(&mut self, deadline: Instant) -> Result<GuestReady, GuestError>;

    /// Lets running work end: no new work is taken, hooks run, busy work is waited for.
    fn drain(&mut self, timeout: Duration) -> Result<Drained, GuestError>;

    /// Prepares for a snapshot: hooks, sync, secrets and config unmounted. The guest is not ready afterwards.
    fn prepare_sleep(&mut self, deadline: Instant) -> Result<(), GuestError>;

    /// Sets the clock to the host's present time, reseeds the random pool, mounts fresh config and secrets, runs the wake hooks;
    /// returns when the guest is ready.
    fn wake(&mut self, fixup: &WakeFixup, deadline: Instant) -> Result<GuestReady, GuestError>;

    /// Asks the guest to end by itself. Returns when it has taken the request.
    fn shutdown(&mut self, grace: Duration) -> Result<(), GuestError>;
}

/// The way to guests.
pub trait GuestChannel: Send + Sync {
    /// Opens the lifecycle's conversation with a guest, trying until the deadline.
    fn control(&self, vm: &VmHandle, deadline: Instant) -> Result<Box<dyn GuestControl>, GuestError>;
}

/// Why a guest did not do something.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// It could not be reached.
    #[error("the guest agent cannot be reached: {why}")]
    Unreachable {
        /// What went wrong last.
        why: String,
    },
    /// It was not ready in time.
    #[error("the guest is not ready after {after_ms} ms; missing: {missing}")]
    NotReady {
        /// What it still lacks, in its own (capped) words.
        missing: String,
        /// How long was waited, in milliseconds.
        after_ms: u64,
    },
    /// It did not answer in time.
    #[error("{what}: no answer from the guest within {after_ms} ms")]
    Timeout {
        /// What was asked.
        what: &'static str,
        /// How long was waited, in milliseconds.
        after_ms: u64,
    },
    /// Its role does not have it do this.
    #[error("{what}: {why}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// What it said, capped.
        why: String,
    },
    /// It refused, or broke the protocol.
    #[error("{what}: {why}")]
    Failed {
        /// What was asked.
        what: &'static str,
        /// What it said, capped.
        why: String,
    },
    /// The operating system refused.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}
