//! `PUT /actions`.

use serde::{Deserialize, Serialize};

/// What a microVM is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Write the metrics to their file now.
    FlushMetrics,
    /// Boot the guest.
    InstanceStart,
    /// Press Ctrl+Alt+Del on the guest's keyboard, if it has a driver for an i8042.
    SendCtrlAltDel,
}

/// The body of `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceActionInfo {
    /// What is to be done.
    pub action_type: ActionType,
}
