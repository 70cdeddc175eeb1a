//! Takes a build's result from its drive, of which nothing is believed.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use mvm_guest_api::archive;

use crate::image::nix::{BuildError, FILES, Job, printable};

/// What the archive takes besides its files, in bytes: a header and a rest of a block for each, and its end.
const AROUND: u64 = 64 << 10;

/// The size of the drive for a result, in bytes.
pub(super) fn drive_size(job: &Job) -> u64 {
    (job.limits.disk_mib << 20).saturating_add(AROUND)
}

/// Writes the files of an image into a directory.
///
/// # Errors
/// When the drive holds anything but one archive of them, or the host cannot write.
pub fn take(drive: OwnedFd, into: &Path, job: &Job) -> Result<(), BuildError> {
    let reader = BufReader::with_capacity(1 << 20, File::from(drive));
    archive::unpack_files(reader, &FILES, job.limits.disk_mib << 20, into).map(drop).map_err(|error| match error.kind() {
        ErrorKind::InvalidData | ErrorKind::InvalidInput | ErrorKind::UnexpectedEof | ErrorKind::AlreadyExists | ErrorKind::Other => {
            BuildError::Output { attribute: job.attribute.clone(), file: "its result".into(), why: printable(&error.to_string()) }
        }
        // What is wrong with this host is not the build's doing.
        _ => BuildError::at(into)(error),
    })
}
