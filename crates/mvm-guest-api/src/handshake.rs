//! The line by which a host opens a session on a serial port.
//!
//! A serial port is one stream for the life of the guest: what an earlier client left behind in the buffers arrives
//! first at the next one, in both directions. So the host names its session with a fresh nonce and discards
//! whatever comes until that nonce is echoed; the agent discards whatever comes until a connect line.
//!
//! A host that gets no answer in time may send another line with another nonce on the same stream, and then waits
//! for that one only: lines are answered in order, so nothing but HTTP/2 follows the answer to the last. The agent
//! therefore goes on answering connect lines until the HTTP/2 preface begins.

/// How a connect line begins.
pub const CONNECT: &[u8] = b"MVM-CONNECT ";
/// How the answer begins.
pub const OK: &[u8] = b"MVM-OK ";
/// How HTTP/2 begins (RFC 9113, 3.4); enough of it to be told from a connect line.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n";
/// Hexadecimal digits of a nonce.
pub const NONCE_DIGITS: usize = 16;
/// Length of a connect line with its newline.
pub const CONNECT_LEN: usize = CONNECT.len() + NONCE_DIGITS + 1;
/// Length of an answer with its newline.
pub const OK_LEN: usize = OK.len() + NONCE_DIGITS + 1;

/// Names one attempt to open a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonce(pub u64);

impl Nonce {
    /// The host's line for this nonce.
    pub fn connect_line(self) -> [u8; CONNECT_LEN] {
        line(CONNECT, self)
    }

    /// The agent's answer to this nonce.
    pub fn ok_line(self) -> [u8; OK_LEN] {
        line(OK, self)
    }

    fn parse(digits: &[u8]) -> Option<Nonce> {
        if digits.len() != NONCE_DIGITS {
            return None;
        }
        digits
            .iter()
            .try_fold(0u64, |value, &digit| {
                let nibble = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return None,
                };
                Some(value << 4 | u64::from(nibble))
            })
            .map(Nonce)
    }
}

fn line<const N: usize>(prefix: &[u8], nonce: Nonce) -> [u8; N] {
    let mut line = [b'\n'; N];
    line[..prefix.len()].copy_from_slice(prefix);
    let mut rest = nonce.0;
    for place in line[prefix.len()..N - 1].iter_mut().rev() {
        *place = b"0123456789abcdef"[(rest & 15) as usize];
        rest >>= 4;
    }
    line
}

/// What the agent found at the start of what it has read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A connect line ends at `consumed`: answer it, drop that many bytes, and look again.
    Connect {
        /// The nonce to echo.
        nonce: Nonce,
        /// How many bytes to drop.
        consumed: usize,
    },
    /// After a connect line was answered: HTTP/2 begins at the start of the buffer.
    Session,
    /// Nothing yet; the first `discard` bytes can never become part of anything.
    More {
        /// How many bytes to drop.
        discard: usize,
    },
}

/// Looks for the next thing that a host says to an agent. `answered`: a connect line has been answered on this stream
/// since it was last idle, so that HTTP/2 may begin (only directly at the start of `buffer`).
pub fn hear(buffer: &[u8], answered: bool) -> Heard {
    if answered {
        if buffer.starts_with(PREFACE) {
            return Heard::Session;
        }
        if !buffer.is_empty() && PREFACE.starts_with(buffer) {
            return Heard::More { discard: 0 };
        }
    }
    match find_line(buffer, CONNECT) {
        Found::Line { nonce, end } => Heard::Connect {
            nonce,
            consumed: end,
        },
        Found::Nothing { keep_from } => Heard::More { discard: keep_from },
    }
}

/// What the host found in what it has read so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The answer to `expected` ends at `consumed`; what follows belongs to HTTP/2.
    Open {
        /// How many bytes to drop.
        consumed: usize,
    },
    /// Nothing yet; the first `discard` bytes can never become part of anything.
    More {
        /// How many bytes to drop.
        discard: usize,
    },
}

/// Looks for the agent's answer to the host's nonce `expected`, past everything else.
pub fn await_ok(buffer: &[u8], expected: Nonce) -> Reply {
    let mut from = 0;
    loop {
        match find_line(&buffer[from..], OK) {
            Found::Line { nonce, end } if nonce == expected => {
                return Reply::Open {
                    consumed: from + end,
                };
            }
            Found::Line { end, .. } => from += end,
            Found::Nothing { keep_from } => {
                return Reply::More {
                    discard: from + keep_from,
                };
            }
        }
    }
}

enum Found {
    Line { nonce: Nonce, end: usize },
    Nothing { keep_from: usize },
}

/// Finds the first `prefix` + nonce + newline.
fn find_line(buffer: &[u8], prefix: &[u8]) -> Found {
    let total = prefix.len() + NONCE_DIGITS + 1;
    for start in 0..buffer.len() {
        let rest = &buffer[start..];
        let seen = rest.len().min(prefix.len());
        if rest[..seen] != prefix[..seen] {
            continue;
        }
        if rest.len() >= total {
            if let (Some(nonce), b'\n') = (
                Nonce::parse(&rest[prefix.len()..total - 1]),
                rest[total - 1],
            ) {
                return Found::Line {
                    nonce,
                    end: start + total,
                };
            }
        } else if could_be_nonce(&rest[seen..]) {
            return Found::Nothing { keep_from: start };
        }
    }
    Found::Nothing {
        keep_from: buffer.len(),
    }
}

fn could_be_nonce(digits: &[u8]) -> bool {
    digits
        .iter()
        .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `stream` in pieces as an agent would and returns the nonces it answered and what was left for HTTP/2.
    fn agent(stream: &[u8], piece: usize) -> (Vec<Nonce>, Option<Vec<u8>>) {
        let (mut buffer, mut nonces) = (Vec::new(), Vec::new());
        for part in stream.chunks(piece) {
            buffer.extend_from_slice(part);
            loop {
                match hear(&buffer, !nonces.is_empty()) {
                    Heard::Connect { nonce, consumed } => {
                        nonces.push(nonce);
                        buffer.drain(..consumed);
                    }
                    Heard::Session => return (nonces, Some(buffer)),
                    Heard::More { discard } => {
                        buffer.drain(..discard);
                        assert!(buffer.len() <= CONNECT_LEN, "an idle agent keeps little");
                        break;
                    }
                }
            }
        }
        (nonces, None)
    }

    #[test]
    fn the_preface_without_a_connect_line_is_not_a_session() {
        assert_eq!(agent(PREFACE, 3), (vec![], None));
    }

    proptest! {
        #[test]
        fn a_connect_line_is_found_behind_any_garbage(garbage in proptest::collection::vec(any::<u8>(), 0..300), nonce: u64, piece in 1usize..40) {
            let mut stream = garbage;
            stream.extend_from_slice(&Nonce(nonce).connect_line());
            stream.extend_from_slice(PREFACE);
            let (nonces, session) = agent(&stream, piece);
            prop_assert_eq!(nonces.last(), Some(&Nonce(nonce)));
            prop_assert!(session.is_some_and(|rest| rest.starts_with(PREFACE)));
        }

        #[test]
        fn a_half_sent_line_does_not_hide_the_next(cut in 0usize..CONNECT_LEN, first: u64, second: u64) {
            let mut stream = Nonce(first).connect_line()[..cut].to_vec();
            stream.extend_from_slice(&Nonce(second).connect_line());
            prop_assert_eq!(agent(&stream, 7).0, vec![Nonce(second)]);
        }

        #[test]
        fn every_repeated_line_is_answered_until_http_begins(values in proptest::collection::vec(any::<u64>(), 1..6), piece in 1usize..64) {
            let mut stream: Vec<u8> = values.iter().flat_map(|&v| Nonce(v).connect_line()).collect();
            stream.extend_from_slice(PREFACE);
            let (nonces, session) = agent(&stream, piece);
            prop_assert_eq!(nonces, values.into_iter().map(Nonce).collect::<Vec<_>>());
            prop_assert!(session.is_some());
        }

        #[test]
        fn the_host_passes_over_everything_but_its_own_answer(garbage in proptest::collection::vec(any::<u8>(), 0..200), stale: u64, own: u64) {
            prop_assume!(stale != own);
            let mut stream = garbage;
            stream.extend_from_slice(&Nonce(stale).ok_line());
            let before = stream.len();
            let early = matches!(await_ok(&stream, Nonce(own)), Reply::Open { .. });
            prop_assert!(!early);
            stream.extend_from_slice(&Nonce(own).ok_line());
            stream.extend_from_slice(b"rest");
            prop_assert_eq!(await_ok(&stream, Nonce(own)), Reply::Open { consumed: before + OK_LEN });
        }

        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), own: u64, answered: bool) {
            let _ = hear(&bytes, answered);
            let _ = await_ok(&bytes, Nonce(own));
        }
    }
}
