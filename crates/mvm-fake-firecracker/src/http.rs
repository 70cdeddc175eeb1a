//! HTTP/1.1 as Firecracker's server speaks it: no reason phrases, no length where there is no body, errors of its own
//! kind, and no connection that it closes first.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The largest body.
const MAX_BODY: usize = 51_200;
/// The longest line of a head.
const MAX_LINE: usize = 1024;

/// One request.
#[derive(Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub body: Option<Vec<u8>>,
}

/// A connection and what was read of it.
#[derive(Debug)]
pub struct Connection {
    pub stream: UnixStream,
    buffer: Vec<u8>,
}

impl Connection {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    /// The next request, or why it is none; `None` when the client has gone.
    pub fn next(&mut self) -> Option<Result<Request, String>> {
        let mut head = Vec::new();
        loop {
            let line = match self.line()? {
                Ok(line) => line,
                Err(why) => return Some(Err(why)),
            };
            if line.is_empty() {
                break;
            }
            head.push(line);
        }
        if head.is_empty() {
            return Some(Err("Invalid request.".into()));
        }
        let (method, path, length) = match parse(&head) {
            Ok(parsed) => parsed,
            Err(why) => return Some(Err(why)),
        };
        while self.buffer.len() < length {
            self.fill()?;
        }
        let body: Vec<u8> = self.buffer.drain(..length).collect();
        Some(Ok(Request { method, path, body: (length > 0).then_some(body) }))
    }

    fn line(&mut self) -> Option<Result<String, String>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).take(end).collect();
                let line = String::from_utf8(line).map_err(|_| "Invalid request.".into());
                return Some(line.and_then(|line| if line.len() > MAX_LINE { Err(too_long(&line)) } else { Ok(line) }));
            }
            if self.buffer.len() > MAX_LINE {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.buffer)).into_owned();
                return Some(Err(too_long(&line)));
            }
            self.fill()?;
        }
    }

    fn fill(&mut self) -> Option<()> {
        let mut chunk = [0; 4096];
        let read = self.stream.read(&mut chunk).ok().filter(|read| *read > 0)?;
        self.buffer.extend_from_slice(&chunk[..read]);
        Some(())
    }

    /// Whether the client has closed its half: it then gets no answer.
    pub fn client_is_gone(&self) -> bool {
        let mut poll_for = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        poll(&mut poll_for, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }

    pub fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }
}

fn too_long(line: &str) -> String {
    format!("Invalid header. Reason: Invalid content length. Header: {line}")
}

fn parse(head: &[String]) -> Result<(String, String, usize), String> {
    let words: Vec<&str> = head[0].split(' ').collect();
    let [method, target, version] = words[..] else { return Err("Invalid request.".into()) };
    if !["GET", "PUT", "PATCH", "DELETE"].contains(&method) {
        return Err("Invalid HTTP Method: Unsupported HTTP method.".into());
    }
    if !["HTTP/1.1", "HTTP/1.0"].contains(&version) {
        return Err("Invalid HTTP Version: Unsupported HTTP version.".into());
    }
    let mut length = 0;
    for line in &head[1..] {
        let (name, value) = line.split_once(':').ok_or("Invalid request.")?;
        let value = value.trim();
        match name.to_lowercase().as_str() {
            "content-length" => {
                let wrong = || format!("Invalid header. Reason: Invalid value. Key:{name}; Value: {value}");
                length = value.parse().map_err(|_| wrong())?;
            }
            "transfer-encoding" if value != "identity" => return Err("Invalid request.".into()),
            _ => {}
        }
    }
    if length > MAX_BODY {
        return Err(format!("Request payload with size {length} is larger than the limit of {MAX_BODY} allowed by server."));
    }
    let path = target.strip_prefix("http://localhost").unwrap_or(target);
    Ok((method.into(), path.into(), length))
}

/// The head of every answer.
const HEAD: &str = "Server: Firecracker API\r\nConnection: keep-alive\r\n";

pub fn done(deprecated: bool) -> Vec<u8> {
    let deprecation = if deprecated { "Deprecation: true\r\n" } else { "" };
    format!("HTTP/1.1 204 \r\n{HEAD}{deprecation}\r\n").into_bytes()
}

pub fn document(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} \r\n{HEAD}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

pub fn fault(message: &str) -> Vec<u8> {
    document(400, &serde_json::json!({ "fault_message": message }).to_string())
}

/// Not JSON, since the line feed is in it as it is.
pub fn refused(why: &str) -> Vec<u8> {
    document(400, &format!("{{ \"error\": \"{why}\nAll previous unanswered requests will be dropped.\" }}"))
}

pub fn too_many_connections() -> Vec<u8> {
    let body = "{ \"error\": \"Too many open connections\" }";
    format!("HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}
