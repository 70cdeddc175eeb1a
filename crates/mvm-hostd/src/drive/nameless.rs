//! Drives of machines that leave nothing: files without a name, which are gone with their last descriptor, however that comes about.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::data::format;
use crate::error::{During, HostdError};

/// Makes a sparse file without a name on the file system of a directory; `size` is in bytes.
///
/// # Errors
/// When there is no room for it, or the directory cannot be written to.
pub fn nameless(dir: &Path, size: u64) -> Result<OwnedFd, HostdError> {
    let what = || format!("cannot make a drive of {} MiB in {}", size >> 20, dir.display());
    // By O_TMPFILE; where that is missing it is made with a name that goes at once.
    let file = tempfile::tempfile_in(dir).during(what)?;
    file.set_len(size).during(what)?;
    Ok(file.into())
}

/// As [`nameless`], with an empty ext4 of that label.
///
/// # Errors
/// As [`nameless`], and when `mke2fs` fails.
pub fn nameless_ext4(dir: &Path, size: u64, label: &str) -> Result<OwnedFd, HostdError> {
    let file = File::from(nameless(dir, size)?);
    format(&file, label)?;
    Ok(file.into())
}

/// The path by which another program of root reaches an open file of this process.
pub fn path_of(file: &impl AsRawFd) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

/// Opens an open file once more, for reading only: whoever gets that descriptor cannot write.
///
/// # Errors
/// When the kernel refuses.
pub fn read_only(file: &impl AsRawFd) -> Result<OwnedFd, HostdError> {
    rustix::fs::open(path_of(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during(|| "cannot open a drive for reading".into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_nameless_drive_is_sparse_formatted_and_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let drive = nameless_ext4(dir.path(), 64 << 20, "mvm-work").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let reader = File::from(read_only(&drive).unwrap());
        let mut label = [0; 8];
        reader.read_exact_at(&mut label, 1024 + 120).unwrap();
        assert_eq!((&label, reader.metadata().unwrap().len()), (b"mvm-work", 64 << 20));
        assert!(reader.write_at(b"x", 0).is_err());
        let missing = nameless(&dir.path().join("no"), 1 << 20).unwrap_err();
        assert!(missing.to_string().starts_with("cannot make a drive of 1 MiB in "), "{missing}");
    }
}
