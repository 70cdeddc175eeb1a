//! `PUT /entropy`.

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// The body of `PUT /entropy`: the guest gets random numbers of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntropyDevice {
    /// Its limits in bytes and operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
