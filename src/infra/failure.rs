//! What went wrong with an object, and when it is tried again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::clock::Moment;

/// What last went wrong with an object, and when it is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was being done, e.g. `start`.
    pub step: String,
    /// The error with its causes.
    pub error: String,
    /// How often it was tried without success.
    pub attempts: u32,
    /// When it may be tried again.
    pub next_try: Moment,
}

/// The time between tries: 1 s doubled with each, at most 5 minutes.
pub fn backoff(attempts: u32) -> Duration {
    const MOST: Duration = Duration::from_secs(300);
    Duration::from_secs(1_u64.checked_shl(attempts.saturating_sub(1)).unwrap_or(u64::MAX)).min(MOST)
}

impl Failure {
    /// Records one more failure of a step; the attempts count on while it is the same step that fails.
    pub fn again(earlier: Option<&Failure>, step: &str, error: String, now: &Moment) -> Failure {
        let attempts = earlier.filter(|earlier| earlier.step == step).map_or(0, |earlier| earlier.attempts).saturating_add(1);
        Failure { step: step.to_owned(), error, attempts, next_try: now.plus(backoff(attempts)) }
    }

    /// Returns how long it is until the next try; zero when it may be tried now.
    pub fn wait(&self, now: &Moment) -> Duration {
        now.elapsed(&self.next_try)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_grows_and_is_bounded() {
        assert_eq!(backoff(1), Duration::from_secs(1));
        assert_eq!(backoff(4), Duration::from_secs(8));
        assert_eq!(backoff(200), Duration::from_secs(300));
    }
}
