//! The Firecracker driver: one jailed Firecracker per machine.
//!
//! ```text
//!  mvm                         jailer, then Firecracker (same process, own uid, own mount and PID namespace, nothing but this)
//!  -------------------------   --------------------------------------------------------------------------------------
//!  kernel, initrd, root    --> /image/kernel, /image/initrd, /drives/root      mounted, read-only
//!  data disk               --> /drives/data                                    mounted
//!  secrets, configuration  --> /drives/secrets, /drives/config                 copied into the jail's memory
//!  <run>/<instance>/jail   <-> /host/{api.sock, v.sock, firecracker.log, metrics}   mounted
//!  <instance>/vmm          <-- /scratch/{state, memory}                        mounted; what a snapshot is written to
//!  <instance>/snapshot     --> /restore/{state, memory}                        mounted, read-only, for a wake
//!  TAP, by name, kept until Firecracker has it; or in a network namespace that has only it and the cable to its bridge
//! ```
//!
//! The jail is a tmpfs that exists only in the mount namespace of the process that becomes the jailer: nobody else can plant
//! anything in it, and it is gone when the process is. What Firecracker writes outside of it is in two directories of its own,
//! below directories that are root's; mvm takes sockets and snapshot files out of them without following links.
//!
//! Start and wake take the same path: the same jail, the same limits, then `PUT` of everything and `InstanceStart`, or
//! `PUT /snapshot/load`.

mod args;
mod driver;
mod ends;
mod jail;
mod metrics;
mod snapshot;
mod start;
mod versions;

pub use args::VSOCK_SOCKET;
pub use driver::{Firecracker, FirecrackerOptions, JailNetwork};
pub use versions::{Installed, MINIMUM, VERSIONS_DIR, Verdict, install};
