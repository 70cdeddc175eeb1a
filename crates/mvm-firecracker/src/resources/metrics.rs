//! `PUT /metrics`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The body of `PUT /metrics`, which is taken once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// A file or named pipe; a line of JSON is added each minute and whenever it is asked for.
    pub metrics_path: String,
    /// Whether lines have the microVM's id (Firecracker 1.17).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emit_id: Option<bool>,
    /// What else lines have (Firecracker 1.17).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}
