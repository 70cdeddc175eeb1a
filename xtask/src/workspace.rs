//! Where things are, and how programs are run.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;

/// The top of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// The target directory: `cargo run` started this very program from `<target>/<profile>/xtask`.
///
/// # Errors
/// When this program does not know where it is.
pub fn target() -> Result<PathBuf, String> {
    let exe = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let target = exe.parent().and_then(Path::parent).map(Path::to_owned);
    target.ok_or_else(|| format!("{} is not in a target directory; start it with cargo xtask", exe.display()))
}

/// The target triple of this machine.
pub const TRIPLE: &str = if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };

/// Cargo, in the top of the repository.
pub fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // What cargo set for this program is not for the next cargo.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// Shows a command as it would be typed.
pub fn typed(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let name = |word: &OsStr| Path::new(word).file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut words = words.map(|word| word.to_string_lossy().into_owned());
    let program = words.next().map(|program| name(OsStr::new(&program)));
    program.into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// Runs to the end, output shown.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn succeed(command: &mut Command) -> Result<(), String> {
    let status = command.status().map_err(|error| format!("cannot start {}: {error}", typed(command)))?;
    if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", typed(command))) }
}

/// Runs to the end and returns what it printed; nothing is shown unless it fails.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn output(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("cannot start {}: {error}", typed(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} ended with {}: {}", typed(command), output.status, said.trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs to the end, output shown; `hear` is told every line of it.
///
/// # Errors
/// When it cannot be started.
pub fn overhear(command: &mut Command, mut hear: impl FnMut(&str)) -> Result<ExitStatus, String> {
    let failed = |command: &Command, error| format!("cannot start {}: {error}", typed(command));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(command, error))?;
    let (sender, lines) = mpsc::channel();
    let out: Option<Box<dyn Read + Send>> = child.stdout.take().map(|out| Box::new(out) as _);
    let err: Option<Box<dyn Read + Send>> = child.stderr.take().map(|err| Box::new(err) as _);
    for stream in out.into_iter().chain(err) {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
                if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                    return;
                }
                line.clear();
            }
        });
    }
    drop(sender);
    for line in lines {
        // Whoever closed our output is not interested any more; the command runs on.
        let _ = std::io::stderr().write_all(line.as_bytes());
        hear(&line);
    }
    child.wait().map_err(|error| failed(command, error))
}
