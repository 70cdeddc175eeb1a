//! Commands in a guest: their streams, their end, and a terminal where one is wanted.

use std::io::{Read, Write};
use std::time::Duration;

use mvm_guest_api::limits;
use mvm_guest_api::proto::{Eof, ExecInput, ExecOutput, ExecStart, Tty, TtySize, exec_input, exec_output, exited};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::client::refused;
use super::terminal::{self, RawMode};
use super::{GuestClient, GuestError};

const WHAT: &str = "exec";
/// How long the guest may take to start a command.
const START: Duration = Duration::from_secs(30);

/// A command for a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE`.
    pub env: Vec<Vec<u8>>,
    /// The directory; the user's home where none is named.
    pub cwd: Option<String>,
    /// A name or number; root where none is named.
    pub user: Option<String>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl ExecEnd {
    /// The exit code as a shell would give it: 128 and the signal's number for a signal.
    pub fn code(self) -> u8 {
        match self {
            ExecEnd::Code(code) => (code & 0xff) as u8,
            ExecEnd::Signal(signal) => (128 + (signal & 0x7f)) as u8,
        }
    }
}

impl ExecRequest {
    fn into_start(self, tty: Option<Tty>, stdin: bool) -> ExecInput {
        let bytes = |strings: Vec<Vec<u8>>| strings.into_iter().map(Into::into).collect();
        input(exec_input::Kind::Start(ExecStart {
            argv: bytes(self.argv),
            env: bytes(self.env),
            cwd: self.cwd.unwrap_or_default(),
            user: self.user.unwrap_or_default(),
            tty,
            stdin,
        }))
    }
}

fn input(kind: exec_input::Kind) -> ExecInput {
    ExecInput { kind: Some(kind) }
}

impl GuestClient {
    /// Runs a command with these streams and returns when it has ended.
    ///
    /// Without `stdin` the command reads nothing. With it, a thread reads it to its end, which may be after the command's.
    ///
    /// # Errors
    /// When the guest refuses or goes away, or a writer fails; the command is killed then.
    pub fn exec(
        &mut self,
        request: ExecRequest,
        stdin: Option<impl Read + Send + 'static>,
        stdout: &mut dyn Write,
        stderr: &mut dyn Write,
    ) -> Result<ExecEnd, GuestError> {
        let (messages, receiver) = mpsc::channel(8);
        let start = request.into_start(None, stdin.is_some());
        let output = self.start(start, &messages, receiver)?;
        if let Some(stdin) = stdin {
            let messages = messages.clone();
            std::thread::spawn(move || pump(stdin, &messages));
        }
        let end = self.runtime.block_on(copy(output, stdout, stderr));
        drop(messages);
        end
    }

    /// Runs a command on this process's terminal: raw mode, window size, one stream for output and errors.
    ///
    /// # Errors
    /// As [`GuestClient::exec`], and when standard input is not a terminal. The terminal is as before in any case.
    pub fn exec_on_terminal(&mut self, request: ExecRequest) -> Result<ExecEnd, GuestError> {
        let io = |source| GuestError::Io { what: "terminal".into(), source };
        let tty = Tty { size: Some(terminal::size().map_err(io)?), term: std::env::var("TERM").unwrap_or_default() };
        let mut resized = {
            let _inside = self.runtime.enter();
            signal(SignalKind::window_change()).map_err(io)?
        };
        let (sizes, windows) = mpsc::channel(4);
        self.runtime.spawn(async move {
            while resized.recv().await.is_some() {
                let Ok(size) = terminal::size() else { continue };
                if sizes.send((size.rows, size.cols)).await.is_err() {
                    break;
                }
            }
        });
        let raw = RawMode::enter().map_err(io)?;
        let end = self.exec_in_window(request, tty, windows, std::io::stdin(), &mut std::io::stdout());
        drop(raw);
        end
    }

    /// Runs a command in a terminal of the guest, shown by whatever `stdin` and `stdout` are; `windows` brings new sizes (rows,
    /// columns).
    ///
    /// # Errors
    /// As [`GuestClient::exec`].
    pub fn exec_in_window(
        &mut self,
        request: ExecRequest,
        tty: Tty,
        mut windows: mpsc::Receiver<(u32, u32)>,
        stdin: impl Read + Send + 'static,
        stdout: &mut dyn Write,
    ) -> Result<ExecEnd, GuestError> {
        let (messages, receiver) = mpsc::channel(8);
        let output = self.start(request.into_start(Some(tty), true), &messages, receiver)?;
        let typed = messages.clone();
        std::thread::spawn(move || pump(stdin, &typed));
        self.runtime.block_on(async {
            let mut nothing = std::io::sink();
            let follow_window = async {
                while let Some((rows, cols)) = windows.recv().await {
                    let resize = exec_input::Kind::Resize(TtySize { rows, cols });
                    if messages.send(input(resize)).await.is_err() {
                        break;
                    }
                }
                std::future::pending().await
            };
            tokio::select! {
                end = copy(output, stdout, &mut nothing) => end,
                end = follow_window => end,
            }
        })
    }

    fn start(
        &mut self,
        start: ExecInput,
        messages: &mpsc::Sender<ExecInput>,
        receiver: mpsc::Receiver<ExecInput>,
    ) -> Result<Streaming<ExecOutput>, GuestError> {
        let size: usize = match &start.kind {
            Some(exec_input::Kind::Start(start)) => start.argv.iter().chain(&start.env).map(|text| text.len()).sum(),
            _ => 0,
        };
        if size > limits::MAX_ARG_BYTES {
            let why = format!("arguments and variables are longer than {} bytes", limits::MAX_ARG_BYTES);
            return Err(GuestError::Failed { what: WHAT, why });
        }
        messages.try_send(start).map_err(|_| GuestError::Failed { what: WHAT, why: "the line is closed".into() })?;
        let mut agent = self.agent.clone();
        self.call(WHAT, START, agent.exec(ReceiverStream::new(receiver)))
    }
}

/// Passes on what is read, until the end or until nobody wants it.
fn pump(mut reader: impl Read, messages: &mpsc::Sender<ExecInput>) {
    let mut buffer = vec![0; limits::CHUNK];
    loop {
        let kind = match reader.read(&mut buffer) {
            Ok(0) => exec_input::Kind::Eof(Eof {}),
            Ok(count) => exec_input::Kind::Stdin(buffer[..count].to_vec().into()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => exec_input::Kind::Eof(Eof {}),
        };
        let ended = matches!(kind, exec_input::Kind::Eof(_));
        if messages.blocking_send(input(kind)).is_err() || ended {
            return;
        }
    }
}

async fn copy<'w>(
    mut output: Streaming<ExecOutput>,
    stdout: &mut (dyn Write + 'w),
    stderr: &mut (dyn Write + 'w),
) -> Result<ExecEnd, GuestError> {
    while let Some(message) = output.message().await.map_err(|status| refused(WHAT, &status))? {
        let (writer, bytes) = match message.kind {
            Some(exec_output::Kind::Stdout(bytes)) => (&mut *stdout, bytes),
            Some(exec_output::Kind::Stderr(bytes)) => (&mut *stderr, bytes),
            Some(exec_output::Kind::Exited(exited)) => match exited.how {
                Some(exited::How::Code(code)) => return Ok(ExecEnd::Code(code)),
                Some(exited::How::Signal(signal)) => return Ok(ExecEnd::Signal(signal)),
                None => break,
            },
            Some(exec_output::Kind::Started(_)) | None => continue,
        };
        let written = writer.write_all(&bytes).and_then(|()| writer.flush());
        written.map_err(|source| GuestError::Io { what: "output of the command".into(), source })?;
    }
    Err(GuestError::Failed { what: WHAT, why: "the guest did not say how the command ended".into() })
}

/// The size of a terminal, for the protocol.
pub(super) fn tty_size(rows: u16, cols: u16) -> TtySize {
    TtySize { rows: rows.into(), cols: cols.into() }
}
