//! `cargo xtask bench`: holds mvm against its limits, and against the bare thing in pairs of one run, on the host it runs on.
//!
//! ```text
//!  outside                                     inside (PID 1 of namespaces of its own)
//!  temporary directory ── unshare ──────────>  mvm, bare QEMU, TAPs, bridges, rules
//!  table, verdict      <── figures.json ─────  figures
//! ```
//!
//! What runs inside cannot outlive it: its processes end with PID 1, its interfaces and rules with the network namespace, its files
//! with the directory that the outside removes, however the inside ends.

mod bare;
mod figure;
mod inside;
mod jailed;
mod live;
mod machine;
mod manifests;
mod measure;
mod outside;
mod program;
mod simulated;
mod start;
mod trace;
mod wake;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

/// The options; `cargo xtask bench` gives them on.
#[derive(Debug, Parser)]
struct Options {
    /// Fewer repetitions: to try a change, not for the record
    #[arg(long)]
    quick: bool,
    /// How the figures are written
    #[arg(long, default_value = "table")]
    output: Output,
    /// Only figures whose names contain one of these
    filters: Vec<String>,
    /// Measure, on a host of its own, and leave the figures in this directory
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

/// How the figures are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

/// How often things are measured, and which.
#[derive(Debug, Clone)]
struct Selection {
    quick: bool,
    filters: Vec<String>,
}

impl Selection {
    /// Tells whether a figure is wanted.
    fn wants(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter.as_str()))
    }

    /// Chooses between the repetitions for the record and those of a quick run.
    fn rounds(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let selection = Selection { quick: options.quick, filters: options.filters.clone() };
    let result = match &options.inside {
        Some(dir) => inside::run(dir, &selection).map(|()| ExitCode::SUCCESS),
        None => outside::run(&options).map(|within| if within { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {error}");
        ExitCode::FAILURE
    })
}
