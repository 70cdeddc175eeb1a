//! The microVM of one build: its drives, its place, its end.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use mvm_guest_api::config as guest;
use mvm_hostd::{drive, scratch};
use mvm_types::{InstanceAddress, InstanceId, Role};
use zeroize::Zeroizing;

use super::conversation::{Conversation, Trouble};
use super::watchman::Watchman;
use super::{TICK, job, result};
use crate::host::{DriveFile, DriveLabel, HostError};
use crate::image::nix::{BuildError, Job, Lines, Provenance};
use crate::net::BuilderNetwork;
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::node::Node;
use crate::vm::pool::Image;
use crate::vm::throwaway::{Throwaway, Waited};
use crate::vmm::{Drive, DriveAccess, Lifetime, Liveness, Nic, Rates, VmSpec};

/// What the machine's directory holds at most, in bytes: sockets, and what its console and VMM say.
const SCRATCH: u64 = 32 << 20;

/// A disk for less than this is none for nix's own database and a file system's journal, in bytes.
const LEAST_WORK: u64 = 64 << 20;

/// More than this many processors make no build of an image faster.
const MOST_VCPUS: usize = 4;

/// The machine's drives besides root and configuration.
pub(super) struct Drives {
    /// Where the machine's sockets and logs are.
    dir: PathBuf,
    instance: InstanceId,
    job: OwnedFd,
    work: OwnedFd,
    result: OwnedFd,
}

impl Drives {
    /// Opens the result's drive for reading it when the machine is gone.
    pub fn result_reader(&self) -> Result<OwnedFd, BuildError> {
        drive::read_only(&self.result).map_err(|error| BuildError::Builder { what: "open its result drive".into(), why: error.to_string() })
    }
}

/// Makes the machine's directory, which is memory of this thread's own, and its drives, which have no name.
pub(super) fn drives(node: &Node, job: &Job, place: &Path) -> Result<Drives, BuildError> {
    let cannot = |what: &str| {
        let what = what.to_owned();
        move |error: &dyn std::error::Error| BuildError::Builder { what, why: with_causes(error) }
    };
    let all = node.paths.run().join("builders");
    let mut make = DirBuilder::new();
    make.recursive(true).mode(0o700);
    make.create(&all).map_err(BuildError::at(&all))?;
    scratch::mount_scratch(&all, SCRATCH).map_err(|error| cannot("make its directory")(&error))?;
    let mut bits = [0; 4];
    (node.seams.random)(&mut bits);
    let instance = InstanceId::from_bits(u32::from_be_bytes(bits));
    let (dir, staged) = (all.join(instance.as_str()), all.join("job"));
    // In a directory of its own, since a file system's root has things of its own in it, and a flake is all that is in a directory.
    let tree = staged.join(job::TREE);
    for path in [&dir, &tree] {
        make.create(path).map_err(BuildError::at(path))?;
    }
    let document = staged.join(job::DOCUMENT);
    fs::write(&document, job::describe(job)).map_err(BuildError::at(&document))?;
    scratch::show(&job.tree, &tree).map_err(|error| cannot("reach the flake's sources")(&error))?;
    let disk = job.limits.disk_mib << 20;
    let job_drive = drive::nameless(place, 0).map_err(|error| cannot("make its job drive")(&error))?;
    crate::image::make_drive(&staged, job::LABEL, &drive::path_of(&job_drive), disk)
        .map_err(|error| cannot("make its job drive")(&error))?;
    Ok(Drives {
        dir,
        instance,
        job: drive::read_only(&job_drive).map_err(|error| cannot("make its job drive")(&error))?,
        work: drive::nameless_ext4(place, disk.max(LEAST_WORK), "mvm-work").map_err(|error| cannot("make its work drive")(&error))?,
        result: drive::nameless(place, result::drive_size(job)).map_err(|error| cannot("make its result drive")(&error))?,
    })
}

/// Describes the machine to the driver.
pub(super) fn spec(
    node: &Node,
    job: &Job,
    image: &Image,
    root: &Path,
    drives: Drives,
    network: Option<&BuilderNetwork>,
) -> Result<VmSpec, LifecycleError> {
    let Drives { dir, instance, job: job_drive, work, result } = drives;
    let uid = node.vmm_uid(|range| range.builder(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()));
    let config = config(node, &instance, network);
    let files = [DriveFile { name: "config.json".into(), content: Zeroizing::new(config.to_json()), mode: 0o444 }];
    let config = node.host().build_drive(&instance, DriveLabel::Config, &files)?;
    let open = |source| HostError::Io { what: format!("cannot open {}", root.display()), source };
    let root = OwnedFd::from(File::open(root).map_err(open)?);
    let nic = match network {
        Some(network) => Some(Nic { tap: node.host().create_builder_tap(network, uid)?, tap_name: network.tap(), mac: network.mac().0 }),
        None => None,
    };
    let limits = node.host().limits_of(&instance)?;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(MOST_VCPUS));
    Ok(VmSpec {
        at: InstanceAddress::new("builder".parse().expect("it is a tenant id"), "builder".parse().expect("it is a pool id"), instance),
        node: node.id.clone(),
        uid,
        limits,
        vcpus: u8::try_from(cpus).expect("it is at most 4"),
        mem_mib: job.limits.mem_mib,
        kernel: image.kernel.clone(),
        initrd: image.initrd.clone(),
        kernel_args: image.kernel_args.clone(),
        // The guest's script knows the order.
        drives: vec![
            Drive { name: "root", file: root, access: DriveAccess::ReadOnly },
            Drive { name: "config", file: config, access: DriveAccess::ReadOnly },
            Drive { name: "job", file: job_drive, access: DriveAccess::ReadOnly },
            Drive { name: "work", file: work, access: DriveAccess::ReadWrite },
            Drive { name: "result", file: result, access: DriveAccess::ReadWrite },
        ],
        nic,
        rates: Rates::default(),
        reclaim_memory: false,
        console_log: dir.join("console.log"),
        vmm_log: dir.join("vmm.log"),
        run_dir: dir,
        scratch: None,
        lifetime: Lifetime::WithCaller,
    })
}

/// What the guest learns of itself: nothing of any tenant but where the way out is.
fn config(node: &Node, instance: &InstanceId, network: Option<&BuilderNetwork>) -> guest::GuestConfig {
    guest::GuestConfig {
        version: guest::VERSION,
        identity: guest::Identity {
            tenant: "builder".into(),
            pool: "builder".into(),
            instance: instance.to_string(),
            node: node.id.to_string(),
        },
        role: Role::Builder.to_string(),
        profile: "minimal".into(),
        hostname: "builder".into(),
        config_version: 1,
        secrets_epoch: 0,
        network: network.map(|network| guest::Network {
            mac: guest::Mac(network.mac().0),
            address: guest::Ipv4Cidr { address: network.address(), prefix: network.tenant.subnet.prefix() },
            gateway: network.tenant.subnet.gateway(),
            dns: node.dns.clone(),
            mtu: 0,
        }),
        forward: false,
        workload: None,
        services: Vec::new(),
        handlers: Some(vec!["exec".into()]),
        not_enabled: Vec::new(),
        requires: guest::Requires { data: false, config: true, secrets: false },
    }
}

/// Boots the machine, has it build, and ends it.
pub(super) fn run(node: &Node, spec: VmSpec, watchman: &Watchman<'_>, offline: bool) -> Result<Provenance, BuildError> {
    let console = spec.console_log.clone();
    let cannot = |what: &str, error: &LifecycleError| BuildError::Builder { what: what.to_owned(), why: with_causes(error) };
    let machine = Throwaway::boot(node, spec).map_err(|error| cannot("boot its microVM", &error))?;
    let given_up = || {
        watchman.not_yet();
        watchman.verdict().is_err()
    };
    match machine.wait_ready(&given_up) {
        Ok(Waited::Ready) => {}
        Ok(Waited::GivenUp) => watchman.verdict()?,
        Err(error) => return Err(cannot("boot its microVM", &error)),
    }
    let run_dir = machine.vm().run_dir.clone();
    let outcome = std::thread::scope(|scope| {
        let talking = scope.spawn(|| Conversation::open(&run_dir, watchman, offline)?.build());
        while !talking.is_finished() {
            let alive = node.vmm().liveness(machine.vm()) == Liveness::Alive;
            if watchman.verdict().is_err() || !alive {
                break;
            }
            std::thread::sleep(TICK);
        }
        let verdict = watchman.verdict();
        if !talking.is_finished() || verdict.is_err() {
            // Whoever talks to it notices.
            machine.end().map_err(|error| cannot("end its microVM", &error))?;
        }
        let said = talking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        verdict?;
        match said {
            Ok(provenance) => Ok(provenance),
            Err(Trouble::Build(error)) => Err(error),
            Err(Trouble::Guest(error)) => Err(BuildError::Failed {
                attribute: watchman.job.attribute.clone(),
                said: format!("its microVM does not answer ({error}); it said last: {}", last_words(&console)),
            }),
        }
    });
    machine.end().map_err(|error| cannot("end its microVM", &error))?;
    outcome
}

/// The end of what the machine's console says.
fn last_words(console: &Path) -> String {
    const MOST: u64 = 1000;
    let read = || {
        let mut file = File::open(console)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MOST)))?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    let (mut lines, mut said) = (Lines::default(), Vec::new());
    lines.take(&read().unwrap_or_default(), |line| said.push(line));
    lines.end(&mut |line| said.push(line));
    said[said.len().saturating_sub(4)..].join("; ")
}
