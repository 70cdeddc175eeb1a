//! Tenants: the boundary of security, quota and network.

mod config;

pub use config::{NetworkSpec, Quotas, TenantDoc};
