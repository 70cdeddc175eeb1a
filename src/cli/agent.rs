//! `mvm agent`: one pass, and the document of what is there.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::CliResult;
use super::apply::{default_parallel, one_pass, print_report};
use super::args::read_document;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use crate::agent::observe::observe;
use crate::agent::plan::Retry;
use crate::agent::reconciler::describe;
use crate::infra::display::{to_json, write_out};
use crate::store::Wait;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Make one reconcile pass and report it; refused while another one runs
    Reconcile {
        /// The desired-state document, TOML or JSON; `-` is standard input
        #[arg(long, value_name = "FILE")]
        desired: PathBuf,
        /// Do at once what failed before, instead of waiting until its next try is due
        #[arg(long)]
        now: bool,
    },
    /// Write the document that describes what is there; applying it changes nothing
    #[command(after_help = "Example:\n  mvm agent desired > fleet.toml")]
    Desired {
        /// How it is written
        #[arg(long, default_value = "toml")]
        format: DocumentFormat,
    },
}

/// How a document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DocumentFormat {
    /// TOML
    Toml,
    /// JSON
    Json,
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: AgentCommand) -> CliResult {
    match command {
        AgentCommand::Reconcile { desired, now } => {
            let desired = read_document(&desired)?;
            let opened = open(globals, Intent::Change)?;
            let retry = if now { Retry::Now } else { Retry::WhenDue };
            let report = one_pass(&opened.node, &desired, retry, default_parallel(globals), Wait::No)?;
            let exit = print_report(globals, &report)?;
            opened.close()?;
            Ok(exit)
        }
        AgentCommand::Desired { format } => {
            let opened = open(globals, Intent::Look)?;
            let observed = observe(&opened.node)?;
            for problem in &observed.problems {
                eprintln!("mvm: warning: {problem}");
            }
            let document = describe(&observed);
            let text = match format {
                DocumentFormat::Json => to_json(&document)?,
                DocumentFormat::Toml => toml::to_string(&document).map_err(|error| CliError::new(Exit::Failed, error.to_string()))?,
            };
            write_out(&text)?;
            Ok(Exit::Done)
        }
    }
}
