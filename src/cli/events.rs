//! `mvm events`.

use std::time::Duration;

use clap::{Args, Subcommand};
use mvm_types::TenantId;
use serde::Serialize;

use super::CliResult;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use crate::audit::Event;
use crate::infra::display::{OutputFormat, Row, Width, print_rows, table, to_json, write_out};
use crate::vm::error::LifecycleError;
use crate::vm::node::Node;

/// Arguments of `mvm events`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  mvm events acme --tail 20\n  mvm events -f\n  mvm events verify"
)]
pub struct EventsArgs {
    /// Only this tenant's; also one that is gone
    tenant: Option<TenantId>,
    /// Go on as more happens
    #[arg(short, long)]
    follow: bool,
    /// Only the last ones
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Check the chain of hashes, and name the first record that was changed
    Verify {
        /// Only this tenant's
        tenant: Option<TenantId>,
    },
}

impl Row for Event {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("AT", Width::Narrow),
        ("ACTION", Width::Narrow),
        ("OBJECT", Width::Narrow),
        ("ROLE", Width::Narrow),
        ("FROM", Width::Narrow),
        ("TO", Width::Narrow),
        ("TOOK", Width::Narrow),
        ("WHO", Width::Wide),
        ("SEQ", Width::Wide),
        ("RESULT", Width::Narrow),
    ];
    fn cells(&self) -> Vec<String> {
        let dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
        vec![
            self.at.clone(),
            self.action.clone(),
            self.object.clone(),
            self.role.map(|role| role.to_string()).unwrap_or_else(|| "-".into()),
            dash(&self.from),
            dash(&self.to),
            format!("{} ms", self.took_ms),
            self.who.clone(),
            self.seq.to_string(),
            self.why.as_ref().map_or_else(|| self.result.clone(), |why| format!("{}: {why}", self.result)),
        ]
    }
}

/// Shows or checks the record.
pub fn run(globals: &Globals, args: &EventsArgs) -> CliResult {
    let opened = open(globals, Intent::Look)?;
    let node = &opened.node;
    if let Some(Verb::Verify { tenant }) = &args.verb {
        return verify(globals, node, tenant.as_ref());
    }
    let mut events = read(node, args.tenant.as_ref())?;
    // Before the tail is cut: what is not shown of these was there, and what comes after is new.
    let mut seen: std::collections::HashSet<(String, u64)> = events.iter().map(key).collect();
    let shown = events.len().saturating_sub(args.tail.unwrap_or(usize::MAX));
    events.drain(..shown);
    let format = globals.format();
    if !args.follow {
        print_rows(&events, format)?;
        return Ok(Exit::Done);
    }
    // Followed, JSON is one object a line.
    let line = |event: &Event| -> Result<String, CliError> {
        if format == OutputFormat::Json {
            return Ok(serde_json::to_string(event).map_err(std::io::Error::from)? + "\n");
        }
        let lines = table(std::slice::from_ref(event), format);
        Ok(lines.split_once('\n').map_or(String::new(), |(_, row)| row.to_owned()))
    };
    events.iter().try_for_each(|event| -> Result<(), CliError> { Ok(write_out(&line(event)?)?) })?;
    loop {
        std::thread::sleep(Duration::from_millis(200));
        for event in read(node, args.tenant.as_ref())? {
            if seen.insert(key(&event)) {
                write_out(&line(&event)?)?;
            }
        }
    }
}

/// Numbers are a tenant's own; objects begin with their tenant.
fn key(event: &Event) -> (String, u64) {
    (event.object.split('/').next().unwrap_or_default().to_owned(), event.seq)
}

fn logs(node: &Node, tenant: Option<&TenantId>) -> Result<Vec<TenantId>, CliError> {
    let all = node.audit().tenants()?;
    match tenant {
        None => Ok(all),
        Some(tenant) if all.contains(tenant) => Ok(vec![tenant.clone()]),
        Some(tenant) => {
            let known = all.iter().map(ToString::to_string).collect();
            Err(LifecycleError::NotFound { kind: "log of tenant", name: tenant.to_string(), known }.into())
        }
    }
}

fn read(node: &Node, tenant: Option<&TenantId>) -> Result<Vec<Event>, CliError> {
    let mut events = Vec::new();
    for tenant in logs(node, tenant)? {
        events.extend(node.audit().events(&tenant)?);
    }
    events.sort_by(|a, b| (&a.at, a.seq).cmp(&(&b.at, b.seq)));
    Ok(events)
}

/// The verdict on one log.
#[derive(Serialize)]
struct Verdict {
    tenant: TenantId,
    whole: bool,
    records: Option<u64>,
    problem: Option<String>,
}

fn verify(globals: &Globals, node: &Node, tenant: Option<&TenantId>) -> CliResult {
    let mut verdicts = Vec::new();
    for tenant in logs(node, tenant)? {
        verdicts.push(match node.audit().verify(&tenant)? {
            Ok(records) => Verdict { tenant, whole: true, records: Some(records), problem: None },
            Err(broken) => Verdict { tenant, whole: false, records: None, problem: Some(broken.to_string()) },
        });
    }
    if globals.format() == OutputFormat::Json {
        write_out(&to_json(&verdicts)?)?;
    } else {
        let whole = verdicts.iter().filter_map(|one| Some(format!("{}: {} records, whole\n", one.tenant, one.records?)));
        write_out(&whole.collect::<String>())?;
    }
    let bad: Vec<String> =
        verdicts.iter().filter_map(|one| Some(format!("the log of tenant {} is broken: {}", one.tenant, one.problem.as_ref()?))).collect();
    if bad.is_empty() { Ok(Exit::Done) } else { Err(CliError::new(Exit::Failed, bad.join("\nmvm: "))) }
}
