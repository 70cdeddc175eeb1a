//! A build's log: lines that can be shown, and a bounded record of them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// The longest line that is shown, in bytes; the rest of it is left out.
const LINE: usize = 4096;
/// How much of a log's beginning is kept, in bytes.
const HEAD: usize = 64 << 10;
/// How much of its end is kept, in bytes.
const TAIL: usize = 192 << 10;

/// Cuts a stream into lines that can be shown on any terminal.
#[derive(Default)]
pub struct Lines {
    line: Vec<u8>,
    cut: bool,
}

impl Lines {
    /// Takes what was read, and gives every line that it ends.
    pub fn take(&mut self, bytes: &[u8], mut give: impl FnMut(String)) {
        for byte in bytes {
            match byte {
                // A carriage return alone begins a progress line anew; what it replaces is over.
                b'\n' | b'\r' => self.end(&mut give),
                _ if self.line.len() < LINE => self.line.push(*byte),
                _ => self.cut = true,
            }
        }
    }

    /// Gives what is left without an end.
    pub fn end(&mut self, give: &mut impl FnMut(String)) {
        if self.line.is_empty() {
            return;
        }
        let mut text = printable(&String::from_utf8_lossy(&self.line));
        if self.cut {
            text.push_str(" [cut]");
        }
        self.line.clear();
        self.cut = false;
        if !text.trim().is_empty() {
            give(text);
        }
    }
}

/// Leaves out control characters and the terminal's escape sequences.
pub fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => match chars.next() {
                // ECMA-48, CSI: parameters, then one byte of 0x40 to 0x7e.
                Some('[') => while chars.next().is_some_and(|c| !('\x40'..='\x7e').contains(&c)) {},
                // OSC and the like, up to BEL or ESC.
                Some(']' | 'P' | '_' | '^') => while chars.next().is_some_and(|c| c != '\x07' && c != '\x1b') {},
                _ => {}
            },
            '\t' => clean.push(' '),
            // Also what turns the direction of writing, so that no line looks like another.
            c if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c) => {}
            c => clean.push(c),
        }
    }
    clean
}

/// The beginning and the end of a log.
#[derive(Default)]
pub struct Record {
    head: String,
    tail: VecDeque<String>,
    tail_len: usize,
    left_out: u64,
}

impl Record {
    /// Takes a line.
    pub fn push(&mut self, line: &str) {
        if self.left_out == 0 && self.tail.is_empty() && self.head.len() + line.len() < HEAD {
            self.head.push_str(line);
            self.head.push('\n');
            return;
        }
        self.tail_len += line.len() + 1;
        self.tail.push_back(line.to_owned());
        while self.tail_len > TAIL {
            let gone = self.tail.pop_front().expect("what has a length has a line");
            self.tail_len -= gone.len() + 1;
            self.left_out += 1;
        }
    }

    /// The last lines, joined, at most so many characters.
    pub fn last(&self, most: usize) -> String {
        let head = self.head.lines();
        let lines: Vec<&str> = head.chain(self.tail.iter().map(String::as_str)).collect();
        let mut from = lines.len();
        let mut len = 0;
        while from > 0 && len + lines[from - 1].len() + 2 <= most {
            from -= 1;
            len += lines[from].len() + 2;
        }
        if from == lines.len() {
            return lines.last().map(|line| line.chars().take(most).collect()).unwrap_or_default();
        }
        lines[from..].join("; ")
    }

    /// The last line.
    pub fn last_line(&self) -> String {
        self.tail
            .back()
            .cloned()
            .or_else(|| self.head.lines().next_back().map(str::to_owned))
            .unwrap_or_default()
            .chars()
            .take(200)
            .collect()
    }

    /// Writes the record to a file.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let mut text = self.head.clone();
        if self.left_out > 0 {
            text.push_str(&format!("[{} lines are left out]\n", self.left_out));
        }
        for line in &self.tail {
            text.push_str(line);
            text.push('\n');
        }
        File::create(path)?.write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(bytes: &[u8]) -> Vec<String> {
        let (mut cutter, mut found) = (Lines::default(), Vec::new());
        cutter.take(bytes, |line| found.push(line));
        cutter.end(&mut |line| found.push(line));
        found
    }

    #[test]
    fn lines_are_cut_and_cleaned() {
        assert_eq!(lines(b"a\r\nb\n\nc"), ["a", "b", "c"]);
        assert_eq!(lines(b"\x1b[31;1merror:\x1b[0m no\x07 \x1b]0;title\x07x\tx"), ["error: no x x"]);
        let long = lines(&[b'x'; 3 * LINE]);
        assert_eq!(long.len(), 1);
        assert!(long[0].len() < LINE + 10 && long[0].ends_with(" [cut]"));
        assert_eq!(lines("safe\u{202e}gnp".as_bytes()), ["safegnp"]);
    }

    #[test]
    fn a_long_log_keeps_its_beginning_and_its_end() {
        let mut record = Record::default();
        for n in 0..100_000 {
            record.push(&format!("line {n}"));
        }
        assert_eq!(record.last_line(), "line 99999");
        assert_eq!(record.last(24), "line 99998; line 99999");
        let dir = tempfile::tempdir().unwrap();
        record.save(&dir.path().join("log")).unwrap();
        let text = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(text.starts_with("line 0\nline 1\n") && text.ends_with("line 99999\n") && text.contains("lines are left out]"));
        assert!(text.len() < HEAD + TAIL + 100);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_line_that_controls_a_terminal(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for line in lines(&bytes) {
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}
