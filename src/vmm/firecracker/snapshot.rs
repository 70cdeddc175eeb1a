//! Snapshot files: taken out of a directory that Firecracker may write to, and brought up to date.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, Gid, Mode, OFlags, SeekFrom, Uid, renameat, seek, unlinkat};
use rustix::io::Errno;

use crate::vmm::files::{open_directory, open_plain_at};

/// A directory that is somebody else's to write to, through which nothing else is reached.
pub(super) struct Scratch(OwnedFd);

impl Scratch {
    /// Opens it, itself and not what a link in its place leads to.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        open_directory(path).map(Self)
    }

    /// Makes it for a user, with nothing in it; its parent is root's only.
    pub(super) fn make(path: &Path, uid: u32) -> io::Result<Self> {
        // Anew each time: who had it before may have put more than files there, a default ACL say.
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        rustix::fs::mkdir(path, Mode::RWXU)?;
        let made = Self::open(path)?;
        rustix::fs::fchown(&made.0, Some(Uid::from_raw(uid)), Some(Gid::from_raw(uid)))?;
        Ok(made)
    }

    /// Its descriptor.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Removes a name, whatever it is of.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.0, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Opens a file that was written there, for reading: a regular one with one name, of its writer, and of a plausible length.
    pub(super) fn take(&self, name: &str, uid: u32, length: std::ops::RangeInclusive<u64>) -> io::Result<File> {
        let file = open_plain_at(&self.0, name, OFlags::RDONLY)?;
        let meta = file.metadata()?;
        let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{name} {why}"));
        if meta.uid() != uid {
            return Err(wrong(format!("belongs to user {}, not {uid}", meta.uid())));
        }
        if !length.contains(&meta.len()) {
            return Err(wrong(format!("has {} bytes, and between {} and {} are expected", meta.len(), length.start(), length.end())));
        }
        Ok(file)
    }

    /// Moves a file into another directory, where it is root's and may be read by its writer, and makes sure that it is the one that was
    /// looked at.
    pub(super) fn hand_over(&self, name: &str, file: &File, into: &Path, as_name: &str, uid: u32) -> io::Result<()> {
        let target = Self::open(into)?;
        guard(file, uid)?;
        renameat(&self.0, name, &target.0, as_name)?;
        let (moved, looked_at) = (fs::symlink_metadata(into.join(as_name))?, file.metadata()?);
        if (moved.dev(), moved.ino()) != (looked_at.dev(), looked_at.ino()) {
            unlinkat(&target.0, as_name, AtFlags::empty())?;
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{name} was replaced while it was taken")));
        }
        file.sync_all()?;
        Ok(rustix::fs::fsync(&target.0)?)
    }
}

/// The list of who else may do what with a file, which overrules its group (acl(5)).
const ACCESS_ACL: &CStr = c"system.posix_acl_access";

/// Makes a file root's, for the user to read only.
pub(super) fn guard(file: &File, uid: u32) -> io::Result<()> {
    match rustix::fs::fremovexattr(file, ACCESS_ACL) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    rustix::fs::fchown(file, Some(Uid::ROOT), Some(Gid::from_raw(uid)))?;
    Ok(rustix::fs::fchmod(file, Mode::RUSR | Mode::WUSR | Mode::RGRP)?)
}

/// Copies what is data in a sparse file over the same places of another one, durably; returns how many bytes that was.
///
/// This is how Firecracker's own `snapshot-editor` puts a diff snapshot onto its base.
pub(super) fn merge(diff: &File, base: &File) -> io::Result<u64> {
    let length = diff.metadata()?.len();
    if base.metadata()?.len() != length {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the memory that changed and the memory before it differ in length"));
    }
    let mut buffer = vec![0; 1 << 20];
    let (mut at, mut copied) = (0, 0);
    while at < length {
        let begin = match seek(diff, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(diff, SeekFrom::Hole(begin))?.min(length);
        at = begin;
        while at < end {
            let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            diff.read_exact_at(&mut buffer[..part], at)?;
            base.write_all_at(&buffer[..part], at)?;
            at += part as u64;
            copied += part as u64;
        }
    }
    base.sync_all()?;
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_what_changed_is_merged() {
        let file = || tempfile::tempfile().unwrap();
        let (diff, base) = (file(), file());
        const LENGTH: u64 = 3 << 20;
        base.write_all_at(&vec![1; LENGTH as usize], 0).unwrap();
        diff.set_len(LENGTH).unwrap();
        diff.write_all_at(&[2; 4096], 4096).unwrap();
        diff.write_all_at(&[0; 4096], 2 << 20).unwrap();
        let copied = merge(&diff, &base).unwrap();
        assert!((8192..LENGTH).contains(&copied), "{copied}");
        let mut found = vec![0; LENGTH as usize];
        base.read_exact_at(&mut found, 0).unwrap();
        assert!(found[4096..8192].iter().all(|byte| *byte == 2));
        assert!(found[2 << 20..(2 << 20) + 4096].iter().all(|byte| *byte == 0), "zeros that were written are data");
        assert!(found[..4096].iter().chain(&found[1 << 20..2 << 20]).all(|byte| *byte == 1));
        diff.set_len(LENGTH + 1).unwrap();
        assert!(merge(&diff, &base).is_err());
    }

    #[test]
    fn a_directory_is_made_anew_whatever_is_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch");
        let uid = rustix::process::geteuid().as_raw();
        let make = || {
            let made = Scratch::make(&path, uid).unwrap();
            let meta = fs::symlink_metadata(&path).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o700, uid, uid));
            assert!(meta.is_dir() && fs::read_dir(&path).unwrap().next().is_none());
            assert_eq!(rustix::fs::fgetxattr(&made.0, DEFAULT_ACL, &mut [0_u8; 0]), Err(Errno::NODATA));
            made
        };
        let first = make();
        rustix::fs::fsetxattr(&first.0, DEFAULT_ACL, &acl(0, 7), rustix::fs::XattrFlags::empty()).unwrap();
        make();
        fs::create_dir_all(path.join(".hidden/deep")).unwrap();
        make();
        fs::remove_dir(&path).unwrap();
        symlink("/", &path).unwrap();
        make();
        fs::remove_dir(&path).unwrap();
        fs::write(&path, "no directory").unwrap();
        assert!(Scratch::make(&path, uid).is_err());
    }

    const DEFAULT_ACL: &CStr = c"system.posix_acl_default";

    /// An access control list (linux/posix_acl_xattr.h) that gives nothing to owner and group, and this to a user.
    fn acl(user: u32, permissions: u16) -> Vec<u8> {
        const NOBODY: u32 = u32::MAX;
        let mut list = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in [(1_u16, 0, NOBODY), (2, permissions, user), (4, 0, NOBODY), (16, 7, NOBODY), (32, 0, NOBODY)] {
            list.extend([&tag.to_le_bytes()[..], &permissions.to_le_bytes()[..], &id.to_le_bytes()[..]].concat());
        }
        list
    }

    #[test]
    fn a_guarded_file_is_its_readers_whatever_list_it_was_given() {
        let dir = tempfile::tempdir().unwrap();
        let (path, uid) = (dir.path().join("scratch"), rustix::process::geteuid().as_raw());
        let scratch = Scratch::make(&path, uid).unwrap();
        rustix::fs::fsetxattr(&scratch.0, DEFAULT_ACL, &acl(1000, 7), rustix::fs::XattrFlags::empty()).unwrap();
        let file = File::create(path.join("state")).unwrap();
        assert!(rustix::fs::fgetxattr(&file, ACCESS_ACL, &mut [0_u8; 0]).is_ok(), "it has the directory's");
        for _ in 0..2 {
            guard(&file, uid).unwrap();
            assert_eq!(rustix::fs::fgetxattr(&file, ACCESS_ACL, &mut [0_u8; 0]), Err(Errno::NODATA));
            assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o640);
        }
    }

    #[test]
    fn nothing_planted_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch");
        let uid = rustix::process::geteuid().as_raw();
        let scratch = Scratch::make(&path, uid).unwrap();
        let refused = |name: &str| scratch.take(name, uid, 0..=10).unwrap_err().to_string();
        fs::write(dir.path().join("secret"), "secret").unwrap();
        symlink(dir.path().join("secret"), path.join("link")).unwrap();
        assert!(scratch.take("link", uid, 0..=10).is_err());
        fs::hard_link(dir.path().join("secret"), path.join("second")).unwrap();
        assert!(refused("second").contains("has 2 names"), "{}", refused("second"));
        rustix::fs::mknodat(rustix::fs::CWD, path.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refused("pipe").contains("not a regular file"));
        fs::write(path.join("long"), "more than ten bytes").unwrap();
        assert!(refused("long").contains("19 bytes"));
        fs::write(path.join("other"), "x").unwrap();
        assert!(scratch.take("other", uid + 1, 0..=10).unwrap_err().to_string().contains("belongs to user"));
        // What was looked at is what is moved, or nothing is.
        fs::write(path.join("state"), "right").unwrap();
        let file = scratch.take("state", uid, 0..=10).unwrap();
        fs::rename(path.join("other"), path.join("state")).unwrap();
        let into = dir.path().join("into");
        fs::create_dir(&into).unwrap();
        assert!(scratch.hand_over("state", &file, &into, "state", uid).unwrap_err().to_string().contains("was replaced"));
        assert_eq!(fs::read_dir(&into).unwrap().count(), 0);
        // A link in its own place is not followed either.
        symlink(&into, dir.path().join("elsewhere")).unwrap();
        assert!(Scratch::open(&dir.path().join("elsewhere")).is_err());
    }
}
