//! `mvm instance`.

use clap::{Args, Subcommand};
use mvm_types::{Address, InstanceAddress, InstanceSelector, PoolAddress};
use serde::Serialize;

use super::CliResult;
use super::args::{confirm, resolve};
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use super::progress::ProgressLines;
use super::status::instance_row;
use crate::agent::observe::{Observed, ObservedInstance, observe};
use crate::infra::display::{InstanceRow, OutputFormat, Row, Width, print_info, print_rows, to_json, write_out};
use crate::vm::error::LifecycleError;
use crate::vm::instance::{InstanceDoc, StateName, StopMode};
use crate::vm::node::Node;
use crate::vmm::{VmStats, VmmCall};

/// Which instance.
#[derive(Debug, Args)]
pub struct Which {
    /// The instance; the start of its id is enough
    #[arg(value_name = "TENANT/POOL/INSTANCE")]
    pub instance: InstanceSelector,
}

/// The instance to bring up.
#[derive(Debug, Args)]
pub struct Timed {
    #[command(flatten)]
    which: Which,
    /// Show the calls to the VMM with their times, where the driver makes any
    #[arg(long)]
    timings: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum InstanceCommand {
    /// Write down new instances of a pool; `start` boots them
    Create {
        /// The pool
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// How many
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65_532))]
        count: u32,
    },
    /// List instances
    List {
        /// Only this tenant's or pool's
        #[arg(value_name = "TENANT[/POOL]")]
        address: Option<Address>,
    },
    /// Show an instance
    Info(Which),
    /// Boot an instance afresh, and wait until it is ready
    Start(Timed),
    /// End an instance; its data disk stays
    Stop {
        #[command(flatten)]
        which: Which,
        /// Kill it without asking the guest
        #[arg(long)]
        force: bool,
    },
    /// Pause an instance and keep its memory
    Warm(Which),
    /// Let a warm instance run again
    Resume(Which),
    /// Write an instance to disk, and free its memory
    Sleep(Which),
    /// Let a sleeping instance go on where it was
    Wake(Timed),
    /// Remove an instance with its data
    Destroy {
        #[command(flatten)]
        which: Which,
        /// Do not ask
        #[arg(long, short, visible_alias = "force")]
        yes: bool,
    },
    /// Show what an instance's VMM counts: what its devices moved, and what went wrong in them
    ///
    /// The names are the VMM's own. Firecracker counts anew each time it has written its numbers, which it does once a minute besides.
    Metrics(Which),
    /// Show what instances use
    Stats {
        /// Only this tenant's, pool's or instance's
        #[arg(value_name = "TENANT[/POOL[/INSTANCE]]")]
        address: Option<Address>,
    },
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: InstanceCommand) -> CliResult {
    let looks = matches!(
        command,
        InstanceCommand::List { .. } | InstanceCommand::Info(_) | InstanceCommand::Stats { .. } | InstanceCommand::Metrics(_)
    );
    let opened = open(globals, if looks { Intent::Look } else { Intent::Change })?;
    let node = &opened.node;
    match command {
        InstanceCommand::Create { pool, count } => {
            super::revisions::build_first(node, &pool)?;
            let made = node.instances_create(&pool, count)?;
            node.apply_network()?;
            let names: Vec<String> = made.iter().map(ToString::to_string).collect();
            match globals.format() {
                OutputFormat::Json => write_out(&to_json(&names)?)?,
                _ => write_out(&names.iter().map(|name| format!("{name}\n")).collect::<String>())?,
            }
        }
        InstanceCommand::List { address } => list(globals, node, address.as_ref())?,
        InstanceCommand::Info(which) => info(globals, node, &resolve(node, &which.instance)?)?,
        InstanceCommand::Start(Timed { which, timings }) => {
            act(node, &which, "start", |at| {
                node.apply_network()?;
                node.start(at, StateName::Running)
            })?;
            show_timings(globals, node, timings)?;
        }
        InstanceCommand::Stop { which, force } => {
            let mode = if force { StopMode::Force } else { StopMode::Graceful };
            act(node, &which, "stop", |at| node.stop(at, mode))?;
        }
        InstanceCommand::Warm(which) => act(node, &which, "warm", |at| node.warm(at))?,
        InstanceCommand::Resume(which) => act(node, &which, "resume", |at| node.resume(at))?,
        InstanceCommand::Sleep(which) => act(node, &which, "sleep", |at| node.sleep(at))?,
        InstanceCommand::Wake(Timed { which, timings }) => {
            act(node, &which, "wake", |at| {
                node.apply_network()?;
                node.wake(at, StateName::Running)
            })?;
            show_timings(globals, node, timings)?;
        }
        InstanceCommand::Destroy { which, yes } => {
            let at = resolve(node, &which.instance)?;
            let state = node.instance(&at)?.state.name();
            confirm(yes, &format!("Destroy {at}, which is {state}, with its data?"))?;
            act(node, &which, "destroy", |at| {
                if matches!(state, StateName::Running | StateName::Warm) {
                    node.stop(at, StopMode::Graceful)?;
                }
                node.destroy(at)?;
                node.apply_network()
            })?;
        }
        InstanceCommand::Metrics(which) => metrics(globals, node, &resolve(node, &which.instance)?)?,
        InstanceCommand::Stats { address } => stats(globals, node, address.as_ref())?,
    }
    opened.close()?;
    Ok(Exit::Done)
}

fn act(node: &Node, which: &Which, verb: &str, body: impl FnOnce(&InstanceAddress) -> Result<(), LifecycleError>) -> Result<(), CliError> {
    let at = resolve(node, &which.instance)?;
    let lines = ProgressLines::new();
    let bar = lines.spin(&format!("{verb} {at}"));
    let result = body(&at).and_then(|()| match node.pool(&at.pool_address()) {
        // The ports that it exposes lead to what runs now.
        Ok(pool) if !pool.spec.expose.is_empty() => node.apply_network(),
        _ => Ok(()),
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(result?)
}

impl Row for VmmCall {
    const COLUMNS: &'static [(&'static str, Width)] = &[("CALL", Width::Narrow), ("AT", Width::Narrow), ("TOOK", Width::Narrow)];
    fn cells(&self) -> Vec<String> {
        let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
        vec![self.what.clone(), ms(self.began_us), ms(self.took_us)]
    }
}

fn show_timings(globals: &Globals, node: &Node, wanted: bool) -> Result<(), CliError> {
    let calls = node.vmm().take_timeline();
    if wanted { Ok(print_rows(&calls, globals.format())?) } else { Ok(()) }
}

/// What is there, and which of it is meant.
struct Selected<'a> {
    observed: Observed,
    address: Option<&'a Address>,
    /// The instance that the address means, if it is one's.
    at: Option<InstanceAddress>,
}

impl Selected<'_> {
    fn instances(&self) -> impl Iterator<Item = &ObservedInstance> {
        let all = self.observed.tenants.values().flat_map(|tenant| tenant.pools.values()).flat_map(|pool| &pool.instances);
        all.filter(|one| match self.address {
            None => true,
            Some(Address::Tenant(tenant)) => one.doc.tenant_id == *tenant,
            Some(Address::Pool(pool)) => one.doc.tenant_id == pool.tenant && one.doc.pool_id == pool.pool,
            Some(Address::Instance(_)) => Some(one.doc.at()) == self.at,
        })
    }
}

/// Looks for the instances of an address, or of the whole node.
fn select<'a>(node: &Node, address: Option<&'a Address>) -> Result<Selected<'a>, CliError> {
    let at = match address {
        Some(Address::Tenant(tenant)) => {
            node.tenant(tenant)?;
            None
        }
        Some(Address::Pool(pool)) => {
            node.pool(pool)?;
            None
        }
        Some(Address::Instance(selector)) => Some(resolve(node, selector)?),
        None => None,
    };
    let observed = observe(node)?;
    for problem in &observed.problems {
        eprintln!("mvm: warning: {problem}");
    }
    Ok(Selected { observed, address, at })
}

fn list(globals: &Globals, node: &Node, address: Option<&Address>) -> Result<(), CliError> {
    let now = node.clock().now();
    let rows: Vec<InstanceRow> = select(node, address)?.instances().map(|one| instance_row(one, &now)).collect();
    Ok(print_rows(&rows, globals.format())?)
}

#[derive(Serialize)]
struct InstanceInfo<'a> {
    #[serde(flatten)]
    row: InstanceRow,
    document: &'a InstanceDoc,
    console_log: String,
    vmm_log: String,
}

fn info(globals: &Globals, node: &Node, at: &InstanceAddress) -> Result<(), CliError> {
    let selector = InstanceSelector { tenant: at.tenant.clone(), pool: at.pool.clone(), prefix: at.instance.to_string() };
    let address = Address::Instance(selector);
    let selected = select(node, Some(&address))?;
    let one = selected.instances().next().ok_or_else(|| CliError::new(Exit::NotFound, format!("there is no instance {at} any more")))?;
    let row = instance_row(one, &node.clock().now());
    let network = one.doc.network(&node.tenant(&at.tenant)?.network.network());
    let lines = [
        ("instance", row.instance.clone()),
        ("role", row.role.to_string()),
        ("profile", row.profile.clone()),
        ("state", row.state.clone()),
        ("address", row.address.clone()),
        ("mac", network.mac().to_string()),
        ("tap", network.tap()),
        ("pid", row.pid.map(|pid| pid.to_string()).unwrap_or_default()),
        ("uid", node.uid_range.instance(network.tenant.net_id, network.offset).to_string()),
        ("vcpus", one.doc.blueprint.resources.vcpus.to_string()),
        ("memory MiB", row.mem_mib.to_string()),
        ("data disk MiB", one.doc.blueprint.resources.data_disk_mib.to_string()),
        ("limits", one.doc.blueprint.resources.limits()),
        ("revision", row.revision.clone().unwrap_or_default()),
        ("config version", row.config_version.to_string()),
        ("secrets epoch", row.secrets_epoch.to_string()),
        ("created", one.doc.created.to_rfc3339()),
        ("since", one.doc.state.since().map(|since| since.to_rfc3339()).unwrap_or_default()),
        ("console log", node.paths.console_log(at).display().to_string()),
        ("vmm log", node.paths.vmm_log(at).display().to_string()),
        ("problem", row.problem.clone().unwrap_or_default()),
    ];
    let (console_log, vmm_log) = (node.paths.console_log(at).display().to_string(), node.paths.vmm_log(at).display().to_string());
    Ok(print_info(&InstanceInfo { row, document: &one.doc, console_log, vmm_log }, &lines, globals.format())?)
}

#[derive(Serialize)]
struct StatsRow {
    instance: String,
    state: String,
    cpu_ms: Option<u64>,
    rss_kib: Option<u64>,
    snapshot_kib: u64,
    data_kib: u64,
}

impl Row for StatsRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("INSTANCE", Width::Narrow),
        ("STATE", Width::Narrow),
        ("CPU-MS", Width::Narrow),
        ("RSS-KIB", Width::Narrow),
        ("SNAPSHOT-KIB", Width::Narrow),
        ("DATA-KIB", Width::Narrow),
    ];
    fn cells(&self) -> Vec<String> {
        let number = |value: Option<u64>| value.map(|value| value.to_string()).unwrap_or_else(|| "-".into());
        let (snapshot, data) = (self.snapshot_kib.to_string(), self.data_kib.to_string());
        vec![self.instance.clone(), self.state.clone(), number(self.cpu_ms), number(self.rss_kib), snapshot, data]
    }
}

fn stats(globals: &Globals, node: &Node, address: Option<&Address>) -> Result<(), CliError> {
    let mut rows = Vec::new();
    for one in select(node, address)?.instances() {
        let at = one.doc.at();
        // One that ended since it was seen has no numbers.
        let used: Option<VmStats> = one.doc.state.vm().filter(|_| !one.needs_recovery()).and_then(|vm| node.vmm().stats(vm).ok());
        let snapshot = crate::vmm::SNAPSHOT_FILES.iter().map(|name| on_disk_kib(&node.paths.snapshot(&at).join(name))).sum();
        rows.push(StatsRow {
            instance: at.to_string(),
            state: one.doc.state.name().to_string(),
            cpu_ms: used.map(|used| used.cpu_ms),
            rss_kib: used.map(|used| used.rss_kib),
            snapshot_kib: snapshot,
            data_kib: on_disk_kib(&node.paths.data_disk(&at)),
        });
    }
    Ok(print_rows(&rows, globals.format())?)
}

#[derive(Serialize)]
struct MetricRow {
    name: String,
    value: String,
}

impl Row for MetricRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[("NAME", Width::Narrow), ("VALUE", Width::Narrow)];
    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.value.clone()]
    }
}

/// Shows all of them as JSON, and in a table those that are not 0.
fn metrics(globals: &Globals, node: &Node, at: &InstanceAddress) -> Result<(), CliError> {
    let instance = node.instance(at)?;
    let vm = instance.state.vm().ok_or_else(|| LifecycleError::Refused {
        what: format!("show metrics of {at}"),
        why: format!("it is {} and has no VMM; `mvm instance start {at}` gives it one", instance.state.name()),
    })?;
    let metrics = node.vmm().metrics(vm).map_err(LifecycleError::from)?;
    if globals.format() == OutputFormat::Json {
        return Ok(write_out(&to_json(&metrics)?)?);
    }
    let mut rows = Vec::new();
    let mut left: Vec<(String, &serde_json::Value)> = metrics.iter().map(|(name, value)| (name.clone(), value)).collect();
    while let Some((name, value)) = left.pop() {
        match value {
            serde_json::Value::Object(inner) => left.extend(inner.iter().map(|(inner, value)| (format!("{name}.{inner}"), value))),
            value if value.as_f64() == Some(0.0) => {}
            value => rows.push(MetricRow { name, value: value.to_string() }),
        }
    }
    rows.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(print_rows(&rows, globals.format())?)
}

/// What a file takes on disk, which for a sparse one is less than its length.
fn on_disk_kib(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() / 2)
}
