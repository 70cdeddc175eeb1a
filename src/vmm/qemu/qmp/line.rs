//! Lines out of a byte stream, capped in length.

use std::io::Read;

/// The longest line that is taken, in bytes. QEMU's longest answers to our commands are its greeting and refusals, below 1 KiB.
pub(super) const MAX_LINE: usize = 64 * 1024;

/// Cuts a stream into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// How much of the buffer is known to hold no line end.
    searched: usize,
}

/// Why there is no line.
#[derive(Debug)]
pub(super) enum LineError {
    /// The stream ended.
    Closed,
    /// The line is longer than [`MAX_LINE`].
    TooLong,
    /// Reading failed.
    Io(std::io::Error),
}

impl Lines {
    /// Takes a complete line out of what was read already, without its end.
    pub(super) fn take(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        if let Some(found) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') {
            let end = self.searched + found;
            let rest = self.buffer.split_off(end + 1);
            let mut line = std::mem::replace(&mut self.buffer, rest);
            line.truncate(end);
            self.searched = 0;
            return if line.len() > MAX_LINE { Err(LineError::TooLong) } else { Ok(Some(line)) };
        }
        self.searched = self.buffer.len();
        if self.buffer.len() > MAX_LINE { Err(LineError::TooLong) } else { Ok(None) }
    }

    /// Reads once.
    pub(super) fn fill(&mut self, from: &mut impl Read) -> Result<(), LineError> {
        let mut chunk = [0; 4096];
        match from.read(&mut chunk) {
            Ok(0) => Err(LineError::Closed),
            Ok(n) => {
                self.buffer.extend_from_slice(&chunk[..n]);
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(LineError::Io(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::wire::{Message, parse};
    use super::*;

    fn all(mut stream: &[u8]) -> (Vec<Vec<u8>>, LineError) {
        let mut lines = Lines::default();
        let mut out = Vec::new();
        loop {
            match lines.take() {
                Ok(Some(line)) => out.push(line),
                Ok(None) => {
                    if let Err(error) = lines.fill(&mut stream) {
                        return (out, error);
                    }
                }
                Err(error) => return (out, error),
            }
        }
    }

    #[test]
    fn a_line_without_end_is_refused_before_it_fills_the_memory() {
        let mut lines = Lines::default();
        let mut endless = std::io::repeat(b'x');
        let error = loop {
            match lines.take() {
                Ok(_) => lines.fill(&mut endless).unwrap(),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, LineError::TooLong));
        assert!(lines.buffer.len() <= MAX_LINE + 4096);
    }

    proptest! {
        #[test]
        fn any_bytes_are_cut_at_line_ends_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..10_000)) {
            let (lines, error) = all(&bytes);
            prop_assert!(matches!(error, LineError::Closed));
            let ends = bytes.iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(lines.len(), ends);
            let expected: Vec<&[u8]> = bytes.split(|b| *b == b'\n').take(ends).collect();
            prop_assert_eq!(&lines, &expected);
            for line in lines {
                drop(parse::<Message>(&line));
            }
        }

        #[test]
        fn json_like_garbage_never_panics(text in r#"[\{\}\[\]":,a-zA-Z0-9 \\-]{0,200}"#) {
            drop(parse::<Message>(text.as_bytes()));
        }

        #[test]
        fn a_long_line_is_refused_wherever_it_stands(before in 0..5_usize, over in 1..5_000_usize) {
            let mut bytes = b"{}\n".repeat(before);
            bytes.extend(std::iter::repeat_n(b'x', MAX_LINE + over));
            bytes.push(b'\n');
            let (lines, error) = all(&bytes);
            prop_assert!(matches!(error, LineError::TooLong));
            prop_assert_eq!(lines.len(), before);
        }
    }
}
