//! The node agent: observe, plan, execute.

pub mod desired;
pub mod execute;
pub mod observe;
pub mod order;
pub mod plan;
pub mod reconciler;
pub mod roles;

pub use crate::vm::pool::role::role_priority;
