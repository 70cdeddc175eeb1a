//! Tenants: the boundary of security, quota and network.

mod config;
mod lifecycle;
mod sealing;
mod secrets;

pub use config::{NetworkSpec, Quotas, Remains, TenantDoc};
pub use lifecycle::reserved;
pub use sealing::NodeSealer;
pub use secrets::{MAX_SECRET, MAX_SECRETS, SealedSecret, SecretChange, SecretsDoc, unsealed};
