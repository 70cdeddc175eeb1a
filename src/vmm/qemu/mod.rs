//! The QEMU `microvm` driver: KVM where a guest really boots with it, software (TCG) everywhere else.
//!
//! ```text
//!  mvm                                   QEMU (own session, own uid, seccomp, no paths)
//!  -----------------------------------   ------------------------------------------------
//!  memfd, or the snapshot's memory   --> guest RAM   (share=on        / share=off)
//!  kernel, initrd, drives, TAP,      --> inherited descriptors
//!  logs, listening sockets
//!  qmp.sock            <-- stop, cont, xen-save-devices-state --> device.state
//!  /proc/<pid>/{fd,pagemap,mem}      --> memory      (copied by mvm while the guest is paused)
//! ```
//!
//! A snapshot is the device state, written by QEMU to a descriptor, and the RAM, copied by mvm: QEMU's own migration would
//! write all of a privately mapped RAM every time. `docs/adr/0001-qemu-snapshots.md` has the reasons and the figures.
//!
//! What it does not do: network, drives and images come open from the caller; what the guest says is `crate::guest`'s.

mod args;
mod driver;
mod extents;
mod files;
mod memory;
mod probe;
mod qmp;
mod spawn;

pub use driver::{AccelerationChoice, Qemu, QemuOptions};
pub use probe::{HostFacts, KvmVerdict};

/// How many ports the guest agent serves: `mvm.agent.0` … and `agent.0.sock` … in the run directory.
pub const AGENT_PORTS: usize = 8;

/// The name of an agent port's socket in the run directory.
///
/// # Panics
/// Never; a port that is not below [`AGENT_PORTS`] has no socket, and connecting to it fails.
pub fn agent_socket(port: usize) -> String {
    format!("agent.{port}.sock")
}
