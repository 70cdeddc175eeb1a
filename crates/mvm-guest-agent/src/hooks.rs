//! Programs that an image runs around sleep, wake and drain.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::exec::{Leads, PATH, lead_session};
use crate::reap::{Exit, signal_group};

/// When hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before sleep or stop, while work still runs.
    Drain,
    /// Directly before the guest is frozen.
    PreSleep,
    /// After a wake, before the guest is ready.
    PostWake,
}

impl Moment {
    fn directory(self) -> &'static str {
        match self {
            Moment::Drain => "drain.d",
            Moment::PreSleep => "pre-sleep.d",
            Moment::PostWake => "post-wake.d",
        }
    }
}

/// Runs the executable files of the moment's directory, one after the other in the order of their names, all within
/// `limit`. Returns what went wrong, in words; a hook that takes too long is killed, and those after it still get a
/// chance only if there is time.
pub async fn run(agent: &Agent, moment: Moment, limit: Duration) -> Vec<String> {
    let until = Instant::now() + limit;
    let mut wrong = Vec::new();
    for hook in hooks(&agent.settings.hooks.join(moment.directory())) {
        if let Err(why) = run_one(agent, &hook, until).await {
            let why = format!("hook {}: {why}", hook.display());
            agent.say(&why);
            wrong.push(why);
        }
    }
    wrong
}

fn hooks(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut hooks: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0))
        .collect();
    hooks.sort();
    hooks
}

async fn run_one(agent: &Agent, hook: &Path, until: Instant) -> Result<(), String> {
    if Instant::now() >= until {
        return Err("no time was left".into());
    }
    let mut command = Command::new(hook);
    command.env_clear().env("PATH", PATH).current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    lead_session(&mut command, Leads::Session);
    let started = agent.reaper.spawn(&mut command).map_err(|error| error.to_string())?;
    match tokio::time::timeout_at(until, started.exit).await {
        Ok(Ok(Exit::Code(0))) => Ok(()),
        Ok(Ok(exit)) => Err(format!("ended with {exit}")),
        Ok(Err(_)) => Err("its end was not seen".into()),
        Err(_) => {
            signal_group(started.pid, Signal::KILL);
            Err("took too long and was killed".into())
        }
    }
}
