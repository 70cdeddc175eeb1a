//! The unix socket: who waits for it, how long, and how much is read from it.
//!
//! One HTTP connection is kept and used again. Before it is, the socket is looked at: what the other side closed, or
//! where something lies that nobody asked for, is replaced. A call that failed takes its connection with it, so that a
//! late answer is never taken for that of the next call.
//!
//! Calls block. Inside is a runtime of this thread's own, which works only as long as a call lasts.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::StatusCode;
use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap};
use hyper_util::rt::TokioIo;
use rustix::net::{RecvFlags, Shutdown};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;
use tokio::time::{Instant as Moment, sleep, timeout_at};

use crate::error::{ApiError, ApiErrorKind, clean, of_http};
use crate::request::Request;
use crate::resources::Fault;
use crate::timeline::{CallTiming, Timeline, timing};

/// The most that is read of an answer's head, and of its body.
const MAX_ANSWER: usize = 64 * 1024;
/// The largest body that Firecracker takes unless it is told otherwise (1.17, `HTTP_MAX_PAYLOAD_SIZE`).
const MAX_REQUEST: usize = 51_200;
/// How often the socket of a process that was just started is looked for.
const LOOK_AGAIN: Duration = Duration::from_micros(250);
/// The name of the wait for the socket.
const CONNECT: &str = "connect";

/// How long calls may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadlines {
    /// Until the socket is there.
    pub connect: Duration,
    /// Of most calls.
    pub call: Duration,
    /// Of `InstanceStart`, which reads the kernel and the initrd.
    pub start: Duration,
    /// Of `PUT /snapshot/create` and `PUT /snapshot/load`; the former writes all memory.
    pub snapshot: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(5), call: seconds(5), start: seconds(30), snapshot: seconds(120) }
    }
}

/// Which deadline holds.
#[derive(Clone, Copy)]
pub(crate) enum Limit {
    Call,
    Start,
    Snapshot,
}

/// Whether a socket that is not there may come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Socket {
    MayCome,
    MustBeThere,
}

/// The way to one Firecracker.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: PathBuf,
    pub deadlines: Deadlines,
    pub timeline: Timeline,
    idle: Vec<Line>,
    // Last, so that the lines are gone before what drives them.
    runtime: Runtime,
}

impl Connection {
    pub fn open(socket: &Path, deadlines: Deadlines, may: Socket, is_alive: &mut dyn FnMut() -> bool) -> Result<Self, ApiError> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|source| {
            let kind = ApiErrorKind::Io { doing: "make what drives a connection", source };
            ApiError { request: CONNECT.into(), kind }
        })?;
        let mut timeline = Timeline::new();
        let began = timeline.origin;
        let line = runtime.block_on(async {
            let deadline = moment(began, deadlines.connect);
            loop {
                match Line::open(socket).await {
                    Err(ApiErrorKind::Io { source, .. }) if may == Socket::MayCome && is_not_there_yet(&source) => {}
                    other => break other,
                }
                if !is_alive() {
                    break Err(ApiErrorKind::Ended);
                }
                if Moment::now() >= deadline {
                    break Err(ApiErrorKind::Timeout { after_ms: millis(deadlines.connect) });
                }
                // Nothing else goes on here, and the runtime's own clock ticks in milliseconds.
                std::thread::sleep(LOOK_AGAIN);
            }
        });
        timeline.note(timing(began, CONNECT.into(), began));
        let line = line.map_err(|kind| ApiError { request: CONNECT.into(), kind })?;
        Ok(Self { socket: socket.into(), deadlines, timeline, idle: vec![line], runtime })
    }

    /// One call that is answered without a body.
    pub fn tell(&mut self, request: &Request, limit: Limit) -> Result<(), ApiError> {
        let body = self.call(request, limit)?;
        body_is_empty(&body).map_err(|kind| ApiError { request: request.to_string(), kind })
    }

    /// One call that is answered with a document.
    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ApiError> {
        let body = self.call(request, Limit::Call)?;
        serde_json::from_slice(&body).map_err(|error| {
            // The error's own text repeats what was received.
            let why = format!("its body is wrong at line {}, column {}", error.line(), error.column());
            ApiError { request: request.to_string(), kind: ApiErrorKind::Garbage { why } }
        })
    }

    fn call(&mut self, request: &Request, limit: Limit) -> Result<Vec<u8>, ApiError> {
        let line = self.usable_line();
        let Self { socket, runtime, timeline, .. } = self;
        let within = within(&self.deadlines, limit);
        let began = Instant::now();
        let result = runtime.block_on(exchange(line, socket, request, within));
        timeline.note(timing(timeline.origin, request.to_string(), began));
        let (line, body) = result.map_err(|kind| ApiError { request: request.to_string(), kind })?;
        self.idle.extend(line);
        Ok(body)
    }

    /// Calls that are answered without a body: those of a lane one after the other, the lanes beside each other. When one
    /// fails no other is begun; the first lane's error is the result. While one call hangs those of the other lanes are not answered
    /// either, and nobody can tell which it is: the error names all of them then.
    pub fn tell_all(&mut self, lanes: Vec<Vec<Request>>) -> Result<(), ApiError> {
        let failed = Arc::new(AtomicBool::new(false));
        let within = within(&self.deadlines, Limit::Call);
        let mut tasks = JoinSet::new();
        for (number, lane) in lanes.into_iter().enumerate() {
            let work = Lane { line: self.usable_line(), socket: self.socket.clone(), origin: self.timeline.origin, within };
            let failed = failed.clone();
            tasks.spawn_on(async move { (number, work.run(lane, &failed).await) }, self.runtime.handle());
        }
        let mut all = self.runtime.block_on(tasks.join_all());
        all.sort_by_key(|(number, _)| *number);
        let (mut first, mut silent) = (None, Vec::new());
        for (_, done) in all {
            done.timings.into_iter().for_each(|timing| self.timeline.note(timing));
            self.idle.extend(done.line);
            match done.error {
                Some(error) if matches!(error.kind, ApiErrorKind::Timeout { .. }) => silent.push(error),
                error => first = first.or(error),
            }
        }
        // One is kept.
        self.idle.truncate(1);
        first.or_else(|| one_of(silent)).map_or(Ok(()), Err)
    }

    fn usable_line(&mut self) -> Option<Line> {
        let line = self.idle.pop()?;
        line.is_quiet().then_some(line)
    }
}

/// The error of calls that were not answered, of which one hangs.
fn one_of(silent: Vec<ApiError>) -> Option<ApiError> {
    let requests: Vec<String> = silent.iter().map(|error| error.request.clone()).collect();
    let mut first = silent.into_iter().next()?;
    if requests.len() > 1 {
        first.request = format!("one of {}", requests.join(", "));
    }
    Some(first)
}

/// Calls that follow each other.
struct Lane {
    line: Option<Line>,
    socket: PathBuf,
    origin: Instant,
    within: Duration,
}

/// What came of them.
struct Done {
    line: Option<Line>,
    timings: Vec<CallTiming>,
    error: Option<ApiError>,
}

impl Lane {
    async fn run(mut self, requests: Vec<Request>, failed: &AtomicBool) -> Done {
        let mut timings = Vec::with_capacity(requests.len());
        for request in requests {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            let began = Instant::now();
            let result = exchange(self.line.take(), &self.socket, &request, self.within).await;
            timings.push(timing(self.origin, request.to_string(), began));
            match result.and_then(|(line, body)| body_is_empty(&body).map(|()| line)) {
                Ok(line) => self.line = line,
                Err(kind) => {
                    failed.store(true, Ordering::Relaxed);
                    return Done { line: None, timings, error: Some(ApiError { request: request.to_string(), kind }) };
                }
            }
        }
        Done { line: self.line, timings, error: None }
    }
}

/// An open HTTP connection.
#[derive(Debug)]
struct Line {
    sender: SendRequest<Full<Bytes>>,
    /// The same socket, to look at it and to close it.
    probe: OwnedFd,
}

impl Line {
    async fn open(socket: &Path) -> Result<Self, ApiErrorKind> {
        let to = |doing: &'static str| move |source: io::Error| ApiErrorKind::Io { doing, source };
        let stream = UnixStream::connect(socket).await.map_err(to("connect to Firecracker's socket"))?;
        let probe = stream.as_fd().try_clone_to_owned().map_err(to("duplicate a descriptor"))?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(MAX_ANSWER)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| of_http(&error, MAX_ANSWER))?;
        tokio::spawn(async move {
            // What goes wrong is said to the call that waits.
            let _ = connection.await;
        });
        Ok(Self { sender, probe })
    }

    /// Whether the other side is there and has said nothing since its last answer.
    fn is_quiet(&self) -> bool {
        let mut byte = [0_u8];
        let looked = rustix::net::recv(&self.probe, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT);
        looked.is_err_and(|error| error == rustix::io::Errno::AGAIN) && !self.sender.is_closed()
    }
}

impl Drop for Line {
    /// Closes the connection now: what drives it works only during calls.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.probe, Shutdown::Both);
    }
}

/// One call and its answer's body.
async fn exchange(line: Option<Line>, socket: &Path, request: &Request, within: Duration) -> Result<(Option<Line>, Vec<u8>), ApiErrorKind> {
    let size = request.body.as_ref().map_or(0, Vec::len);
    if size > MAX_REQUEST {
        return Err(ApiErrorKind::TooLarge { what: "the request", limit: MAX_REQUEST });
    }
    let answer = async {
        let mut line = match line {
            Some(line) => line,
            None => reopen(socket).await?,
        };
        let answer = line.sender.send_request(compose(request)).await.map_err(|error| of_http(&error, MAX_ANSWER))?;
        let (head, body) = answer.into_parts();
        let body = read(body).await?;
        judge(head.status, &head.headers, &body)?;
        // What came along with the answer and is none is seen now, and not taken for the next one.
        let is_over = line.sender.ready().await.is_err();
        Ok(((!is_over).then_some(line), body))
    };
    let deadline = moment(Instant::now(), within);
    timeout_at(deadline, answer).await.unwrap_or_else(|_| Err(ApiErrorKind::Timeout { after_ms: millis(within) }))
}

/// Connects once more. A queue that is full has room later; that nobody listens does not change.
async fn reopen(socket: &Path) -> Result<Line, ApiErrorKind> {
    loop {
        match Line::open(socket).await {
            Err(ApiErrorKind::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => sleep(LOOK_AGAIN).await,
            other => return other,
        }
    }
}

fn compose(request: &Request) -> hyper::Request<Full<Bytes>> {
    let builder =
        hyper::Request::builder().method(&request.method).uri(&request.path).header(HOST, "localhost").header(ACCEPT, "application/json");
    let built = match &request.body {
        None => builder.body(Full::default()),
        Some(body) => builder.header(CONTENT_TYPE, "application/json").body(Full::from(body.clone())),
    };
    built.expect("a path is made of the API's own words and of ids, which have letters, digits and underscores only")
}

async fn read(mut body: Incoming) -> Result<Vec<u8>, ApiErrorKind> {
    let too_large = || ApiErrorKind::TooLarge { what: "the answer", limit: MAX_ANSWER };
    if body.size_hint().lower() > MAX_ANSWER as u64 {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| of_http(&error, MAX_ANSWER))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > MAX_ANSWER {
            return Err(too_large());
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Whether it was done.
fn judge(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Result<(), ApiErrorKind> {
    if status == StatusCode::NO_CONTENT {
        // Its body, if it says that it has one, was not read as one.
        let announced = headers.get(CONTENT_LENGTH).is_some_and(|length| length.as_bytes() != b"0");
        return if announced { Err(ApiErrorKind::Garbage { why: "status 204 with a body".into() }) } else { Ok(()) };
    }
    if status.is_success() {
        return Ok(());
    }
    Err(ApiErrorKind::Fault { status: status.as_u16(), message: fault(body) })
}

/// The words of a fault. What the HTTP server itself refuses has another form, which is not even JSON, and may repeat
/// parts of the request: its first line is enough.
fn fault(body: &[u8]) -> String {
    if let Ok(Fault { fault_message: Some(message) }) = serde_json::from_slice(body) {
        return clean(&message);
    }
    let text = String::from_utf8_lossy(body);
    match text.strip_prefix("{ \"error\": \"").and_then(|rest| rest.split(['\n', '"', ':']).next()) {
        Some(message) => clean(message),
        None => "it gave no reason".into(),
    }
}

fn body_is_empty(body: &[u8]) -> Result<(), ApiErrorKind> {
    if body.is_empty() { Ok(()) } else { Err(ApiErrorKind::Garbage { why: "it has a body where none belongs".into() }) }
}

fn is_not_there_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock)
}

fn within(deadlines: &Deadlines, limit: Limit) -> Duration {
    match limit {
        Limit::Call => deadlines.call,
        Limit::Start => deadlines.start,
        Limit::Snapshot => deadlines.snapshot,
    }
}

/// When a deadline is; a day when it is further than the clock goes.
fn moment(from: Instant, within: Duration) -> Moment {
    from.checked_add(within).unwrap_or_else(|| from + Duration::from_secs(86_400)).into()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
