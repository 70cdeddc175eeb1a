//! `PUT /serial`.

use serde::{Deserialize, Serialize};

use super::TokenBucket;

/// The body of `PUT /serial`: where the guest's console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialDevice {
    /// A file or named pipe, opened when the guest boots or is loaded; Firecracker's standard output when absent. A file
    /// that is there is written over from its start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
    /// How much the guest may write, in bytes; what is beyond is dropped and counted in `uart.rate_limiter_dropped_bytes`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
