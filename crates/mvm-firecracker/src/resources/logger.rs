//! `PUT /logger`.

use serde::{Deserialize, Serialize};

/// The least important message that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warning,
    Info,
    Debug,
    Trace,
    Off,
}

/// The body of `PUT /logger`. What is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logger {
    /// A file or named pipe; Firecracker's standard output when absent. A file that is there is written over from its start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_path: Option<String>,
    /// What is written; [`LogLevel::Info`] when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines have their level.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines have the place in Firecracker's source that wrote them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// The one module of Firecracker that may write, such as `api_server::request`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}
