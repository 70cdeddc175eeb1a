//! `/network-interfaces/{iface_id}`.

use serde::{Deserialize, Serialize};

use super::{Mtu, RateLimiter, ResourceId};

/// The body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkInterface {
    /// The name; also in the request's path.
    pub iface_id: ResourceId,
    /// The host's TAP device, at most 15 bytes. Firecracker opens it at once, and makes it when it is not there and it may.
    pub host_dev_name: String,
    /// The guest's MAC address, such as `06:00:ac:10:00:02`; the guest's own choice when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// The largest packet, in bytes; the guest's own choice when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// Limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// The body of `PATCH /network-interfaces/{iface_id}`, of a microVM that has booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartialNetworkInterface {
    /// The name; also in the request's path.
    pub iface_id: ResourceId,
    /// New limits of what the guest receives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// New limits of what the guest sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}
