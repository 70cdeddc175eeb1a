//! `GET /version`.

use serde::{Deserialize, Serialize};

/// What `GET /version` answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirecrackerVersion {
    /// Such as `1.17.0`.
    pub firecracker_version: String,
}
