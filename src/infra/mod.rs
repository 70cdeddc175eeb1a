//! Small parts that know nothing of microVMs: paths, clocks, process identities.

pub mod clock;
pub mod failure;
pub mod kill_switch;
pub mod paths;
pub mod process;
