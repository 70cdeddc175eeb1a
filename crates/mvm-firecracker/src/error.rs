//! What can go wrong with a call.

use std::error::Error;
use std::fmt;
use std::io;

/// A call that failed, and which.
#[derive(Debug)]
pub struct ApiError {
    /// The call, such as `PUT /drives/root`.
    pub request: String,
    /// What went wrong.
    pub kind: ApiErrorKind,
}

/// What goes wrong with a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApiErrorKind {
    /// Firecracker answered that it did not do it.
    #[error("refused with status {status}: {message}")]
    Fault {
        /// The status of the answer, such as 400.
        status: u16,
        /// Its `fault_message`, without control characters and cut at 2,000 characters.
        message: String,
    },
    /// There was no whole answer within the deadline.
    #[error("no answer within {after_ms} ms; it may still be done, so ask for the state before asking again")]
    Timeout {
        /// The deadline, in milliseconds.
        after_ms: u64,
    },
    /// The connection ended before the whole answer was there.
    #[error("the connection was closed before the answer was there; Firecracker's log may say why it ended")]
    Closed,
    /// The answer is not one of Firecracker. What was received is not repeated, since nothing is known about it.
    #[error("the answer is not one of Firecracker: {why}; is it Firecracker that listens there?")]
    Garbage {
        /// What is wrong with it.
        why: String,
    },
    /// More than Firecracker takes or sends.
    #[error("{what} has more than {limit} bytes")]
    TooLarge {
        /// What has.
        what: &'static str,
        /// How much it may have.
        limit: usize,
    },
    /// The process ended before its socket was there.
    #[error("Firecracker ended before it listened; its output may say why")]
    Ended,
    /// The socket cannot be reached.
    #[error("cannot {doing}")]
    Io {
        /// What cannot be done.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ApiError {
    /// Whether the same call can succeed later. Where it may have been done already, its effect is to be looked for first.
    #[must_use]
    pub fn can_retry(&self) -> bool {
        matches!(self.kind, ApiErrorKind::Timeout { .. } | ApiErrorKind::Closed | ApiErrorKind::Io { .. })
    }

    /// Firecracker's own words, if it answered.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        match &self.kind {
            ApiErrorKind::Fault { message, .. } => Some(message),
            _ => None,
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.request, self.kind)
    }
}

impl Error for ApiError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.kind.source()
    }
}

/// What `hyper` found wrong.
pub(crate) fn of_http(error: &hyper::Error, limit: usize) -> ApiErrorKind {
    let mut cause: Option<&(dyn Error + 'static)> = error.source();
    let mut io = None;
    while let Some(inner) = cause {
        io = inner.downcast_ref::<io::Error>().map(io::Error::kind).or(io);
        cause = inner.source();
    }
    // hyper tells clients of this one by its text alone.
    if error.is_parse() && error.to_string().contains("too large") {
        return ApiErrorKind::TooLarge { what: "the head of the answer", limit };
    }
    match io {
        _ if error.is_parse() => ApiErrorKind::Garbage { why: "it is not HTTP/1.1".into() },
        _ if error.is_incomplete_message() || error.is_closed() || error.is_canceled() => ApiErrorKind::Closed,
        Some(io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof) => ApiErrorKind::Closed,
        Some(io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput) => ApiErrorKind::Garbage { why: "its body is not HTTP/1.1".into() },
        Some(kind) => ApiErrorKind::Io { doing: "talk to Firecracker's socket", source: kind.into() },
        None => ApiErrorKind::Garbage { why: error.to_string() },
    }
}

/// Text of somebody else's, fit for a log line.
pub(crate) fn clean(text: &str) -> String {
    text.chars().take(2_000).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
