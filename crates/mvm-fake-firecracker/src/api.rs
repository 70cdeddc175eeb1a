//! Connections of clients. Requests are handled one after the other over all of them.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::http::{Connection, Request, document, done, fault, refused, too_many_connections};
use crate::machine::{Machine, Outcome};
use crate::script::{Deed, When};

/// How many clients there may be at once.
const MAX_CONNECTIONS: usize = 10;

pub fn serve(listener: &UnixListener, machine: &Arc<Machine>) -> ExitCode {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return machine.log.exit(1) };
        if open.load(Ordering::SeqCst) >= MAX_CONNECTIONS {
            let _ = stream.write_all(&too_many_connections());
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (machine, open) = (machine.clone(), open.clone());
        std::thread::spawn(move || {
            serve_client(stream, &machine);
            open.fetch_sub(1, Ordering::SeqCst);
        });
    }
    machine.log.exit(1)
}

fn serve_client(stream: UnixStream, machine: &Machine) {
    let mut connection = Connection::new(stream);
    while let Some(request) = connection.next() {
        let goes_on = match request {
            Ok(request) => answer(&mut connection, machine, &request),
            Err(why) => connection.send(&refused(&why)),
        };
        if !goes_on {
            return;
        }
    }
}

/// Handles one request. False ends the connection.
fn answer(connection: &mut Connection, machine: &Machine, request: &Request) -> bool {
    let key = format!("{} {}", request.method, request.path);
    let mut state = machine.lock();
    machine.log.line("fc_api", &format!("The API server received a {} request on {:?}.", request.method, request.path));
    let scripted = machine.script.deeds(&key);
    if let Some((When::Before, deeds)) = &scripted
        && let Some(goes_on) = do_deeds(connection, deeds)
    {
        return goes_on;
    }
    let middle = scripted.as_ref().filter(|(when, _)| *when == When::Middle).map(|(_, deeds)| deeds);
    let outcome = machine.handle(&mut state, request, &mut || middle.into_iter().flatten().for_each(Deed::alone));
    if let Some((When::Middle | When::After, deeds)) = &scripted
        && let Some(goes_on) = do_deeds(connection, deeds)
    {
        return goes_on;
    }
    let bytes = match &outcome {
        Outcome::Done { deprecated } => done(*deprecated),
        Outcome::Document(body) => document(200, body),
        Outcome::Fault(message) | Outcome::Fatal(message) => fault(message),
    };
    let sent = !connection.client_is_gone() && connection.send(&bytes);
    if let Outcome::Fatal(_) = outcome {
        machine.fail();
    }
    sent
}

/// Does what the script says. `None` goes on as if nothing were, else whether the connection does.
fn do_deeds(connection: &mut Connection, deeds: &[Deed]) -> Option<bool> {
    for deed in deeds {
        match deed {
            Deed::Hang | Deed::Slow(_) | Deed::Die | Deed::Exit(_) | Deed::Leave(_) => deed.alone(),
            Deed::Close => return Some(close(connection)),
            Deed::Cut => {
                connection.send(
                    b"HTTP/1.1 200 \r\nServer: Firecracker API\r\nContent-Type: application/json\r\nContent-Length: 86\r\n\r\n{\"id\":",
                );
                return Some(close(connection));
            }
            Deed::Garbage => return Some(connection.send(b"\0\x01\x02 not HTTP \xff\r\n\r\n")),
            Deed::Flood => {
                connection.send(b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n");
                while connection.send(b"40\r\n................................................................\r\n") {}
                return Some(false);
            }
            Deed::Fault(message) => return Some(connection.send(&fault(message))),
        }
    }
    None
}

fn close(connection: &Connection) -> bool {
    let _ = connection.stream.shutdown(Shutdown::Both);
    false
}
