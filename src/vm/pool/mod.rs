//! Pools: one homogeneous workload of a tenant.

mod build;
mod config;
mod lifecycle;
pub mod nix_manifest;
mod revision;
pub mod role;

pub use crate::image::nix::{BuildWatch, Limits, check_reference};
pub use build::{BuildRequest, Image, ImageError, ImageSource, NodeImages, SYSTEM, SimulatedImages, StoredImage};
pub use config::{
    BUILTIN, Blueprint, DesiredCounts, Exposure, InstanceResources, PoolDoc, PoolSpec, RestartPolicy, RuntimePolicy, Workload,
};
pub use lifecycle::{BuildOptions, BuilderChoice, Quiet};
pub use revision::{Difference, LastBuild, Origin, OriginFile, RevisionDoc, closure_hash, differences};
