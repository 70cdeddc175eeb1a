//! Small parts that know nothing of microVMs: paths, clocks, process identities.

pub mod clock;
pub mod failure;
pub mod paths;
pub mod process;
