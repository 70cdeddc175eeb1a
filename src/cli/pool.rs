//! `mvm pool`.

use std::time::Duration;

use clap::Subcommand;
use mvm_types::{InstanceAddress, PoolAddress, Role, TenantId};

use super::CliResult;
use super::args::{SpecArgs, confirm, role, span};
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use super::revisions;
use super::status::pool_row;
use crate::agent::desired::{DesiredState, InvalidDocument, Problem, pool_problems};
use crate::agent::observe::observe;
use crate::agent::reconciler::{declared, waiting};
use crate::infra::display::{PoolInfo, PoolRow, print_info, print_rows};
use crate::vm::error::LifecycleError;
use crate::vm::instance::{StateName, StopMode};
use crate::vm::node::Node;
use crate::vm::pool::{BUILTIN, Limits, PoolSpec};

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
    #[command(
        after_help = "Example:\n  mvm pool build acme/web --timeout 1h\n\nThe log goes to standard error. A flake whose sources and lock are the same is not built again, nor evaluated. When a build fails, the pool keeps the image that it has. Instances get a new image with the next `mvm apply` or `mvm pool update`."
    )]
    Build {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// How long the build may take
        #[arg(long, default_value = "30m", value_parser = span)]
        timeout: Duration,
        /// How long the build may say nothing
        #[arg(long, default_value = "5m", value_parser = span)]
        silence_timeout: Duration,
        /// How many processes the build may have at a time
        #[arg(long, default_value_t = Limits::default().processes, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        max_processes: u32,
        /// How much memory the build may use, in MiB
        #[arg(long, default_value_t = Limits::default().mem_mib, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..))]
        max_mem_mib: u32,
        /// How large the image may be, in MiB
        #[arg(long, default_value_t = Limits::default().disk_mib, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
        max_image_mib: u64,
        /// Take the distribution's newest kernel and busybox for the built-in image, instead of those that this node has
        #[arg(long)]
        refresh: bool,
    },
    /// List the images that a pool had, the newest first
    #[command(after_help = "Example:\n  mvm pool revisions acme/web -o wide")]
    Revisions {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
    },
    /// Go back to an image that a pool had, and replace its instances
    #[command(
        after_help = "Examples:\n  mvm pool rollback acme/web                     to the one before\n  mvm pool rollback acme/web --revision 3f9a\n\nIt stays so until the pool's flake changes, or `mvm pool build`."
    )]
    Rollback {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// The revision, or the beginning of its name; without it the one before
        #[arg(long)]
        revision: Option<String>,
        /// How long to wait until its instances are replaced
        #[arg(long, default_value = "5m", value_parser = span)]
        timeout: Duration,
    },
    /// Show what differs between two images of a pool: files, and packages where nix built them
    #[command(
        after_help = "Examples:\n  mvm pool diff acme/web               the one before and the current one\n  mvm pool diff acme/web 3f9a 77b1"
    )]
    Diff {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// The first revision, or the beginning of its name [default: the one before the current one]
        from: Option<String>,
        /// The second one [default: the current one]
        to: Option<String>,
    },
    /// Remove a pool's older revisions, and images that no pool has any more; never what is in use
    #[command(after_help = "Example:\n  mvm pool gc acme/web --keep 2 --dry-run")]
    Gc {
        /// Its address
        #[arg(value_name = "TENANT/POOL")]
        pool: PoolAddress,
        /// How many of the newest stay
        #[arg(long, default_value_t = 3, value_name = "N")]
        keep: usize,
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
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
    let intent = if matches!(
        command,
        PoolCommand::List { .. } | PoolCommand::Info { .. } | PoolCommand::Revisions { .. } | PoolCommand::Diff { .. }
    ) {
        Intent::Look
    } else {
        Intent::Change
    };
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
                crate::agent::roles::check(node, &new).map_err(|problems| CliError::new(Exit::Usage, problems))?;
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
            let waiting = waiting(&observed, &node.clock().now());
            let rows: Vec<PoolRow> = tenants.flat_map(|tenant| tenant.pools.values()).map(|pool| pool_row(pool, &waiting)).collect();
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
        PoolCommand::Build { pool, timeout, silence_timeout, max_processes, max_mem_mib, max_image_mib, refresh } => {
            if refresh {
                refresh_parts(globals, &node.pool(&pool)?.spec)?;
            }
            let limits = Limits {
                time: timeout,
                silence: silence_timeout,
                processes: max_processes,
                mem_mib: max_mem_mib,
                disk_mib: max_image_mib,
                ..Limits::default()
            };
            revisions::build(globals, node, &pool, limits)?;
            Exit::Done
        }
        PoolCommand::Revisions { pool } => {
            revisions::list(globals, node, &pool)?;
            Exit::Done
        }
        PoolCommand::Rollback { pool, revision, timeout } => {
            revisions::roll_back(node, &pool, revision.as_deref())?;
            change(globals, node, &pool, timeout, |_| Ok(()))?
        }
        PoolCommand::Diff { pool, from, to } => {
            revisions::diff(globals, node, &pool, from.as_deref(), to.as_deref())?;
            Exit::Done
        }
        PoolCommand::Gc { pool, keep, dry_run } => {
            revisions::show(globals, &node.pool_collect(&pool, keep, revisions::collect(dry_run))?)?;
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

/// Forgets what the built-in image is made of, so that the build that follows takes the newest.
fn refresh_parts(globals: &Globals, spec: &PoolSpec) -> Result<(), CliError> {
    if spec.flake_ref != BUILTIN {
        let text = format!("--refresh is about the built-in image, and the pool's is from {}", spec.flake_ref);
        return Err(CliError::new(Exit::Usage, text));
    }
    crate::image::builtin::refresh(&globals.paths().images())
        .map_err(|error| CliError::new(Exit::Failed, crate::vm::error::with_causes(&error)))
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
    let there = there.ok_or_else(|| CliError::new(Exit::NotFound, format!("there is no pool {pool} any more")))?;
    let row = pool_row(there, &waiting(&observed, &node.clock().now()));
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
        ("limits", spec.instance_resources.limits()),
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
