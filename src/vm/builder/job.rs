//! What the job drive holds.
//!
//! ```text
//!  job.json   {"version":1,"attribute":"packages.x86_64-linux.tenant-worker-minimal"}
//!  tree/      the flake's sources
//! ```
//!
//! The built-in builder is told what to build by the guest agent; a NixOS system of role `builder` reads it here, and writes the same
//! archive to the same drive (`nix/roles/builder/build-job.sh`).

use crate::image::nix::Job;

/// The name of the drive's file system.
pub(super) const LABEL: &str = "mvm-job";
/// The name of the document.
pub const DOCUMENT: &str = "job.json";
/// The name of the directory with the flake's sources.
pub const TREE: &str = "tree";

/// The document that says what is built.
pub fn describe(job: &Job) -> String {
    serde_json::json!({ "version": 1, "attribute": job.attribute }).to_string()
}
