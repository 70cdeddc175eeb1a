//! Adds up what test runners say.

use std::process::ExitStatus;

/// Tests and checks over all runners.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many succeeded.
    pub passed: u64,
    /// How many did not.
    pub failed: u64,
}

impl Tally {
    /// One check that is not a test of a runner.
    pub fn of(result: &Result<(), String>) -> Tally {
        match result {
            Ok(()) => Tally { passed: 1, failed: 0 },
            Err(_) => Tally { passed: 0, failed: 1 },
        }
    }

    /// Adds another.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Adds what a line says, when it is the summary of nextest or of cargo's own runner.
    pub fn hear(&mut self, line: &str) {
        let line = plain(line);
        let line = line.trim();
        let counts = if let Some(rest) = line.strip_prefix("test result: ") {
            rest.split_once(". ").map(|(_, counts)| counts)
        } else if line.starts_with("Summary [") {
            line.split_once("run: ").map(|(_, counts)| counts)
        } else {
            None
        };
        for part in counts.unwrap_or_default().split([',', ';']) {
            let mut words = part.split_whitespace();
            let (number, what) = (words.next().and_then(|n| n.parse::<u64>().ok()), words.next());
            match (number, what) {
                (Some(number), Some("passed")) => self.passed += number,
                (Some(number), Some("failed" | "timed" | "exec")) => self.failed += number,
                _ => {}
            }
        }
    }

    /// What a runner said, held against how it ended: one that fails without a failed test could not run them.
    pub fn ended(mut self, status: ExitStatus) -> Tally {
        if !status.success() && self.failed == 0 {
            self.failed = 1;
        }
        self
    }

    /// # Errors
    /// When anything failed.
    pub fn verdict(self) -> Result<(), String> {
        if self.failed == 0 { Ok(()) } else { Err(format!("{} failed", self.failed)) }
    }
}

/// Without the escape sequences of colours.
fn plain(line: &str) -> String {
    let mut parts = line.split("\u{1b}[");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &[&str]) -> (u64, u64) {
        let mut tally = Tally::default();
        lines.iter().for_each(|line| tally.hear(line));
        (tally.passed, tally.failed)
    }

    #[test]
    fn the_summaries_of_both_runners_are_added_up() {
        let lines = [
            "    Starting 208 tests across 9 binaries",
            "     Summary [   5.2s] 208 tests run: 206 passed (3 slow), 1 failed, 1 timed out, 2 skipped\n",
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.00s",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out",
            "test passed ... ok",
        ];
        assert_eq!(heard(&lines), (219, 4));
    }

    #[test]
    fn colours_do_not_hide_a_summary() {
        let line = "\u{1b}[32;1m     Summary\u{1b}[0m [   0.1s] \u{1b}[1m2\u{1b}[0m tests run: \u{1b}[1m2\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, 0 skipped";
        assert_eq!(heard(&[line]), (2, 0));
    }
}
