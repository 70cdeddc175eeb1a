//! The agent inside mvm's guests.
//!
//! ```text
//!  boot (PID 1 only): modules, root drive
//!    -> setup: drives by label, config.json, network, workload
//!    -> ready
//!  ports, vsock -> session (connect line, HTTP/2) -> service -> exec, transfer, log, lifecycle, hooks
//! ```
//!
//! One thread runs everything but file transfers and unmounts; one [`reap::Reaper`] starts processes and takes their
//! ends; [`agent::Agent`] is what everybody knows.

pub mod agent;
pub mod boot;
pub mod busy;
pub mod drives;
pub mod exec;
pub mod hooks;
pub mod lifecycle;
pub mod log;
pub mod network;
pub mod notify;
pub mod port;
pub mod power;
pub mod random;
pub mod reap;
pub mod secrets;
pub mod service;
pub mod services;
pub mod session;
pub mod setup;
pub mod system;
pub mod transfer;
pub mod users;
pub mod wiping;
pub mod workload;
