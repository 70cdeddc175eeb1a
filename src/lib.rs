//! mvm runs fleets of microVMs for many tenants from a declared state.
//!
//! ```text
//!  desired state (file) --parse, validate--> Desired
//!                                               |
//!  documents, VMMs, /proc, host --observe--> Observed
//!                                               |
//!                              plan(Desired, Observed, now, capacity) -> Plan     PURE
//!                                               |
//!                                         execute(Plan) -> Outcomes
//! ```

pub mod agent;
pub mod audit;
pub mod cli;
pub mod guest;
pub mod host;
pub mod image;
pub mod infra;
pub mod net;
pub mod store;
pub mod vm;
pub mod vmm;
