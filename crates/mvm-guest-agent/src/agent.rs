//! What the agent knows; everything else asks and tells it here.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mvm_guest_api::config::GuestConfig;
use mvm_guest_api::{limits, proto};
use rustix::process::Pid;
use tokio::sync::Notify;

use crate::drives::Mounted;
use crate::log::{Ring, say};
use crate::reap::Reaper;
use crate::workload::Workload;
use crate::{busy, system};

/// Whether the agent may change the system it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manage {
    /// Drives, network, clock and power, as in a guest.
    System,
    /// Nothing: the agent of a test, or of a system that looks after itself.
    Nothing,
}

/// Where things lie and what may be done.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Whether the agent may change the system.
    pub manage: Manage,
    /// Directory of `drain.d` and its like.
    pub hooks: PathBuf,
    /// Directory of busy leases.
    pub busy: PathBuf,
    /// `config.json`, once its drive is mounted.
    pub config: PathBuf,
    /// What tells whether a systemd unit is active.
    pub systemctl: PathBuf,
}

/// The agent of one guest.
pub struct Agent {
    /// Where things lie and what may be done.
    pub settings: Settings,
    /// Starts processes.
    pub reaper: Reaper,
    /// What the agent said.
    pub log: Ring,
    /// What the configuration wants kept up.
    pub workload: Workload,
    state: Mutex<State>,
    draining: AtomicBool,
    next_exec: AtomicU64,
    ready_at_ms: AtomicU64,
    wakes: AtomicU32,
    /// Told when a command has ended.
    pub exec_ended: Notify,
}

/// The part that changes.
#[derive(Default)]
pub struct State {
    /// As on the config drive.
    pub config: Option<GuestConfig>,
    /// What is mounted, by label.
    pub drives: Vec<Mounted>,
    /// What went wrong in setting up, by part (`config`, `network` …), in words.
    pub faults: BTreeMap<&'static str, String>,
    /// Set between PrepareSleep and the end of Wake, and until boot is over: why the guest is not ready.
    pub holding: Option<&'static str>,
    execs: BTreeMap<u64, Running>,
}

/// A command that runs for the host.
#[derive(Clone, Debug)]
pub struct Running {
    /// Its process group.
    pub group: Pid,
    /// Its program, for people.
    pub program: String,
}

/// Keeps a command in the list while it runs.
pub struct ExecGuard {
    agent: Arc<Agent>,
    id: u64,
}

impl Drop for ExecGuard {
    fn drop(&mut self) {
        self.agent.state().execs.remove(&self.id);
        self.agent.exec_ended.notify_waiters();
    }
}

impl Agent {
    /// An agent that is not ready yet.
    pub fn new(settings: Settings) -> Arc<Agent> {
        Arc::new(Agent {
            settings,
            reaper: Reaper::default(),
            log: Ring::new(limits::LOG_RING),
            workload: Workload::new(),
            state: Mutex::new(State { holding: Some("start of the agent"), ..State::default() }),
            draining: AtomicBool::new(false),
            next_exec: AtomicU64::new(0),
            ready_at_ms: AtomicU64::new(0),
            wakes: AtomicU32::new(0),
            exec_ended: Notify::new(),
        })
    }

    /// The part that changes. Never held across an `await`.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something on the console and in the agent's log.
    pub fn say(&self, text: &str) {
        say(&self.log, text);
    }

    /// Notes or clears what is wrong with one part of the set-up.
    pub fn note(&self, part: &'static str, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => {
                self.state().faults.remove(part);
            }
            Err(why) => {
                self.say(&format!("{part}: {why}"));
                self.state().faults.insert(part, why);
            }
        }
    }

    /// Whether new commands are refused.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Starts or ends the refusal of new commands.
    pub fn set_draining(&self, draining: bool) {
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// Counts a completed wake.
    pub fn count_wake(&self) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
    }

    /// Refuses what the role does not have the agent do.
    ///
    /// # Errors
    /// With the role and what it has instead.
    pub fn check_handler(&self, handler: &str) -> Result<(), tonic::Status> {
        let state = self.state();
        let Some(config) = &state.config else { return Ok(()) };
        match &config.handlers {
            Some(handlers) if !handlers.iter().any(|one| one == handler) => {
                let has = if handlers.is_empty() { "none".to_owned() } else { handlers.join(", ") };
                Err(tonic::Status::permission_denied(format!("role {} has no handler {handler}; it has: {has}", config.role)))
            }
            _ => Ok(()),
        }
    }

    /// Takes a command into the list of those that run; `None` when there are too many.
    pub fn enlist(self: &Arc<Agent>, running: Running) -> Option<ExecGuard> {
        let id = self.next_exec.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        if state.execs.len() >= limits::MAX_EXECS {
            return None;
        }
        state.execs.insert(id, running);
        Some(ExecGuard { agent: self.clone(), id })
    }

    /// The commands that run.
    pub fn running(&self) -> Vec<Running> {
        self.state().execs.values().cloned().collect()
    }

    /// What readiness still lacks, in words; empty when ready.
    pub fn missing(&self) -> Vec<String> {
        let state = self.state();
        let mut missing: Vec<String> = state.holding.iter().map(|why| (*why).to_owned()).collect();
        missing.extend(state.faults.iter().map(|(part, why)| format!("{part}: {why}")));
        if let Some(config) = &state.config {
            let mounted = |label: &str| state.drives.iter().any(|drive| drive.label == label);
            let requires = config.requires;
            for (wanted, label) in [
                (requires.data, mvm_guest_api::LABEL_DATA),
                (requires.config, mvm_guest_api::LABEL_CONFIG),
                (requires.secrets, mvm_guest_api::LABEL_SECRETS),
            ] {
                if wanted && !mounted(label) {
                    missing.push(format!("drive {label}"));
                }
            }
            if config.workload.is_some() && !self.workload.was_started() {
                missing.push("workload not started".into());
            }
        }
        missing
    }

    /// Notes when the guest was ready first, and says so.
    pub fn note_ready(&self) {
        let missing = self.missing();
        if !missing.is_empty() {
            self.say(&format!("not ready: {}", missing.join("; ")));
        } else if self.ready_at_ms.load(Ordering::Relaxed) == 0 {
            self.ready_at_ms.store(system::uptime_ms().max(1), Ordering::Relaxed);
            self.say("ready");
        }
    }

    /// The answer to Status.
    pub fn status(&self) -> proto::StatusReply {
        let missing = self.missing();
        let (running, drives, versions) = {
            let state = self.state();
            let drives = state.drives.iter().map(Mounted::to_proto).collect();
            let versions = state.config.as_ref().map_or((0, 0), |config| (config.config_version, config.secrets_epoch));
            (state.execs.len() as u32, drives, versions)
        };
        proto::StatusReply {
            protocol_version: mvm_guest_api::PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ready: missing.is_empty(),
            missing,
            boot_id: system::boot_id(),
            workload: Some(self.workload.to_proto()),
            uptime_ms: system::uptime_ms(),
            drives,
            unix_time_ns: system::unix_time_ns(),
            draining: self.draining(),
            running_execs: running,
            busy: busy::leases(&self.settings.busy),
            config_version: versions.0,
            secrets_epoch: versions.1,
            ready_at_uptime_ms: self.ready_at_ms.load(Ordering::Relaxed),
            wakes: self.wakes.load(Ordering::Relaxed),
            kernel_release: system::kernel_release(),
            usage: Some(system::usage()),
        }
    }
}
