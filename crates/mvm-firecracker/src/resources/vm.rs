//! `PATCH /vm`.

use serde::{Deserialize, Serialize};

/// What a microVM's vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Stand still.
    Paused,
    /// Run.
    Resumed,
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What they are to do.
    pub state: VmState,
}
