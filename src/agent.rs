//! The node agent: observe, plan, execute.

pub mod desired;
pub mod order;
