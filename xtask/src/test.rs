//! Every test, and one line that says how many passed.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::build::{Profile, fake_firecracker, guest_agent};
use crate::options::{Live, Selection};
use crate::phase::phase;
use crate::tally::Tally;
use crate::workspace::{cargo, overhear, succeed, target};
use crate::{fuzz, setup};

/// The test program with real microVMs and the real network.
const LIVE: &str = "live";
/// What says where Firecracker's API definition is, and where it is looked for when nothing says so.
const FIRECRACKER_SPEC: (&str, &str) = ("MVM_FIRECRACKER_SPEC", "../shared/firecracker/firecracker-api-1.17.yaml");
/// How long each fuzz target runs.
const FUZZ_SECONDS: u32 = 30;

/// Installs what is missing, builds, and runs what was selected. The last line is `N passed, N failed`, where each
/// check (format, lints, each fuzz target) counts as one.
///
/// # Errors
/// When anything fails; the rest has run nevertheless.
pub fn run(selection: &Selection) -> Result<(), String> {
    // Shared by all live tests, which make it when it is not there.
    let parts = target()?.join("tmp/live-images/parts/parts.json");
    phase("install what is missing", || {
        setup::ensure(&setup::TESTS, Some(&parts))?;
        if selection.live == Live::Not { Ok(()) } else { setup::require_root(&[]) }
    })?;
    let agent = phase("build the guest agent", || guest_agent(Profile::Dev))?;
    let firecracker = phase("build the stand-in for Firecracker", || fake_firecracker(Profile::Dev))?;
    // A few names are asked for by somebody who waits for them, and only for them.
    let everything = selection.filters.is_empty() && selection.live != Live::Only;
    let mut tally = Tally::default();
    if everything {
        tally.add(Tally::of(&phase("format", || succeed(&mut cargo(["fmt", "--all", "--check"])))));
        let lints = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
        tally.add(Tally::of(&phase("lints", || succeed(&mut cargo(lints)))));
    }
    for (name, mut command) in runners(selection, everything) {
        let begun = tally;
        if let Some(spec) = firecracker_spec() {
            command.env(FIRECRACKER_SPEC.0, spec);
        }
        let result = phase(name, || {
            let mut heard = Tally::default();
            let status =
                overhear(command.env("MVM_GUEST_AGENT", &agent).env("MVM_FAKE_FIRECRACKER", &firecracker), |line| heard.hear(line))?;
            let heard = heard.ended(status);
            tally.add(heard);
            heard.verdict()
        });
        if result.is_err() && tally == begun {
            tally.failed += 1;
        }
    }
    if everything {
        match fuzz::run(FUZZ_SECONDS) {
            Ok(fuzzed) => tally.add(fuzzed),
            Err(error) => {
                eprintln!("{error}");
                tally.failed += 1;
            }
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    tally.verdict()
}

/// The commands that run tests, each with the name of its phase.
fn runners(selection: &Selection, everything: bool) -> Vec<(&'static str, Command)> {
    let mut runners = Vec::new();
    if has_nextest() {
        let mut tests = cargo(["nextest", "run", "--workspace", "--no-fail-fast", "--status-level", "slow", "--no-tests", "pass"]);
        match selection.live {
            Live::Too => {}
            Live::Only => drop(tests.args(["-E", "binary(live)"])),
            Live::Not => drop(tests.args(["-E", "not binary(live)"])),
        }
        tests.args(&selection.filters);
        runners.push(("tests", tests));
    } else {
        eprintln!("cargo-nextest is not installed; cargo's own runner does it, which takes longer");
        if selection.live != Live::Only {
            let mut tests = cargo(["test", "--workspace", "--lib", "--bins", "--no-fail-fast"]);
            for name in test_programs() {
                tests.args(["--test", &name]);
            }
            runners.push(("tests", filtered(tests, selection)));
        }
        if selection.live != Live::Not {
            let tests = cargo(["test", "--package", "mvm", "--test", LIVE, "--no-fail-fast"]);
            let mut tests = filtered(tests, selection);
            // One machine without acceleration keeps one processor busy.
            tests.arg("--test-threads=2");
            runners.push(("live tests", tests));
        }
    }
    if everything {
        runners.push(("tests in the documentation", cargo(["test", "--workspace", "--doc", "--no-fail-fast"])));
    }
    runners
}

/// The definition, when nobody said where it is and it is in its place.
fn firecracker_spec() -> Option<PathBuf> {
    let (name, place) = FIRECRACKER_SPEC;
    let spec = crate::workspace::root().join(place);
    (std::env::var_os(name).is_none() && spec.is_file()).then_some(spec)
}

fn filtered(mut tests: Command, selection: &Selection) -> Command {
    tests.arg("--").args(&selection.filters);
    tests
}

/// The test programs of the root package that need neither root nor a network.
fn test_programs() -> Vec<String> {
    let entries = std::fs::read_dir(crate::workspace::root().join("tests")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| {
            entry.path().is_dir() && entry.path().join("main.rs").exists() || entry.path().extension().is_some_and(|e| e == "rs")
        })
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .filter(|name| name != LIVE)
        .collect();
    names.sort();
    names
}

fn has_nextest() -> bool {
    cargo(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
