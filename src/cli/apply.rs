//! `mvm apply` and `mvm plan`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::args::{read_document, span};
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use super::progress::{ProgressLines, interrupted};
use super::{CliResult, status};
use crate::agent::desired::DesiredState;
use crate::agent::execute::{End, ExecuteOptions, Progress};
use crate::agent::plan::{Deferred, Plan, Retry};
use crate::agent::reconciler::{self, Applied, ApplyOptions, Report};
use crate::infra::display::{OutputFormat, StepRow, print_rows, table, to_json, write_out};
use crate::store::Wait;
use crate::vm::node::Node;

/// Arguments of `mvm apply`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mvm apply -f fleet.toml\n  mvm apply -f fleet.json --timeout 2m\n  mvm agent desired | mvm apply -f -\n\nInterrupted or killed, it leaves a state that the next apply finishes."
)]
pub struct ApplyArgs {
    /// The desired-state document, TOML or JSON; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// How long to wait until the fleet is ready
    #[arg(long, default_value = "5m", value_parser = span)]
    timeout: Duration,
    /// Make one pass and do not wait for what is deferred
    #[arg(long)]
    no_wait: bool,
    /// How many steps run at the same time [default: twice the processors, at least 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    parallel: Option<u16>,
}

/// Arguments of `mvm plan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  mvm plan -f fleet.toml\n  mvm plan -f fleet.toml --detailed-exitcode || echo something would change")]
pub struct PlanArgs {
    /// The desired-state document, TOML or JSON; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// Exit with 10 when there is a difference
    #[arg(long)]
    detailed_exitcode: bool,
}

#[derive(Serialize)]
struct PlanView<'a> {
    steps: Vec<StepRow>,
    deferred: &'a [Deferred],
    problems: &'a [String],
}

pub(super) fn default_parallel(globals: &Globals) -> usize {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    // Simulated steps wait for the disk only, whose flushes are shared.
    if globals.vmm == super::open::VmmChoice::Simulated { 32 } else { (cores * 2).max(4) }
}

/// `mvm plan`.
pub fn plan(globals: &Globals, args: &PlanArgs) -> CliResult {
    let desired = read_document(&args.file)?;
    let opened = open(globals, Intent::Look)?;
    let (observed, plan) = reconciler::look(&opened.node, &desired, Retry::Now)?;
    let steps = rows(&plan);
    let differs = !steps.is_empty() || !plan.deferred.is_empty();
    if globals.format() == OutputFormat::Json {
        write_out(&to_json(&PlanView { steps, deferred: &plan.deferred, problems: &observed.problems })?)?;
    } else {
        for problem in &observed.problems {
            eprintln!("mvm: warning: {problem}");
        }
        if !differs {
            write_out("Nothing to do: everything is as declared.\n")?;
        }
        if !steps.is_empty() {
            write_out(&table(&steps, globals.format()))?;
        }
        print_deferred(&plan.deferred)?;
    }
    Ok(if args.detailed_exitcode && differs { Exit::Difference } else { Exit::Done })
}

/// The visible steps; edges through steps that are not shown go to the shown ones behind them.
fn rows(plan: &Plan) -> Vec<StepRow> {
    let mut number = BTreeMap::new();
    let mut behind: Vec<Vec<usize>> = Vec::new();
    let mut rows = Vec::new();
    for (index, step) in plan.steps.iter().enumerate() {
        let mut after: Vec<usize> = Vec::new();
        for edge in &step.after {
            match number.get(&edge.step) {
                Some(shown) => after.push(*shown),
                None => after.extend(&behind[edge.step]),
            }
        }
        after.sort_unstable();
        after.dedup();
        if step.action.is_visible() {
            number.insert(index, rows.len() + 1);
            let (action, object) = (step.action.verb().to_owned(), step.action.object());
            rows.push(StepRow { step: rows.len() + 1, action, object, why: step.why.clone(), after: after.clone() });
            behind.push(Vec::new());
        } else {
            behind.push(after);
        }
    }
    rows
}

fn print_deferred(deferred: &[Deferred]) -> Result<(), CliError> {
    if deferred.is_empty() {
        return Ok(());
    }
    let mut text = String::from("\nDeferred:\n");
    for one in deferred {
        let when = one.in_ms.map(|ms| format!(" (in {} s)", ms.div_ceil(1000))).unwrap_or_default();
        text.push_str(&format!("  {} {}: {}{when}\n", one.what, one.object, one.why));
    }
    Ok(write_out(&text)?)
}

/// `mvm apply`.
pub fn apply(globals: &Globals, args: &ApplyArgs) -> CliResult {
    let desired = read_document(&args.file)?;
    let opened = open(globals, Intent::Change)?;
    let parallel = args.parallel.map_or_else(|| default_parallel(globals), usize::from);
    let exit = if args.no_wait {
        let report = one_pass(&opened.node, &desired, Retry::Now, parallel, Wait::Until(Instant::now() + args.timeout))?;
        print_report(globals, &report)?
    } else {
        converge(globals, &opened.node, &desired, args.timeout, parallel)?
    };
    opened.close()?;
    Ok(exit)
}

/// Makes what is desired, waits for it, and shows the result.
pub(super) fn converge(globals: &Globals, node: &Node, desired: &DesiredState, timeout: Duration, parallel: usize) -> CliResult {
    let begun = Instant::now();
    let lines = ProgressLines::new();
    let cancel = interrupted()?;
    let progress = |event: Progress<'_>| lines.show(event);
    let options = ApplyOptions { deadline: begun + timeout, parallel, progress: &progress, cancel: &cancel };
    let applied = reconciler::apply(node, desired, &options)?;
    if globals.format() == OutputFormat::Json {
        write_out(&to_json(&applied)?)?;
    }
    let took = begun.elapsed().as_secs_f64();
    match applied {
        Applied::Ready => {
            if globals.format() != OutputFormat::Json {
                status::print_instances(globals, node, desired)?;
                eprintln!("Everything is as declared ({took:.1} s).");
            }
            Ok(Exit::Done)
        }
        Applied::Partly { failed, deferred } => {
            explain(&failed, &deferred);
            Err(CliError::new(
                Exit::Partly,
                format!("partly done after {took:.1} s; `mvm apply` tries again, `mvm events` tells what was done"),
            ))
        }
        Applied::TimedOut { failed, deferred } => {
            explain(&failed, &deferred);
            Err(CliError::new(Exit::TimedOut, format!("not ready within {took:.0} s; `mvm apply` goes on from here")))
        }
        Applied::Interrupted => Err(CliError::new(Exit::Interrupted, "interrupted; `mvm apply` goes on from here")),
    }
}

fn explain(failed: &BTreeMap<String, String>, deferred: &[Deferred]) {
    for (object, error) in failed {
        eprintln!("mvm: {object}: {error}");
    }
    for one in deferred.iter().filter(|one| !failed.contains_key(&one.object)) {
        eprintln!("mvm: {}: {} waits: {}", one.object, one.what, one.why);
    }
}

/// One pass with progress.
pub(super) fn one_pass(node: &Node, desired: &DesiredState, retry: Retry, parallel: usize, wait: Wait) -> Result<Report, CliError> {
    let lines = ProgressLines::new();
    let cancel: std::sync::Arc<AtomicBool> = interrupted()?;
    let progress = |event: Progress<'_>| lines.show(event);
    let options = ExecuteOptions { parallel, progress: &progress, cancel: &cancel };
    Ok(reconciler::pass(node, desired, retry, wait, &options)?)
}

#[derive(Serialize)]
struct OutcomeRow {
    action: String,
    object: String,
    result: String,
    took_ms: u64,
}

impl crate::infra::display::Row for OutcomeRow {
    const COLUMNS: &'static [(&'static str, crate::infra::display::Width)] = &[
        ("ACTION", crate::infra::display::Width::Narrow),
        ("OBJECT", crate::infra::display::Width::Narrow),
        ("TOOK", crate::infra::display::Width::Narrow),
        ("RESULT", crate::infra::display::Width::Narrow),
    ];
    fn cells(&self) -> Vec<String> {
        vec![self.action.clone(), self.object.clone(), format!("{} ms", self.took_ms), self.result.clone()]
    }
}

#[derive(Serialize)]
struct ReportView<'a> {
    steps: Vec<OutcomeRow>,
    deferred: &'a [Deferred],
    problems: &'a [String],
}

/// Shows what a pass did; the exit code says whether all of it went well.
pub(super) fn print_report(globals: &Globals, report: &Report) -> CliResult {
    let steps: Vec<OutcomeRow> = report
        .visible()
        .map(|(step, outcome)| OutcomeRow {
            action: step.action.verb().to_owned(),
            object: outcome.object.clone(),
            result: match &outcome.end {
                End::Done => "ok".to_owned(),
                End::Failed { error, .. } => error.clone(),
                End::Held { by } => format!("held back: {by} failed"),
                End::Cancelled => "interrupted".to_owned(),
            },
            took_ms: u64::try_from(outcome.took.as_millis()).unwrap_or(u64::MAX),
        })
        .collect();
    let failed = report.failed().next().is_some();
    if globals.format() == OutputFormat::Json {
        write_out(&to_json(&ReportView { steps, deferred: &report.plan.deferred, problems: &report.problems })?)?;
    } else {
        for problem in &report.problems {
            eprintln!("mvm: warning: {problem}");
        }
        if steps.is_empty() && report.plan.deferred.is_empty() {
            write_out("Nothing to do: everything is as declared.\n")?;
        } else if !steps.is_empty() {
            print_rows(&steps, globals.format())?;
        }
        print_deferred(&report.plan.deferred)?;
    }
    let ended = |wanted: fn(&End) -> bool| report.outcomes.iter().any(|outcome| wanted(&outcome.end));
    if ended(|end| matches!(end, End::Cancelled)) {
        return Ok(Exit::Interrupted);
    }
    let partly = failed || ended(|end| matches!(end, End::Held { .. })) || report.plan.look_again.is_some();
    Ok(if partly || !report.plan.deferred.is_empty() || !report.problems.is_empty() { Exit::Partly } else { Exit::Done })
}
