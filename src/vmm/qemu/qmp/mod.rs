//! A client of the QEMU Machine Protocol: line-delimited JSON over a unix socket, one command at a time.
//!
//! Only the commands that the driver uses are here, typed on both sides; the generated `qapi-qmp` has all of QEMU's some thousand
//! types and would be most of this program's build.

mod client;
mod line;
mod wire;

pub(super) use client::{QmpClient, QmpError};
pub(super) use wire::{Command, RunState};
