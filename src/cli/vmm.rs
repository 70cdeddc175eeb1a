//! The drivers as the options set them up.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use mvm_firecracker::{CpuTemplate, HugePages};

use super::exit::{CliError, Exit};
use super::open::{AccelChoice, Globals, VmmChoice, find_qemu};
use crate::infra::paths::Paths;
use crate::net::UidRange;
use crate::vmm::drivers::{Demand, DriverChoice, Drivers};
use crate::vmm::firecracker::{Firecracker, FirecrackerOptions, JailNetwork, VERSIONS_DIR};
use crate::vmm::qemu::{AccelerationChoice, Qemu, QemuOptions};

/// Options of the drivers.
#[derive(Debug, Clone, Args)]
pub struct VmmOptions {
    /// Refuse what is no boundary against hostile guests: execution in software, Firecracker without its jailer or its filters
    #[arg(long, global = true, env = "MVM_PRODUCTION", help_heading = "Global options")]
    pub production: bool,
    /// A firecracker, with its jailer beside it, instead of the newest that is found
    #[arg(long, global = true, env = "MVM_FIRECRACKER", value_name = "FILE", help_heading = "Global options")]
    pub firecracker: Option<PathBuf>,
    /// Where versions of Firecracker lie side by side
    #[arg(long, global = true, env = "MVM_FIRECRACKER_DIR", default_value = VERSIONS_DIR, value_name = "DIR", help_heading = "Global options")]
    pub firecracker_dir: PathBuf,
    /// Take a Firecracker that lacks security fixes
    #[arg(long, global = true, env = "MVM_ALLOW_OLD_FIRECRACKER", help_heading = "Global options")]
    pub allow_old_firecracker: bool,
    /// Give each Firecracker a network namespace of its own, with nothing in it but its guest's interface
    #[arg(long, global = true, env = "MVM_JAIL_NETNS", help_heading = "Global options")]
    pub jail_netns: bool,
    /// Arguments for Firecracker itself, separated by spaces; one that was built without system call filters wants `--no-seccomp`
    #[arg(
        long,
        global = true,
        env = "MVM_FIRECRACKER_ARGS",
        default_value = "",
        value_name = "ARGS",
        hide_default_value = true,
        help_heading = "Global options"
    )]
    pub firecracker_args: String,
    /// The CPU that Firecracker shows to guests, so that snapshots wake on unlike hosts
    #[arg(long, global = true, env = "MVM_CPU_TEMPLATE", default_value = "none", value_name = "TEMPLATE", help_heading = "Global options")]
    pub cpu_template: WhichTemplate,
    /// The pages that Firecracker makes guest memory of
    #[arg(long, global = true, env = "MVM_HUGE_PAGES", default_value = "none", value_name = "PAGES", help_heading = "Global options")]
    pub huge_pages: WhichPages,
    /// The first of the users that VMMs have, some 278 million; chosen when the node's state begins, and kept by it [default: 1869611008]
    #[arg(long, global = true, env = "MVM_FIRST_UID", value_name = "UID", help_heading = "Global options")]
    pub first_uid: Option<UidRange>,
    /// Arguments for guests' kernels under Firecracker, before those of their images, separated by spaces
    #[arg(
        long,
        global = true,
        env = "MVM_KERNEL_ARGS",
        default_value = "",
        value_name = "ARGS",
        hide_default_value = true,
        help_heading = "Global options"
    )]
    pub kernel_args: String,
}

/// A CPU template (docs/cpu_templates/cpu-templates.md of Firecracker).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WhichTemplate {
    /// The host's own CPU
    None,
    /// Intel from Skylake on, without what newer ones have
    T2,
    /// T2 for a mix of Skylake and Cascade Lake
    T2s,
    /// T2 for a mix of Cascade Lake and Ice Lake
    T2cl,
    /// AMD Milan like T2
    T2a,
    /// Intel from Skylake on like EC2's C3
    C3,
}

/// Pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WhichPages {
    /// Of the host's usual size
    None,
    /// Of 2 MiB, which the host has to reserve
    #[value(name = "2m")]
    TwoMib,
}

/// The drivers of real machines, which look for nothing yet.
///
/// # Errors
/// When options contradict each other.
pub fn drivers(globals: &Globals, paths: &Paths, uids: UidRange) -> Result<Drivers, CliError> {
    let options = &globals.drivers;
    if options.production && !options.firecracker_args.trim().is_empty() {
        let text = "--firecracker-args is for development builds, and --production is not: leave one of them out";
        return Err(CliError::new(Exit::Usage, text.to_owned()));
    }
    let choice = match globals.vmm {
        VmmChoice::Auto | VmmChoice::Simulated => DriverChoice::Auto,
        VmmChoice::Firecracker => DriverChoice::Firecracker,
        VmmChoice::Qemu => DriverChoice::Qemu,
    };
    let demand = if options.production { Demand::Production } else { Demand::Any };
    Ok(Drivers::new(firecracker(globals, paths, uids), qemu(globals, paths), choice, demand))
}

/// The Firecracker driver as the options set it up.
pub fn firecracker(globals: &Globals, paths: &Paths, uids: UidRange) -> Firecracker {
    let options = &globals.drivers;
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    Firecracker::new(FirecrackerOptions {
        binary: options.firecracker.clone(),
        versions: options.firecracker_dir.clone(),
        allow_old: options.allow_old_firecracker,
        facts_file: paths.run().join("firecracker.json"),
        cpu_template: match options.cpu_template {
            WhichTemplate::None => None,
            WhichTemplate::T2 => Some(CpuTemplate::T2),
            WhichTemplate::T2s => Some(CpuTemplate::T2S),
            WhichTemplate::T2cl => Some(CpuTemplate::T2CL),
            WhichTemplate::T2a => Some(CpuTemplate::T2A),
            WhichTemplate::C3 => Some(CpuTemplate::C3),
        },
        trial_uid: uids.trial(),
        huge_pages: match options.huge_pages {
            WhichPages::None => HugePages::None,
            WhichPages::TwoMib => HugePages::TwoMib,
        },
        network: if options.jail_netns { JailNetwork::Own } else { JailNetwork::Shared },
        kernel_args: words(&options.kernel_args),
        extra: words(&options.firecracker_args),
    })
}

/// The QEMU driver as the options set it up.
pub fn qemu(globals: &Globals, paths: &Paths) -> Qemu {
    let acceleration = match globals.accel {
        AccelChoice::Auto => AccelerationChoice::Auto,
        AccelChoice::Kvm => AccelerationChoice::Kvm,
        AccelChoice::Tcg => AccelerationChoice::Tcg,
    };
    Qemu::new(QemuOptions { binary: find_qemu(), facts_file: paths.run().join("qemu.json"), acceleration })
}
