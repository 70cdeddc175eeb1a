//! Builds flakes in a microVM of role `builder` that is thrown away.
//!
//! ```text
//!  host                                         guest
//!  sources   -- job drive, read-only       -->  /run/job/tree, job.json
//!               work drive, no name        ---  /nix, /tmp: as large as the build may fill
//!  log       <-- guest agent, line by line ---  nix, in a group of processes with limits of its own
//!  image     <-- result drive, one archive ---  vmlinux, initrd, rootfs, vmm.json
//! ```
//!
//! The host never mounts what the guest wrote: it reads the archive when the machine is dead, takes four files by name, and believes
//! no length. Machine, drives, sockets and TAP go with the thread that builds, however it ends.
//!
//! What the guest is asked to do to itself (its own limits of processes and memory, what became of its disk) makes for better words
//! when a limit is met; what bounds it is outside: the machine's memory, the drives' sizes, and this thread's clock.

mod conversation;
pub mod job;
mod machine;
pub mod result;
mod watchman;

use std::path::{Path, PathBuf};
use std::time::Duration;

use mvm_types::TenantId;

use super::error::{LifecycleError, with_causes};
use super::node::Node;
use super::pool::Image;
use crate::image::nix::{BuildError, BuildWatch, BuilderKind, FlakeBuilder, Job, Provenance};
use crate::net::BuilderNetwork;
use crate::store::{LockGuard, StoreError, Wait};

use watchman::Watchman;

/// How often it is looked whether a build is still wanted.
const TICK: Duration = Duration::from_millis(50);

/// More builds than this at a time are no gain on any host.
const MOST_BUILDS: u64 = 64;

/// What nix and the guest agent take, with something to build, in MiB.
const LEAST_MEM_MIB: u32 = 192;

/// What builder microVMs of a node reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EgressChoice {
    /// Nothing.
    #[default]
    None,
    /// What is outside of the host and of every tenant.
    Internet,
}

/// What a builder microVM reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Egress {
    /// Nothing: it has no network.
    None,
    /// What is outside of the host and of every tenant, by the network of this tenant, one build at a time.
    Internet(TenantId),
}

/// The right to use a tenant's network for a build, and what that is.
type Turn = (Box<dyn LockGuard>, BuilderNetwork);

/// Builds flakes in microVMs of a node.
pub struct VmBuilder<'n> {
    node: &'n Node,
    egress: Egress,
}

impl<'n> VmBuilder<'n> {
    /// Takes the node and what the machines reach.
    pub fn new(node: &'n Node, egress: Egress) -> Self {
        Self { node, egress }
    }

    /// Makes the machine's parts, boots it, has it build, and takes its result. On a thread of its own, which the machine dies with.
    fn build_here(&self, job: &Job, into: &Path, watch: &dyn BuildWatch) -> Result<Provenance, BuildError> {
        let cannot = |what: &str| {
            let what = what.to_owned();
            move |error: LifecycleError| BuildError::Builder { what, why: with_causes(&error) }
        };
        refuse_odd_attribute(&job.attribute)?;
        let room_mib = self.node.host().guest_memory_mib().map_err(|error| cannot("ask for memory")(error.into()))?;
        let job = &fitted(job, room_mib)?;
        let (image, root) = self.images(watch)?;
        let _room = self.room(job, room_mib, watch)?;
        let turn = self.turn(job, watch)?;
        let network = turn.as_ref().map(|(_, network)| network);
        let watchman = Watchman::new(job, watch);
        // On the file system that the result goes to, where there has to be room for it anyway.
        let drives = machine::drives(self.node, job, into)?;
        let result = drives.result_reader()?;
        let spec = machine::spec(self.node, job, &image, &root, drives, network).map_err(cannot("make its microVM"))?;
        let provenance = machine::run(self.node, spec, &watchman, self.egress == Egress::None)?;
        // The machine is gone: what lies on the drive stays as it is.
        result::take(result, into, job)?;
        Ok(provenance)
    }

    /// The built-in image, of which the kernel and the agent are taken, and the builder's own root file system.
    fn images(&self, watch: &dyn BuildWatch) -> Result<(Image, PathBuf), BuildError> {
        let say = |text: &str| watch.line(&format!("builder image: {text}"));
        let cannot = |why: String| BuildError::Builder { what: "make the image of its microVM".into(), why };
        let image = self.node.throwaway_image(&say).map_err(|error| cannot(with_causes(&error)))?;
        let root = crate::image::builder::ensure(&self.node.paths.images(), &say).map_err(|error| cannot(with_causes(&error)))?;
        Ok((image, root.rootfs))
    }

    /// Waits until the builds that go on leave room for this one's memory.
    fn room(&self, job: &Job, room_mib: u64, watch: &dyn BuildWatch) -> Result<Box<dyn LockGuard>, BuildError> {
        let slots = (room_mib / u64::from(job.limits.mem_mib)).clamp(1, MOST_BUILDS);
        self.first_free(job, watch, "the memory of the host", &(0..slots).map(super::keys::builder_slot).collect::<Vec<_>>())
    }

    /// Waits until no other build uses the tenant's network, and sees to it that the network is there.
    fn turn(&self, job: &Job, watch: &dyn BuildWatch) -> Result<Option<Turn>, BuildError> {
        let Egress::Internet(tenant) = &self.egress else { return Ok(None) };
        let what = format!("the network of tenant {tenant}");
        let guard = self.first_free(job, watch, &what, &[super::keys::builder_lock(tenant)])?;
        let cannot = |error: LifecycleError| BuildError::Builder { what: format!("use {what}"), why: with_causes(&error) };
        let network = self.node.tenant(tenant).map_err(cannot)?.network.network();
        self.node.apply_network().map_err(cannot)?;
        Ok(Some((guard, network.builder())))
    }

    /// Waits for one of several locks.
    fn first_free(&self, job: &Job, watch: &dyn BuildWatch, what: &str, keys: &[String]) -> Result<Box<dyn LockGuard>, BuildError> {
        let mut told = false;
        loop {
            for key in keys {
                match self.node.documents().raw().lock(key, Wait::No) {
                    Ok(guard) => return Ok(guard),
                    Err(StoreError::Locked { .. }) => {}
                    Err(error) => {
                        return Err(BuildError::Builder { what: format!("wait for {what}"), why: with_causes(&error) });
                    }
                }
            }
            if watch.cancelled() {
                return Err(BuildError::Interrupted { attribute: job.attribute.clone() });
            }
            if !told {
                watch.line(&format!("other builds go on; waiting for {what}"));
                told = true;
            }
            std::thread::sleep(TICK);
        }
    }
}

/// The job with as much memory as the host has for guests, where that is less than it may use.
fn fitted(job: &Job, room_mib: u64) -> Result<Job, BuildError> {
    let mut job = job.clone();
    job.limits.mem_mib = job.limits.mem_mib.min(u32::try_from(room_mib).unwrap_or(u32::MAX));
    if job.limits.mem_mib < LEAST_MEM_MIB {
        let why = format!("nix needs {LEAST_MEM_MIB} MiB of memory, and it may have {} MiB", job.limits.mem_mib);
        return Err(BuildError::Builder { what: "boot its microVM".into(), why });
    }
    Ok(job)
}

/// Attributes are made of names that were checked; a quote would end a string of the expression that asks for one.
fn refuse_odd_attribute(attribute: &str) -> Result<(), BuildError> {
    let plain = attribute.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) && !attribute.starts_with('-');
    if plain {
        return Ok(());
    }
    Err(BuildError::Builder { what: format!("build {attribute:?}"), why: "it is no attribute".into() })
}

impl FlakeBuilder for VmBuilder<'_> {
    fn kind(&self) -> BuilderKind {
        BuilderKind::Vm
    }

    fn build(&self, job: &Job, into: &Path, watch: &dyn BuildWatch) -> Result<Provenance, BuildError> {
        std::thread::scope(|scope| {
            let building = scope.spawn(|| self.build_here(job, into, watch));
            building.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_gets_what_memory_there_is() {
        let job = |mem_mib| Job {
            flake_ref: "path:/f".into(),
            shown: "path:/f".into(),
            tree: "/f".into(),
            attribute: "a".into(),
            limits: crate::image::nix::Limits { mem_mib, ..Default::default() },
        };
        let fits = |mem_mib, room_mib| fitted(&job(mem_mib), room_mib).map(|job| job.limits.mem_mib).map_err(|error| error.to_string());
        assert_eq!((fits(4096, 9000), fits(4096, 2000), fits(300, u64::MAX)), (Ok(4096), Ok(2000), Ok(300)));
        assert!(fits(4096, 100).unwrap_err().ends_with("nix needs 192 MiB of memory, and it may have 100 MiB"));
        assert!(fits(64, 9000).is_err());
    }

    #[test]
    fn an_attribute_cannot_end_an_expression() {
        refuse_odd_attribute("packages.x86_64-linux.tenant-worker-minimal").unwrap();
        for odd in ["a\"b", "a b", "a${b}", "--impure", "a;b", "a\n"] {
            assert!(refuse_odd_attribute(odd).is_err(), "{odd:?}");
        }
    }
}
