//! Drives: data disks below the state directory, small read-only drives that exist only in memory, and drives without a name for
//! machines that are thrown away.

mod data;
mod image;
mod nameless;

pub use data::{ensure_data_disk, open_data_disk};
pub use image::{DRIVE_BYTES, ImageError, ImageFile, build_image};
pub use nameless::{nameless, nameless_ext4, path_of, read_only};

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

use crate::error::{During, HostdError};

/// Builds a small read-only ext4 drive in memory and opens it for reading.
///
/// It has no name anywhere: it is gone with its last descriptor, and a killed process leaves nothing. Its size is always
/// [`DRIVE_BYTES`], since a guest that wakes must find the drive as large as it was. The image is sealed: nobody can change
/// it any more.
///
/// `time` is the files' time, in seconds since 1970.
///
/// Errors when the files do not fit, naming their size.
pub fn build_drive(label: &str, files: &[ImageFile<'_>], time: u32) -> Result<OwnedFd, HostdError> {
    let image =
        build_image(label, files, time).map_err(|error| HostdError::refused(format!("cannot build drive {label}"), error.to_string()))?;
    let what = || format!("cannot make drive {label} in memory");
    let memory = rustix::fs::memfd_create(label, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).during(what)?;
    let mut file = std::fs::File::from(memory);
    // The rest reads as zero.
    file.set_len(DRIVE_BYTES).during(what)?;
    file.write_all(&image).during(what)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).during(what)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during(what)
}
