//! The protocol between mvm and the agent inside its guests.
//!
//! ```text
//!  host                                     guest
//!  MVM-CONNECT 0123456789abcdef\n  ----->
//!                                  <-----   MVM-OK 0123456789abcdef\n      (serial ports only, see [`handshake`])
//!  gRPC over HTTP/2 (see [`proto`]) <---->
//! ```
//!
//! [`config`] is the document on the guest's config drive. What a guest says is hostile to the host and the other
//! way round less so; both sides hold [`limits`].
#![forbid(unsafe_code)]

pub mod archive;
pub mod config;
pub mod handshake;
pub mod limits;

/// Messages and services of `proto/guest.proto`.
#[allow(missing_docs, clippy::all)]
pub mod proto {
    tonic::include_proto!("mvm.guest.v1");
}

/// The version in `StatusReply.protocol_version`; another one is refused by the host.
pub const PROTOCOL_VERSION: u32 = 1;

/// The vsock port of the agent.
pub const VSOCK_PORT: u32 = 5200;

/// Serial ports are named with this and a number from 0; port 0 is for the lifecycle.
pub const PORT_NAME_PREFIX: &str = "mvm.agent.";

/// How many serial ports a guest has.
pub const PORT_COUNT: u32 = 8;

/// The label of the file system for data that stays.
pub const LABEL_DATA: &str = "mvm-data";
/// The label of the file system with the tenant's secrets.
pub const LABEL_SECRETS: &str = "mvm-secrets";
/// The label of the file system with `config.json`.
pub const LABEL_CONFIG: &str = "mvm-config";

/// Where the guest sees its data.
pub const DATA_DIR: &str = "/data";
/// Where the guest sees its secrets.
pub const SECRETS_DIR: &str = "/run/secrets";
/// Where the guest sees its configuration.
pub const CONFIG_DIR: &str = "/etc/mvm-config";
/// The document in [`CONFIG_DIR`].
pub const CONFIG_FILE: &str = "config.json";
/// Below this are `drain.d`, `pre-sleep.d` and `post-wake.d`.
pub const HOOKS_DIR: &str = "/etc/mvm/hooks";
/// Programs in the guest write `<seconds>` into a file here to ask not to be put to sleep for that long.
pub const BUSY_DIR: &str = "/run/mvm/busy.d";
