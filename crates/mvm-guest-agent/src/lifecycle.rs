//! Drain, sleep, wake and the end.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use mvm_guest_api::{CONFIG_DIR, LABEL_CONFIG, LABEL_DATA, LABEL_SECRETS, limits, proto};
use rustix::time::{ClockId, Timespec};
use tokio::time::Instant;
use tonic::Status;

use crate::agent::{Agent, Manage};
use crate::hooks::{self, Moment};
use crate::setup::{Occasion, set_up};
use crate::{drives, notify, random, secrets, services, system};

/// A deadline from outside, capped.
pub fn capped(ms: u64) -> Duration {
    Duration::from_millis(ms.min(limits::MAX_DEADLINE_MS))
}

/// Takes no new commands, runs the hooks, waits for what runs.
pub async fn drain(agent: &Arc<Agent>, limit: Duration) -> proto::DrainReply {
    agent.set_draining(true);
    agent.say("draining");
    let until = Instant::now() + limit;
    let mut busy = hooks::run(agent, Moment::Drain, limit).await;
    loop {
        let ended = agent.exec_ended.notified();
        tokio::pin!(ended);
        ended.as_mut().enable();
        let running = agent.running();
        if running.is_empty() {
            return proto::DrainReply { drained: true, busy };
        }
        if tokio::time::timeout_at(until, ended).await.is_err() {
            busy.extend(running.iter().map(|exec| {
                let program: String = exec.program.chars().take(limits::MAX_WORD / 4).collect();
                format!("command {program} (pid {})", exec.group.as_raw_nonzero())
            }));
            busy.truncate(limits::MAX_WORDS);
            return proto::DrainReply { drained: false, busy };
        }
    }
}

/// Takes commands again.
pub fn undrain(agent: &Agent) {
    if agent.draining() {
        agent.set_draining(false);
        agent.say("taking commands again");
    }
}

/// Makes the guest safe to freeze.
pub async fn prepare_sleep(agent: &Arc<Agent>, limit: Duration) -> Result<Vec<String>, Status> {
    agent.set_draining(true);
    let mut warnings = hooks::run(agent, Moment::PreSleep, limit).await;
    agent.state().holding = Some("wake");
    if agent.settings.manage == Manage::System {
        let worker = agent.clone();
        let more = tokio::task::spawn_blocking(move || put_away(&worker));
        warnings.extend(more.await.map_err(|error| Status::internal(error.to_string()))?);
    }
    agent.say("ready to sleep");
    Ok(warnings)
}

/// Unmounts what a snapshot must not keep and writes out the rest.
fn put_away(agent: &Agent) -> Vec<String> {
    let mut warnings = Vec::new();
    let mounted = |label: &str| agent.state().drives.iter().any(|drive| drive.label == label);
    if mounted(LABEL_SECRETS)
        && let Err(why) = secrets::wipe()
    {
        warnings.push(why);
    }
    if mounted(LABEL_CONFIG)
        && let Err(error) = drives::unmount(CONFIG_DIR)
    {
        warnings.push(format!("{CONFIG_DIR}: {error}"));
    }
    agent.state().drives.retain(|drive| drive.label == LABEL_DATA);
    rustix::fs::sync();
    // Small pages again: less to write into the snapshot, and nothing that was only read.
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "3") {
        warnings.push(format!("drop_caches: {error}"));
    }
    warnings
}

/// Makes a restored guest current; it is ready when this returns without a fault.
pub async fn wake(agent: &Arc<Agent>, request: proto::WakeRequest) -> Result<proto::WakeReply, Status> {
    if request.entropy.len() != 64 {
        return Err(Status::invalid_argument("entropy is not 64 bytes"));
    }
    let mut step = 0;
    let mut warnings = Vec::new();
    if agent.settings.manage == Manage::System {
        // The clock first: whatever follows may read it.
        step = set_clock(request.unix_time_ns).map_err(|why| Status::internal(format!("clock: {why}")))?;
        random::reseed(&request.entropy).map_err(|error| Status::internal(format!("random pool: {error}")))?;
        let worker = agent.clone();
        let more = tokio::task::spawn_blocking(move || take_out(&worker));
        warnings = more.await.map_err(|error| Status::internal(error.to_string()))?;
    }
    set_up(agent, Occasion::Wake);
    warnings.extend(hooks::run(agent, Moment::PostWake, capped(request.deadline_ms)).await);
    services::look(agent).await;
    agent.state().holding = None;
    agent.set_draining(false);
    agent.count_wake();
    agent.say("awake");
    agent.note_ready();
    Ok(proto::WakeReply { clock_step_ns: step, warnings, status: Some(agent.status()) })
}

/// Forgets the drives as they were: the host has rebuilt config and secrets.
fn take_out(agent: &Agent) -> Vec<String> {
    // A host that snapshots without PrepareSleep leaves them mounted.
    let mut warnings = if agent.state().drives.iter().any(|drive| drive.label != LABEL_DATA) { put_away(agent) } else { Vec::new() };
    for device in drives::devices() {
        if device.label != LABEL_CONFIG && device.label != LABEL_SECRETS {
            continue;
        }
        if let Err(error) = drives::forget_cache(&device.path) {
            warnings.push(format!("{}: {error}", device.path.display()));
        }
    }
    warnings
}

/// Moves the clock by a step, and returns what it shows then.
pub fn step_clock(agent: &Agent, step_ns: i64) -> Result<proto::ClockReply, Status> {
    if step_ns != 0 && agent.settings.manage == Manage::System {
        let target = system::unix_time_ns().saturating_add(step_ns);
        set_clock(target).map_err(|why| Status::invalid_argument(format!("clock: {why}")))?;
    }
    Ok(proto::ClockReply { unix_time_ns: system::unix_time_ns() })
}

/// Sets the clock; returns how far it was behind.
fn set_clock(unix_time_ns: i64) -> Result<i64, String> {
    // 2020-01-01 to 2100-01-01: a host whose own clock is unset must not throw the guest's back to 1970.
    if !(1_577_836_800_000_000_000..4_102_444_800_000_000_000).contains(&unix_time_ns) {
        return Err(format!("{unix_time_ns} ns is not between the years 2020 and 2100"));
    }
    let step = unix_time_ns - system::unix_time_ns();
    let time = Timespec { tv_sec: unix_time_ns / 1_000_000_000, tv_nsec: unix_time_ns % 1_000_000_000 };
    rustix::time::clock_settime(ClockId::Realtime, time).map_err(|error| error.to_string())?;
    Ok(step)
}

/// Ends the workload, writes everything out and powers off.
pub async fn shut_down(agent: &Arc<Agent>, grace: Duration) {
    agent.set_draining(true);
    agent.state().holding = Some("shutdown");
    agent.say("shutting down");
    agent.workload.stop(grace).await;
    for exec in agent.running() {
        crate::reap::signal_group(exec.group, rustix::process::Signal::KILL);
    }
    if agent.settings.manage == Manage::Nothing {
        agent.say("the system is not mine to power off");
        return;
    }
    if notify::systemd_runs() {
        // Other services may still write: they are stopped and /data is unmounted in systemd's order.
        match notify::power_off(agent).await {
            Ok(()) => return,
            Err(why) => agent.say(&why),
        }
    }
    let worker = agent.clone();
    let ended = tokio::task::spawn_blocking(move || {
        let warnings = put_away(&worker);
        let data = worker.state().drives.iter().any(|drive| drive.label == LABEL_DATA);
        if data && let Err(error) = drives::unmount(mvm_guest_api::DATA_DIR) {
            worker.say(&format!("data: {error}"));
        }
        rustix::fs::sync();
        warnings
    });
    // A device that hangs must not keep the guest up for ever.
    if let Ok(Ok(warnings)) = tokio::time::timeout(Duration::from_secs(30), ended).await {
        for why in warnings {
            agent.say(&why);
        }
    }
    crate::power::off();
}
