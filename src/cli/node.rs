//! `mvm node`.

use clap::Subcommand;
use mvm_types::NodeId;
use serde::Serialize;

use super::CliResult;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open_as};
use crate::agent::observe::observe;
use crate::host::HostFacts;
use crate::infra::display::print_info;
use crate::vm::instance::StateName;
use crate::vm::node::Node;
use crate::vmm::firecracker::install;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Show what this host is and what it can run
    Info,
    /// Give a node that is new an id of your choice, which documents with `node_id` are for
    #[command(after_help = "Example:\n  mvm node init --id rack3-host7\n\nWithout it the first change gives the node an id of its own.")]
    Init {
        /// The id
        #[arg(long, value_name = "ID")]
        id: NodeId,
    },
    /// Put a release of Firecracker in place, beside those that are there: a snapshot is woken by the version that made it
    #[command(
        after_help = "Example:\n  mvm node install-firecracker --from firecracker-v1.16.1-x86_64.tgz --sha256 SUM\n\nThe sum is in the release's SHA256SUMS."
    )]
    InstallFirecracker {
        /// The release's archive
        #[arg(long, value_name = "FILE")]
        from: std::path::PathBuf,
        /// Its SHA-256, in hex
        #[arg(long, value_name = "SUM", value_parser = sha256)]
        sha256: String,
    },
    /// Show what the instances of this host use
    Stats,
    /// Remove images that nothing uses and no pool got lately, and what killed builds left
    #[command(
        after_help = "Example:\n  mvm node gc --older-than 30d --dry-run\n\nWhat the current revision of a pool, an instance or a snapshot refers to stays, however old it is."
    )]
    Gc {
        /// How long ago a pool must have got an image for the last time
        #[arg(long, default_value = "14d", value_name = "AGE", value_parser = super::args::age)]
        older_than: std::time::Duration,
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
    },
}

fn sha256(text: &str) -> Result<String, String> {
    let whole = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if whole { Ok(text.to_owned()) } else { Err("a SHA-256 is 64 hex digits".into()) }
}

#[derive(Serialize)]
struct NodeInfo {
    node: String,
    state_dir: String,
    run_dir: String,
    vmm: String,
    vmm_build: Option<String>,
    acceleration: Option<String>,
    guest_memory_mib: u64,
    facts: HostFacts,
}

#[derive(Serialize)]
struct NodeStats {
    tenants: usize,
    pools: usize,
    instances: usize,
    running: usize,
    warm: usize,
    sleeping: usize,
    guest_memory_mib: u64,
    guest_memory_used_mib: u64,
    vmm_rss_kib: u64,
    vmm_cpu_ms: u64,
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: &NodeCommand) -> CliResult {
    if let NodeCommand::InstallFirecracker { from, sha256 } = command {
        let place = install(from, sha256, &globals.drivers.firecracker_dir).map_err(|why| CliError::new(Exit::Failed, why))?;
        crate::infra::display::write_out(&format!("{}\n", place.display()))?;
        return Ok(Exit::Done);
    }
    let (intent, wanted) = match command {
        NodeCommand::Info | NodeCommand::Stats | NodeCommand::InstallFirecracker { .. } => (Intent::Look, None),
        NodeCommand::Gc { .. } => (Intent::Change, None),
        NodeCommand::Init { id } => (Intent::Change, Some(id)),
    };
    let opened = open_as(globals, intent, wanted)?;
    match command {
        NodeCommand::Init { id } if opened.node.id != *id => {
            let text = format!("this node is {} already, and keeps its id for its life", opened.node.id);
            return Err(CliError::new(Exit::Refused, text));
        }
        NodeCommand::Init { .. } | NodeCommand::InstallFirecracker { .. } => {}
        NodeCommand::Info => info(globals, &opened.node)?,
        NodeCommand::Stats => stats(globals, &opened.node)?,
        NodeCommand::Gc { older_than, dry_run } => {
            let collected = opened.node.node_collect(*older_than, super::revisions::collect(*dry_run))?;
            super::revisions::show(globals, &collected)?;
        }
    }
    opened.close()?;
    Ok(Exit::Done)
}

fn info(globals: &Globals, node: &Node) -> Result<(), CliError> {
    let facts = node.host().facts()?;
    let stamp = node.vmm().stamp();
    let memory = node.host().guest_memory_mib()?;
    let (build, acceleration) = match &stamp {
        Ok(stamp) => (stamp.build.clone(), format!("{:?}", stamp.acceleration).to_lowercase()),
        Err(error) => (error.to_string(), "not known yet".to_owned()),
    };
    let lines = [
        ("node", node.id.to_string()),
        ("state directory", node.paths.state().display().to_string()),
        ("run directory", node.paths.run().display().to_string()),
        ("vmm", node.vmm().kind().as_str().to_owned()),
        ("vmm build", build),
        ("acceleration", acceleration),
        ("kernel", facts.kernel.clone()),
        ("limits", super::doctor::limits(&facts.limits)),
        ("processors", facts.cpus.to_string()),
        ("memory MiB", format!("{} of {} available", facts.memory_available_mib, facts.memory_total_mib)),
        ("for guests MiB", memory.to_string()),
        ("state disk MiB", format!("{} of {} free", facts.state_free_mib, facts.state_total_mib)),
    ];
    let info = NodeInfo {
        node: node.id.to_string(),
        state_dir: node.paths.state().display().to_string(),
        run_dir: node.paths.run().display().to_string(),
        vmm: node.vmm().kind().as_str().to_owned(),
        vmm_build: stamp.as_ref().ok().map(|stamp| stamp.build.clone()),
        acceleration: stamp.as_ref().ok().map(|stamp| format!("{:?}", stamp.acceleration).to_lowercase()),
        guest_memory_mib: memory,
        facts,
    };
    Ok(print_info(&info, &lines, globals.format())?)
}

fn stats(globals: &Globals, node: &Node) -> Result<(), CliError> {
    let observed = observe(node)?;
    let pools: Vec<_> = observed.tenants.values().flat_map(|tenant| tenant.pools.values()).collect();
    let instances: Vec<_> = pools.iter().flat_map(|pool| &pool.instances).collect();
    let count = |state| instances.iter().filter(|one| one.doc.state.name() == state && !one.needs_recovery()).count();
    let with_machine = || instances.iter().filter(|one| !one.needs_recovery()).filter_map(|one| Some((one, one.doc.state.vm()?)));
    let used: Vec<_> = with_machine().filter_map(|(_, vm)| node.vmm().stats(vm).ok()).collect();
    let stats = NodeStats {
        tenants: observed.tenants.len(),
        pools: pools.len(),
        instances: instances.len(),
        running: count(StateName::Running),
        warm: count(StateName::Warm),
        sleeping: count(StateName::Sleeping),
        guest_memory_mib: observed.capacity_mib,
        guest_memory_used_mib: with_machine().map(|(one, _)| u64::from(one.doc.blueprint.resources.mem_mib)).sum(),
        vmm_rss_kib: used.iter().map(|used| used.rss_kib).sum(),
        vmm_cpu_ms: used.iter().map(|used| used.cpu_ms).sum(),
    };
    let lines = [
        ("tenants", stats.tenants.to_string()),
        ("pools", stats.pools.to_string()),
        ("instances", stats.instances.to_string()),
        ("running", stats.running.to_string()),
        ("warm", stats.warm.to_string()),
        ("sleeping", stats.sleeping.to_string()),
        ("guest memory MiB", format!("{} of {}", stats.guest_memory_used_mib, stats.guest_memory_mib)),
        ("VMM resident KiB", stats.vmm_rss_kib.to_string()),
        ("VMM CPU ms", stats.vmm_cpu_ms.to_string()),
    ];
    Ok(print_info(&stats, &lines, globals.format())?)
}
