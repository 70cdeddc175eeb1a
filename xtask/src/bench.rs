//! Measures mvm against its limits.

use std::process::Command;

use crate::build::{Profile, all, bench, fake_firecracker};
use crate::options::Measure;
use crate::phase::phase;
use crate::setup;
use crate::workspace::{succeed, target};

/// Installs, builds as for use, and measures; the figures go to standard output.
///
/// # Errors
/// When a figure misses its limit, or cannot be measured.
pub fn run(measure: &Measure) -> Result<(), String> {
    let parts = target()?.join("tmp/live-images/parts/parts.json");
    phase("install what is missing", || {
        setup::ensure(&setup::BENCH, Some(&parts))?;
        setup::require_root(&[])
    })?;
    let program = phase("build", || {
        all(Profile::Release)?;
        fake_firecracker(Profile::Release)?;
        bench()
    })?;
    phase("measure", || succeed(Command::new(program).args(arguments(measure))))
}

fn arguments(measure: &Measure) -> Vec<&str> {
    let quick = measure.quick.then_some("--quick");
    let output = measure.output.iter().flat_map(|format| ["--output", format]);
    quick.into_iter().chain(output).chain(measure.filters.iter().map(String::as_str)).collect()
}
