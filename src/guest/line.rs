//! One line to the guest agent: a socket that a VMM joins to a virtio-serial port (QEMU), or to the guest's vsock (Firecracker).
//!
//! A port takes one client at a time, so a client holds `agent.N.lock`; over vsock it does too, so that as many sessions as an agent
//! takes are shared out in the same way. Line 0 is for the lifecycle, the others are for people (exec, shell, cp, logs), so that
//! neither waits for the other.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use mvm_guest_api::handshake::{Nonce, Reply, await_ok};
use mvm_guest_api::{PORT_COUNT, VSOCK_PORT};

use super::GuestError;
use crate::vmm::files::open_socket;
use crate::vmm::firecracker::VSOCK_SOCKET;

/// What a line is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Start, sleep, wake, stop.
    Lifecycle,
    /// Exec, shell, cp, logs.
    Interactive,
}

/// How long the first connect line is given before another is sent; it doubles.
const FIRST_PATIENCE: Duration = Duration::from_millis(25);
/// The longest time between connect lines.
const LONGEST_PATIENCE: Duration = Duration::from_millis(400);
/// How long to wait before connecting again when the other side hangs up, or a lock is taken.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a guest may take to answer one connection over vsock; while it boots it does not, and another one is made.
const VSOCK_PATIENCE: Duration = Duration::from_millis(500);
/// More than `OK` and a port.
const MOST_OF_ANSWER: usize = 32;
/// A port that an earlier session left full holds less than this.
const MOST_DISCARDED: usize = 16 << 20;

/// An open line, ready for HTTP/2.
#[derive(Debug)]
pub(super) struct Line {
    /// The stream.
    pub stream: UnixStream,
    /// Held while the line is.
    pub lock: File,
}

/// Why a line is not open.
enum Miss {
    /// It may be later.
    NotYet(String),
    /// What is there is not what it should be.
    Never(String),
}

/// Opens a line, trying until the deadline, and as long as there is a machine behind it.
///
/// While a guest boots, QEMU keeps what is written until the agent opens its port, so the answer comes as soon as there
/// is someone to give it.
pub(super) fn open(run_dir: &Path, purpose: Purpose, deadline: Instant, machine_is_there: &dyn Fn() -> bool) -> Result<Line, GuestError> {
    let (number, lock) = take_lock(run_dir, purpose, deadline)?;
    let (port, vsock) = (run_dir.join(format!("agent.{number}.sock")), run_dir.join(VSOCK_SOCKET));
    loop {
        let opened =
            if port.symlink_metadata().is_ok() { over_port(&port, deadline).map_err(Miss::NotYet) } else { over_vsock(&vsock, deadline) };
        let why = match opened {
            Ok(stream) => return Ok(Line { stream, lock }),
            Err(Miss::NotYet(why)) => why,
            Err(Miss::Never(why)) => return Err(GuestError::Unreachable { why }),
        };
        if !machine_is_there() {
            return Err(GuestError::Unreachable { why: "its virtual machine ended".into() });
        }
        if Instant::now() + PAUSE >= deadline {
            return Err(GuestError::Unreachable { why });
        }
        std::thread::sleep(PAUSE);
    }
}

fn over_port(path: &Path, deadline: Instant) -> Result<UnixStream, String> {
    let mut stream = UnixStream::connect(path).map_err(|error| format!("{}: {error}", path.display()))?;
    shake_hands(&mut stream, deadline).map_err(|error| error.to_string())?;
    Ok(stream)
}

/// Connects to the agent's port through Firecracker's socket (docs/vsock.md of Firecracker): `CONNECT port`, in one write, is answered
/// with `OK` and the host's port, or by hanging up where nobody listens; a guest that has not come that far does not answer at all.
fn over_vsock(path: &Path, deadline: Instant) -> Result<UnixStream, Miss> {
    let stream = connect_in_place(path).map_err(|error| {
        let why = format!("{}: {error}", path.display());
        let is_of_another = matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::NotADirectory);
        if is_of_another { Miss::Never(why) } else { Miss::NotYet(why) }
    })?;
    ask_for_agent(stream, deadline).map_err(|why| Miss::NotYet(format!("{}: {why}", path.display())))
}

fn ask_for_agent(mut stream: UnixStream, deadline: Instant) -> Result<UnixStream, String> {
    let said = |error: io::Error| error.to_string();
    let left = deadline.saturating_duration_since(Instant::now()).min(VSOCK_PATIENCE);
    stream.set_write_timeout(Some(left.max(PAUSE))).map_err(said)?;
    stream.set_read_timeout(Some(left.max(PAUSE))).map_err(said)?;
    stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).map_err(said)?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the agent's.
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err("nobody listens in the guest yet".into()),
            Ok(_) if answer.len() < MOST_OF_ANSWER => answer.push(byte[0]),
            Ok(_) => return Err("Firecracker answers out of turn".into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err("the guest agent does not answer".into());
            }
            Err(error) => return Err(said(error)),
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    match answer.strip_prefix("OK ").map(|port| port.trim_end().parse::<u32>()) {
        Some(Ok(_)) => {}
        _ => return Err(format!("Firecracker answers {:?} instead of OK and a port", answer.trim_end())),
    }
    stream.set_write_timeout(None).and_then(|()| stream.set_read_timeout(None)).map_err(said)?;
    Ok(stream)
}

/// Connects to a socket, and to nothing that a link in its place or its directory's leads to: the directory is the VMM's.
fn connect_in_place(path: &Path) -> io::Result<UnixStream> {
    let (directory, name) = (path.parent().unwrap_or(Path::new("/")), path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
    let socket = open_socket(directory, name)?;
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

fn take_lock(run_dir: &Path, purpose: Purpose, deadline: Instant) -> Result<(u32, File), GuestError> {
    let numbers = match purpose {
        Purpose::Lifecycle => 0..1,
        Purpose::Interactive => 1..PORT_COUNT,
    };
    loop {
        for number in numbers.clone() {
            let path = run_dir.join(format!("agent.{number}.lock"));
            let file = File::options().create(true).truncate(false).write(true).open(&path);
            let file = file.map_err(|source| GuestError::Io { what: path.display().to_string(), source })?;
            match file.try_lock() {
                Ok(()) => return Ok((number, file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(GuestError::Io { what: path.display().to_string(), source }),
            }
        }
        if Instant::now() + PAUSE >= deadline {
            let why = match purpose {
                Purpose::Lifecycle => "another mvm process is starting, stopping or changing this instance".to_owned(),
                Purpose::Interactive => format!("all {} lines for exec, shell, cp and logs are in use", PORT_COUNT - 1),
            };
            return Err(GuestError::Unreachable { why });
        }
        std::thread::sleep(PAUSE);
    }
}

/// Sends connect lines until the last one is answered.
fn shake_hands(stream: &mut UnixStream, deadline: Instant) -> io::Result<()> {
    let mut patience = FIRST_PATIENCE;
    let mut buffer = Vec::new();
    let mut discarded = 0;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the guest agent does not answer"));
        }
        let nonce = fresh_nonce()?;
        stream.set_write_timeout(Some(left))?;
        stream.write_all(&nonce.connect_line())?;
        let until = Instant::now() + patience.min(left);
        patience = (patience * 2).min(LONGEST_PATIENCE);
        loop {
            match await_ok(&buffer, nonce) {
                // The agent says nothing after its answer until HTTP/2 begins, which the host does.
                Reply::Open { consumed } if consumed == buffer.len() => return Ok(()),
                Reply::Open { .. } => return Err(io::Error::new(io::ErrorKind::InvalidData, "the guest agent speaks out of turn")),
                Reply::More { discard } => {
                    buffer.drain(..discard);
                    discarded += discard;
                }
            }
            if discarded > MOST_DISCARDED {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the guest sends without end"));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            stream.set_read_timeout(Some(left))?;
            let mut part = [0; 4096];
            match stream.read(&mut part) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the VMM closed the line to the guest agent")),
                Ok(count) => buffer.extend_from_slice(&part[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn fresh_nonce() -> io::Result<Nonce> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(Nonce(u64::from_ne_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use mvm_guest_api::handshake::{CONNECT_LEN, OK_LEN};

    use super::*;

    #[test]
    fn a_slow_agent_gets_more_lines_and_the_last_one_counts() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("agent.0.sock")).unwrap();
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = [0; CONNECT_LEN];
            stream.read_exact(&mut line).unwrap();
            let first = line;
            stream.read_exact(&mut line).unwrap();
            assert_ne!(first, line);
            let ok = |line: &[u8]| [b"MVM-OK ", &line[CONNECT_LEN - 17..]].concat();
            stream.write_all(b"garbage\n").unwrap();
            stream.write_all(&ok(&first)).unwrap();
            stream.write_all(&ok(&line)).unwrap();
            assert_eq!(ok(&line).len(), OK_LEN);
            stream
        });
        let deadline = Instant::now() + Duration::from_secs(10);
        let line = open(dir.path(), Purpose::Lifecycle, deadline, &|| true).unwrap();
        drop(agent.join().unwrap());
        drop(line);
    }

    #[test]
    fn a_line_in_use_is_not_given_twice() {
        let dir = tempfile::tempdir().unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        let held: Vec<_> = (1..PORT_COUNT).map(|_| take_lock(dir.path(), Purpose::Interactive, soon()).unwrap()).collect();
        let numbers: Vec<_> = held.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7]);
        let error = take_lock(dir.path(), Purpose::Interactive, soon()).unwrap_err();
        assert!(error.to_string().contains("all 7 lines"), "{error}");
        take_lock(dir.path(), Purpose::Lifecycle, soon()).unwrap();
    }

    #[test]
    fn nobody_there_is_an_error_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let began = Instant::now();
        let error = open(dir.path(), Purpose::Lifecycle, began + Duration::from_millis(50), &|| true).unwrap_err();
        assert!(error.to_string().starts_with("the guest agent cannot be reached"), "{error}");
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
