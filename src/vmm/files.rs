//! Files that VMMs are handed: logs, and what they open again as their own users.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};

use super::VmmError;

/// Opens a log for appending, as a console needs it: for writing only, and readable for root only.
pub(super) fn append_to(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    Ok(file)
}

/// Opens a log, naming it when that fails.
pub(super) fn open_log(path: &Path) -> Result<File, VmmError> {
    append_to(path).map_err(|source| VmmError::Io { what: format!("cannot open {}", path.display()), source })
}

/// Opens a file that the VMM opens again as its own user, who must be allowed to read it.
pub(super) fn open_for_vmm(path: &Path, uid: Option<u32>) -> Result<File, VmmError> {
    let failed = |source| VmmError::Io { what: format!("cannot open {}", path.display()), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    if uid.is_some() && mode & 0o004 == 0 {
        return Err(VmmError::Failed {
            what: "cannot start the VMM",
            why: format!("{} has mode {:o}, and the machine's own user has to read it: chmod o+r", path.display(), mode & 0o777),
        });
    }
    Ok(file)
}

/// Finds an executable in `PATH`.
pub(super) fn find_in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_absolute() && fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0))
}
