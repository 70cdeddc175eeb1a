//! Hybrid vsock: `CONNECT <port>\n` on a unix socket, answered `OK <port of the host>\n`, and then the guest's stream.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::guest::{Guest, Link};
use crate::script::{Deed, Script};

/// The agent's port.
const AGENT_PORT: u32 = 5200;
/// The longest `CONNECT` line.
const MAX_LINE: usize = 32;
/// The shortest one.
const MIN_LINE: usize = 10;
/// How often an agent that is not up yet is tried.
const TRY_AGAIN: Duration = Duration::from_millis(2);

/// The device's socket, open as long as this is there.
#[derive(Debug)]
pub struct Device {
    listener: Arc<UnixListener>,
    path: PathBuf,
}

impl Device {
    pub fn bind(path: &str, guest: &Arc<Guest>, script: &Arc<Script>) -> std::io::Result<Self> {
        let listener = Arc::new(UnixListener::bind(path)?);
        let (waiting, guest, script) = (listener.clone(), guest.clone(), script.clone());
        std::thread::spawn(move || {
            // As long as vCPUs stand still, who connects waits in the queue.
            loop {
                guest.wait_until_running();
                let Ok((host, _)) = waiting.accept() else { return };
                let (guest, script) = (guest.clone(), script.clone());
                std::thread::spawn(move || {
                    guest.wait_until_running();
                    let _ = serve(host, &guest, &script);
                });
            }
        });
        Ok(Self { listener, path: path.into() })
    }

    /// Takes the socket away, which Firecracker does only when the device is configured anew.
    pub fn replace(self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = std::fs::remove_file(&self.path);
    }
}

fn serve(mut host: UnixStream, guest: &Arc<Guest>, script: &Script) -> std::io::Result<()> {
    // The line has to come at once; more may come with it.
    let mut first = [0; 4096];
    let read = host.read(&mut first)?;
    let first = &first[..read];
    let Some(end) = first.iter().take(MAX_LINE).position(|byte| *byte == b'\n').filter(|_| first.len() >= MIN_LINE) else { return Ok(()) };
    let Some(port) = parse(&first[..end]) else { return Ok(()) };
    if let Some((_, deeds)) = script.deeds(&format!("CONNECT {port}")) {
        for deed in deeds {
            match deed {
                Deed::Close | Deed::Cut | Deed::Fault(_) => return Ok(()),
                Deed::Garbage => return host.write_all(b"\0\x01\x02\n"),
                Deed::Flood => loop {
                    host.write_all(b"................")?;
                },
                other => other.alone(),
            }
        }
    }
    let number = guest.next_port();
    if port != AGENT_PORT || !guest.has_agent() {
        return Ok(());
    }
    let Some((place, socket)) = guest.take_place() else {
        // The agent accepts and hangs up.
        return host.write_all(format!("OK {number}\n").as_bytes());
    };
    let mut agent = match reach(&socket, number) {
        Ok(agent) => agent,
        Err(error) => {
            guest.give_back(place);
            return Err(error);
        }
    };
    let link = guest.link(place, agent.try_clone()?);
    let result = host.write_all(format!("OK {number}\n").as_bytes()).and_then(|()| agent.write_all(&first[end + 1..]));
    if result.is_ok() {
        join(host, agent, guest, &link);
    }
    guest.unlink(&link);
    result
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    words.next()?.parse().ok().filter(|_| is_connect)
}

/// Connects to one of the agent's sockets, which are like serial ports: a line with a nonce opens a session.
fn reach(socket: &PathBuf, nonce: u32) -> std::io::Result<UnixStream> {
    let mut agent = loop {
        match UnixStream::connect(socket) {
            Ok(agent) => break agent,
            // It is not that far yet; this process ends with it.
            Err(_) => std::thread::sleep(TRY_AGAIN),
        }
    };
    agent.write_all(format!("MVM-CONNECT {nonce:016x}\n").as_bytes())?;
    let mut answer = [0; 24];
    agent.read_exact(&mut answer)?;
    if answer == *format!("MVM-OK {nonce:016x}\n").as_bytes() { Ok(agent) } else { Err(std::io::Error::other("no agent answers")) }
}

/// Carries bytes both ways until one side ends.
fn join(mut host: UnixStream, mut agent: UnixStream, guest: &Arc<Guest>, link: &Arc<Link>) {
    let (Ok(mut from_agent), Ok(mut to_host)) = (agent.try_clone(), host.try_clone()) else { return };
    let back = {
        let (guest, link) = (guest.clone(), link.clone());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from_agent, &mut to_host);
            if !link.is_forgotten.load(Ordering::SeqCst) {
                let _ = to_host.shutdown(Shutdown::Both);
            }
            guest.unlink(&link);
        })
    };
    let mut bytes = [0; 16 * 1024];
    while let Ok(read) = host.read(&mut bytes) {
        // The guest does not know this connection: it resets it.
        if read == 0 || link.is_forgotten.load(Ordering::SeqCst) || agent.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = host.shutdown(Shutdown::Both);
    let _ = agent.shutdown(Shutdown::Both);
    let _ = back.join();
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn lines_are_read_as_firecracker_reads_them() {
        for (line, port) in [
            ("CONNECT 5200", Some(5200)),
            ("connect 5200\r", Some(5200)),
            ("CONNECT 5200 extra", Some(5200)),
            ("CONNECT", None),
            ("CONNECT x5200", None),
            ("CONNECT 99999999999", None),
            ("HELLO 5200", None),
        ] {
            assert_eq!(parse(line.as_bytes()), port, "{line}");
        }
    }
}
