//! From the drives to a guest that is what its configuration says, at boot and again after a wake.

use std::fs;
use std::sync::Arc;

use mvm_guest_api::config::GuestConfig;
use mvm_guest_api::{LABEL_CONFIG, LABEL_DATA, LABEL_SECRETS, limits};

use crate::agent::{Agent, Manage};
use crate::{drives, network, secrets, workload};

/// When the set-up happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// The first time.
    Boot,
    /// After a sleep: data is mounted and the workload runs, everything else is taken anew.
    Wake,
}

/// Mounts the drives, reads the configuration and applies it. What fails is noted with the agent, which is then not
/// ready; the rest goes on.
pub fn set_up(agent: &Arc<Agent>, occasion: Occasion) {
    let system = agent.settings.manage == Manage::System;
    if system {
        mount_drives(agent, occasion);
    }
    let before = agent.state().config.clone();
    match read_config(agent) {
        Ok(config) => {
            if let (true, Some(config)) = (system, &config) {
                apply(agent, config, before.as_ref());
            }
            for what in config.iter().flat_map(|config| &config.not_enabled) {
                agent.say(what);
            }
            agent.state().config = config;
            agent.note("config", Ok(()));
        }
        Err(why) => agent.note("config", Err(why)),
    }
    if occasion == Occasion::Boot {
        let wanted = agent.state().config.as_ref().and_then(|config| config.workload.clone());
        if let Some(wanted) = wanted {
            workload::supervise(agent, wanted);
        }
    }
}

fn mount_drives(agent: &Agent, occasion: Occasion) {
    let is_mounted = |label: &str| agent.state().drives.iter().any(|drive| drive.label == label);
    for device in drives::devices() {
        if is_mounted(&device.label) {
            continue;
        }
        let mounted = match device.label.as_str() {
            LABEL_CONFIG => drives::mount_config(&device).map_err(|error| error.to_string()),
            LABEL_SECRETS => secrets::mount(&device),
            LABEL_DATA if occasion == Occasion::Boot => match drives::mount_data(&device) {
                Ok((mounted, grown)) => {
                    if let Err(why) = grown {
                        agent.say(&format!("{LABEL_DATA} was not grown to the size of its device: {why}"));
                    }
                    Ok(mounted)
                }
                Err(error) => Err(error.to_string()),
            },
            _ => continue,
        };
        let part = match device.label.as_str() {
            LABEL_CONFIG => "config drive",
            LABEL_SECRETS => "secrets drive",
            _ => "data drive",
        };
        agent.note(
            part,
            mounted.map(|mounted| {
                agent.state().drives.push(mounted);
            }),
        );
    }
}

/// Reads the document; a guest without one has nothing asked of it.
fn read_config(agent: &Agent) -> Result<Option<GuestConfig>, String> {
    let path = &agent.settings.config;
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    match fs::metadata(path) {
        Ok(meta) if meta.len() > limits::MAX_CONFIG => Err(format!("{}: larger than {} bytes", path.display(), limits::MAX_CONFIG)),
        Ok(_) => {
            let bytes = fs::read(path).map_err(failed)?;
            GuestConfig::parse(&bytes).map(Some).map_err(|error| match std::error::Error::source(&error) {
                Some(source) => format!("{error}: {source}"),
                None => error.to_string(),
            })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn apply(agent: &Agent, config: &GuestConfig, before: Option<&GuestConfig>) {
    let named = rustix::system::sethostname(config.hostname.as_bytes());
    agent.note("hostname", named.map_err(|error| error.to_string()));
    let networked = match &config.network {
        Some(wanted) => network::configure(wanted, before.and_then(|config| config.network.as_ref())),
        None => Ok(()),
    };
    agent.note("network", networked);
    agent.note("forwarding", network::set_forward(config.forward));
}
