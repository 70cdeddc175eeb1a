//! Whatever arrives on a serial port: both ends find the same lines however the stream is cut, and discard only what belongs to none.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mvm_guest_api::handshake::{CONNECT_LEN, Heard, Nonce, OK_LEN, Reply, await_ok, hear};

/// What the agent finds in a stream that arrives in pieces of at most `piece` bytes.
fn agent(stream: &[u8], piece: usize) -> (Vec<Nonce>, Option<usize>) {
    let (mut buffer, mut answered, mut nonces, mut dropped) = (Vec::new(), false, Vec::new(), 0);
    for bytes in stream.chunks(piece) {
        buffer.extend_from_slice(bytes);
        loop {
            let consumed = match hear(&buffer, answered) {
                Heard::Connect { nonce, consumed } => {
                    nonces.push(nonce);
                    answered = true;
                    consumed
                }
                Heard::Session => return (nonces, Some(dropped)),
                Heard::More { discard } => {
                    buffer.drain(..discard);
                    dropped += discard;
                    break;
                }
            };
            assert!(consumed >= CONNECT_LEN);
            buffer.drain(..consumed);
            dropped += consumed;
        }
        assert!(buffer.len() <= CONNECT_LEN, "at most one unfinished line is kept");
    }
    (nonces, None)
}

/// Where the host finds its answer.
fn host(stream: &[u8], piece: usize, expected: Nonce) -> Option<usize> {
    let (mut buffer, mut dropped) = (Vec::new(), 0);
    for bytes in stream.chunks(piece) {
        buffer.extend_from_slice(bytes);
        match await_ok(&buffer, expected) {
            Reply::Open { consumed } => {
                assert!(consumed >= OK_LEN);
                return Some(dropped + consumed);
            }
            Reply::More { discard } => {
                buffer.drain(..discard);
                dropped += discard;
            }
        }
        assert!(buffer.len() <= OK_LEN, "at most one unfinished line is kept");
    }
    None
}

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else { return };
    let piece = usize::from(piece).max(1);
    let (nonces, session) = agent(stream, piece);
    let (bytewise, _) = agent(stream, 1);
    if session.is_none() {
        assert!(bytewise.starts_with(&nonces) || nonces.starts_with(&bytewise));
    }
    let expected = Nonce(0x0123_4567_89ab_cdef);
    assert_eq!(host(stream, piece, expected), host(stream, 1, expected), "however the stream is cut");
});
