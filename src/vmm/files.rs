//! Files that VMMs are handed: logs, and what they open again as their own users.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fchmod, fstat, openat};

use super::VmmError;

/// Opens a log for appending, as a console needs it: for writing only, and readable for root only.
pub(super) fn append_to(path: &Path) -> io::Result<File> {
    let (parent, name) = parts(path)?;
    let directory = open_directory(parent)?;
    let file = open_plain_at(&directory, name, OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE)?;
    fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    Ok(file)
}

/// Opens a directory itself, and not what a link in its place leads to.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a regular file that has this name and no other, so that nothing else is read or changed through it: neither a link in its
/// place is followed nor one in its directory's, nor is a pipe waited for. One that is made is root's only.
pub(crate) fn open_plain(path: &Path, flags: OFlags) -> io::Result<File> {
    let (parent, name) = parts(path)?;
    open_plain_at(open_directory(parent)?, name, flags)
}

/// As [`open_plain`], in a directory that is open.
pub(super) fn open_plain_at(directory: impl AsFd, name: &str, flags: OFlags) -> io::Result<File> {
    let file = openat(directory, name, flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    let file = File::from(file);
    let meta = file.metadata()?;
    let wrong = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} {why}")));
    if !meta.is_file() {
        return wrong("is not a regular file".into());
    }
    if meta.nlink() != 1 {
        return wrong(format!("has {} names, and should have this one only", meta.nlink()));
    }
    Ok(file)
}

fn parts(path: &Path) -> io::Result<(&Path, &str)> {
    let name = path.file_name().and_then(|name| name.to_str());
    path.parent().zip(name).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it is the path of no file"))
}

/// Opens a socket in a directory that somebody else may write to, and only one that its owner made: what is returned names it whatever
/// happens to its name, and is connected to through `/proc/self/fd`.
pub(crate) fn open_socket(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags | OFlags::DIRECTORY, Mode::empty())?;
    let socket = openat(&directory, name, flags, Mode::empty())?;
    let (found, owner) = (fstat(&socket)?, fstat(&directory)?.st_uid);
    let wrong = |why: String| Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} {why}")));
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Socket if found.st_uid == owner && found.st_nlink == 1 => Ok(socket),
        FileType::Socket => {
            wrong(format!("is a socket of user {} with {} names, and not that of user {owner}", found.st_uid, found.st_nlink))
        }
        other => wrong(format!("is no socket, but {other:?}")),
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_file_that_has_this_name_and_no_other_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "content").unwrap();
        assert!(open_plain(&at("file"), OFlags::RDONLY).is_ok());
        symlink(at("file"), at("link")).unwrap();
        assert!(open_plain(&at("link"), OFlags::RDONLY).is_err());
        assert!(append_to(&at("link")).is_err());
        fs::hard_link(at("file"), at("second")).unwrap();
        assert!(open_plain(&at("second"), OFlags::RDONLY).unwrap_err().to_string().contains("2 names"));
        assert!(append_to(&at("second")).unwrap_err().to_string().contains("2 names"));
        fs::create_dir(at("dir")).unwrap();
        assert!(open_plain(&at("dir"), OFlags::RDONLY).unwrap_err().to_string().contains("not a regular file"));
        fs::write(at("dir/file"), "").unwrap();
        symlink(at("dir"), at("link to dir")).unwrap();
        assert!(open_plain(&at("link to dir/file"), OFlags::RDONLY).is_err());
        assert_eq!(fs::read_to_string(at("file")).unwrap(), "content");
    }

    #[test]
    fn only_its_owners_socket_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let _listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(open_socket(dir.path(), "socket").is_ok());
        fs::hard_link(dir.path().join("socket"), dir.path().join("second")).unwrap();
        assert!(open_socket(dir.path(), "second").unwrap_err().to_string().contains("with 2 names"));
        symlink("socket", dir.path().join("link")).unwrap();
        assert!(open_socket(dir.path(), "link").unwrap_err().to_string().contains("is no socket"));
        assert_eq!(open_socket(dir.path(), "none").unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
