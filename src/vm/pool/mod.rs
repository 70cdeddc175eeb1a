//! Pools: one homogeneous workload of a tenant.

mod config;

pub use config::{BUILTIN, Blueprint, DesiredCounts, InstanceResources, PoolDoc, PoolSpec, RestartPolicy, RuntimePolicy, Workload};
