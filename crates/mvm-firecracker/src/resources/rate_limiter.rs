//! Limits of drives, network interfaces, the entropy device and the serial console.

use serde::{Deserialize, Serialize};

/// Two limits that both hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimiter {
    /// Tokens are bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Tokens are operations: requests to a drive, packets of a network interface.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// A bucket of tokens that refills at the rate `size / refill_time`. A size or a refill time of 0 is no limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBucket {
    /// How many tokens it holds.
    pub size: u64,
    /// How long it takes to fill when it is empty, in milliseconds.
    pub refill_time: u64,
    /// Tokens beside those of the bucket, that are spent first and once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
}

impl TokenBucket {
    /// So many tokens per second, none of them saved for longer than a second.
    #[must_use]
    pub fn per_second(size: u64) -> Self {
        Self { size, refill_time: 1000, one_time_burst: None }
    }
}
