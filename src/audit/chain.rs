//! PURE: lines, hashes, and where a chain breaks.

use super::Event;

/// What the first record names as the hash before it.
pub(super) const GENESIS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

const SEPARATOR: &str = ",\"hash\":\"";
const HASH_LEN: usize = 64;

/// A chain that is broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("record {record} (line {record} of the log) {why}")]
pub struct Broken {
    /// The first bad record, counted from 1.
    pub record: u64,
    /// What is wrong with it.
    pub why: &'static str,
}

/// Writes an event as its line, and returns the line with its newline and the hash.
pub(super) fn seal(event: &Event) -> (String, String) {
    let mut line = serde_json::to_string(event).expect("events have string keys and no failing serializers");
    line.pop();
    let hash = blake3::hash(line.as_bytes()).to_hex().to_string();
    line.push_str(SEPARATOR);
    line.push_str(&hash);
    line.push_str("\"}\n");
    (line, hash)
}

/// Reads a line without its newline; `None` when it is none, or when its hash is not its own.
pub(super) fn open(line: &[u8]) -> Option<(Event, String)> {
    let text = std::str::from_utf8(line).ok()?;
    let (body, rest) = text.split_at_checked(text.len().checked_sub(SEPARATOR.len() + HASH_LEN + 2)?)?;
    let hash = rest.strip_prefix(SEPARATOR)?.strip_suffix("\"}")?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != hash {
        return None;
    }
    Some((serde_json::from_str(&format!("{body}}}")).ok()?, hash.to_owned()))
}

/// Checks a whole log and returns how many records it has.
///
/// # Errors
/// The first record that is not what was written there.
pub fn verify(log: &[u8]) -> Result<u64, Broken> {
    let mut prev = GENESIS.to_owned();
    let mut record = 0;
    if log.is_empty() {
        return Ok(0);
    }
    let Some(lines) = log.strip_suffix(b"\n") else {
        let record = log.iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        return Err(Broken { record, why: "is cut off" });
    };
    for line in lines.split(|byte| *byte == b'\n') {
        record += 1;
        let Some((event, hash)) = open(line) else {
            return Err(Broken { record, why: "was changed: its hash is another one" });
        };
        if event.prev != prev || event.seq != record {
            return Err(Broken { record, why: "does not follow the record before it: one was removed, put in or replaced" });
        }
        prev = hash;
    }
    Ok(record)
}
