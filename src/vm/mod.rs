//! Tenants, pools and instances: their documents, and the one lifecycle that changes them.

pub mod instance;
pub mod pool;
pub mod sleep_policy;
pub mod tenant;
pub mod usage;
