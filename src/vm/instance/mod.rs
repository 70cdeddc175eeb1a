//! Instances: microVMs, the only things with runtime state.

mod config;
mod create;
mod exposure;
mod lifecycle;
mod machine;
mod recover;
mod snapshot;
mod state;
mod verbs;

pub use config::InstanceDoc;
pub use exposure::exposed;
pub use lifecycle::{MOST_REFUSALS, SNAPSHOT_REFUSED, StopMode, VMM_REFUSED};
pub use machine::missing_secrets;
pub use snapshot::{FileHash, SnapshotError, SnapshotManifest, hash_file, manifest_key};
pub use state::{IllegalTransition, InstanceState, StateName, StopReason, Transition, TransitionStep, Verb};
