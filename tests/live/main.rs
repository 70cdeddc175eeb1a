//! Tests with the real kernel; they need root and clean up after themselves.

mod builder;
mod crash;
mod drivers;
mod firecracker;
mod fleet;
mod full_disk;
mod groups;
mod guest;
mod image;
mod isolation;
mod jail;
mod namespaces;
mod network;
mod nix;
mod qemu;
mod rates;
mod rig;
mod roles;
mod secrets;
mod sleep;
mod throwaway;
mod together;
mod vmm;
mod wire;
