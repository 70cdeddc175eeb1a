//! The `mvm` command: parse, dispatch, error to exit code.

use std::process::ExitCode;

use clap::Parser;
use mvm::cli::{Cli, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    mvm::infra::logging::init(cli.globals.verbose, cli.globals.log_format == mvm::cli::open::LogFormat::Json);
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            if !error.text.is_empty() {
                eprintln!("mvm: {}", error.text);
            }
            error.exit.into()
        }
    }
}
