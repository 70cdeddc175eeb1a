//! Instances: microVMs, the only things with runtime state.

mod config;
mod state;

pub use config::InstanceDoc;
pub use state::{IllegalTransition, InstanceState, StateName, StopReason, Transition, TransitionStep, Verb};
