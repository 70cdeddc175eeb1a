//! Tests with the real kernel; they need root and clean up after themselves.

mod guest;
mod image;
mod network;
mod qemu;
mod wire;
