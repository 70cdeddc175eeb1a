//! Listens on a unix socket, keeps what it is asked, and answers as it is told.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mvm_firecracker::{Api, Deadlines, Fresh};
use tempfile::TempDir;

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Which connection it came over, counted from 1.
    pub connection: usize,
    /// Method and path.
    pub line: String,
    /// Header lines, without the first line.
    pub head: String,
    /// The body, empty when there is none.
    pub body: String,
}

/// Answers one request; false closes the connection.
pub type Answer = dyn Fn(&Asked, &mut UnixStream) -> bool + Send + Sync;

/// A running server; it ends with the test.
pub struct Server {
    pub socket: PathBuf,
    seen: Arc<Mutex<Vec<Asked>>>,
    _dir: TempDir,
}

impl Server {
    pub fn start(answer: impl Fn(&Asked, &mut UnixStream) -> bool + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let answer: Arc<Answer> = Arc::new(answer);
        let keep = seen.clone();
        std::thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let (stream, seen, answer) = (stream.unwrap(), keep.clone(), answer.clone());
                std::thread::spawn(move || serve(number + 1, stream, &seen, &*answer));
            }
        });
        Self { socket, seen, _dir: dir }
    }

    /// Says yes to everything, as Firecracker does.
    pub fn obliging() -> Self {
        Self::start(|_, stream| stream.write_all(DONE).is_ok())
    }

    pub fn connect(&self) -> Api<Fresh> {
        Api::connect(&self.socket, Deadlines::default()).unwrap()
    }

    /// What was asked since the last time, by connection.
    pub fn take(&self) -> Vec<Asked> {
        let mut seen = std::mem::take(&mut *self.seen.lock().unwrap());
        seen.sort_by_key(|asked| asked.connection);
        seen
    }

    /// The same as text.
    pub fn conversation(&self) -> String {
        let mut text = String::new();
        let mut connection = 0;
        for asked in self.take() {
            if asked.connection != connection {
                connection = asked.connection;
                text.push_str(&format!("== connection {connection}\n"));
            }
            text.push_str(&format!("{}\n", asked.line));
            if !asked.body.is_empty() {
                text.push_str(&format!("{}\n", asked.body));
            }
        }
        text
    }
}

/// What Firecracker says when it has done something.
pub const DONE: &[u8] = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

/// A document, as Firecracker sends it.
pub fn document(status: u16, body: &str) -> Vec<u8> {
    let head = "Server: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json";
    format!("HTTP/1.1 {status} \r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Deadlines that a test can wait for.
pub fn short(call: Duration) -> Deadlines {
    Deadlines { connect: call, call, start: call, snapshot: call }
}

fn serve(connection: usize, mut stream: UnixStream, seen: &Mutex<Vec<Asked>>, answer: &Answer) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(asked) = read(connection, &mut reader) {
        seen.lock().unwrap().push(asked.clone());
        if !answer(&asked, &mut stream) {
            return;
        }
    }
}

fn read(connection: usize, reader: &mut BufReader<UnixStream>) -> Option<Asked> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let first = lines.remove(0);
    let length = lines.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length: ").map(|n| n.parse::<usize>().unwrap()));
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).ok()?;
    let line = first.strip_suffix(" HTTP/1.1").unwrap().to_owned();
    Some(Asked { connection, line, head: lines.join("\n"), body: String::from_utf8(body).unwrap() })
}
