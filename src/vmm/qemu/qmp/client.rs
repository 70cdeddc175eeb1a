//! The conversation: greeting, negotiation, one command at a time, events in between.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::de::DeserializeOwned;

use super::line::{LineError, Lines, MAX_LINE};
use super::wire::{AddedFd, Command, Message, RunState, Status, parse};

/// A connection on which commands can be given.
#[derive(Debug)]
pub(in crate::vmm::qemu) struct QmpClient {
    stream: UnixStream,
    lines: Lines,
    deadline: Instant,
    started: Instant,
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub(in crate::vmm::qemu) enum QmpError {
    #[error("QMP {command}: {source}")]
    Io {
        command: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("QMP {command}: no answer within {after_ms} ms")]
    Timeout { command: &'static str, after_ms: u64 },
    #[error("QMP {command}: QEMU closed the connection")]
    Closed { command: &'static str },
    #[error("QMP {command}: an answer is longer than {MAX_LINE} bytes")]
    TooLong { command: &'static str },
    #[error("QMP {command}: not an answer: {why}")]
    Malformed { command: &'static str, why: String },
    #[error("QMP {command}: {desc} ({class})")]
    Refused { command: &'static str, class: String, desc: String },
}

/// What stands for the command before there is one.
const GREETING: &str = "greeting";

impl QmpClient {
    /// Connects, waits for the greeting and negotiates; everything on this connection has to be done by the deadline.
    ///
    /// The socket listens from before QEMU starts, so that connecting does not wait; the greeting does.
    pub(in crate::vmm::qemu) fn connect(path: &Path, deadline: Instant) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).map_err(|source| QmpError::Io { command: GREETING, source })?;
        Self::over(stream, deadline)
    }

    /// Greets over a connected stream.
    pub(super) fn over(stream: UnixStream, deadline: Instant) -> Result<Self, QmpError> {
        let mut client = Self { stream, lines: Lines::default(), deadline, started: Instant::now() };
        match client.next_message(GREETING)? {
            Message::Greeting { .. } => {}
            other => return Err(QmpError::Malformed { command: GREETING, why: format!("{other:?}") }),
        }
        client.execute(Command::QmpCapabilities)?;
        Ok(client)
    }

    /// Does a command that returns nothing of interest.
    pub(in crate::vmm::qemu) fn execute(&mut self, command: Command) -> Result<(), QmpError> {
        self.call::<serde::de::IgnoredAny>(&command, None).map(drop)
    }

    /// Asks whether the virtual CPUs run.
    pub(in crate::vmm::qemu) fn run_state(&mut self) -> Result<RunState, QmpError> {
        Ok(self.call::<Status>(&Command::QueryStatus, None)?.status)
    }

    /// Hands over a descriptor and returns the number of its set: `/dev/fdset/<number>` names it.
    pub(in crate::vmm::qemu) fn add_fd(&mut self, fd: BorrowedFd<'_>, opaque: &str) -> Result<u64, QmpError> {
        Ok(self.call::<AddedFd>(&Command::AddFd { opaque: opaque.to_owned() }, Some(fd))?.fdset_id)
    }

    fn call<T: DeserializeOwned>(&mut self, command: &Command, fd: Option<BorrowedFd<'_>>) -> Result<T, QmpError> {
        let name = command.name();
        let mut text = serde_json::to_vec(command).map_err(|error| QmpError::Malformed { command: name, why: error.to_string() })?;
        text.push(b'\n');
        self.send(name, &text, fd)?;
        loop {
            match self.next_message(name)? {
                Message::Return { value } => {
                    return serde_json::from_value(value).map_err(|error| QmpError::Malformed { command: name, why: error.to_string() });
                }
                Message::Error { error } => {
                    return Err(QmpError::Refused { command: name, class: error.class, desc: error.desc });
                }
                // What it means for the machine is seen at its process; here it is only of interest to who looks for a mistake.
                Message::Event(event) => tracing::debug!(event = event.event, during = name, "QMP event"),
                Message::Greeting { .. } => {
                    return Err(QmpError::Malformed { command: name, why: "a second greeting".into() });
                }
            }
        }
    }

    fn send(&mut self, command: &'static str, text: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<(), QmpError> {
        let left = self.left(command)?;
        let io = |source| QmpError::Io { command, source };
        self.stream.set_write_timeout(Some(left)).map_err(io)?;
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(QmpError::Malformed { command, why: "no space for a descriptor".into() });
            }
            sent = sendmsg(&self.stream, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL)
                .map_err(|error| self.failed(command, error.into()))?;
        }
        self.stream.write_all(&text[sent..]).map_err(|error| self.failed(command, error))
    }

    fn next_message(&mut self, command: &'static str) -> Result<Message, QmpError> {
        loop {
            match self.lines.take() {
                Ok(Some(line)) => {
                    return parse(&line).map_err(|error| QmpError::Malformed { command, why: error.to_string() });
                }
                Ok(None) => {}
                Err(error) => return Err(self.line_error(command, error)),
            }
            let left = self.left(command)?;
            self.stream.set_read_timeout(Some(left)).map_err(|source| QmpError::Io { command, source })?;
            if let Err(error) = self.lines.fill(&mut self.stream) {
                return Err(self.line_error(command, error));
            }
        }
    }

    fn line_error(&self, command: &'static str, error: LineError) -> QmpError {
        match error {
            LineError::Closed => QmpError::Closed { command },
            LineError::TooLong => QmpError::TooLong { command },
            LineError::Io(source) => self.failed(command, source),
        }
    }

    fn failed(&self, command: &'static str, source: std::io::Error) -> QmpError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, WouldBlock};
        match source.kind() {
            WouldBlock | TimedOut => self.timeout(command),
            BrokenPipe | ConnectionReset => QmpError::Closed { command },
            _ => QmpError::Io { command, source },
        }
    }

    fn timeout(&self, command: &'static str) -> QmpError {
        let after = self.deadline.saturating_duration_since(self.started);
        QmpError::Timeout { command, after_ms: u64::try_from(after.as_millis()).unwrap_or(u64::MAX) }
    }

    /// What is left until the deadline; never zero, which would mean no deadline.
    fn left(&self, command: &'static str) -> Result<Duration, QmpError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_micros(1) { Err(self.timeout(command)) } else { Ok(left) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::thread;

    use super::*;

    const GREETING_LINE: &str = r#"{"QMP":{"version":{},"capabilities":[]}}"#;

    /// A QEMU that says these lines after the greeting, one per command received, and then closes.
    fn scripted(answers: Vec<String>) -> (UnixStream, thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let thread = thread::spawn(move || {
            let mut out = theirs.try_clone().unwrap();
            let mut input = BufReader::new(theirs);
            writeln!(out, "{GREETING_LINE}").unwrap();
            let mut heard = Vec::new();
            for answer in answers {
                let mut line = String::new();
                input.read_line(&mut line).unwrap();
                heard.push(line);
                writeln!(out, "{answer}").unwrap();
            }
            heard
        });
        (ours, thread)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn events_in_between_do_not_hide_the_answer() {
        let (stream, qemu) = scripted(vec![
            r#"{"return":{}}"#.into(),
            "{\"timestamp\":{\"seconds\":1,\"microseconds\":2},\"event\":\"STOP\"}\r\n{\"return\":{}}".into(),
            r#"{"return":{"status":"paused","running":false}}"#.into(),
        ]);
        let mut client = QmpClient::over(stream, soon()).unwrap();
        client.execute(Command::Stop).unwrap();
        assert_eq!(client.run_state().unwrap(), RunState::Paused);
        assert_eq!(qemu.join().unwrap()[1], "{\"execute\":\"stop\"}\n");
    }

    #[test]
    fn errors_name_the_command() {
        let (stream, _qemu) = scripted(vec![
            r#"{"return":{}}"#.into(),
            r#"{"error":{"class":"GenericError","desc":"no such set"}}"#.into(),
            r#"{"return":{}}"#.into(),
            "not json".into(),
        ]);
        let mut client = QmpClient::over(stream, soon()).unwrap();
        let text = |e: QmpError| e.to_string();
        assert_eq!(text(client.execute(Command::RemoveFd { fdset_id: 3 }).unwrap_err()), "QMP remove-fd: no such set (GenericError)");
        let error = text(client.add_fd(std::io::stdin().as_fd(), "x").unwrap_err());
        assert!(error.starts_with("QMP add-fd: not an answer: missing field `fdset-id`"), "{error}");
        let error = text(client.execute(Command::Cont).unwrap_err());
        assert!(error.starts_with("QMP cont: not an answer"), "{error}");
        assert_eq!(text(client.execute(Command::Stop).unwrap_err()), "QMP stop: QEMU closed the connection");
    }

    #[test]
    fn silence_ends_at_the_deadline() {
        let (stream, _kept) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_millis(30);
        let error = QmpClient::over(stream, deadline).unwrap_err();
        assert!(matches!(error, QmpError::Timeout { command: "greeting", .. }), "{error}");
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn an_endless_answer_is_refused() {
        let (stream, mut qemu) = UnixStream::pair().unwrap();
        let writer = thread::spawn(move || {
            let chunk = [b'x'; 4096];
            while qemu.write_all(&chunk).is_ok() {}
        });
        assert!(matches!(QmpClient::over(stream, soon()).unwrap_err(), QmpError::TooLong { .. }));
        writer.join().unwrap();
    }
}
