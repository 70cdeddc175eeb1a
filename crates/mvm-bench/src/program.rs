//! Running programs to their end.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::measure::timed;

/// The program that is measured: it lies beside this one.
pub fn measured() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("mvm")
}

/// `mvm` on directories of its own, untouched by the environment.
pub fn mvm(state: &Path, run: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(measured());
    command.args(args).env("MVM_STATE_DIR", state).env("MVM_RUN_DIR", run);
    for variable in ["MVM_VMM", "MVM_ACCEL", "MVM_SIMULATION", "MVM_LOG", mvm::image::AGENT_VARIABLE] {
        command.env_remove(variable);
    }
    command
}

/// Runs a command, which has to succeed, and returns what it printed.
pub fn printed(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program of the system.
pub fn output(program: &str, args: &[&str]) -> Result<String, String> {
    printed(Command::new(program).args(args).env("LC_ALL", "C"))
}

/// Runs a command, which has to succeed, and tells how long it took from being started to having ended.
pub fn took(command: &mut Command) -> Result<Duration, String> {
    let shown = format!("{command:?}");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (took, status) = timed(|| command.status().map_err(|error| format!("cannot start {shown}: {error}")))?;
    if status.success() { Ok(took) } else { Err(format!("{shown} ended with {status}")) }
}
