//! Commands that run for the host.
//!
//! A command leads a session and process group of its own. It ends with its leader; what it left running in the
//! background stays, unless the caller went away, which kills the whole group.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use mvm_guest_api::limits;
use mvm_guest_api::proto::{ExecInput, ExecOutput, ExecStart, Exited, TtySize, exec_input, exec_output, exited};
use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::agent::{Agent, Running};
use crate::port::watch;
use crate::reap::{Started, signal_group};
use crate::users::{self, User};

/// How long output is still read after the leader has ended, when something else keeps the pipe open.
const LINGER: Duration = Duration::from_millis(250);
/// How long the first message may take.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Where programs are looked for.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What goes back to the host.
pub type Output = mpsc::Sender<Result<ExecOutput, Status>>;

/// Reads the first message and starts its command; the rest goes on in the background.
///
/// # Errors
/// When the request is refused; that a command cannot be started is an answer instead (code 126 or 127).
pub async fn start(agent: Arc<Agent>, mut input: Streaming<ExecInput>, output: Output) -> Result<(), Status> {
    let first = tokio::time::timeout(START_DEADLINE, input.message())
        .await
        .map_err(|_| Status::deadline_exceeded("no start message within 10 s"))??;
    let Some(ExecInput { kind: Some(exec_input::Kind::Start(start)) }) = first else {
        return Err(Status::invalid_argument("the first message is not a start message"));
    };
    check(&start)?;
    agent.check_handler(if start.tty.is_some() { "shell" } else { "exec" })?;
    if agent.draining() {
        return Err(Status::unavailable("the guest is draining and takes no new commands"));
    }
    let user = users::find(&start.user).map_err(Status::invalid_argument)?;
    let program = String::from_utf8_lossy(&start.argv[0]).into_owned();
    let (started, streams) = match launch(&agent, &start, &user) {
        Ok(parts) => parts,
        Err(Refusal { code, text }) => {
            send(&output, exec_output::Kind::Stderr(format!("{text}\n").into_bytes().into())).await;
            let how = Some(exited::How::Code(code));
            send(&output, exec_output::Kind::Exited(Exited { how })).await;
            return Ok(());
        }
    };
    let group = started.pid;
    let Some(guard) = agent.enlist(Running { group, program }) else {
        signal_group(group, Signal::KILL);
        return Err(Status::resource_exhausted(format!("{} commands run already", limits::MAX_EXECS)));
    };
    tokio::spawn(async move {
        send(&output, exec_output::Kind::Started(group.as_raw_nonzero().get() as u32)).await;
        run(started, streams, input, output).await;
        drop(guard);
    });
    Ok(())
}

fn check(start: &ExecStart) -> Result<(), Status> {
    let refuse = |text: String| Err(Status::invalid_argument(text));
    if start.argv.first().is_none_or(|program| program.is_empty()) {
        return refuse("the command is empty".into());
    }
    if start.argv.len() > limits::MAX_ARGS || start.env.len() > limits::MAX_ENV {
        return refuse(format!("more than {} arguments or {} variables", limits::MAX_ARGS, limits::MAX_ENV));
    }
    let strings = || start.argv.iter().chain(&start.env);
    if strings().map(|s| s.len()).sum::<usize>() > limits::MAX_ARG_BYTES {
        return refuse(format!("arguments and variables are longer than {} bytes", limits::MAX_ARG_BYTES));
    }
    if strings().any(|s| s.contains(&0)) || start.cwd.contains('\0') || start.cwd.len() > limits::MAX_PATH {
        return refuse("an argument, variable or directory holds a NUL or is too long".into());
    }
    if start.env.iter().any(|v| matches!(v.iter().position(|&b| b == b'='), None | Some(0))) {
        return refuse("a variable is not of the form NAME=VALUE".into());
    }
    Ok(())
}

/// Why a command could not be started, as a shell would say it.
struct Refusal {
    code: i32,
    text: String,
}

/// The agent's ends of what a command reads and writes.
enum Streams {
    Pipes { stdin: Option<pipe::Sender>, stdout: pipe::Receiver, stderr: pipe::Receiver },
    Terminal(Arc<Terminal>),
}

fn launch(agent: &Agent, start: &ExecStart, user: &User) -> Result<(Started, Streams), Refusal> {
    let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let shown = String::from_utf8_lossy(&start.argv[0]).into_owned();
    let failed = |what: &str, error: io::Error| Refusal { code: 126, text: format!("{shown}: {what}: {error}") };
    let mut command = Command::new(text(&start.argv[0]));
    command.args(start.argv[1..].iter().map(|a| text(a)));
    command.env_clear().env("PATH", PATH).env("HOME", &user.home).env("USER", &user.name);
    if let Some(tty) = &start.tty {
        command.env("TERM", if tty.term.is_empty() { "linux" } else { &tty.term });
    }
    for variable in &start.env {
        let at = variable.iter().position(|&b| b == b'=').unwrap_or(variable.len());
        command.env(text(&variable[..at]), text(&variable[(at + 1).min(variable.len())..]));
    }
    let cwd = match (&start.cwd, std::path::Path::new(&user.home).is_dir()) {
        (cwd, _) if !cwd.is_empty() => cwd.as_str(),
        (_, true) => user.home.as_str(),
        (_, false) => "/",
    };
    if !std::path::Path::new(cwd).is_dir() {
        return Err(failed(cwd, io::ErrorKind::NotADirectory.into()));
    }
    command.current_dir(cwd);
    if !user.is_root() {
        command.uid(user.uid).gid(user.gid);
    }
    let (terminal, leads) = match &start.tty {
        Some(tty) => {
            let (master, slave) = open_terminal(tty.size).map_err(|e| failed("terminal", e))?;
            let end = || slave.try_clone().map(Stdio::from).map_err(|e| failed("terminal", e));
            command.stdin(end()?).stdout(end()?).stderr(end()?);
            (Some(master), Leads::SessionWithTerminal)
        }
        None => {
            command.stdin(if start.stdin { Stdio::piped() } else { Stdio::null() });
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            (None, Leads::Session)
        }
    };
    lead_session(&mut command, leads);
    let mut started = agent.reaper.spawn(&mut command).map_err(|error| Refusal {
        code: if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 },
        text: format!("{shown}: {error}"),
    })?;
    let streams = match terminal {
        Some(master) => watch(master).map(|fd| Streams::Terminal(Arc::new(Terminal(fd)))),
        None => pipes(&mut started),
    };
    streams.map(|streams| (started, streams)).map_err(|e| failed("pipes", e))
}

fn pipes(started: &mut Started) -> io::Result<Streams> {
    let child = &mut started.child;
    let missing = || io::Error::other("the pipe was not made");
    let stdin = child.stdin.take().map(|fd| pipe::Sender::from_owned_fd(fd.into())).transpose()?;
    let stdout = pipe::Receiver::from_owned_fd(child.stdout.take().ok_or_else(missing)?.into())?;
    let stderr = pipe::Receiver::from_owned_fd(child.stderr.take().ok_or_else(missing)?.into())?;
    Ok(Streams::Pipes { stdin, stdout, stderr })
}

/// What a started process leads.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Leads {
    /// A session without a terminal.
    Session,
    /// A session whose terminal is its standard input.
    SessionWithTerminal,
}

/// Makes the command lead a session, and so a process group, of its own.
pub fn lead_session(command: &mut Command, leads: Leads) {
    let prepare = move || {
        rustix::process::setsid()?;
        if leads == Leads::SessionWithTerminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated and no lock is taken.
    unsafe {
        command.pre_exec(prepare);
    }
}

fn open_terminal(size: Option<TtySize>) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    if let Some(size) = size {
        rustix::termios::tcsetwinsize(&master, window(size))?;
    }
    rustix::io::ioctl_fionbio(&master, true)?;
    Ok((master, slave))
}

fn window(size: TtySize) -> Winsize {
    let cap = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    Winsize { ws_row: cap(size.rows), ws_col: cap(size.cols), ws_xpixel: 0, ws_ypixel: 0 }
}

async fn send(output: &Output, kind: exec_output::Kind) -> bool {
    output.send(Ok(ExecOutput { kind: Some(kind) })).await.is_ok()
}

async fn run(started: Started, streams: Streams, input: Streaming<ExecInput>, output: Output) {
    let group = started.pid;
    let (feeder, mut readers) = match streams {
        Streams::Pipes { stdin, stdout, stderr } => (
            tokio::spawn(feed(input, stdin, None, group)),
            vec![
                tokio::spawn(forward(stdout, output.clone(), exec_output::Kind::Stdout)),
                tokio::spawn(forward(stderr, output.clone(), exec_output::Kind::Stderr)),
            ],
        ),
        Streams::Terminal(terminal) => {
            let (reader, writer) = (TerminalEnd(terminal.clone()), TerminalEnd(terminal.clone()));
            (
                tokio::spawn(feed(input, Some(writer), Some(terminal), group)),
                vec![tokio::spawn(forward(reader, output.clone(), exec_output::Kind::Stdout))],
            )
        }
    };
    let exit = tokio::select! {
        exit = started.exit => exit.ok(),
        () = output.closed() => None,
    };
    match exit {
        Some(exit) => {
            for reader in &mut readers {
                // A background process may hold the pipe; while output still comes it is waited for.
                if tokio::time::timeout(LINGER, &mut *reader).await.is_err() {
                    reader.abort();
                }
            }
            send(&output, exec_output::Kind::Exited(exit.into())).await;
        }
        None => signal_group(group, Signal::KILL),
    }
    feeder.abort();
    readers.iter().for_each(|reader| reader.abort());
}

/// Takes the host's messages until it goes away.
async fn feed<W>(mut input: Streaming<ExecInput>, mut stdin: Option<W>, terminal: Option<Arc<Terminal>>, group: Pid)
where
    W: AsyncWrite + Unpin,
{
    while let Ok(Some(message)) = input.message().await {
        match message.kind {
            Some(exec_input::Kind::Stdin(bytes)) => {
                if let Some(writer) = &mut stdin
                    && writer.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            Some(exec_input::Kind::Eof(_)) => match (&terminal, &mut stdin) {
                // A terminal is not closed but told: VEOF is control-D.
                (Some(_), Some(writer)) => {
                    let _ = writer.write_all(&[4]).await;
                }
                _ => stdin = None,
            },
            Some(exec_input::Kind::Resize(size)) => {
                if let Some(terminal) = &terminal {
                    let _ = rustix::termios::tcsetwinsize(terminal.0.get_ref(), window(size));
                }
            }
            Some(exec_input::Kind::Signal(number)) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    signal_group(group, signal);
                }
            }
            Some(exec_input::Kind::Start(_)) | None => return,
        }
    }
}

async fn forward<R>(mut reader: R, output: Output, kind: fn(bytes::Bytes) -> exec_output::Kind)
where
    R: AsyncRead + Unpin,
{
    let mut buffer = vec![0; limits::CHUNK];
    while let Ok(count @ 1..) = reader.read(&mut buffer).await {
        if !send(&output, kind(buffer[..count].to_vec().into())).await {
            return;
        }
    }
}

/// The agent's end of a terminal.
struct Terminal(AsyncFd<OwnedFd>);

/// Reads or writes a terminal. One task reads and one writes, so each kind of readiness has one waiter.
struct TerminalEnd(Arc<Terminal>);

impl AsyncRead for TerminalEnd {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.0.poll_read_ready(cx))?;
            match rustix::io::read(ready.get_inner().as_fd(), buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                // No process has the other end any more: the end.
                Err(rustix::io::Errno::IO) => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for TerminalEnd {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.0.poll_write_ready(cx))?;
            match rustix::io::write(ready.get_inner().as_fd(), bytes) {
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                outcome => return Poll::Ready(outcome.map_err(Into::into)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
