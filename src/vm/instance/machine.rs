//! From documents to what a driver needs: drives, interface, identity. Start and wake take the same path.

use std::fs::File;
use std::os::fd::OwnedFd;

use mvm_guest_api::config as guest;
use mvm_types::Role;
use zeroize::Zeroizing;

use super::lifecycle::Locked;
use crate::host::{DriveFile, DriveLabel};
use crate::vm::error::LifecycleError;
use crate::vm::node::VmmUids;
use crate::vm::pool::{Image, RestartPolicy};
use crate::vm::tenant;
use crate::vmm::{Drive, DriveAccess, Lifetime, Nic, VmSpec};

/// The part of the lifecycle that puts a virtual machine together.
pub(super) struct Machine<'a, 'n> {
    pub instance: &'a Locked<'n>,
}

impl Machine<'_, '_> {
    /// Makes what the machine needs on the host, and describes it to the driver.
    pub fn spec(&self, image: &Image) -> Result<VmSpec, LifecycleError> {
        let Locked { node, at, doc, tenant, .. } = self.instance;
        let host = node.host();
        let run_dir = host.ensure_run_dir(&at.instance)?;
        let network = doc.network(&tenant.network.network());
        let uid = (node.uids == VmmUids::PerInstance).then(|| network.uid());
        let config = [DriveFile { name: "config.json".into(), content: Zeroizing::new(self.config()?.to_json()), mode: 0o444 }];
        let secrets = tenant::unsealed(node, tenant)?;
        // Each takes milliseconds, and none needs another.
        let (config, secrets, data, tap) = std::thread::scope(|scope| {
            let config = scope.spawn(|| host.build_drive(&at.instance, DriveLabel::Config, &config));
            let secrets = scope.spawn(|| host.build_drive(&at.instance, DriveLabel::Secrets, &secrets));
            let data = self.data();
            let tap = host.create_tap(&network, uid);
            (config.join().expect("building a drive does not panic"), secrets.join().expect("building a drive does not panic"), data, tap)
        });
        let mut drives = vec![Drive { name: "root", file: open(image)?, access: DriveAccess::ReadOnly }];
        drives.extend(data?.map(|file| Drive { name: "data", file, access: DriveAccess::ReadWrite }));
        drives.push(Drive { name: "secrets", file: secrets?, access: DriveAccess::ReadOnly });
        drives.push(Drive { name: "config", file: config?, access: DriveAccess::ReadOnly });
        Ok(VmSpec {
            at: at.clone(),
            node: node.id.clone(),
            uid,
            vcpus: doc.blueprint.resources.vcpus,
            mem_mib: doc.blueprint.resources.mem_mib,
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            kernel_args: image.kernel_args.clone(),
            drives,
            nic: Some(Nic { tap: tap?, mac: network.mac().0 }),
            run_dir,
            console_log: node.paths.console_log(at),
            vmm_log: node.paths.vmm_log(at),
            lifetime: Lifetime::Detached,
        })
    }

    fn data(&self) -> Result<Option<OwnedFd>, LifecycleError> {
        let Locked { node, at, doc, .. } = self.instance;
        match doc.blueprint.resources.data_disk_mib {
            0 => Ok(None),
            size_mib => {
                node.host().ensure_data_disk(at, size_mib)?;
                Ok(Some(node.host().open_data_disk(at)?))
            }
        }
    }

    /// What the guest learns of itself.
    fn config(&self) -> Result<guest::GuestConfig, LifecycleError> {
        let Locked { node, at, doc, tenant, pool, .. } = self.instance;
        let network = doc.network(&tenant.network.network());
        let subnet = tenant.network.ipv4_subnet;
        let address = network.address().map_err(|error| LifecycleError::Invalid { place: at.to_string(), why: error.to_string() })?;
        let workload = doc.blueprint.workload.as_ref().map(|workload| guest::Workload {
            command: workload.command.clone(),
            env: workload.env.clone(),
            restart: match workload.restart {
                RestartPolicy::Always => guest::Restart::Always,
                RestartPolicy::OnFailure => guest::Restart::OnFailure,
                RestartPolicy::Never => guest::Restart::Never,
            },
            backoff_ms: 0,
        });
        Ok(guest::GuestConfig {
            version: guest::VERSION,
            identity: guest::Identity {
                tenant: at.tenant.to_string(),
                pool: at.pool.to_string(),
                instance: at.instance.to_string(),
                node: node.id.to_string(),
            },
            role: doc.role.to_string(),
            profile: doc.blueprint.profile.to_string(),
            hostname: format!("{}-{}", at.pool, at.instance),
            config_version: pool.config_version,
            secrets_epoch: tenant.secrets_epoch,
            network: Some(guest::Network {
                mac: guest::Mac(network.mac().0),
                address: guest::Ipv4Cidr { address, prefix: subnet.prefix() },
                gateway: subnet.gateway(),
                dns: node.dns.clone(),
                mtu: 0,
            }),
            forward: doc.role == Role::Gateway,
            workload,
            requires: guest::Requires { data: doc.blueprint.resources.data_disk_mib > 0, config: true, secrets: true },
        })
    }
}

fn open(image: &Image) -> Result<OwnedFd, LifecycleError> {
    let unusable = |error: std::io::Error| crate::vm::pool::ImageError::Unusable {
        revision: image.revision.clone(),
        why: format!("{}: {error}", image.rootfs.display()),
    };
    Ok(File::open(&image.rootfs).map_err(unusable)?.into())
}
