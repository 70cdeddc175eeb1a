//! Why a tenant, a pool or an instance could not be changed.

use crate::guest::GuestError;
use crate::host::HostError;
use crate::store::{DocumentError, StoreError};
use crate::vm::instance::{IllegalTransition, SnapshotError};
use crate::vm::pool::ImageError;
use crate::vm::usage::QuotaExceeded;
use crate::vmm::VmmError;

/// What kind of failure it is; exit codes follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The input makes no sense.
    Invalid,
    /// The object is not there.
    NotFound,
    /// A policy, a quota or the object's state refuses it.
    Refused,
    /// It took too long.
    Timeout,
    /// Anything else.
    Failed,
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// The object is not there.
    #[error("there is no {kind} {name}{}", hint(.known))]
    NotFound {
        /// Tenant, pool or instance.
        kind: &'static str,
        /// Its address.
        name: String,
        /// What there is instead.
        known: Vec<String>,
    },
    /// It is there already.
    #[error("{kind} {name} is there already")]
    Exists {
        /// Tenant, pool or instance.
        kind: &'static str,
        /// Its address.
        name: String,
    },
    /// The input makes no sense.
    #[error("{place}: {why}")]
    Invalid {
        /// The field or argument.
        place: String,
        /// What is wrong and what would be right.
        why: String,
    },
    /// Something has to be done first.
    #[error("cannot {what}: {why}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why not, and what to do.
        why: String,
    },
    /// What it needs was not there this time.
    #[error("cannot {what}: {why}")]
    Unready {
        /// What was asked for.
        what: String,
        /// Why not.
        why: String,
    },
    /// Its state does not allow it.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// A quota leaves no room.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// A document could not be read or written.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The host could not do it.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The VMM could not do it.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The guest did not do it.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The image is not there or could not be built.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The snapshot cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

fn hint(known: &[String]) -> String {
    const MOST: usize = 10;
    match known.len() {
        0 => String::new(),
        n if n <= MOST => format!("; there is: {}", known.join(", ")),
        n => format!("; there is: {} and {} more", known[..MOST].join(", "), n - MOST),
    }
}

impl From<StoreError> for LifecycleError {
    fn from(error: StoreError) -> Self {
        LifecycleError::Document(error.into())
    }
}

impl LifecycleError {
    /// Returns what kind of failure it is.
    pub fn kind(&self) -> FailureKind {
        match self {
            LifecycleError::NotFound { .. } => FailureKind::NotFound,
            LifecycleError::Invalid { .. } => FailureKind::Invalid,
            LifecycleError::Exists { .. }
            | LifecycleError::Refused { .. }
            | LifecycleError::Illegal(_)
            | LifecycleError::Quota(_)
            | LifecycleError::Snapshot(_)
            | LifecycleError::Guest(GuestError::Refused { .. })
            | LifecycleError::Document(DocumentError::Store(StoreError::Locked { .. })) => FailureKind::Refused,
            LifecycleError::Image(ImageError::Flake { source, .. }) if source.is_timeout() => FailureKind::Timeout,
            LifecycleError::Vmm(VmmError::Timeout { .. })
            | LifecycleError::Guest(GuestError::Timeout { .. } | GuestError::NotReady { .. }) => FailureKind::Timeout,
            _ => FailureKind::Failed,
        }
    }

    /// Tells whether trying the same again can help without anybody changing anything.
    pub fn retry_can_help(&self) -> bool {
        if let LifecycleError::Image(error) = self {
            return error.retry_can_help();
        }
        matches!(self.kind(), FailureKind::Failed | FailureKind::Timeout)
            || matches!(self, LifecycleError::Document(DocumentError::Store(StoreError::Locked { .. })) | LifecycleError::Quota(_))
            // The next plan boots the instance afresh.
            || matches!(self, LifecycleError::Snapshot(_))
    }

    /// Tells whether the program was ended by a test here: nothing must be done any more, not even cleaning up.
    pub fn is_killed(&self) -> bool {
        matches!(self, LifecycleError::Document(DocumentError::Store(StoreError::Killed(_))) | LifecycleError::Host(HostError::Killed(_)))
            || matches!(self, LifecycleError::Vmm(VmmError::Killed(_)))
    }
}

/// Writes an error with its causes on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
