//! From documents to what a driver needs: drives, interface, identity. Start and wake take the same path.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;

use mvm_guest_api::config as guest;
use mvm_types::{InstanceAddress, Role, SecretName};
use zeroize::Zeroizing;

use super::config::InstanceDoc;
use super::lifecycle::Locked;
use crate::host::{DriveFile, DriveLabel};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::node::Node;
use crate::vm::pool::role::RoleTraits;
use crate::vm::pool::{Exposure, Image, PoolDoc, RestartPolicy};
use crate::vm::tenant::{self, TenantDoc};
use crate::vmm::{Drive, DriveAccess, Lifetime, Nic, VmSpec};

/// The part of the lifecycle that puts a virtual machine together, from the documents as they are when it begins.
pub(super) struct Machine<'n> {
    node: &'n Node,
    at: InstanceAddress,
    tenant: TenantDoc,
    pool: PoolDoc,
    doc: InstanceDoc,
}

/// The drives that are made anew for each start. They are in memory only: nothing of them has to be taken away again.
pub(super) struct NewDrives {
    config: OwnedFd,
    secrets: Option<OwnedFd>,
}

impl<'n> Machine<'n> {
    /// Takes the documents of an instance.
    pub fn of(instance: &Locked<'n>) -> Self {
        let Locked { node, at, tenant, pool, doc, .. } = instance;
        Self { node, at: at.clone(), tenant: tenant.clone(), pool: pool.clone(), doc: doc.clone() }
    }

    /// Makes the drives that the role requires.
    pub fn drives(&self) -> Result<NewDrives, LifecycleError> {
        let traits = self.pool.role_traits();
        std::thread::scope(|scope| {
            let secrets = traits.requires_secrets_drive.then(|| scope.spawn(|| self.secrets_drive()));
            let config = self.config_drive(&traits);
            let secrets = secrets.map(|secrets| secrets.join().expect("building a drive does not panic")).transpose();
            Ok(NewDrives { config: config?, secrets: secrets? })
        })
    }

    /// Makes what else the machine needs on the host, and describes it to the driver.
    pub fn spec(&self, NewDrives { config, secrets }: NewDrives, image: &Image) -> Result<VmSpec, LifecycleError> {
        let Self { node, at, doc, tenant, .. } = self;
        let host = node.host();
        let run_dir = host.ensure_run_dir(&at.instance)?;
        let network = doc.network(&tenant.network.network());
        let uid = node.instance_uid(&network);
        let data = self.data()?;
        let tap = host.create_tap(&network, uid)?;
        let mut drives = vec![Drive { name: "root", file: open(image)?, access: DriveAccess::ReadOnly }];
        drives.extend(data.map(|file| Drive { name: "data", file, access: DriveAccess::ReadWrite }));
        drives.extend(secrets.map(|file| Drive { name: "secrets", file, access: DriveAccess::ReadOnly }));
        drives.push(Drive { name: "config", file: config, access: DriveAccess::ReadOnly });
        Ok(VmSpec {
            at: at.clone(),
            node: node.id.clone(),
            uid,
            limits: host.limits_of(&at.instance)?,
            vcpus: doc.blueprint.resources.vcpus,
            mem_mib: doc.blueprint.resources.mem_mib,
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            kernel_args: image.kernel_args.clone(),
            drives,
            nic: Some(Nic { tap, tap_name: network.tap(), mac: network.mac().0 }),
            rates: doc.blueprint.resources.rates(),
            reclaim_memory: doc.blueprint.resources.reclaim_memory,
            run_dir,
            scratch: Some(node.paths.vmm_scratch(at)),
            console_log: node.paths.console_log(at),
            vmm_log: node.paths.vmm_log(at),
            lifetime: Lifetime::Detached,
        })
    }

    fn data(&self) -> Result<Option<OwnedFd>, LifecycleError> {
        let Self { node, at, doc, .. } = self;
        match doc.blueprint.resources.data_disk_mib {
            0 => Ok(None),
            size_mib => {
                node.host().ensure_data_disk(at, size_mib)?;
                Ok(Some(node.host().open_data_disk(at)?))
            }
        }
    }

    /// The drive from which the guest learns who it is; every instance has one.
    fn config_drive(&self, traits: &RoleTraits) -> Result<OwnedFd, LifecycleError> {
        let Self { node, at, doc, pool, .. } = self;
        let build = || {
            let mut files = vec![drive_file("config.json", self.config(traits)?.to_json())];
            if doc.role == Role::Gateway {
                files.push(drive_file("gateway.json", gateway_rules(&pool.spec.expose)));
            }
            Ok(node.host().build_drive(&at.instance, DriveLabel::Config, &files)?)
        };
        build().map_err(|error| self.lacking("configuration", traits.requires_config_drive, error))
    }

    /// The drive with the tenant's secrets, for a role that has to do with them.
    fn secrets_drive(&self) -> Result<OwnedFd, LifecycleError> {
        let Self { node, at, tenant, .. } = self;
        let build = || {
            let secrets = tenant::unsealed(node, tenant)?;
            Ok(node.host().build_drive(&at.instance, DriveLabel::Secrets, &secrets)?)
        };
        build().map_err(|error| self.lacking("secrets", true, error))
    }

    /// Says that a drive is missing which the role requires.
    fn lacking(&self, drive: &str, required: bool, error: LifecycleError) -> LifecycleError {
        if !required || error.is_killed() {
            return error;
        }
        let Self { at, doc, .. } = self;
        let why = format!("its role {} requires the {drive} drive, which cannot be made: {}", doc.role, with_causes(&error));
        LifecycleError::Unready { what: format!("start {at}"), why }
    }

    /// What the guest learns of itself.
    fn config(&self, traits: &RoleTraits) -> Result<guest::GuestConfig, LifecycleError> {
        let Self { node, at, doc, tenant, pool, .. } = self;
        let network = doc.network(&tenant.network.network());
        let subnet = tenant.network.ipv4_subnet;
        let address = network.address().map_err(|error| LifecycleError::Invalid { place: at.to_string(), why: error.to_string() })?;
        // A role without the drive has none of them.
        let there = if traits.requires_secrets_drive { Some(node.secret_names(tenant)?) } else { None };
        let mut not_enabled = Vec::new();
        let mut enabled = |what: &str, needs: &[SecretName]| {
            let missing = missing_secrets(what, needs, there.as_ref());
            not_enabled.extend(missing.clone());
            missing.is_none()
        };
        let services =
            traits.services.iter().filter(|service| enabled(&service.unit, &service.secrets)).map(|service| service.unit.clone()).collect();
        let workload = doc.blueprint.workload.as_ref().filter(|workload| enabled("workload", &workload.secrets));
        let workload = workload.map(|workload| guest::Workload {
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
            requires: guest::Requires {
                data: doc.blueprint.resources.data_disk_mib > 0,
                config: true,
                secrets: traits.requires_secrets_drive,
            },
            handlers: Some(traits.vsock_handlers.iter().map(|handler| handler.as_str().to_owned()).collect()),
            services,
            not_enabled,
        })
    }
}

fn drive_file(name: &str, content: Vec<u8>) -> DriveFile {
    DriveFile { name: name.into(), content: Zeroizing::new(content), mode: 0o444 }
}

/// Says what is not enabled because of which missing secrets; `None` when all are there. A role without the secrets drive has none.
pub fn missing_secrets(what: &str, needs: &[SecretName], there: Option<&BTreeSet<SecretName>>) -> Option<String> {
    let Some(there) = there else {
        let needs: Vec<&str> = needs.iter().map(SecretName::as_str).collect();
        return (!needs.is_empty()).then(|| {
            let needs = needs.join(", ");
            format!("{what} is not enabled: it needs the secret {needs}, and its role does not require the secrets drive")
        });
    };
    let missing: Vec<&str> = needs.iter().filter(|name| !there.contains(*name)).map(SecretName::as_str).collect();
    (!missing.is_empty()).then(|| format!("{what} is not enabled: the tenant has no secret {}", missing.join(", ")))
}

/// `gateway.json`: what a gateway lets in from outside its tenant.
fn gateway_rules(expose: &[Exposure]) -> Vec<u8> {
    let allow: Vec<_> = expose.iter().map(|one| serde_json::json!({ "protocol": one.protocol, "port": one.port })).collect();
    serde_json::json!({ "version": 1, "allow": allow }).to_string().into_bytes()
}

fn open(image: &Image) -> Result<OwnedFd, LifecycleError> {
    let unusable = |error: std::io::Error| crate::vm::pool::ImageError::Unusable {
        revision: image.revision.clone(),
        why: format!("{}: {error}", image.rootfs.display()),
    };
    Ok(File::open(&image.rootfs).map_err(unusable)?.into())
}
