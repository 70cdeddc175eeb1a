//! The one place that starts processes and takes their ends.
//!
//! As PID 1 the agent inherits every orphan, so it waits for any child at all; whoever started one is told through a
//! channel. The table is locked while a process is started, so that none ends before it is known.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};

use mvm_guest_api::proto;
use rustix::process::{Pid, Signal, WaitOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl From<Exit> for proto::Exited {
    fn from(exit: Exit) -> proto::Exited {
        let how = match exit {
            Exit::Code(code) => proto::exited::How::Code(code),
            Exit::Signal(signal) => proto::exited::How::Signal(signal),
        };
        proto::Exited { how: Some(how) }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "code {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Starts processes and takes their ends.
#[derive(Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

/// A started process.
pub struct Started {
    /// With its ends of the pipes.
    pub child: Child,
    /// Also the id of its process group, when it leads one.
    pub pid: Pid,
    /// Resolves when it ends.
    pub exit: oneshot::Receiver<Exit>,
}

impl Reaper {
    /// Starts a process.
    ///
    /// # Errors
    /// What `fork` or `exec` said.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Started> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn()?;
        let (tell, exit) = oneshot::channel();
        waiting.insert(child.id() as i32, tell);
        let pid = Pid::from_raw(child.id() as i32).expect("a started process has a pid");
        Ok(Started { child, pid, exit })
    }

    /// Takes the ends of processes for ever.
    ///
    /// # Errors
    /// When the signal cannot be listened to.
    pub async fn run(&self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.reap();
            ended.recv().await;
        }
    }

    fn reap(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => continue,
            };
            if let Some(tell) = waiting.remove(&pid.as_raw_nonzero().get()) {
                // Whoever started it may have lost interest.
                let _ = tell.send(exit);
            }
        }
    }
}

/// Signals a process group; that it is gone already is no error.
pub fn signal_group(group: Pid, signal: Signal) {
    let _ = rustix::process::kill_process_group(group, signal);
}
