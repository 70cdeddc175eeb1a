//! How an image comes to be.
//!
//! [`builtin`] is the embedded default: a distribution's kernel, unpacked and not installed, the guest agent as
//! PID 1, and busybox. [`builder`] is the same with another root file system, on which there is nix.
//!
//! ```text
//!  package (apt, dpkg) -> kernel (ELF out of the bzImage)  -> vmlinux
//!                      -> modules (in order) + agent       -> initrd          } revision, named by what went in
//!  busybox, tree                          -> mke2fs -d     -> rootfs.ext4
//! ```

mod agent_binary;
pub mod builder;
pub mod builtin;
mod error;
pub mod initramfs;
pub mod kernel;
mod manifest;
mod modules;
pub mod nix;
mod package;
mod rootfs;

pub use agent_binary::{AGENT_VARIABLE, find_agent};
pub use error::ImageError;
pub use manifest::{FileEntry, Image, Inputs, MANIFEST, Manifest};
pub use rootfs::make_drive;
