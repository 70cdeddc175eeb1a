//! What Firecracker counts: it writes a line of JSON a minute, and when it is asked to.
//!
//! It goes into a pipe with a name. A file would grow without end, and a Firecracker that writes beyond its limit is ended; what does
//! not fit into a pipe that nobody empties (64 KiB) is lost instead, and nothing else comes of it.

use std::fs::File;
use std::io::{self, Read};

use rustix::fs::{FileType, Gid, Mode, OFlags, Uid, chownat, fstat, mknodat, openat};
use serde_json::{Map, Value};

use super::snapshot::Scratch;

/// What a line begins with (`FirecrackerMetrics` of Firecracker).
const LINE_BEGINS: &str = "{\"utc_timestamp_ms\"";

/// The most that is read at once: some times what a pipe holds. Whoever fills it meanwhile does not hold mvm up.
const MOST: u64 = 1 << 20;

/// Makes the pipe in the directory that a Firecracker shares with the host.
pub(super) fn make(dir: &Scratch, name: &str, uid: u32) -> io::Result<()> {
    mknodat(dir.fd(), name, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
    Ok(chownat(dir.fd(), name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Opens the pipe for reading, and nothing else that may be in its place; it is never waited for.
pub(super) fn open(dir: &Scratch, name: &str) -> io::Result<File> {
    let pipe = openat(dir.fd(), name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let kind = FileType::from_raw_mode(fstat(&pipe)?.st_mode);
    if kind != FileType::Fifo {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} is no pipe, but {kind:?}")));
    }
    Ok(pipe.into())
}

/// Takes what is in the pipe.
pub(super) fn drain(pipe: &File) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    match pipe.take(MOST).read_to_end(&mut all) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(all),
    }
}

/// The newest line, which may come after the first half of one that did not fit.
pub(super) fn newest(text: &[u8]) -> Option<Map<String, Value>> {
    let text = String::from_utf8_lossy(text);
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let parsed = |line: &str| serde_json::from_str(&line[line.rfind(LINE_BEGINS)?..]).ok();
    lines.rev().find_map(parsed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_newest_whole_line_counts() {
        let at = |text: &str| newest(text.as_bytes()).map(|all| all["utc_timestamp_ms"].as_u64().unwrap());
        assert_eq!(at("{\"utc_timestamp_ms\":1}\n{\"utc_timestamp_ms\":2}\n"), Some(2));
        assert_eq!(at("{\"utc_timestamp_ms\":1}\n{\"utc_timestamp_ms\":2}"), Some(1), "one without its end");
        assert_eq!(at("{\"utc_timestamp_ms\":1,\"a\":{\"b\":{\"utc_timestamp_ms\":2}\n"), Some(2), "after half of one");
        assert_eq!(at("{\"utc_timestamp_ms\":1}\n\u{fffd}]\n"), Some(1));
        assert_eq!((at(""), at("{}\n"), at("null\n")), (None, None, None));
    }

    #[test]
    fn only_a_pipe_is_read_and_an_empty_one_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(dir.path()).unwrap();
        make(&scratch, "pipe", rustix::process::geteuid().as_raw()).unwrap();
        let writer = File::options().read(true).write(true).open(dir.path().join("pipe")).unwrap();
        let pipe = open(&scratch, "pipe").unwrap();
        assert_eq!(drain(&pipe).unwrap(), b"");
        io::Write::write_all(&mut &writer, b"one\n").unwrap();
        assert_eq!(drain(&pipe).unwrap(), b"one\n");
        std::fs::write(dir.path().join("file"), "").unwrap();
        assert!(open(&scratch, "file").unwrap_err().to_string().contains("is no pipe"));
        symlink("pipe", dir.path().join("link")).unwrap();
        assert!(open(&scratch, "link").is_err());
    }
}
