//! The client of one guest's agent.

use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use mvm_guest_api::proto::guest_agent_client::GuestAgentClient;
use mvm_guest_api::proto::{self, StatusReply};
use mvm_guest_api::{PROTOCOL_VERSION, limits};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::line::{self, Purpose};
use super::{Drained, GuestControl, GuestError, GuestReady, WakeFixup};

/// How long an answer may take that needs no work in the guest.
const QUICK: Duration = Duration::from_secs(10);
/// What a call with a deadline of its own may take on top of it.
const ON_TOP: Duration = Duration::from_secs(10);
/// How often a guest that answers but is not ready is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// A guest that does not answer this long during exec, cp or logs is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// A conversation with one guest's agent.
///
/// Works while a method runs, and only then; it has no thread of its own.
pub struct GuestClient {
    pub(super) runtime: Runtime,
    pub(super) agent: GuestAgentClient<Channel>,
    /// Held while the line is used.
    _lock: std::fs::File,
}

/// Which log of the guest is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// What the agent says of itself.
    Agent,
    /// What the workload prints.
    Workload,
}

/// Whether a log is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// Until the guest or the reader goes away.
    Yes,
    /// Only what is there.
    No,
}

impl GuestClient {
    /// Opens a conversation with the guest whose sockets are in `run_dir`, trying until the deadline.
    ///
    /// # Errors
    /// When the agent does not answer in time.
    pub fn connect(run_dir: &Path, purpose: Purpose, deadline: Instant) -> Result<GuestClient, GuestError> {
        Self::connect_while(run_dir, purpose, deadline, &|| true)
    }

    /// As [`Self::connect`], but no longer than there is a machine for it.
    ///
    /// # Errors
    /// When the agent does not answer in time, or the machine ends.
    pub fn connect_while(
        run_dir: &Path,
        purpose: Purpose,
        deadline: Instant,
        machine_is_there: &dyn Fn() -> bool,
    ) -> Result<GuestClient, GuestError> {
        let line = line::open(run_dir, purpose, deadline, machine_is_there)?;
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| GuestError::Io { what, source }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(io("async runtime"))?;
        line.stream.set_nonblocking(true).map_err(io("socket of the guest agent"))?;
        let channel = {
            let _inside = runtime.enter();
            let mut stream = Some(UnixStream::from_std(line.stream).map_err(io("socket of the guest agent"))?);
            let endpoint = Endpoint::from_static("http://guest")
                .http2_keep_alive_interval(KEEP_ALIVE / 2)
                .keep_alive_timeout(KEEP_ALIVE / 2)
                .keep_alive_while_idle(false)
                .initial_stream_window_size(256 << 10)
                .initial_connection_window_size(1 << 20);
            // A line is used once: another session needs another handshake.
            let connector = tower::service_fn(move |_| {
                let stream = stream.take().map(TokioIo::new);
                async move { stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::BrokenPipe)) }
            });
            let left = deadline.saturating_duration_since(Instant::now());
            let connecting = async { tokio::time::timeout(left, endpoint.connect_with_connector(connector)).await };
            match runtime.block_on(connecting) {
                Ok(Ok(channel)) => channel,
                Ok(Err(error)) => return Err(GuestError::Unreachable { why: error.to_string() }),
                Err(_) => return Err(GuestError::Unreachable { why: "the guest agent does not speak HTTP/2 in time".into() }),
            }
        };
        let agent =
            GuestAgentClient::new(channel).max_decoding_message_size(limits::MAX_MESSAGE).max_encoding_message_size(limits::MAX_MESSAGE);
        Ok(GuestClient { runtime, agent, _lock: line.lock })
    }

    /// Waits for one answer.
    pub(super) fn call<T>(
        &self,
        what: &'static str,
        limit: Duration,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, GuestError> {
        match self.runtime.block_on(async { tokio::time::timeout(limit, answer).await }) {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(refused(what, &status)),
            Err(_) => Err(GuestError::Timeout { what, after_ms: limit.as_millis() as u64 }),
        }
    }

    /// What the guest says of itself.
    ///
    /// # Errors
    /// When it does not answer, or speaks another version of the protocol.
    pub fn status(&mut self, limit: Duration) -> Result<StatusReply, GuestError> {
        let mut agent = self.agent.clone();
        let mut status = self.call("status", limit.min(QUICK), agent.status(proto::StatusRequest {}))?;
        if status.protocol_version != PROTOCOL_VERSION {
            let why = format!(
                "the guest agent speaks version {} of the protocol, and this mvm version {PROTOCOL_VERSION}; build the pool's image again",
                status.protocol_version
            );
            return Err(GuestError::Failed { what: "status", why });
        }
        status.missing = words(&status.missing);
        status.drives.truncate(limits::MAX_WORDS);
        status.busy.truncate(limits::MAX_LEASES);
        for lease in &mut status.busy {
            lease.holder = word(&lease.holder);
        }
        for text in [&mut status.agent_version, &mut status.boot_id, &mut status.kernel_release] {
            *text = word(text);
        }
        Ok(status)
    }

    /// Sets the guest's clock by the host's, as NTP does: the guest's answer is from the middle of the time that it took, give or
    /// take half of that.
    ///
    /// A single message that says what time it is would be late by its own way, which in a guest that was just restored and runs
    /// in software is more than 100 ms.
    fn set_clock(&mut self) -> Result<(), GuestError> {
        const WHAT: &str = "set the clock";
        const GOOD_NS: i128 = 20_000_000;
        const ROUNDS: usize = 5;
        let host = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map(|now| now.as_nanos() as i128)
                .map_err(|_| GuestError::Failed { what: WHAT, why: "the host's clock is before 1970".into() })
        };
        let mut step_ns = 0;
        for _ in 0..ROUNDS {
            let asked = host()?;
            let mut agent = self.agent.clone();
            let reply = self.call(WHAT, QUICK, agent.clock(proto::ClockRequest { step_ns }))?;
            let answered = host()?;
            let behind = (asked + answered) / 2 - i128::from(reply.unix_time_ns);
            let doubt = (answered - asked) / 2;
            if behind.abs() + doubt <= GOOD_NS {
                break;
            }
            // A slow answer may come from a clock that is right.
            step_ns = if behind.abs() > doubt { i64::try_from(behind).unwrap_or(0) } else { 0 };
        }
        Ok(())
    }

    /// Lets the guest take commands again after a drain that led to nothing.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn undrain(&mut self) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        self.call("undrain", QUICK, agent.undrain(proto::UndrainRequest {})).map(drop)
    }

    /// Writes a log of the guest to `out`; only the last `tail` lines of what is kept, where that is given.
    ///
    /// # Errors
    /// When the guest goes away or `out` cannot be written; a reader that has gone (`BrokenPipe`) is no error.
    pub fn logs(&mut self, source: LogSource, follow: Follow, tail: Option<u32>, out: &mut dyn Write) -> Result<(), GuestError> {
        const WHAT: &str = "logs";
        let source = match source {
            LogSource::Agent => proto::logs_request::Source::Agent,
            LogSource::Workload => proto::logs_request::Source::Workload,
        };
        if tail == Some(0) && follow == Follow::No {
            return Ok(());
        }
        let request = proto::LogsRequest { source: source.into(), follow: follow == Follow::Yes, tail: tail.unwrap_or(0) };
        let mut agent = self.agent.clone();
        let mut chunks = self.call(WHAT, QUICK, agent.logs(request))?;
        while let Some(chunk) = self.runtime.block_on(chunks.message()).map_err(|status| refused(WHAT, &status))? {
            match out.write_all(&chunk.data).and_then(|()| out.flush()) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                Err(source) => return Err(GuestError::Io { what: WHAT.into(), source }),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

impl GuestControl for GuestClient {
    fn wait_ready(&mut self, deadline: Instant) -> Result<GuestReady, GuestError> {
        let began = Instant::now();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let status = self.status(left.max(ASK_AGAIN))?;
            if status.ready {
                // What a guest boots with is its real-time clock, which knows whole seconds.
                self.set_clock()?;
                return Ok(ready(&status));
            }
            if Instant::now() + ASK_AGAIN >= deadline {
                let missing = status.missing.join("; ");
                return Err(GuestError::NotReady { missing, after_ms: began.elapsed().as_millis() as u64 });
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn drain(&mut self, timeout: Duration) -> Result<Drained, GuestError> {
        let mut agent = self.agent.clone();
        let request = proto::DrainRequest { deadline_ms: timeout.as_millis() as u64 };
        let reply = self.call("drain", timeout + ON_TOP, agent.drain(request))?;
        Ok(if reply.drained { Drained::Idle } else { Drained::Busy(words(&reply.busy)) })
    }

    fn prepare_sleep(&mut self, deadline: Instant) -> Result<(), GuestError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut agent = self.agent.clone();
        // Hooks get half of the time, so that writing out has the other.
        let request = proto::PrepareSleepRequest { deadline_ms: (left / 2).as_millis() as u64 };
        let reply = self.call("prepare for sleep", left, agent.prepare_sleep(request))?;
        // Secrets in a snapshot would be on disk: that is no warning.
        match reply.warnings.iter().find(|warning| warning.contains("secrets")) {
            Some(why) => Err(GuestError::Failed { what: "prepare for sleep", why: word(why) }),
            None => Ok(()),
        }
    }

    fn wake(&mut self, fixup: &WakeFixup, deadline: Instant) -> Result<GuestReady, GuestError> {
        const WHAT: &str = "wake";
        let left = deadline.saturating_duration_since(Instant::now());
        let mut agent = self.agent.clone();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = now.map_err(|_| GuestError::Failed { what: WHAT, why: "the host's clock is before 1970".into() })?;
        let request = proto::WakeRequest {
            unix_time_ns: now.as_nanos() as i64,
            entropy: fixup.entropy.to_vec().into(),
            deadline_ms: (left / 2).as_millis() as u64,
        };
        let reply = self.call(WHAT, left, agent.wake(request))?;
        self.set_clock()?;
        match reply.status {
            Some(status) if status.ready => Ok(ready(&status)),
            _ => self.wait_ready(deadline),
        }
    }

    fn shutdown(&mut self, grace: Duration) -> Result<(), GuestError> {
        let mut agent = self.agent.clone();
        let request = proto::ShutdownRequest { grace_ms: grace.as_millis() as u64 };
        self.call("shutdown", QUICK, agent.shutdown(request)).map(drop)
    }
}

fn ready(status: &StatusReply) -> GuestReady {
    GuestReady { agent_version: word(&status.agent_version), boot_id: word(&status.boot_id), clock_ns: i128::from(status.unix_time_ns) }
}

/// Says why a call failed, in the guest's words, capped.
pub(super) fn refused(what: &'static str, status: &Status) -> GuestError {
    match status.code() {
        tonic::Code::Unavailable if status.message().is_empty() => GuestError::Unreachable { why: "the line broke".into() },
        // From this side's transport, not from the guest.
        _ if std::error::Error::source(status).is_some() => {
            GuestError::Unreachable { why: format!("it went away during {what}: put to sleep, stopped or died") }
        }
        tonic::Code::PermissionDenied => GuestError::Refused { what, why: word(status.message()) },
        _ => GuestError::Failed { what, why: word(status.message()) },
    }
}

/// A guest's word as it may be shown: capped, and nothing that a terminal would obey.
fn word(text: &str) -> String {
    text.chars().take(limits::MAX_WORD).map(|c| if c.is_control() { '?' } else { c }).collect()
}

fn words(texts: &[String]) -> Vec<String> {
    texts.iter().take(limits::MAX_WORDS).map(|text| word(text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_capped_and_harmless() {
        assert_eq!(word("a\x1b[2Jb\n"), "a?[2Jb?");
        assert_eq!(word(&"ä".repeat(10_000)).chars().count(), limits::MAX_WORD);
        assert_eq!(words(&vec![String::new(); 1000]).len(), limits::MAX_WORDS);
    }
}
