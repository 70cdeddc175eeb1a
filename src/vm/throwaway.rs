//! A microVM without tenant, network or document, that is gone when its caller is: `mvm run`.
//!
//! Its machine is killed by the kernel when the caller ends, however that comes about; its directory is removed by the caller, or
//! else by the next one that comes along.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mvm_guest_api::config as guest;
use mvm_types::{InstanceAddress, InstanceId};
use zeroize::Zeroizing;

use super::error::LifecycleError;
use super::node::{Node, VmmUids};
use super::pool::PoolSpec;
use crate::host::{DriveFile, DriveLabel};
use crate::vmm::{Drive, DriveAccess, Lifetime, VmHandle, VmSpec};

/// The uid of a throw-away machine is this number and the pid of its caller, which Linux keeps below 2^22: below those of instances,
/// which begin at `0x7000_0000`.
const UID_BASE: u32 = 0x6fb0_0000;

/// A running throw-away machine. Dropping it ends it and removes what it had.
pub struct Throwaway<'a> {
    node: &'a Node,
    vm: VmHandle,
    dir: PathBuf,
    _lock: File,
}

impl Node {
    /// Boots a throw-away machine of the built-in image and waits until it is ready.
    ///
    /// Must be called on a thread that lives as long as the machine should. `mem_mib` is its memory in MiB.
    pub fn throwaway(&self, vcpus: u8, mem_mib: u32, progress: &dyn Fn(&str)) -> Result<Throwaway<'_>, LifecycleError> {
        let io = |what: &str, source: io::Error| {
            LifecycleError::Host(crate::host::HostError::Io {
                what: format!("cannot {what} the directory of a throw-away microVM"),
                source,
            })
        };
        let spec = PoolSpec::new("throwaway".parse().expect("it is a pool id"), mvm_types::Role::Worker);
        let revision = self.images().ensure(&spec, progress)?;
        let image = self.images().open(&revision)?;
        let all = self.paths.run().join("throwaway");
        DirBuilder::new().recursive(true).mode(0o700).create(&all).map_err(|error| io("make", error))?;
        // Between making a directory and locking it, it looks like one that was left behind.
        let alone = File::create(self.paths.run().join("throwaway.lock")).map_err(|error| io("lock", error))?;
        alone.lock().map_err(|error| io("lock", error))?;
        sweep(&all).map_err(|error| io("sweep", error))?;
        let mut bits = [0; 4];
        (self.seams.random)(&mut bits);
        let instance = InstanceId::from_bits(u32::from_be_bytes(bits));
        let dir = all.join(instance.as_str());
        DirBuilder::new().mode(0o700).create(&dir).map_err(|error| io("make", error))?;
        let lock = File::create(dir.join("lock")).map_err(|error| io("lock", error))?;
        lock.lock().map_err(|error| io("lock", error))?;
        drop(alone);
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
        };
        let files = [DriveFile { name: "config.json".into(), content: Zeroizing::new(config.to_json()), mode: 0o444 }];
        let root = File::open(&image.rootfs).map_err(|error| io("open the image of", error))?;
        progress("boot");
        let booted = self.host().build_drive(&instance, DriveLabel::Config, &files).map_err(LifecycleError::from).and_then(|config| {
            let spec = VmSpec {
                at,
                node: self.id.clone(),
                uid: (self.uids == VmmUids::PerInstance).then(|| UID_BASE + std::process::id()),
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
                run_dir: dir.clone(),
                console_log: dir.join("console.log"),
                vmm_log: dir.join("vmm.log"),
                lifetime: Lifetime::WithCaller,
            };
            Ok(self.vmm().boot(spec)?)
        });
        let vm = match booted {
            Ok(vm) => vm,
            Err(error) => {
                let _ = remove(&dir);
                return Err(error);
            }
        };
        let machine = Throwaway { node: self, vm, dir, _lock: lock };
        let deadline = Instant::now() + self.boot_timeout;
        self.guests().control(&machine.vm, deadline)?.wait_ready(deadline)?;
        Ok(machine)
    }
}

/// Removes the directories of callers that were killed. Other callers remove their own meanwhile.
fn sweep(all: &Path) -> io::Result<()> {
    for entry in fs::read_dir(all)? {
        let dir = entry?.path();
        match File::open(dir.join("lock")).map(|lock| lock.try_lock()) {
            // Its caller lives.
            Ok(Err(_)) => {}
            _ => remove(&dir)?,
        }
    }
    Ok(())
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Throwaway<'_> {
    /// Returns the machine, by which its guest is reached.
    pub fn vm(&self) -> &VmHandle {
        &self.vm
    }
}

impl Drop for Throwaway<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.node.vmm().kill(&self.vm) {
            tracing::warn!(
                error = super::error::with_causes(&error),
                "the throw-away machine could not be ended; it ends with this process"
            );
        }
        if let Err(error) = remove(&self.dir) {
            tracing::warn!(%error, dir = %self.dir.display(), "the next `mvm run` removes it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_swept() {
        let all = tempfile::tempdir().unwrap();
        let dir = |name: &str| {
            let dir = all.path().join(name);
            fs::create_dir(&dir).unwrap();
            dir
        };
        let (held, left, torn) = (dir("held"), dir("left"), dir("torn"));
        let lock = File::create(held.join("lock")).unwrap();
        lock.lock().unwrap();
        File::create(left.join("lock")).unwrap();
        sweep(all.path()).unwrap();
        assert!(held.exists() && !left.exists() && !torn.exists());
        remove(&torn).unwrap();
        drop(lock);
        sweep(all.path()).unwrap();
        assert!(!held.exists());
    }
}
