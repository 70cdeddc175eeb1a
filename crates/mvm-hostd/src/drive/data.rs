//! Data disks: sparse files with an ext4 labelled `mvm-data`.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use rustix::fs::OFlags;

use crate::dir::Dir;
use crate::error::{During, HostdError};
use crate::program;

/// Makes the data disk, or grows it; never formats one that is there.
///
/// `size` is in bytes. A disk appears under its name only when it is formatted and on the disk. Growing only lengthens the
/// file: the guest grows the file system in it. Returns whether a new one was made.
///
/// Errors when it would have to shrink, which would cut off data.
pub fn ensure_data_disk(volumes: &Dir, name: &str, label: &str, size: u64) -> Result<bool, HostdError> {
    let path = volumes.path().join(name);
    if volumes.kind_of(name)?.is_some() {
        let disk: File = open_data_disk(volumes, name)?.into();
        let length = disk.metadata().during(|| format!("cannot look at {}", path.display()))?.len();
        if length > size {
            return Err(HostdError::refused(
                format!("cannot resize data disk {}", path.display()),
                format!("it has {} MiB and cannot shrink to {} MiB; ask for at least what it has", length >> 20, size >> 20),
            ));
        }
        if length < size {
            disk.set_len(size).during(|| format!("cannot grow {} to {} MiB", path.display(), size >> 20))?;
            disk.sync_all().during(|| format!("cannot sync {}", path.display()))?;
        }
        return Ok(false);
    }
    // Always the same name, so that a killed process's half-made disk is overwritten by the next one's.
    let temporary = format!(".{name}.new");
    volumes.remove_file(&temporary)?;
    let disk = volumes.open_file(&temporary, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL, 0o600)?;
    disk.set_len(size).during(|| format!("cannot make {} of {} MiB", path.display(), size >> 20))?;
    format(&disk, label)?;
    disk.sync_all().during(|| format!("cannot sync {}", path.display()))?;
    volumes.rename(&temporary, name)?;
    volumes.sync()?;
    Ok(true)
}

/// Opens a data disk for reading and writing.
pub fn open_data_disk(volumes: &Dir, name: &str) -> Result<OwnedFd, HostdError> {
    let what = || format!("cannot open data disk {}", volumes.path().join(name).display());
    let disk = volumes.open_file(name, OFlags::RDWR | OFlags::NONBLOCK, 0)?;
    let meta = disk.metadata().during(what)?;
    if !meta.is_file() {
        return Err(HostdError::refused(what(), "it is not a regular file"));
    }
    // It is handed to its machine, and whatever else it were with it.
    if meta.nlink() != 1 {
        return Err(HostdError::refused(what(), format!("it has {} names; copy it instead of linking to it", meta.nlink())));
    }
    Ok(disk.into())
}

/// Makes an ext4 with a journal, no blocks reserved for root, and the zeroing of tables left to the guest's kernel.
pub(super) fn format(disk: &File, label: &str) -> Result<(), HostdError> {
    let mut command = Command::new(program::find("mke2fs", "e2fsprogs")?);
    command.args(["-F", "-q", "-t", "ext4", "-m", "0", "-L", label]);
    command.args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"]);
    // By descriptor, so that what is formatted is what was opened.
    command.arg(format!("/proc/{}/fd/{}", std::process::id(), disk.as_raw_fd()));
    program::run(command, "format a data disk with mke2fs", b"").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_disk_is_made_once_grows_and_does_not_shrink() {
        let top = tempfile::tempdir().unwrap();
        let volumes = Dir::open(top.path()).unwrap();
        let path = top.path().join("data.img");
        // What a killed process left behind.
        std::fs::write(top.path().join(".data.img.new"), b"half").unwrap();
        assert!(ensure_data_disk(&volumes, "data.img", "mvm-data", 64 << 20).unwrap());
        let made = std::fs::read(&path).unwrap();
        assert_eq!(&made[1024 + 120..1024 + 128], b"mvm-data");
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 8 << 20, "it is sparse");
        assert!(!ensure_data_disk(&volumes, "data.img", "mvm-data", 64 << 20).unwrap());
        assert!(!ensure_data_disk(&volumes, "data.img", "mvm-data", 80 << 20).unwrap());
        let grown = std::fs::read(&path).unwrap();
        assert_eq!(grown.len(), 80 << 20);
        assert!(grown.starts_with(&made), "growing changes nothing of what is there");
        let error = ensure_data_disk(&volumes, "data.img", "mvm-data", 64 << 20).unwrap_err();
        assert!(error.to_string().ends_with("it has 80 MiB and cannot shrink to 64 MiB; ask for at least what it has"), "{error}");
        assert_eq!(volumes.entries().unwrap(), ["data.img"]);
        open_data_disk(&volumes, "data.img").unwrap();
    }
}
