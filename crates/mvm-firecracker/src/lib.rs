//! A client of Firecracker's API (1.16 and 1.17) over its unix socket.
//!
//! ```text
//!              boot, or configure and start
//!  Fresh ----------------------------------------> Running <----> Paused -- create_snapshot
//!    |                                                ^              ^
//!    +------ load_and_resume -------------------------+              |
//!    +------ load_snapshot ------------------------------------------+
//!
//!  Unknown -- find_phase --> Preboot, Running or Paused
//! ```
//!
//! A phase is a type, and what it does not allow does not compile. No drive after the boot:
//!
//! ```compile_fail,E0599
//! # use mvm_firecracker::{Api, Running, Drive};
//! fn add(api: &mut Api<Running>, drive: &Drive) {
//!     let _ = api.drive(drive);
//! }
//! ```
//!
//! No snapshot while vCPUs run:
//!
//! ```compile_fail,E0599
//! # use mvm_firecracker::{Api, Running, SnapshotCreate};
//! fn sleep(api: &mut Api<Running>, snapshot: &SnapshotCreate) {
//!     let _ = api.create_snapshot(snapshot);
//! }
//! ```
//!
//! No second start:
//!
//! ```compile_fail,E0382
//! # use mvm_firecracker::{Api, Preboot};
//! fn twice(api: Api<Preboot>) {
//!     let _ = api.start();
//!     let _ = api.start();
//! }
//! ```
//!
//! No load after anything but outputs was configured:
//!
//! ```compile_fail,E0599
//! # use mvm_firecracker::{Api, Fresh, Outputs, SnapshotLoad};
//! fn late(api: Api<Fresh>, load: &SnapshotLoad) {
//!     let _ = api.configure().load_snapshot(&Outputs::default(), load);
//! }
//! ```
//!
//! What is allowed does:
//!
//! ```
//! # use mvm_firecracker::{Api, ApiError, Boot, Deadlines, Paused, SnapshotCreate};
//! fn sleep(socket: &std::path::Path, boot: &Boot, snapshot: &SnapshotCreate) -> Result<Api<Paused>, ApiError> {
//!     let mut paused = Api::connect(socket, Deadlines::default())?.boot(boot)?.pause()?;
//!     paused.create_snapshot(snapshot)?;
//!     Ok(paused)
//! }
//! ```
//!
//! The metadata service, CPU templates of one's own, persistent memory and devices that come after the boot have no
//! part in it.

#![forbid(unsafe_code)]

mod api;
mod boot;
mod connection;
mod error;
mod request;
mod resources;
mod timeline;

pub use api::{Api, Failed, Found, Fresh, Paused, Preboot, Running, Unknown};
pub use boot::{Boot, Outputs};
pub use connection::Deadlines;
pub use error::{ApiError, ApiErrorKind};
pub use resources::*;
pub use timeline::CallTiming;
