//! What the agent and the workload print: a ring of bounded size, and for the agent also the console.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The last bytes of an output, numbered from its beginning.
pub struct Ring {
    capacity: usize,
    kept: Mutex<Kept>,
    grown: Notify,
}

struct Kept {
    bytes: VecDeque<u8>,
    /// The number of the byte after the last.
    end: u64,
}

impl Ring {
    /// An empty ring that keeps `capacity` bytes.
    pub fn new(capacity: usize) -> Ring {
        Ring { capacity, kept: Mutex::new(Kept { bytes: VecDeque::new(), end: 0 }), grown: Notify::new() }
    }

    /// Appends, and forgets the oldest bytes that no longer fit.
    pub fn push(&self, bytes: &[u8]) {
        let mut kept = self.kept();
        kept.end += bytes.len() as u64;
        let fitting = &bytes[bytes.len().saturating_sub(self.capacity)..];
        let surplus = (kept.bytes.len() + fitting.len()).saturating_sub(self.capacity);
        kept.bytes.drain(..surplus);
        kept.bytes.extend(fitting);
        drop(kept);
        self.grown.notify_waiters();
    }

    /// The place from which the last `lines` lines can be read; 0 lines: everything that is kept.
    pub fn start(&self, lines: u32) -> u64 {
        let kept = self.kept();
        let first = kept.end - kept.bytes.len() as u64;
        if lines == 0 {
            return first;
        }
        let mut left = lines;
        // The newline that ends the last line does not begin another.
        for (index, &byte) in kept.bytes.iter().enumerate().rev().skip(1) {
            if byte == b'\n' {
                left -= 1;
                if left == 0 {
                    return first + index as u64 + 1;
                }
            }
        }
        first
    }

    /// At most `limit` bytes from `place` on (or from the oldest that is kept), and the place after them.
    pub fn read(&self, place: u64, limit: usize) -> (Vec<u8>, u64) {
        let kept = self.kept();
        let first = kept.end - kept.bytes.len() as u64;
        let from = place.clamp(first, kept.end);
        let bytes: Vec<u8> = kept.bytes.iter().skip((from - first) as usize).take(limit).copied().collect();
        let next = from + bytes.len() as u64;
        (bytes, next)
    }

    /// Like [`Ring::read`], but waits until there is something.
    pub async fn read_more(&self, place: u64, limit: usize) -> (Vec<u8>, u64) {
        loop {
            let grown = self.grown.notified();
            tokio::pin!(grown);
            grown.as_mut().enable();
            let (bytes, next) = self.read(place, limit);
            if !bytes.is_empty() {
                return (bytes, next);
            }
            grown.await;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says something about the agent itself: into its ring and onto standard error, which is the console for PID 1.
pub fn say(ring: &Ring, text: &str) {
    let uptime = crate::system::uptime_ms();
    let line = format!("mvm-agent [{}.{:03}] {text}\n", uptime / 1000, uptime % 1000);
    ring.push(line.as_bytes());
    // A console that cannot be written must not stop the agent.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_bytes_go() {
        let ring = Ring::new(8);
        ring.push(b"abcdef");
        ring.push(b"ghij");
        assert_eq!(ring.read(0, 100), (b"cdefghij".to_vec(), 10));
        assert_eq!(ring.read(9, 100), (b"j".to_vec(), 10));
        ring.push(b"0123456789xyz");
        assert_eq!(ring.read(0, 3), (b"567".to_vec(), 18));
    }

    #[test]
    fn the_tail_counts_whole_lines() {
        let ring = Ring::new(100);
        ring.push(b"one\ntwo\nthree\n");
        let tail = |lines| ring.read(ring.start(lines), 100).0;
        assert_eq!(tail(1), b"three\n");
        assert_eq!(tail(2), b"two\nthree\n");
        assert_eq!(tail(9), b"one\ntwo\nthree\n");
        assert_eq!(tail(0), b"one\ntwo\nthree\n");
    }
}
