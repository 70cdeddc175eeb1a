//! What is answered instead of a result.

use serde::{Deserialize, Serialize};

/// The body of an answer whose status is not a success.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What was wrong, in Firecracker's words.
    #[serde(default)]
    pub fault_message: Option<String>,
}
