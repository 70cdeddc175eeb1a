//! What developers and CI both run: `cargo xtask <task>`.
//!
//! Nothing here reaches the network but through apt and cargo.

#![forbid(unsafe_code)]

mod bench;
mod build;
mod docs;
mod fuzz;
mod options;
mod phase;
mod quickstart;
mod setup;
mod tally;
mod test;
mod workspace;

use std::path::Path;
use std::process::ExitCode;

use options::Task;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    match options::parse(std::env::args_os().skip(1).collect())? {
        Task::Help => {
            print!("{}", options::HELP);
            Ok(())
        }
        Task::Setup => setup::ensure(&setup::FLEETS, Some(Path::new(quickstart::PARTS))),
        Task::Build { profile } => build::all(profile).map(drop),
        Task::Quickstart { state_dir } => quickstart::run(state_dir.as_deref()),
        Task::Test(selection) => test::run(&selection),
        Task::Bench(measure) => bench::run(&measure),
        Task::Fuzz { seconds } => fuzz::run(seconds).and_then(|tally| tally.verdict()),
        Task::Docs => docs::generate(),
    }
}
