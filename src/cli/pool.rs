//! `mvm pool`.

use std::time::Duration;

use clap::Subcommand;
use mvm_types::{InstanceAddress, PoolAddress, Role, TenantId};

use super::CliResult;
use super::args::{SpecArgs, confirm, role, span};
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use super::progress::ProgressLines;
use super::status::pool_row;
use crate::agent::desired::{DesiredState, InvalidDocument, Problem, pool_problems};
use crate::agent::observe::observe;
use crate::agent::reconciler::declared;
use crate::infra::display::{OutputFormat, PoolInfo, PoolRow, print_info, print_rows, to_json, write_out};
use crate::vm::error::LifecycleError;
use crate::vm::instance::{StateName, StopMode};
use crate::vm::node::Node;
use crate::vm::pool::PoolSpec;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Make a pool; `mvm pool scale` or `mvm apply` brings its instances up
    #[command(after_help = "Example:\n  mvm pool create acme/gw --role gateway --mem-mib 256")]
    Create {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// Its role, fixed for its life: gateway, builder, worker or capability-imessage
        #[arg(long, default_value = "worker", value_parser = role)]
        role: Role,
        #[command(flatten)]
        spec: Box<SpecArgs>,
    },
    /// List pools
    List {
        /// Only this tenant's
        tenant: Option<TenantId>,
    },
    /// Show a pool
    Info {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
    },
    /// Change a pool's declaration, and make it so
    #[command(
        after_help = "Example:\n  mvm pool update acme/web --mem-mib 512\n\nChanged resources replace the instances one after the other; data disks stay."
    )]
    Update {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        #[command(flatten)]
        spec: Box<SpecArgs>,
        /// How long to wait until it is so
        #[arg(long, default_value = "5m", value_parser = span)]
        timeout: Duration,
    },
    /// Change how many instances are in each state, and make it so
    #[command(after_help = "Example:\n  mvm pool scale acme/web --running 3 --sleeping 1")]
    Scale {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// How many run
        #[arg(long, value_name = "N")]
        running: Option<u32>,
        /// How many are warm
        #[arg(long, value_name = "N")]
        warm: Option<u32>,
        /// How many sleep
        #[arg(long, value_name = "N")]
        sleeping: Option<u32>,
        /// How long to wait until it is so
        #[arg(long, default_value = "5m", value_parser = span)]
        timeout: Duration,
    },
    /// Build a pool's image, unless it is there
    Build {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
    },
    /// Remove a pool with its instances and their data
    Destroy {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// Do not ask
        #[arg(long, short, visible_alias = "force")]
        yes: bool,
    },
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: PoolCommand) -> CliResult {
    let intent = if matches!(command, PoolCommand::List { .. } | PoolCommand::Info { .. }) { Intent::Look } else { Intent::Change };
    let opened = open(globals, intent)?;
    let node = &opened.node;
    let exit = match command {
        PoolCommand::Create { pool, role, spec } => {
            let mut new = PoolSpec::new(pool.pool.clone(), role);
            spec.change(&mut new)?;
            check(&pool, &new)?;
            node.tenant(&pool.tenant)?;
            if node.pool(&pool).is_err() {
                let mut with_it = declared_in(node, &pool.tenant)?;
                with_it.tenants.iter_mut().for_each(|tenant| tenant.pools.push(new.clone()));
                as_a_document(&with_it)?;
            }
            node.pool_create(&pool.tenant, role, new)?;
            Exit::Done
        }
        PoolCommand::List { tenant } => {
            if let Some(tenant) = &tenant {
                node.tenant(tenant)?;
            }
            let observed = observe(node)?;
            let tenants = observed.tenants.values().filter(|one| tenant.as_ref().is_none_or(|id| one.doc.tenant_id == *id));
            let rows: Vec<PoolRow> = tenants.flat_map(|tenant| tenant.pools.values()).map(pool_row).collect();
            print_rows(&rows, globals.format())?;
            Exit::Done
        }
        PoolCommand::Info { pool } => {
            info(globals, node, &pool)?;
            Exit::Done
        }
        PoolCommand::Update { pool, spec, timeout } => change(globals, node, &pool, timeout, |declared| spec.change(declared))?,
        PoolCommand::Scale { pool, running, warm, sleeping, timeout } => change(globals, node, &pool, timeout, |declared| {
            let counts = &mut declared.desired_counts;
            counts.running = running.unwrap_or(counts.running);
            counts.warm = warm.unwrap_or(counts.warm);
            counts.sleeping = sleeping.unwrap_or(counts.sleeping);
            Ok(())
        })?,
        PoolCommand::Build { pool } => {
            let lines = ProgressLines::new();
            let bar = lines.spin("build image");
            let revision = node.pool_build(&pool, &|text| {
                if let Some(bar) = &bar {
                    bar.set_message(format!("build image: {text}"));
                }
            })?;
            drop(bar);
            let info = serde_json::json!({ "pool": pool.to_string(), "revision": revision.to_string() });
            match globals.format() {
                OutputFormat::Json => write_out(&to_json(&info)?)?,
                _ => write_out(&format!("{revision}\n"))?,
            }
            Exit::Done
        }
        PoolCommand::Destroy { pool, yes } => {
            node.pool(&pool)?;
            let declared = declared_in(node, &pool.tenant)?;
            let mut others = declared.tenants.iter().flat_map(|tenant| &tenant.pools);
            if let Some(other) = others.find(|other| other.depends_on.contains(&pool.pool)) {
                let other = format!("{}/{}", pool.tenant, other.pool_id);
                let text = format!("cannot destroy {pool}: {other} depends on it; `mvm pool update {other} --no-depends-on` ends that");
                return Err(CliError::new(Exit::Refused, text));
            }
            let instances = node.instances(&pool)?.len();
            confirm(yes, &format!("Destroy pool {pool} with its {} and their data?", super::args::count(instances, "instance")))?;
            destroy(node, &pool)?;
            node.apply_network()?;
            Exit::Done
        }
    };
    opened.close()?;
    Ok(exit)
}

fn check(pool: &PoolAddress, spec: &PoolSpec) -> Result<(), CliError> {
    let problems: Vec<Problem> =
        pool_problems(spec).into_iter().map(|(field, what)| Problem::new(format!("{pool}: {field}"), what)).collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(CliError::new(Exit::Usage, InvalidDocument { problems }.to_string()))
}

/// What is declared in one tenant.
fn declared_in(node: &Node, tenant: &TenantId) -> Result<DesiredState, CliError> {
    let mut desired = declared(&observe(node)?);
    desired.tenants.retain(|one| one.tenant_id == *tenant);
    Ok(desired)
}

/// Puts declarations through the same checks as a file.
fn as_a_document(desired: &DesiredState) -> Result<DesiredState, CliError> {
    let text = crate::infra::display::to_json(desired)?;
    crate::agent::desired::parse(&text, crate::agent::desired::Format::Json).map_err(|error| CliError::new(Exit::Usage, error.to_string()))
}

/// Changes one declaration and reconciles its tenant: the same way as an edited file would.
fn change(
    globals: &Globals,
    node: &Node,
    pool: &PoolAddress,
    timeout: Duration,
    change: impl FnOnce(&mut PoolSpec) -> Result<(), CliError>,
) -> CliResult {
    node.pool(pool)?;
    let mut desired = declared_in(node, &pool.tenant)?;
    let mut specs = desired.tenants.iter_mut().flat_map(|tenant| &mut tenant.pools);
    if let Some(spec) = specs.find(|spec| spec.pool_id == pool.pool) {
        change(spec)?;
    }
    let desired = as_a_document(&desired)?;
    super::apply::converge(globals, node, &desired, timeout, super::apply::default_parallel(globals))
}

fn info(globals: &Globals, node: &Node, pool: &PoolAddress) -> Result<(), CliError> {
    let doc = node.pool(pool)?;
    let observed = observe(node)?;
    let there = observed.tenants.get(&pool.tenant).and_then(|tenant| tenant.pools.get(&pool.pool));
    let row = pool_row(there.ok_or_else(|| CliError::new(Exit::NotFound, format!("there is no pool {pool} any more")))?);
    let spec = &doc.spec;
    let lines = [
        ("pool", row.pool.clone()),
        ("role", row.role.to_string()),
        ("profile", row.profile.clone()),
        ("flake", spec.flake_ref.clone()),
        ("revision", row.revision.clone().unwrap_or_else(|| "not built".into())),
        ("running", row.running.clone()),
        ("warm", row.warm.clone()),
        ("sleeping", row.sleeping.clone()),
        ("vcpus", row.vcpus.to_string()),
        ("memory MiB", row.mem_mib.to_string()),
        ("data disk MiB", row.data_disk_mib.to_string()),
        ("depends on", spec.depends_on.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        ("pinned", spec.pinned.to_string()),
        ("critical", spec.critical.to_string()),
        ("workload", spec.workload.as_ref().map(|workload| workload.command.join(" ")).unwrap_or_default()),
        ("config version", doc.config_version.to_string()),
        ("created", doc.created.to_rfc3339()),
        ("problem", row.problem.clone().unwrap_or_default()),
    ];
    let info = PoolInfo { row, config_version: doc.config_version, created: doc.created.to_rfc3339(), spec };
    Ok(print_info(&info, &lines, globals.format())?)
}

/// Removes a pool with all its instances, newest first.
pub(super) fn destroy(node: &Node, pool: &PoolAddress) -> Result<(), CliError> {
    let mut instances = Vec::new();
    for id in node.instances(pool)? {
        let at = InstanceAddress::new(pool.tenant.clone(), pool.pool.clone(), id);
        let doc = match node.instance(&at) {
            Ok(doc) => doc,
            // Never finished, which goes with the pool; or its document was moved aside, and then the pool is refused.
            Err(LifecycleError::NotFound { kind: "instance", .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        instances.push((doc.created.wall_ms, at, doc.state.name()));
    }
    instances.sort_by(|a, b| b.cmp(a));
    for (_, at, state) in instances {
        if matches!(state, StateName::Running | StateName::Warm) {
            node.stop(&at, StopMode::Graceful)?;
        }
        node.destroy(&at)?;
    }
    Ok(node.pool_destroy(pool)?)
}
