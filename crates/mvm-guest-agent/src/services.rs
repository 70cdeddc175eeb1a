//! Services that have to run before the guest is ready: systemd units that its role names.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::agent::Agent;
use crate::exec::{Leads, PATH, lead_session};
use crate::reap::Exit;

/// How often units are looked at that are not active yet.
const SOON: Duration = Duration::from_millis(100);
/// How often units are looked at that were active.
const LATER: Duration = Duration::from_secs(5);
/// How long one look may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Keeps what is known of the units current; ends with the agent.
pub async fn watch(agent: Arc<Agent>) {
    loop {
        let all_active = agent.state().faults.keys().all(|part| *part != PART);
        tokio::time::sleep(if all_active { LATER } else { SOON }).await;
        let had = agent.missing();
        look(&agent).await;
        if !had.is_empty() && agent.missing().is_empty() {
            agent.note_ready();
        }
    }
}

/// The part of the set-up that units are.
const PART: &str = "services";

/// Looks at every unit once.
pub async fn look(agent: &Agent) {
    let units = agent.state().config.as_ref().map(|config| config.services.clone()).unwrap_or_default();
    let mut inactive = Vec::new();
    for unit in units {
        if let Err(why) = is_active(agent, &unit).await {
            inactive.push(format!("{unit} {why}"));
        }
    }
    let outcome = if inactive.is_empty() { Ok(()) } else { Err(inactive.join(", ")) };
    // Said once, not at every look.
    let before = agent.state().faults.get(PART).cloned();
    if before.as_ref() != outcome.as_ref().err() {
        agent.note(PART, outcome);
    }
}

async fn is_active(agent: &Agent, unit: &str) -> Result<(), String> {
    let mut command = Command::new(&agent.settings.systemctl);
    command.args(["is-active", "--quiet", unit]).env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_else(|| PATH.into()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    lead_session(&mut command, Leads::Session);
    let started = agent.reaper.spawn(&mut command).map_err(|error| format!("cannot be looked at: {error}"))?;
    match tokio::time::timeout(PATIENCE, started.exit).await {
        Ok(Ok(Exit::Code(0))) => Ok(()),
        Ok(Ok(_)) => Err("is not active".into()),
        _ => Err("was not answered for by systemd".into()),
    }
}
