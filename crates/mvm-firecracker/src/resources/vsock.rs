//! `PUT /vsock`.

use serde::{Deserialize, Serialize};

use super::GuestCid;

/// The body of `PUT /vsock`.
///
/// The host reaches a port of the guest with `CONNECT <port>\n` on the socket, and is answered `OK <port of the host>\n`.
/// What the guest connects to on the host is `<uds_path>_<port>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: GuestCid,
    /// Where Firecracker listens, from when it gets this; nothing may be there.
    pub uds_path: String,
}
