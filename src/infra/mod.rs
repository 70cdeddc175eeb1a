//! Small parts that know nothing of microVMs: paths, clocks, process identities.

pub mod clock;
pub mod paths;
pub mod process;
