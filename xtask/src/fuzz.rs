//! The fuzz targets, bounded.
//!
//! libFuzzer with the stable compiler: the coverage that guides it comes from LLVM's own pass, which needs no unstable option (those
//! that cargo-fuzz gives for `--sanitizer none`). Address sanitizer, which does, has little to find in code without
//! `unsafe`.

use std::fs;
use std::process::Command;

use crate::phase::phase;
use crate::tally::Tally;
use crate::workspace::{TRIPLE, cargo, root, succeed, target, typed};

/// As cargo-fuzz has them, without a sanitizer.
const FLAGS: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
    "-Coverflow-checks",
];

/// Builds the targets and runs each for so many seconds from its committed seeds; one check each.
///
/// # Errors
/// When they do not compile, or a place cannot be written.
pub fn run(seconds: u32) -> Result<Tally, String> {
    let own = target()?.join("fuzz");
    phase("build the fuzz targets", || {
        let mut build = cargo(["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", TRIPLE, "--target-dir"]);
        build.arg(&own).env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", FLAGS.join(" "));
        succeed(&mut build)
    })?;
    let mut tally = Tally::default();
    for name in targets()? {
        let at = |part: &str| own.join(part).join(&name);
        let (corpus, artifacts) = (at("corpus"), at("artifacts"));
        for dir in [&corpus, &artifacts] {
            fs::create_dir_all(dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        }
        let result = phase(&format!("fuzz {name}"), || {
            let mut target = Command::new(own.join(TRIPLE).join("release").join(&name));
            // What is found goes into the first directory; the committed seeds are only read.
            target.arg(&corpus).arg(root().join("fuzz/seeds").join(&name));
            target.arg(format!("-artifact_prefix={}/", artifacts.display()));
            target.arg(format!("-max_total_time={seconds}")).args([
                "-timeout=10",
                "-rss_limit_mb=2048",
                "-verbosity=0",
                "-print_final_stats=1",
            ]);
            run_quietly(&mut target)
        });
        if let Err(error) = &result {
            eprintln!("{error}\nThe input is in {}", artifacts.display());
        }
        tally.add(Tally::of(&result));
    }
    Ok(tally)
}

/// What libFuzzer says is of interest when it found something.
fn run_quietly(target: &mut Command) -> Result<(), String> {
    let output = target.output().map_err(|error| format!("cannot start {}: {error}", typed(target)))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{said}\n{} ended with {}", typed(target), output.status));
    }
    for line in said.lines().filter(|line| line.starts_with("stat::number_of_executed_units")) {
        eprintln!("{line}");
    }
    Ok(())
}

/// One target for each directory of seeds.
fn targets() -> Result<Vec<String>, String> {
    let dir = root().join("fuzz/seeds");
    let entries = fs::read_dir(&dir).map_err(|error| format!("cannot read {}: {error}", dir.display()))?;
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}
