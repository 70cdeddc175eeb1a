//! Why a flake could not be built.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a flake could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A program is not there.
    #[error("{program} cannot be started; install the package {package}")]
    NoProgram {
        /// Its name.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// The reference leads nowhere.
    #[error("the flake {flake_ref} cannot be read: {why}")]
    Unreachable {
        /// The reference.
        flake_ref: String,
        /// What is wrong, in nix's words where it said something.
        why: String,
    },
    /// The flake does not evaluate.
    #[error("the flake {flake_ref} cannot be evaluated: {said}")]
    Evaluation {
        /// The reference.
        flake_ref: String,
        /// What nix said, shortened.
        said: String,
    },
    /// The flake has inputs, and who builds it reaches nothing.
    #[error(
        "the flake {flake_ref} has inputs, and the microVM that builds it has no network and no registry of this host; give them by \
         addresses that are reached from outside of this host, and build with `--builder-egress internet`: {said}"
    )]
    NoEgress {
        /// The reference.
        flake_ref: String,
        /// What nix said, shortened.
        said: String,
    },
    /// The flake has no such attribute.
    #[error("the flake {flake_ref} has no {attribute}; {}", known_list(.known))]
    NoAttribute {
        /// The reference.
        flake_ref: String,
        /// What was looked for.
        attribute: String,
        /// What there is beside it: names below `packages.<system>`.
        known: Vec<String>,
    },
    /// The attribute is something else than a build.
    #[error("{attribute} of the flake {flake_ref} is no derivation; an image is what `derivation`, or a function over it, gives")]
    NoDerivation {
        /// The reference.
        flake_ref: String,
        /// What was looked for.
        attribute: String,
    },
    /// The build failed.
    #[error("the build of {attribute} failed: {said}")]
    Failed {
        /// What was built.
        attribute: String,
        /// The last of what it said.
        said: String,
    },
    /// It took too long.
    #[error("the build of {attribute} was ended after {}: it may take no longer, unless `mvm pool build --timeout` says so{}", seconds(.after), last_words(.last))]
    Time {
        /// What was built.
        attribute: String,
        /// How long it may take.
        after: Duration,
        /// The last line of its log.
        last: String,
    },
    /// It said nothing for too long.
    #[error("the build of {attribute} was ended: it said nothing for {}, and `mvm pool build --silence-timeout` allows more{}", seconds(.after), last_words(.last))]
    Silence {
        /// What was built.
        attribute: String,
        /// How long it may say nothing.
        after: Duration,
        /// The last line of its log.
        last: String,
    },
    /// It said too much.
    #[error("the build of {attribute} was ended: its log is larger than {limit} bytes")]
    Flood {
        /// What was built.
        attribute: String,
        /// How much it may say.
        limit: u64,
    },
    /// It had too many processes.
    #[error(
        "the build of {attribute} was ended: it had more than {limit} processes at a time, and `mvm pool build --max-processes` allows more"
    )]
    Processes {
        /// What was built.
        attribute: String,
        /// How many it may have.
        limit: u32,
    },
    /// It used too much memory.
    #[error(
        "the build of {attribute} was ended: it used more than {limit_mib} MiB of memory, and `mvm pool build --max-mem-mib` allows more"
    )]
    Memory {
        /// What was built.
        attribute: String,
        /// How much it may use.
        limit_mib: u32,
    },
    /// It filled its disk.
    #[error("the build of {attribute} was ended: it filled its disk of {limit_mib} MiB, and `mvm pool build --max-image-mib` allows more")]
    Disk {
        /// What was built.
        attribute: String,
        /// How large its disk may be.
        limit_mib: u64,
    },
    /// Somebody ended it.
    #[error("the build of {attribute} was interrupted")]
    Interrupted {
        /// What was built.
        attribute: String,
    },
    /// What it yields is no image.
    #[error("the build of {attribute} yields no image: {file} {why}")]
    Output {
        /// What was built.
        attribute: String,
        /// The file that is wrong, below the result.
        file: String,
        /// What is wrong with it, and what would be right.
        why: String,
    },
    /// The builder itself could not do its work.
    #[error("the builder cannot {what}: {why}")]
    Builder {
        /// What it could not do.
        what: String,
        /// Why not.
        why: String,
    },
    /// A file could not be read or written.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}

impl BuildError {
    /// Names the file of a system's error.
    pub fn at(path: &Path) -> impl FnOnce(std::io::Error) -> BuildError {
        let path = path.to_owned();
        move |source| BuildError::File { path, source }
    }

    /// The error of a build that had a part of the time that it may take, because another part was gone before.
    pub fn of_whole_time(self, whole: Duration) -> BuildError {
        match self {
            BuildError::Time { attribute, last, .. } => BuildError::Time { attribute, after: whole, last },
            other => other,
        }
    }

    /// Whether the limit of time was what ended it.
    pub fn is_timeout(&self) -> bool {
        matches!(self, BuildError::Time { .. } | BuildError::Silence { .. })
    }

    /// Whether trying the same again can help: what a flake says does not change by itself.
    pub fn retry_can_help(&self) -> bool {
        self.is_timeout() || matches!(self, BuildError::Unreachable { .. } | BuildError::Builder { .. } | BuildError::File { .. })
    }
}

/// `90 s`.
fn seconds(span: &Duration) -> String {
    format!("{} s", span.as_secs_f64())
}

/// What it said last, if it said anything.
fn last_words(last: &str) -> String {
    if last.is_empty() { String::new() } else { format!("; its last words: {last:?}") }
}

fn known_list(known: &[String]) -> String {
    const MOST: usize = 20;
    match known.len() {
        0 => "it has no packages for this system".to_owned(),
        n if n <= MOST => format!("it has: {}", known.join(", ")),
        n => format!("it has: {} and {} more", known[..MOST].join(", "), n - MOST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_said_nothing_has_no_last_words() {
        let silent = |last: &str| {
            let last = last.to_owned();
            BuildError::Silence { attribute: "a".into(), after: Duration::from_secs(2), last }.to_string()
        };
        assert!(silent("").ends_with("allows more"), "{}", silent(""));
        assert!(silent("begun").ends_with("allows more; its last words: \"begun\""), "{}", silent("begun"));
        let part = BuildError::Time { attribute: "a".into(), after: Duration::from_secs(2), last: String::new() };
        assert!(part.of_whole_time(Duration::from_secs(9)).to_string().contains("was ended after 9 s"));
    }

    #[test]
    fn a_missing_attribute_lists_those_that_are_there() {
        let error = |known: &[&str]| BuildError::NoAttribute {
            flake_ref: "path:/f".into(),
            attribute: "packages.x86_64-linux.tenant-worker-minimal".into(),
            known: known.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert_eq!(
            error(&["default", "tenant-minimal"]).to_string(),
            "the flake path:/f has no packages.x86_64-linux.tenant-worker-minimal; it has: default, tenant-minimal"
        );
        assert!(error(&[]).to_string().ends_with("; it has no packages for this system"));
        assert!(error(&["a"; 30]).to_string().ends_with(" and 10 more"));
    }
}
