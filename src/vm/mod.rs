//! Tenants, pools and instances: their documents, and the one lifecycle that changes them.

pub mod collect;
pub mod error;
pub mod instance;
pub mod keys;
mod ledger;
pub mod node;
pub mod pool;
pub mod sleep_policy;
pub mod tenant;
pub mod throwaway;
pub mod usage;
