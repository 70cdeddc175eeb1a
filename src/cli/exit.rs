//! From errors to exit codes, in one place.

use std::process::ExitCode;

use crate::agent::reconciler::ReconcileError;
use crate::vm::error::{FailureKind, LifecycleError, with_causes};

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 1: failed.
    Failed,
    /// 2: usage or invalid input.
    Usage,
    /// 3: not found.
    NotFound,
    /// 4: refused by policy, quota or state.
    Refused,
    /// 5: timed out.
    TimedOut,
    /// 6: partly done.
    Partly,
    /// 10: `mvm plan --detailed-exitcode` found a difference.
    Difference,
    /// 130: interrupted.
    Interrupted,
    /// The code of the command that ran in the guest.
    Guest(u8),
}

impl Exit {
    /// Returns the number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::NotFound => 3,
            Exit::Refused => 4,
            Exit::TimedOut => 5,
            Exit::Partly => 6,
            Exit::Difference => 10,
            Exit::Interrupted => 130,
            Exit::Guest(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}

impl From<FailureKind> for Exit {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::Invalid => Exit::Usage,
            FailureKind::NotFound => Exit::NotFound,
            FailureKind::Refused => Exit::Refused,
            FailureKind::Timeout => Exit::TimedOut,
            FailureKind::Failed => Exit::Failed,
        }
    }
}

/// Shortens words and lines that nobody reads to their end, such as an address of 10 kB.
pub fn shorten_words(text: &str) -> String {
    const LONGEST_WORD: usize = 200;
    const LONGEST_LINE: usize = 1000;
    const SHOWN: usize = 60;
    let shorten = |text: &str, longest: usize, shown: usize| match text.chars().count() {
        length if length > longest => {
            let end = text.char_indices().nth(shown).map_or(text.len(), |(at, _)| at);
            format!("{}… ({length} characters)", &text[..end])
        }
        _ => text.to_owned(),
    };
    let line = |line: &str| {
        let words: Vec<String> = line.split(' ').map(|word| shorten(word, LONGEST_WORD, SHOWN)).collect();
        shorten(&words.join(" "), LONGEST_LINE, LONGEST_LINE)
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// An error on its way to the user.
#[derive(Debug)]
pub struct CliError {
    /// The exit code.
    pub exit: Exit,
    /// What is written to standard error.
    pub text: String,
}

impl CliError {
    /// Makes an error of a code and a text.
    pub fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self { exit, text: text.into() }
    }
}

impl From<LifecycleError> for CliError {
    fn from(error: LifecycleError) -> Self {
        Self::new(error.kind().into(), with_causes(&error))
    }
}

impl From<ReconcileError> for CliError {
    fn from(error: ReconcileError) -> Self {
        Self::new(error.kind().into(), with_causes(&error))
    }
}

impl From<crate::guest::GuestError> for CliError {
    fn from(error: crate::guest::GuestError) -> Self {
        LifecycleError::from(error).into()
    }
}

impl From<crate::host::HostError> for CliError {
    fn from(error: crate::host::HostError) -> Self {
        LifecycleError::from(error).into()
    }
}

impl From<crate::store::StoreError> for CliError {
    fn from(error: crate::store::StoreError) -> Self {
        LifecycleError::from(error).into()
    }
}

impl From<crate::vmm::VmmError> for CliError {
    fn from(error: crate::vmm::VmmError) -> Self {
        LifecycleError::from(error).into()
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        Self::new(Exit::Failed, error.to_string())
    }
}
