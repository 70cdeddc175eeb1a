//! The one program that the configuration wants kept up.

use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_guest_api::config::{self, Restart};
use mvm_guest_api::limits;
use mvm_guest_api::proto;
use proto::workload::State as Phase;
use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::exec::{Leads, PATH, lead_session};
use crate::log::Ring;
use crate::reap::{Exit, signal_group};

/// The first pause when the configuration names none.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause before another start.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A workload that ran this long is not in a loop of failures any more.
const SETTLED: Duration = Duration::from_secs(60);

/// The supervised program.
pub struct Workload {
    /// What it printed.
    pub output: Arc<Ring>,
    seen: Mutex<Seen>,
    stopping: watch::Sender<bool>,
    ended: watch::Sender<bool>,
}

#[derive(Clone, Copy)]
struct Seen {
    phase: Phase,
    pid: Option<Pid>,
    starts: u32,
    last_exit: Option<Exit>,
}

impl Workload {
    /// No program yet.
    pub fn new() -> Workload {
        Workload {
            output: Arc::new(Ring::new(limits::LOG_RING)),
            seen: Mutex::new(Seen { phase: Phase::None, pid: None, starts: 0, last_exit: None }),
            stopping: watch::Sender::new(false),
            ended: watch::Sender::new(true),
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it was started at least once.
    pub fn was_started(&self) -> bool {
        self.seen().starts > 0
    }

    /// For Status.
    pub fn to_proto(&self) -> proto::Workload {
        let seen = *self.seen();
        proto::Workload {
            state: seen.phase.into(),
            pid: seen.pid.map_or(0, |pid| pid.as_raw_nonzero().get() as u32),
            restarts: seen.starts.saturating_sub(1),
            last_exit: seen.last_exit.map(Into::into),
        }
    }

    /// Ends it for good: a request, and after the grace force.
    pub async fn stop(&self, grace: Duration) {
        self.stopping.send_replace(true);
        let Some(group) = self.seen().pid else {
            return;
        };
        signal_group(group, Signal::TERM);
        let mut ended = self.ended.subscribe();
        if tokio::time::timeout(grace, ended.wait_for(|ended| *ended)).await.is_err() {
            signal_group(group, Signal::KILL);
            // What even SIGKILL does not end hangs in the kernel.
            let _ = tokio::time::timeout(Duration::from_secs(1), ended.wait_for(|ended| *ended)).await;
        }
    }
}

impl Default for Workload {
    fn default() -> Self {
        Workload::new()
    }
}

/// Starts the workload and keeps it as its configuration wants.
///
/// The first start has happened when this returns; the rest goes on in the background.
pub fn supervise(agent: &Arc<Agent>, wanted: config::Workload) {
    let workload = &agent.workload;
    workload.ended.send_replace(false);
    let first = start(agent, &wanted);
    let agent = agent.clone();
    tokio::spawn(async move {
        keep(&agent, &wanted, first).await;
        let workload = &agent.workload;
        workload.seen().pid = None;
        workload.ended.send_replace(true);
    });
}

type Start = std::io::Result<tokio::sync::oneshot::Receiver<Exit>>;

async fn keep(agent: &Agent, wanted: &config::Workload, first: Start) {
    let workload = &agent.workload;
    let mut stopping = workload.stopping.subscribe();
    let shortest = match wanted.backoff_ms {
        0 => FIRST_PAUSE,
        ms => Duration::from_millis(ms).min(LONGEST_PAUSE),
    };
    let mut pause = shortest;
    let mut attempt = first;
    loop {
        let began = Instant::now();
        let exit = match attempt {
            Ok(exit) => exit.await.unwrap_or(Exit::Code(-1)),
            Err(error) => {
                agent.note("workload", Err(format!("{}: {error}", wanted.command[0])));
                Exit::Code(127)
            }
        };
        {
            let mut seen = workload.seen();
            seen.pid = None;
            seen.last_exit = Some(exit);
        }
        let again = match wanted.restart {
            Restart::Always => true,
            Restart::OnFailure => exit != Exit::Code(0),
            Restart::Never => false,
        };
        if *stopping.borrow() {
            workload.seen().phase = Phase::Stopped;
            return;
        }
        agent.say(&format!("workload ended with {exit}"));
        if !again {
            workload.seen().phase = Phase::Ended;
            return;
        }
        workload.seen().phase = Phase::Backoff;
        if began.elapsed() >= SETTLED {
            pause = shortest;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stopping.wait_for(|stop| *stop) => {
                workload.seen().phase = Phase::Stopped;
                return;
            }
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        attempt = start(agent, wanted);
        if attempt.is_ok() {
            agent.note("workload", Ok(()));
            agent.note_ready();
        }
    }
}

fn start(agent: &Agent, wanted: &config::Workload) -> Start {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let reader = pipe::Receiver::from_owned_fd(reader)?;
    let mut command = Command::new(&wanted.command[0]);
    command
        .args(&wanted.command[1..])
        .env_clear()
        .envs([("PATH", PATH), ("HOME", "/"), ("USER", "root")])
        .envs(&wanted.env)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::from(writer.try_clone()?))
        .stderr(Stdio::from(writer));
    lead_session(&mut command, Leads::Session);
    let started = agent.reaper.spawn(&mut command)?;
    let mut seen = agent.workload.seen();
    seen.phase = Phase::Running;
    seen.pid = Some(started.pid);
    seen.starts = seen.starts.saturating_add(1);
    tokio::spawn(collect(reader, agent.workload.output.clone()));
    Ok(started.exit)
}

async fn collect(mut reader: pipe::Receiver, ring: Arc<Ring>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
        ring.push(&buffer[..count]);
    }
}
