//! Runs the two programs that this crate needs.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{During, HostdError};

/// Where system programs are, also when `PATH` of the caller lacks the administrator's directories.
const DIRECTORIES: [&str; 7] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/run/current-system/sw/bin"];

/// Finds a program; the error names the package that brings it.
pub(crate) fn find(name: &'static str, package: &'static str) -> Result<PathBuf, HostdError> {
    let found = DIRECTORIES.iter().map(|directory| PathBuf::from(directory).join(name)).find(|path| path.is_file());
    found.ok_or_else(|| {
        HostdError::refused(format!("cannot run {name}"), format!("it is in none of {}; install package {package}", DIRECTORIES.join(", ")))
    })
}

/// Runs a program to its end with `input`, and returns what it printed; an error holds the first lines of its complaint.
pub(crate) fn run(mut command: Command, what: &str, input: &[u8]) -> Result<String, HostdError> {
    command.env_clear().env("LC_ALL", "C").env("PATH", DIRECTORIES.join(":")).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().during(|| format!("cannot start {:?} to {what}", command.get_program()))?;
    let mut stdin = child.stdin.take().expect("standard input was asked to be a pipe");
    // A program that ends early says why itself, so a broken pipe is no news.
    let written = stdin.write_all(input);
    drop(stdin);
    let output = child.wait_with_output().during(|| format!("cannot wait for {:?}", command.get_program()))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = complaint.lines().take(6).collect();
        return Err(HostdError::refused(format!("cannot {what}"), format!("{} ({})", lines.join("; "), output.status)));
    }
    written.during(|| format!("cannot pass the input to {what}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
