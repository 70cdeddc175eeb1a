//! Directory handles: everything below one is reached by `openat2` without following a symbolic link or leaving it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{During, HostdError};

/// No symbolic link is followed, no magic link, and nothing leads out of the directory.
const BELOW: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// Symbolic links are followed, and lead nowhere outside the directory.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// An entry of a directory.
#[derive(Debug)]
pub enum Found {
    /// A regular file, open for reading.
    File(File),
    /// A symbolic link, and what it leads to.
    Link(std::ffi::OsString),
    /// A directory.
    Directory,
    /// Something else: a pipe, a device, a socket.
    Other,
}

/// An open directory, and the path it was opened by, for messages only.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens a directory that an administrator named; links in that path are the administrator's business.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, HostdError> {
        let path = path.into();
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("cannot open directory {}", path.display()))?;
        Ok(Self { fd, path })
    }

    /// Opens a directory that an administrator named, after making it and its parents where they are missing.
    pub fn ensure(path: impl Into<PathBuf>, mode: u32) -> Result<Self, HostdError> {
        let path = path.into();
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(mode).recursive(true).create(&path).during(|| format!("cannot make directory {}", path.display()))?;
        Self::open(path)
    }

    /// The path for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a directory below this one; `None` when it is not there.
    pub fn try_dir(&self, below: impl AsRef<Path>) -> Result<Option<Self>, HostdError> {
        let path = self.path.join(below.as_ref());
        match self.openat2(below.as_ref(), OFlags::RDONLY | OFlags::DIRECTORY, 0) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error).during(|| format!("cannot open directory {}", path.display())),
        }
    }

    /// Opens a directory below this one, after making it and those between where they are missing.
    pub fn ensure_dir(&self, below: impl AsRef<Path>, mode: u32) -> Result<Self, HostdError> {
        if let Some(found) = self.try_dir(below.as_ref())? {
            return Ok(found);
        }
        let mut at = self.reopen()?;
        for component in below.as_ref().components() {
            let Component::Normal(name) = component else {
                return Err(HostdError::refused(
                    format!("cannot make directory {}", self.path.join(below.as_ref()).display()),
                    "the path is not plain",
                ));
            };
            let path = at.path.join(name);
            match rustix::fs::mkdirat(&at.fd, name, Mode::from_bits_truncate(mode)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).during(|| format!("cannot make directory {}", path.display())),
            }
            let fd = at.openat2(Path::new(name), OFlags::RDONLY | OFlags::DIRECTORY, 0);
            at = Self { fd: fd.during(|| format!("cannot open directory {}", path.display()))?, path };
        }
        Ok(at)
    }

    fn reopen(&self) -> Result<Self, HostdError> {
        let fd = self.fd.try_clone().during(|| format!("cannot open directory {} again", self.path.display()))?;
        Ok(Self { fd, path: self.path.clone() })
    }

    fn openat2(&self, below: &Path, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
        loop {
            match rustix::fs::openat2(&self.fd, below, flags | OFlags::CLOEXEC, Mode::from_bits_truncate(mode), BELOW) {
                // A rename elsewhere raced with the resolution (openat2(2)).
                Err(Errno::AGAIN) => {}
                result => return result,
            }
        }
    }

    /// Opens a file below this directory; `flags` say how, `mode` is for one that is made.
    pub fn open_file(&self, below: impl AsRef<Path>, flags: OFlags, mode: u32) -> Result<File, HostdError> {
        let fd = self.openat2(below.as_ref(), flags | OFlags::NOFOLLOW, mode);
        Ok(fd.during(|| format!("cannot open {}", self.path.join(below.as_ref()).display()))?.into())
    }

    /// Reads a file; `None` when it is not there.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, HostdError> {
        let what = || format!("cannot read {}", self.path.join(name).display());
        let mut file: File = match self.openat2(Path::new(name), OFlags::RDONLY, 0) {
            Ok(fd) => fd.into(),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error).during(what),
        };
        let mut content = Vec::new();
        file.read_to_end(&mut content).during(what)?;
        Ok(Some(content))
    }

    /// Opens a regular file of somebody else's directory for reading, through links of his that stay inside it; `None` when it is not
    /// there. Nothing that is no regular file is waited for.
    ///
    /// # Errors
    /// When a link leads out of the directory, or it is no regular file.
    pub fn open_inside(&self, below: impl AsRef<Path>) -> Result<Option<File>, HostdError> {
        let what = || format!("cannot open {}", self.path.join(below.as_ref()).display());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = loop {
            match rustix::fs::openat2(&self.fd, below.as_ref(), flags, Mode::empty(), INSIDE) {
                Err(Errno::AGAIN) => {}
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::XDEV) => return Err(HostdError::refused(what(), "a link leads out of the directory")),
                result => break result.during(what)?,
            }
        };
        let stat = rustix::fs::fstat(&fd).during(what)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(HostdError::refused(what(), "it is no regular file"));
        }
        Ok(Some(fd.into()))
    }

    /// Opens an entry of somebody else's directory as it is at this moment, without following a link; `None` when it is not there.
    /// Nothing that is no regular file is opened or waited for.
    ///
    /// # Errors
    /// When a link lies on the way to it.
    pub fn find(&self, below: impl AsRef<Path>) -> Result<Option<Found>, HostdError> {
        let what = || format!("cannot open {}", self.path.join(below.as_ref()).display());
        let place = match self.openat2(below.as_ref(), OFlags::PATH | OFlags::NOFOLLOW, 0) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            result => result.during(what)?,
        };
        let kind = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode)).during(what);
        match kind(&place)? {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(&place, "", Vec::new()).during(what)?;
                Ok(Some(Found::Link(OsStr::from_bytes(target.as_bytes()).to_owned())))
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
                let file = self.openat2(below.as_ref(), flags, 0).during(what)?;
                match kind(&file)? {
                    FileType::RegularFile => Ok(Some(Found::File(file.into()))),
                    _ => Err(HostdError::refused(what(), "it changes while it is looked at")),
                }
            }
            FileType::Directory => Ok(Some(Found::Directory)),
            _ => Ok(Some(Found::Other)),
        }
    }

    /// Makes a symbolic link in a directory below this one, which is there or is made.
    ///
    /// # Errors
    /// When something of that name is there, or a link lies on the way to it.
    pub fn make_link(&self, below: impl AsRef<Path>, target: &OsStr) -> Result<(), HostdError> {
        let below = below.as_ref();
        let what = || format!("cannot make {}", self.path.join(below).display());
        let name = below.file_name().ok_or_else(|| HostdError::refused(what(), "it has no name"))?;
        let parent = match below.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.ensure_dir(parent, 0o755)?,
            _ => self.reopen()?,
        };
        rustix::fs::symlinkat(target, &parent.fd, name).during(what)
    }

    /// Replaces a file at once: readers see the old or the new one whole. Not synced: for the run directory.
    pub fn write(&self, name: &str, content: &[u8], mode: u32) -> Result<(), HostdError> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let temporary = format!(".{name}.{}.{}", std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
        let mut file = self.open_file(&temporary, OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC, mode)?;
        file.write_all(content).during(|| format!("cannot write {}", self.path.join(&temporary).display()))?;
        self.rename(&temporary, name)
    }

    /// Removes the temporary files that [`Dir::write`] left when it was killed; returns their names.
    pub fn remove_stale_temporaries(&self) -> Result<Vec<String>, HostdError> {
        let mut removed = Vec::new();
        for name in self.entries()? {
            let Some(name) = name.to_str().filter(|name| name.starts_with('.')) else { continue };
            let mut parts = name.rsplit('.');
            let (Some(count), Some(pid)) = (parts.next(), parts.next()) else { continue };
            let ours = count.parse::<u64>().is_ok() && pid.parse::<u32>().is_ok();
            if ours && !Path::new("/proc").join(pid).exists() {
                self.remove_file(name)?;
                removed.push(name.to_owned());
            }
        }
        Ok(removed)
    }

    /// Renames within this directory, replacing what has the new name.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), HostdError> {
        rustix::fs::renameat(&self.fd, from, &self.fd, to).during(|| format!("cannot rename {from} to {to} in {}", self.path.display()))
    }

    /// Makes renames and removals in this directory durable.
    pub fn sync(&self) -> Result<(), HostdError> {
        rustix::fs::fsync(&self.fd).during(|| format!("cannot sync directory {}", self.path.display()))
    }

    /// Removes a file; one that is not there is removed already.
    pub fn remove_file(&self, name: &str) -> Result<(), HostdError> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error).during(|| format!("cannot remove {}", self.path.join(name).display())),
        }
    }

    /// Lists the names in this directory.
    pub fn entries(&self) -> Result<Vec<std::ffi::OsString>, HostdError> {
        let what = || format!("cannot list {}", self.path.display());
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd).during(what)? {
            let entry = entry.during(what)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        Ok(names)
    }

    /// Removes a file, or a directory with everything in it, without following links. Returns whether there was one.
    pub fn remove_tree(&self, name: impl AsRef<OsStr>) -> Result<bool, HostdError> {
        let name = name.as_ref();
        let what = || format!("cannot remove {}", self.path.join(name).display());
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => return Ok(true),
            Err(Errno::NOENT) => return Ok(false),
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error).during(what),
        }
        let Some(inner) = self.try_dir(Path::new(name))? else { return Ok(false) };
        for entry in inner.entries()? {
            inner.remove_tree(entry)?;
        }
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(error) => Err(error).during(what),
        }
    }

    /// Whether an entry is there, of whatever kind.
    pub fn kind_of(&self, name: impl AsRef<OsStr>) -> Result<Option<FileType>, HostdError> {
        match rustix::fs::statat(&self.fd, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error).during(|| format!("cannot look at {}", self.path.join(name.as_ref()).display())),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out_of_a_directory() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("precious"), b"x").unwrap();
        let inside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("precious"), inside.path().join("file")).unwrap();
        let dir = Dir::open(inside.path()).unwrap();
        assert!(dir.try_dir("link").is_err());
        assert!(dir.try_dir("../").is_err());
        assert!(dir.ensure_dir("link/new", 0o700).is_err());
        assert!(dir.ensure_dir("a/../../b", 0o700).is_err());
        assert!(dir.open_file("link/precious", OFlags::RDONLY, 0).is_err());
        assert!(dir.open_file("file", OFlags::WRONLY | OFlags::CREATE, 0o600).is_err());
        assert!(dir.read("file").is_err());
        assert!(dir.remove_tree("link").unwrap());
        assert!(dir.remove_tree("file").unwrap());
        assert_eq!(std::fs::read(outside.path().join("precious")).unwrap(), b"x");
    }

    #[test]
    fn links_of_somebody_else_are_followed_inside_only() {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("inner")).unwrap();
        std::fs::write(top.path().join("inner/file"), b"x").unwrap();
        std::os::unix::fs::symlink("inner/file", top.path().join("inside")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", top.path().join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../etc/hostname", top.path().join("inner/up")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, top.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let dir = Dir::open(top.path()).unwrap();
        assert!(dir.open_inside("inner/file").unwrap().is_some());
        assert!(dir.open_inside("inside").unwrap().is_some());
        assert!(dir.open_inside("absent").unwrap().is_none());
        for bad in ["absolute", "inner/up", "fifo", "inner", "../x"] {
            assert!(dir.open_inside(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn entries_of_somebody_else_are_what_they_are_and_links_on_the_way_are_refused() {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("inner")).unwrap();
        std::fs::write(top.path().join("inner/file"), b"x").unwrap();
        std::os::unix::fs::symlink("inner", top.path().join("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, top.path().join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let dir = Dir::open(top.path()).unwrap();
        assert!(matches!(dir.find("inner/file").unwrap(), Some(Found::File(_))));
        assert!(matches!(dir.find("link").unwrap(), Some(Found::Link(target)) if target == "inner"));
        assert!(matches!(dir.find("inner").unwrap(), Some(Found::Directory)));
        assert!(matches!(dir.find("fifo").unwrap(), Some(Found::Other)));
        assert!(dir.find("absent").unwrap().is_none() && dir.find("inner/file/x").unwrap().is_none());
        for bad in ["link/file", "../x", "/etc/hostname"] {
            assert!(dir.find(bad).is_err(), "{bad}");
        }
        dir.make_link("new/link", OsStr::new("../inner")).unwrap();
        assert!(matches!(dir.find("new/link").unwrap(), Some(Found::Link(_))));
        for bad in ["new/link", "link/new", "..", "../x"] {
            assert!(dir.make_link(bad, OsStr::new("x")).is_err(), "{bad}");
        }
    }

    #[test]
    fn trees_are_removed_whole_and_twice() {
        let top = tempfile::tempdir().unwrap();
        let dir = Dir::open(top.path()).unwrap();
        let deep = dir.ensure_dir("a/b/c", 0o700).unwrap();
        deep.write("file", b"1", 0o600).unwrap();
        assert_eq!(deep.read("file").unwrap().unwrap(), b"1");
        assert_eq!(deep.entries().unwrap(), ["file"]);
        std::fs::write(top.path().join(format!(".file.{}.0", std::process::id())), b"").unwrap();
        std::fs::write(top.path().join(".file.4294967295.0"), b"").unwrap();
        assert_eq!(dir.remove_stale_temporaries().unwrap(), [".file.4294967295.0"]);
        assert!(dir.remove_tree("a").unwrap());
        assert!(!dir.remove_tree("a").unwrap());
        assert_eq!(dir.kind_of("a").unwrap(), None);
    }
}
