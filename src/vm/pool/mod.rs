//! Pools: one homogeneous workload of a tenant.

mod build;
mod config;
mod lifecycle;
pub mod nix_manifest;
pub mod role;

pub use build::{BuiltinImages, Image, ImageError, ImageSource, SimulatedImages};
pub use config::{
    BUILTIN, Blueprint, DesiredCounts, Exposure, InstanceResources, PoolDoc, PoolSpec, RestartPolicy, RuntimePolicy, Workload,
};
