//! What was asked, when, and how long it took.

use std::time::{Duration, Instant};

/// One call's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallTiming {
    /// The call, such as `PUT /drives/root`; `connect` is the wait for the socket.
    pub request: String,
    /// When it began, in microseconds since [`Api::connect`](crate::Api::connect) or [`Api::attach`](crate::Api::attach).
    pub began_us: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// The calls since the connection was made or the timeline was taken; the last of them when they are too many.
#[derive(Debug)]
pub(crate) struct Timeline {
    pub origin: Instant,
    calls: Vec<CallTiming>,
}

/// As many as an operator reads.
const MOST: usize = 512;

impl Timeline {
    pub fn new() -> Self {
        Self { origin: Instant::now(), calls: Vec::new() }
    }

    pub fn note(&mut self, timing: CallTiming) {
        if self.calls.len() == MOST {
            self.calls.drain(..MOST / 2);
        }
        self.calls.push(timing);
    }

    pub fn take(&mut self) -> Vec<CallTiming> {
        let mut calls = std::mem::take(&mut self.calls);
        calls.sort_by_key(|call| call.began_us);
        calls
    }
}

pub(crate) fn timing(origin: Instant, request: String, began: Instant) -> CallTiming {
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    CallTiming { request, began_us: micros(began - origin), took_us: micros(began.elapsed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_life_keeps_its_last_calls_only() {
        let mut timeline = Timeline::new();
        for n in 0..10_000 {
            timeline.note(CallTiming { request: String::new(), began_us: n, took_us: 1 });
        }
        let calls = timeline.take();
        assert!((MOST / 2..=MOST).contains(&calls.len()), "{}", calls.len());
        assert_eq!(calls.last().map(|call| call.began_us), Some(9_999));
        assert!(timeline.take().is_empty());
    }
}
