//! What answers, and not like Firecracker: a clear error, at once or at the deadline.

mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use mvm_firecracker::*;
use support::server::{DONE, Server, document, short};
use support::values::boot;

/// For what has to be an error at once: nobody waits that long.
const NEVER: Duration = Duration::from_secs(100);
/// What a machine that is busy with other things takes for what is done at once.
const AT_ONCE: Duration = Duration::from_secs(30);
/// For what never ends by itself.
const SOON: Duration = Duration::from_millis(200);

/// One call to a server that answers so.
fn call(deadline: Duration, answer: impl Fn(&mut UnixStream) -> bool + Send + Sync + 'static) -> ApiError {
    let server = Server::start(move |_, stream| answer(stream));
    let mut api = Api::attach(&server.socket, short(deadline)).unwrap();
    let begun = Instant::now();
    let error = api.version().unwrap_err();
    assert!(begun.elapsed() < AT_ONCE, "{error} came after {:?}", begun.elapsed());
    assert_eq!(error.request, "GET /version");
    error
}

fn answered(bytes: impl Into<Vec<u8>>) -> ApiError {
    let bytes = bytes.into();
    call(NEVER, move |stream| stream.write_all(&bytes).is_ok())
}

/// As long as the client listens.
fn for_ever(first: &'static [u8], then: &'static [u8]) -> impl Fn(&mut UnixStream) -> bool + Send + Sync + 'static {
    move |stream| {
        stream.write_all(first).unwrap();
        while stream.write_all(then).is_ok() {}
        false
    }
}

#[test]
fn a_fault_has_its_message_and_its_call() {
    let error = answered(document(400, r#"{"fault_message":"The requested\noperation","more":1}"#));
    assert_eq!(error.to_string(), "GET /version: refused with status 400: The requested operation");
    assert_eq!(error.fault(), Some("The requested operation"));
    assert!(!error.can_retry());
}

#[test]
fn a_fault_without_a_message_is_still_one() {
    for body in ["", "{}", "[]", "{\"fault_message\":null}", "\u{1b}[2J", "{\"fault_message\":7}"] {
        let error = answered(document(500, body));
        assert_eq!(error.to_string(), "GET /version: refused with status 500: it gave no reason", "{body}");
    }
}

#[test]
fn what_the_http_server_itself_refuses_is_told_without_what_was_sent() {
    let error =
        answered(document(400, "{ \"error\": \"Invalid header. Reason: secret\nAll previous unanswered requests will be dropped.\" }"));
    assert_eq!(error.fault(), Some("Invalid header. Reason"));
    let full = b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";
    let error = answered(full.as_slice());
    assert_eq!(error.to_string(), "GET /version: refused with status 503: Too many open connections");
}

#[test]
fn a_fault_is_cut() {
    let error = answered(document(400, &format!(r#"{{"fault_message":"{}"}}"#, "x".repeat(60_000))));
    assert_eq!(error.fault().map(str::len), Some(2_000));
}

#[test]
fn silence_ends_at_the_deadline() {
    let error = call(SOON, |stream| stream.read(&mut [0]).is_err());
    assert_eq!(error.kind.to_string(), "no answer within 200 ms; it may still be done, so ask for the state before asking again");
    assert!(error.can_retry());
}

#[test]
fn an_answer_that_trickles_ends_at_the_deadline() {
    let timeout = |error: ApiError| assert!(matches!(error.kind, ApiErrorKind::Timeout { after_ms: 200 }), "{error}");
    timeout(call(SOON, |stream| {
        stream.write_all(b"HTTP/1.1 200 \r\nContent-Length: 60000\r\n\r\n").unwrap();
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }));
    // A length that is never reached.
    timeout(call(SOON, |stream| stream.write_all(b"HTTP/1.1 200 \r\nContent-Length: 50\r\n\r\n{}").is_ok()));
    // Half a head.
    timeout(call(SOON, |stream| stream.write_all(b"HTTP/1.1 200 \r\nContent-Le").is_ok()));
    // No end of interim answers.
    timeout(call(SOON, for_ever(b"", b"HTTP/1.1 100 \r\n\r\n")));
}

#[test]
fn a_connection_that_ends_in_the_middle_is_closed_at_once() {
    for bytes in [
        b"".as_slice(),
        b"HTTP/1.1 200 \r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 36\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 36\r\n\r\n{\"firecracker_version\":",
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
    ] {
        let error = call(NEVER, move |stream| {
            stream.write_all(bytes).unwrap();
            stream.shutdown(Shutdown::Both).is_err()
        });
        assert!(matches!(error.kind, ApiErrorKind::Closed), "{:?}: {error}", String::from_utf8_lossy(bytes));
        assert!(error.can_retry());
    }
}

#[test]
fn garbage_is_named_and_not_repeated() {
    for bytes in [
        b"SSH-2.0-secret\r\n".as_slice(),
        b"\0\x01\x02secret\r\n\r\n",
        b"HTTP/1.1 secret OK\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: secret\r\n\r\n",
        b"HTTP/1.1 200 \r\nContent-Length: 8\r\n\r\n\"secret\"",
        b"HTTP/1.1 200 \r\nContent-Length: 8\r\n\r\n{\"secret",
        b"HTTP/1.1 200 \r\nContent-Length: 32\r\n\r\n{\"firecracker_version\": {\"secret\"",
        b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n",
        b"HTTP/1.1 204 \r\n\r\n",
    ] {
        let error = answered(bytes);
        assert!(matches!(error.kind, ApiErrorKind::Garbage { .. }), "{:?}: {error:?}", String::from_utf8_lossy(bytes));
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
}

#[test]
fn four_gigabytes_are_refused_at_once() {
    let announced = answered(b"HTTP/1.1 200 \r\nContent-Length: 4294967296\r\n\r\n{".as_slice());
    assert_eq!(announced.to_string(), "GET /version: the answer has more than 65536 bytes");
    assert!(matches!(answered(b"HTTP/1.1 200 \r\nContent-Length: 65537\r\n\r\n{".as_slice()).kind, ApiErrorKind::TooLarge { .. }));
    for error in [
        call(NEVER, for_ever(b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n", b"10\r\n0123456789abcdef\r\n")),
        call(NEVER, for_ever(b"HTTP/1.1 200 \r\nConnection: close\r\n\r\n", &[b' '; 4096])),
        call(NEVER, for_ever(b"HTTP/1.1 200 \r\n", b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n")),
        call(NEVER, for_ever(b"HTTP/1.1 200 \r\nX: ", &[b'y'; 4096])),
    ] {
        assert!(matches!(error.kind, ApiErrorKind::TooLarge { .. }), "{error:?}");
    }
}

#[test]
fn a_body_where_none_belongs_is_garbage() {
    for bytes in [b"HTTP/1.1 204 \r\nContent-Length: 5\r\n\r\nhello".to_vec(), document(200, "{}")] {
        let server = Server::start(move |_, stream| stream.write_all(&bytes).is_ok());
        let mut api = Api::connect(&server.socket, short(NEVER)).unwrap().configure();
        let error = api.entropy(&EntropyDevice::default()).unwrap_err();
        assert!(matches!(error.kind, ApiErrorKind::Garbage { .. }), "{error:?}");
    }
}

#[test]
fn after_an_error_the_next_call_has_a_connection_of_its_own() {
    let server = Server::start(|asked, stream| {
        let answer = document(200, &format!(r#"{{"firecracker_version":"{}"}}"#, asked.connection));
        // The first is answered when nobody waits any more.
        asked.connection == 1 && stream.read(&mut [0]).is_ok() || stream.write_all(&answer).is_ok()
    });
    let mut api = Api::attach(&server.socket, short(SOON)).unwrap();
    assert!(matches!(api.version().unwrap_err().kind, ApiErrorKind::Timeout { .. }));
    api.set_deadlines(Deadlines::default());
    assert_eq!(api.version().unwrap().firecracker_version, "2");
    assert_eq!(api.version().unwrap().firecracker_version, "2");
}

#[test]
fn the_first_error_of_a_boot_ends_it_and_names_its_call() {
    let server = Server::start(|asked, stream| {
        let bad = ["PUT /drives/data", "PUT /vsock"].contains(&asked.line.as_str());
        stream.write_all(&if bad { document(400, r#"{"fault_message":"no"}"#) } else { DONE.to_vec() }).is_ok()
    });
    let failed = Api::connect(&server.socket, short(NEVER)).unwrap().boot(&boot()).unwrap_err();
    assert!(["PUT /drives/data", "PUT /vsock"].contains(&failed.error.request.as_str()), "{failed}");
    let asked = server.take();
    assert!(!asked.iter().any(|asked| asked.line == "PUT /actions" || asked.line == "PUT /drives/config"), "{asked:?}");
    // It can still be asked.
    failed.api.start().map(drop).unwrap();
}

#[test]
fn a_request_that_firecracker_would_not_take_is_not_sent() {
    let server = Server::obliging();
    let mut api = server.connect().configure();
    let boot_args = Some("x".repeat(60_000));
    let error = api.boot_source(&BootSource { kernel_image_path: "/k".into(), initrd_path: None, boot_args }).unwrap_err();
    assert_eq!(error.to_string(), "PUT /boot-source: the request has more than 51200 bytes");
    assert!(server.take().is_empty());
    api.entropy(&EntropyDevice::default()).unwrap();
}

#[test]
fn a_socket_that_comes_late_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    // One that was left behind refuses connections; then there is none; then there is one.
    drop(UnixListener::bind(&socket).unwrap());
    let mut looked = 0;
    let mut listener = None;
    let is_alive = || {
        looked += 1;
        match looked {
            2 => std::fs::remove_file(&socket).unwrap(),
            4 => listener = Some(UnixListener::bind(&socket).unwrap()),
            _ => {}
        }
        true
    };
    let mut api = Api::connect_while(&socket, short(NEVER), is_alive).unwrap();
    assert_eq!(looked, 4);
    assert!(listener.is_some());
    assert_eq!(api.take_timeline().len(), 1);
}

#[test]
fn a_socket_that_does_not_come_is_waited_for_until_the_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let error = Api::connect(&socket, short(SOON)).unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Timeout { after_ms: 200 }), "{error}");
    let mut looked = 0;
    let is_alive = || {
        looked += 1;
        looked < 3
    };
    let error = Api::connect_while(&socket, short(NEVER), is_alive).unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Ended), "{error}");
    assert!(!error.can_retry());
    let error = Api::attach(&socket, short(NEVER)).unwrap_err();
    assert_eq!(error.to_string(), "connect: cannot connect to Firecracker's socket");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("No such file"));
}

#[test]
fn a_firecracker_that_is_gone_is_noticed_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut api = Api::connect(&socket, short(NEVER)).unwrap();
    drop(listener);
    let begun = Instant::now();
    let error = api.version().unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Closed | ApiErrorKind::Io { .. }), "{error}");
    assert!(error.can_retry() && begun.elapsed() < AT_ONCE);
}

#[test]
fn a_server_that_accepts_nobody_keeps_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let deadlines = short(SOON);
    // As many as the queue takes; then those that it does not.
    let mut queued = Vec::new();
    let error = loop {
        match Api::connect(&socket, deadlines) {
            Ok(api) => queued.push(api),
            Err(error) => break error,
        }
    };
    assert!(matches!(error.kind, ApiErrorKind::Timeout { .. }), "{error}");
}
