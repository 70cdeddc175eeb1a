//! A microVM without tenant, network or document, that is gone when its caller is: `mvm run`.
//!
//! Its machine is killed by the kernel when the caller ends, however that comes about, and its directory is memory that goes with
//! them both.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use mvm_guest_api::config as guest;
use mvm_hostd::cgroup::Place;
use mvm_types::{InstanceAddress, InstanceId};
use zeroize::Zeroizing;

use super::error::LifecycleError;
use super::node::Node;
use super::pool::{Image, PoolSpec};
use crate::host::{DriveFile, DriveLabel};
use crate::vmm::{Drive, DriveAccess, Lifetime, Liveness, Rates, VmHandle, VmSpec, VmmError};

/// What the directory of a throw-away machine holds at most, in bytes: sockets, and what its console and VMM say.
const SCRATCH: u64 = 32 << 20;

/// How often it is looked whether a machine that boots is still wanted, and still there.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A throw-away machine that was started. Dropping it ends it.
pub struct Throwaway<'a> {
    node: &'a Node,
    vm: VmHandle,
    limits: Option<Place>,
}

impl Node {
    /// Makes the image of throw-away machines, unless it is there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn throwaway_image(&self, progress: &dyn Fn(&str)) -> Result<Image, LifecycleError> {
        let revision = self.images().ensure_builtin(progress)?;
        Ok(self.images().open(&revision)?)
    }

    /// Starts a throw-away machine of an image; [`Throwaway::wait_ready`] waits for it.
    ///
    /// Must be called on a thread that lives as long as the machine should, and that does nothing else afterwards: it gets a mount
    /// namespace of its own. `mem_mib` is its memory in MiB.
    ///
    /// # Errors
    /// When it cannot be started; nothing is left then.
    pub fn throwaway(&self, image: &Image, vcpus: u8, mem_mib: u32) -> Result<Throwaway<'_>, LifecycleError> {
        let io = |what: &str, source: io::Error| {
            LifecycleError::Host(crate::host::HostError::Io { what: format!("cannot {what} a throw-away microVM"), source })
        };
        let spec = throwaway_pool();
        let all = self.paths.run().join("throwaway");
        DirBuilder::new().recursive(true).mode(0o700).create(&all).map_err(|error| io("make the directory of", error))?;
        mvm_hostd::scratch::mount_scratch(&all, SCRATCH).map_err(crate::host::HostError::from)?;
        let mut bits = [0; 4];
        (self.seams.random)(&mut bits);
        let instance = InstanceId::from_bits(u32::from_be_bytes(bits));
        let dir = all.join(instance.as_str());
        DirBuilder::new().mode(0o700).create(&dir).map_err(|error| io("make the directory of", error))?;
        let at = InstanceAddress::new("throwaway".parse().expect("it is a tenant id"), spec.pool_id.clone(), instance.clone());
        let config = guest::GuestConfig {
            version: guest::VERSION,
            identity: guest::Identity {
                tenant: at.tenant.to_string(),
                pool: at.pool.to_string(),
                instance: instance.to_string(),
                node: self.id.to_string(),
            },
            role: spec.role.to_string(),
            profile: spec.profile.to_string(),
            hostname: instance.to_string(),
            config_version: 1,
            secrets_epoch: 0,
            network: None,
            forward: false,
            workload: None,
            requires: guest::Requires { data: false, config: true, secrets: false },
            handlers: None,
            services: Vec::new(),
            not_enabled: Vec::new(),
        };
        let files = [DriveFile { name: "config.json".into(), content: Zeroizing::new(config.to_json()), mode: 0o444 }];
        let root = File::open(&image.rootfs).map_err(|error| io("open the image of", error))?;
        let config = self.host().build_drive(&instance, DriveLabel::Config, &files)?;
        let limits = self.host().limits_of(&instance)?;
        let spec = VmSpec {
            at,
            node: self.id.clone(),
            uid: self.vmm_uid(|range| range.throwaway(std::process::id())),
            limits,
            vcpus,
            mem_mib,
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            kernel_args: image.kernel_args.clone(),
            drives: vec![
                Drive { name: "root", file: root.into(), access: DriveAccess::ReadOnly },
                Drive { name: "config", file: config, access: DriveAccess::ReadOnly },
            ],
            nic: None,
            rates: Rates::default(),
            reclaim_memory: false,
            run_dir: dir.clone(),
            scratch: None,
            console_log: dir.join("console.log"),
            vmm_log: dir.join("vmm.log"),
            lifetime: Lifetime::WithCaller,
        };
        Throwaway::boot(self, spec)
    }
}

/// Ends the cgroup that a machine was in.
fn end(limits: Option<&Place>) -> Result<(), LifecycleError> {
    if let Some(limits) = limits {
        limits.end().map_err(crate::host::HostError::from)?;
    }
    Ok(())
}

fn throwaway_pool() -> PoolSpec {
    PoolSpec::new("throwaway".parse().expect("it is a pool id"), mvm_types::Role::Worker)
}

/// Whether a machine that boots is waited for any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// It is ready.
    Ready,
    /// The caller has lost interest.
    GivenUp,
}

impl<'a> Throwaway<'a> {
    /// Boots a machine that ends when what is returned is dropped.
    ///
    /// # Errors
    /// When it cannot be started; nothing is left then.
    pub(super) fn boot(node: &'a Node, spec: VmSpec) -> Result<Self, LifecycleError> {
        let limits = spec.limits.clone();
        match node.vmm().boot(spec) {
            Ok(vm) => Ok(Self { node, vm, limits }),
            Err(error) => {
                if let Err(left) = end(limits.as_ref()) {
                    tracing::warn!(
                        error = super::error::with_causes(&left),
                        "a machine that did not start leaves its cgroup, which the next apply removes"
                    );
                }
                Err(error.into())
            }
        }
    }

    /// Ends the machine; returns when it is gone. Idempotent.
    ///
    /// # Errors
    /// When the kernel does not end it.
    pub(super) fn end(&self) -> Result<(), LifecycleError> {
        self.node.vmm().kill(&self.vm)?;
        end(self.limits.as_ref())
    }

    /// Waits until the guest is ready, or until `give_up` says so.
    ///
    /// # Errors
    /// When the machine ends, or the guest is not ready in time.
    pub fn wait_ready(&self, give_up: &dyn Fn() -> bool) -> Result<Waited, LifecycleError> {
        let deadline = Instant::now() + self.node.boot_timeout;
        let (guests, vm) = (self.node.seams.guests.clone(), self.vm.clone());
        // On a thread of its own, which ends with the machine that it talks to, or with this process.
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let asked = guests.control(&vm, deadline).and_then(|mut guest| guest.wait_ready(deadline));
            // Nobody listens to it once the machine was given up.
            let _ = tell.send(asked);
        });
        loop {
            match told.recv_timeout(LOOK_AGAIN) {
                Ok(Ok(_)) => return Ok(Waited::Ready),
                Ok(Err(error)) => return Err(error.into()),
                Err(_) if give_up() => return Ok(Waited::GivenUp),
                Err(_) if self.node.vmm().liveness(&self.vm) == Liveness::Gone => {
                    return Err(VmmError::Gone { what: "a throw-away microVM" }.into());
                }
                Err(_) => {}
            }
        }
    }

    /// Returns the machine, by which its guest is reached.
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }
}

impl Drop for Throwaway<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::warn!(
                error = super::error::with_causes(&error),
                "the throw-away machine could not be ended; it ends with this process"
            );
        }
    }
}
