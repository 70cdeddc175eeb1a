//! The outside: a directory, namespaces, and the end of both.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::figure::Run;
use crate::{Options, Output};

/// What the inside writes its figures to.
pub const FIGURES: &str = "figures.json";

/// Measures on a host of its own and shows the figures; tells whether all are within their limits.
pub fn run(options: &Options) -> Result<bool, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("networks and microVMs are made by root; try again as root".into());
    }
    // Made here: where it is measured is no network to fetch parts of it from.
    ensure_image()?;
    let dir = tempfile::Builder::new().prefix("mvm-bench-").tempdir().map_err(|error| format!("cannot make a directory: {error}"))?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, interrupted.clone()).map_err(|error| format!("cannot watch for signals: {error}"))?;
    }
    let status = wait(enter(options, dir.path())?, &interrupted)?;
    let figures = fs::read(dir.path().join(FIGURES));
    drop(dir);
    let figures = match figures {
        Ok(figures) => figures,
        Err(_) if interrupted.load(Ordering::SeqCst) => return Err("interrupted".into()),
        Err(_) => return Err(format!("there are no figures; the measurement ended with {status}")),
    };
    let run: Run = serde_json::from_slice(&figures).map_err(|error| format!("the figures cannot be read: {error}"))?;
    if run.figures.is_empty() {
        return Err(format!("no figure has a name that contains {}", options.filters.join(" or ")));
    }
    match options.output {
        Output::Table => print!("{}", run.to_table()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&run).map_err(|error| error.to_string())?),
    }
    Ok(run.is_within() && status.success())
}

/// Starts this very program inside.
fn enter(options: &Options, dir: &Path) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]).arg(program);
    command.arg("--inside").arg(dir).args(options.quick.then_some("--quick")).args(&options.filters);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.spawn().map_err(|error| format!("cannot start unshare: {error}"))
}

/// Waits until the inside ends, or ends it: with it, all that it started is killed by the kernel.
fn wait(mut child: Child, interrupted: &AtomicBool) -> Result<ExitStatus, String> {
    let failed = |error| format!("cannot wait for the measurement: {error}");
    loop {
        if let Some(status) = child.try_wait().map_err(failed)? {
            return Ok(status);
        }
        if interrupted.load(Ordering::SeqCst) {
            child.kill().map_err(failed)?;
            let status = child.wait().map_err(failed)?;
            debug_assert!(status.signal().is_some() || status.code().is_some());
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ensure_image() -> Result<(), String> {
    for name in ["mvm", "mvm-guest-agent.static"] {
        let beside = crate::program::measured().with_file_name(name);
        if !beside.exists() {
            return Err(format!("{} is missing; `cargo xtask bench` builds it", beside.display()));
        }
    }
    let agent = crate::program::measured().with_file_name("mvm-guest-agent.static");
    mvm::image::builtin::ensure(&crate::live::images(), &agent, &|what| eprintln!("image: {what}"))
        .map(drop)
        .map_err(|error| mvm::vm::error::with_causes(&error))
}
