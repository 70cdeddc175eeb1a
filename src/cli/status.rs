//! `mvm status`, and the rows that several commands show.

use std::collections::BTreeMap;

use clap::Args;
use mvm_types::Address;
use serde::Serialize;

use super::CliResult;
use super::args::resolve;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use crate::agent::desired::DesiredState;
use crate::agent::observe::{ImagePresence, Observed, ObservedInstance, ObservedPool, observe};
use crate::agent::reconciler::waiting;
use crate::infra::clock::Moment;
use crate::infra::display::{InstanceRow, OutputFormat, PoolRow, table, to_json, write_out};
use crate::vm::instance::{InstanceState, StateName, StopReason};
use crate::vm::node::Node;
use crate::vmm::Liveness;

/// Arguments of `mvm status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only this tenant, pool or instance
    #[arg(value_name = "TENANT[/POOL[/INSTANCE]]")]
    address: Option<Address>,
}

#[derive(Serialize)]
struct StatusView {
    node: String,
    vmm: String,
    pools: Vec<PoolRow>,
    instances: Vec<InstanceRow>,
    problems: Vec<String>,
}

/// Shows pools and instances.
pub fn status(globals: &Globals, args: &StatusArgs) -> CliResult {
    let opened = open(globals, Intent::Look)?;
    let node = &opened.node;
    let observed = observe(node)?;
    let shown = |tenant: &str, pool: &str| match &args.address {
        None => true,
        Some(Address::Tenant(id)) => id.as_str() == tenant,
        Some(Address::Pool(address)) => address.tenant.as_str() == tenant && address.pool.as_str() == pool,
        Some(Address::Instance(selector)) => selector.tenant.as_str() == tenant && selector.pool.as_str() == pool,
    };
    match &args.address {
        Some(Address::Tenant(id)) => drop(node.tenant(id)?),
        Some(Address::Pool(address)) => drop(node.pool(address)?),
        Some(Address::Instance(_)) | None => {}
    }
    let only = match &args.address {
        Some(Address::Instance(selector)) => Some(resolve(node, selector)?),
        _ => None,
    };
    let now = node.clock().now();
    let waiting = waiting(&observed, &now);
    let pools: Vec<&ObservedPool> =
        pools(&observed).filter(|pool| shown(pool.doc.tenant_id.as_str(), pool.doc.spec.pool_id.as_str())).collect();
    let view = StatusView {
        node: node.id.to_string(),
        vmm: node.vmm().kind().as_str().to_owned(),
        pools: pools.iter().map(|pool| pool_row(pool, &waiting)).collect(),
        instances: pools
            .iter()
            .flat_map(|pool| &pool.instances)
            .filter(|one| only.as_ref().is_none_or(|at| one.doc.at() == *at))
            .map(|one| instance_row(one, &now))
            .collect(),
        problems: observed.problems.clone(),
    };
    if globals.format() == OutputFormat::Json {
        write_out(&to_json(&view)?)?;
        return Ok(Exit::Done);
    }
    for problem in &view.problems {
        eprintln!("mvm: warning: {problem}");
    }
    if view.pools.is_empty() {
        write_out("There are no pools yet. `mvm apply -f FILE` makes what a file declares.\n")?;
        return Ok(Exit::Done);
    }
    write_out(&table(&view.pools, globals.format()))?;
    if !view.instances.is_empty() {
        write_out("\n")?;
        write_out(&table(&view.instances, globals.format()))?;
    }
    Ok(Exit::Done)
}

/// Every pool in order of tenants and roles.
fn pools(observed: &Observed) -> impl Iterator<Item = &ObservedPool> {
    observed.tenants.values().flat_map(|tenant| {
        let mut pools: Vec<_> = tenant.pools.values().collect();
        pools.sort_by_key(|pool| (pool.doc.role_traits().priority, pool.doc.spec.pool_id.clone()));
        pools
    })
}

/// After an apply: the instances of the tenants that the document names.
pub(super) fn print_instances(globals: &Globals, node: &Node, desired: &DesiredState) -> Result<(), CliError> {
    let observed = observe(node)?;
    let now = node.clock().now();
    let named = |pool: &&ObservedPool| desired.tenants.iter().any(|tenant| tenant.tenant_id == pool.doc.tenant_id);
    let rows: Vec<InstanceRow> =
        pools(&observed).filter(named).flat_map(|pool| &pool.instances).map(|one| instance_row(one, &now)).collect();
    const MOST: usize = 50;
    match rows.len() {
        0 => Ok(()),
        n if n > MOST => Ok(write_out(&format!("{n} instances; `mvm status` shows them\n"))?),
        _ => Ok(write_out(&table(&rows, globals.format()))?),
    }
}

/// The row of a pool.
pub(super) fn pool_row(pool: &ObservedPool, waiting: &BTreeMap<String, String>) -> PoolRow {
    let spec = &pool.doc.spec;
    let count = |state: StateName| pool.instances.iter().filter(|one| one.doc.state.name() == state && is_whole(one)).count();
    let (running, warm, sleeping) = (count(StateName::Running), count(StateName::Warm), count(StateName::Sleeping));
    let problem = match (&pool.doc.failure, pool.image) {
        (Some(failure), _) => Some(format!("{}: {}", failure.step, failure.error)),
        (None, ImagePresence::Outdated) => Some("its flake has changed; the next apply builds it".to_owned()),
        (None, ImagePresence::Missing) if pool.doc.revision.is_some() => Some("its image is missing or damaged".to_owned()),
        _ if !pool.not_enabled.is_empty() => Some(pool.not_enabled.join("; ")),
        _ => waiting.get(&pool.doc.address().to_string()).cloned(),
    };
    PoolRow {
        pool: pool.doc.address().to_string(),
        role: spec.role,
        profile: spec.profile.to_string(),
        running: format!("{running}/{}", spec.desired_counts.running),
        warm: format!("{warm}/{}", spec.desired_counts.warm),
        sleeping: format!("{sleeping}/{}", spec.desired_counts.sleeping),
        other: pool.instances.len() - running - warm - sleeping,
        vcpus: spec.instance_resources.vcpus,
        mem_mib: spec.instance_resources.mem_mib,
        data_disk_mib: spec.instance_resources.data_disk_mib,
        revision: pool.doc.revision.as_ref().map(ToString::to_string),
        problem,
    }
}

fn is_whole(one: &ObservedInstance) -> bool {
    !one.needs_recovery()
}

/// The row of an instance.
pub(super) fn instance_row(one: &ObservedInstance, now: &Moment) -> InstanceRow {
    let doc = &one.doc;
    let (state, problem) = match (&doc.transition, &doc.state) {
        (Some(transition), state) if one.busy => (format!("{} -> {}", state.name(), transition.to), None),
        (Some(transition), state) => {
            (format!("{} -> {}", state.name(), transition.to), Some("cut off; the next apply finishes or undoes it".to_owned()))
        }
        (None, state) if doc.passing_to.is_some() && one.liveness == Liveness::Alive => {
            let goal = doc.passing_to.map_or_else(String::new, |goal| format!(" -> {goal}"));
            (format!("{}{goal}", state.name()), Some("cut off on the way; the next apply finishes or undoes it".to_owned()))
        }
        (None, state) if one.needs_recovery() => {
            let why = one.died_of.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            (state.name().to_string(), Some(format!("its virtual machine died{why}; the next apply starts it again")))
        }
        (None, InstanceState::Stopped { why: StopReason::Died, .. }) => ("Stopped".to_owned(), Some("its virtual machine died".to_owned())),
        (None, InstanceState::Stopped { why: StopReason::DiedOf(why), .. }) => {
            ("Stopped".to_owned(), Some(format!("its virtual machine died: {why}")))
        }
        (None, InstanceState::Stopped { why: StopReason::SnapshotLost(why), .. }) => ("Stopped".to_owned(), Some(why.clone())),
        (None, state) => (state.name().to_string(), None),
    };
    let failure = doc.failure.as_ref().map(|failure| format!("{} failed {}x: {}", failure.step, failure.attempts, failure.error));
    InstanceRow {
        instance: doc.at().to_string(),
        role: doc.role,
        state,
        address: doc.address.to_string(),
        for_seconds: doc.state.since().map(|since| since.elapsed(now).as_secs()),
        pid: doc.state.vm().filter(|_| !one.needs_recovery()).map(|vm| vm.process.pid),
        mem_mib: doc.blueprint.resources.mem_mib,
        profile: doc.blueprint.profile.to_string(),
        config_version: doc.config_version,
        secrets_epoch: doc.secrets_epoch,
        revision: doc.revision.as_ref().map(ToString::to_string),
        problem: failure.or(problem),
    }
}
