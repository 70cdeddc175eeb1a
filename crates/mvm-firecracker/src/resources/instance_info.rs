//! `GET /`.

use serde::{Deserialize, Serialize};

/// What a microVM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InstanceState {
    /// It was neither booted nor loaded.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

/// What `GET /` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The program's name: `Firecracker`.
    pub app_name: String,
    /// What was given with `--id`.
    pub id: String,
    /// What it is doing.
    pub state: InstanceState,
    /// The program's version.
    pub vmm_version: String,
}
