//! Small parts that know nothing of microVMs: paths, clocks, process identities.

pub mod clock;
pub mod display;
pub mod failure;
pub mod kill_switch;
pub mod logging;
pub mod paths;
pub mod process;
