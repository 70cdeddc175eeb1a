//! The one error type of this crate.

use std::io;

/// Why something that needs root was not done.
#[derive(Debug, thiserror::Error)]
pub enum HostdError {
    /// The operating system refused.
    #[error("{what}")]
    Io {
        /// What was being done, and to what.
        what: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// mvm refused, or a program that it ran did.
    #[error("{what}: {why}")]
    Refused {
        /// What was being done, and to what.
        what: String,
        /// What is wrong, and what to do about it.
        why: String,
    },
}

impl HostdError {
    pub(crate) fn refused(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Refused { what: what.into(), why: why.into() }
    }

    /// Whether the kernel would not do it to what is there.
    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.raw_os_error() == Some(libc::EINVAL))
    }

    /// Whether the thing that was to be worked on is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// Names what was being done when the system refused.
pub(crate) trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, HostdError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, HostdError> {
        self.map_err(|source| HostdError::Io { what: what(), source: source.into() })
    }
}
