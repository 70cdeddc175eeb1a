//! Follows a build: its log, its time, whether it is still wanted.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::image::nix::{BuildError, BuildWatch, Job, Lines, Record};

/// What a program in the guest may answer on its standard output, in bytes.
const ANSWER: usize = 16 << 20;

/// Follows one build, from several threads.
pub(super) struct Watchman<'a> {
    /// What is built.
    pub job: &'a Job,
    watch: &'a dyn BuildWatch,
    begun: Instant,
    /// How much was said, in bytes.
    said: AtomicU64,
    heard: Mutex<Heard>,
}

struct Heard {
    last_word: Instant,
    record: Record,
    /// The words of the program that runs now.
    own: Record,
}

impl<'a> Watchman<'a> {
    /// Begins a build.
    pub fn new(job: &'a Job, watch: &'a dyn BuildWatch) -> Self {
        let now = Instant::now();
        let heard = Heard { last_word: now, record: Record::default(), own: Record::default() };
        Self { job, watch, begun: now, said: AtomicU64::new(0), heard: Mutex::new(heard) }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the next program: silence is counted from now on, and words are its own.
    pub fn next(&self) {
        let mut heard = self.heard();
        heard.last_word = Instant::now();
        heard.own = Record::default();
    }

    /// Says that the build cannot speak yet: its microVM boots.
    pub fn not_yet(&self) {
        self.heard().last_word = Instant::now();
    }

    /// The last words of the program that runs now, or ran last.
    pub fn said(&self) -> String {
        self.heard().own.last(2000)
    }

    /// Says why the build must end, if it must.
    pub fn verdict(&self) -> Result<(), BuildError> {
        let attribute = || self.job.attribute.clone();
        let limits = &self.job.limits;
        if self.watch.cancelled() {
            return Err(BuildError::Interrupted { attribute: attribute() });
        }
        if self.said.load(Ordering::Relaxed) > limits.log_bytes {
            return Err(BuildError::Flood { attribute: attribute(), limit: limits.log_bytes });
        }
        let (silent, last) = {
            let heard = self.heard();
            (heard.last_word.elapsed(), heard.record.last_line())
        };
        if self.begun.elapsed() > limits.time {
            return Err(BuildError::Time { attribute: attribute(), after: limits.time, last });
        }
        if silent > limits.silence {
            return Err(BuildError::Silence { attribute: attribute(), after: limits.silence, last });
        }
        Ok(())
    }

    /// Takes a line.
    fn line(&self, line: &str) {
        let line = self.named(line);
        {
            let mut heard = self.heard();
            heard.record.push(&line);
            heard.own.push(&line);
        }
        self.watch.line(&line);
    }

    /// Calls the sources what whoever asked for the build calls them.
    fn named(&self, line: &str) -> String {
        line.replace(&format!("path:{}", super::conversation::TREE), &self.job.shown)
    }

    /// Counts what was said, in bytes.
    fn count(&self, bytes: usize) -> io::Result<()> {
        self.heard().last_word = Instant::now();
        let said = self.said.fetch_add(bytes as u64, Ordering::Relaxed).saturating_add(bytes as u64);
        if said > self.job.limits.log_bytes {
            return Err(io::Error::other("the build says too much"));
        }
        Ok(())
    }
}

/// Takes a program's stream as lines of the log.
pub(super) struct LogStream<'a> {
    watchman: &'a Watchman<'a>,
    lines: Lines,
}

impl<'a> LogStream<'a> {
    /// Takes the stream of one program.
    pub fn new(watchman: &'a Watchman<'a>) -> Self {
        Self { watchman, lines: Lines::default() }
    }

    /// Takes what is left without an end of line.
    pub fn end(mut self) {
        self.lines.end(&mut |line| self.watchman.line(&line));
    }
}

impl Write for LogStream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watchman.count(bytes.len())?;
        self.lines.take(bytes, |line| self.watchman.line(&line));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Takes a program's standard output, which is its answer.
pub(super) struct Answer<'a> {
    watchman: &'a Watchman<'a>,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl<'a> Answer<'a> {
    /// Takes the answer of one program.
    pub fn new(watchman: &'a Watchman<'a>) -> Self {
        Self { watchman, bytes: Vec::new() }
    }
}

impl Write for Answer<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watchman.count(bytes.len())?;
        if self.bytes.len() + bytes.len() > ANSWER {
            return Err(io::Error::other("the answer is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;
    use crate::image::nix::Limits;

    #[derive(Default)]
    struct Seen {
        lines: Mutex<Vec<String>>,
        over: AtomicBool,
    }

    impl BuildWatch for Seen {
        fn line(&self, line: &str) {
            self.lines.lock().unwrap().push(line.to_owned());
        }

        fn cancelled(&self) -> bool {
            self.over.load(Ordering::Relaxed)
        }
    }

    fn job(limits: Limits) -> Job {
        Job {
            flake_ref: "path:/work/tree".into(),
            shown: "git+file:///f".into(),
            tree: "/work/tree".into(),
            attribute: "packages.x.y".into(),
            limits,
        }
    }

    #[test]
    fn words_are_cleaned_named_and_counted() {
        let (job, seen) = (job(Limits { log_bytes: 100, ..Limits::default() }), Seen::default());
        let watchman = Watchman::new(&job, &seen);
        let mut log = LogStream::new(&watchman);
        log.write_all(b"error: path:/run/job/tree is \x1b[31mbad\x1b[0m\nno e").unwrap();
        log.write_all(b"nd").unwrap();
        log.end();
        assert_eq!(*seen.lines.lock().unwrap(), ["error: git+file:///f is bad", "no end"]);
        assert_eq!(watchman.said(), "error: git+file:///f is bad; no end");
        watchman.next();
        assert_eq!(watchman.said(), "");
        watchman.verdict().unwrap();
        let mut answer = Answer::new(&watchman);
        answer.write_all(b"{}").unwrap();
        assert_eq!(answer.bytes, b"{}");
        assert!(answer.write_all(&[b'x'; 100]).is_err());
        assert!(watchman.verdict().unwrap_err().to_string().ends_with("its log is larger than 100 bytes"));
    }

    #[test]
    fn a_build_ends_by_its_limits_or_because_somebody_wants_it_to() {
        let seen = Seen::default();
        let silent = job(Limits { silence: Duration::ZERO, ..Limits::default() });
        assert!(matches!(Watchman::new(&silent, &seen).verdict(), Err(BuildError::Silence { .. })));
        let long = job(Limits { time: Duration::ZERO, ..Limits::default() });
        assert!(matches!(Watchman::new(&long, &seen).verdict(), Err(BuildError::Time { .. })));
        seen.over.store(true, Ordering::Relaxed);
        assert!(matches!(Watchman::new(&long, &seen).verdict(), Err(BuildError::Interrupted { .. })));
    }
}
