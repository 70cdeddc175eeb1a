//! Ids, names, units and roles: the words that every part of mvm shares.
//!
//! Nothing here does IO. A value of one of these types has been parsed once and cannot be wrong
//! afterwards: a [`TenantId`] is safe in a path, in a log line and on a command line.

#![forbid(unsafe_code)]

mod address;
mod id;
mod nearest;
mod role;

pub use address::{Address, AddressError, InstanceAddress, InstanceSelector, PoolAddress};
pub use id::{IdError, InstanceId, NodeId, PoolId, ProfileName, RevisionId, SecretName, TenantId};
pub use nearest::nearest;
pub use role::{Role, RoleError};
