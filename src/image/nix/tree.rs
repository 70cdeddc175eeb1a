//! A flake's sources as they are written into a directory of ours, whoever named them and whatever is in their place by now.
//!
//! Guarantees: nothing is written outside of the directory, also not through links that the sources themselves hold; nothing is written
//! twice; of files there are at most so many bytes.

use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use mvm_hostd::dir::{Dir, Found};
use rustix::fs::OFlags;

use super::{BuildError, BuildWatch};

/// How much is copied between two looks whether the build is still wanted.
const PIECE: usize = 1 << 20;

/// A tree that is written.
pub(super) struct Tree<'a> {
    dir: Dir,
    most_mib: u64,
    left: u64,
    links: Vec<(PathBuf, OsString)>,
    attribute: &'a str,
    watch: &'a dyn BuildWatch,
}

/// Why a tree could not be written.
#[derive(Debug)]
pub(super) enum Trouble {
    /// What is wrong with the sources.
    Sources(String),
    /// Somebody ended it.
    Ended(BuildError),
}

impl Trouble {
    /// The error of a build of this flake.
    pub fn of(self, flake_ref: &str) -> BuildError {
        match self {
            Trouble::Sources(why) => BuildError::Unreachable { flake_ref: flake_ref.to_owned(), why },
            Trouble::Ended(error) => error,
        }
    }
}

impl From<mvm_hostd::HostdError> for Trouble {
    fn from(error: mvm_hostd::HostdError) -> Self {
        let mut why = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(inner) = source {
            why.push_str(&format!(": {inner}"));
            source = inner.source();
        }
        Trouble::Sources(why)
    }
}

impl<'a> Tree<'a> {
    /// Makes the directory.
    pub fn make(path: &Path, most_mib: u64, attribute: &'a str, watch: &'a dyn BuildWatch) -> Result<Self, Trouble> {
        let failed = |error: io::Error| Trouble::Sources(format!("{}: {error}", path.display()));
        DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(failed)?;
        Ok(Self { dir: Dir::open(path)?, most_mib, left: most_mib << 20, links: Vec::new(), attribute, watch })
    }

    /// Refuses what does not fit before it is written.
    pub fn take_room(&mut self, bytes: u64) -> Result<(), Trouble> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| Trouble::Sources(format!("it has more than {} MiB", self.most_mib)))?;
        Ok(())
    }

    /// Makes a new file.
    pub fn file(&self, path: &Path, executable: bool) -> Result<File, Trouble> {
        if self.watch.cancelled() {
            return Err(Trouble::Ended(BuildError::Interrupted { attribute: self.attribute.to_owned() }));
        }
        self.parent(path)?;
        let mode = if executable { 0o755 } else { 0o644 };
        Ok(self.dir.open_file(path, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL, mode)?)
    }

    /// Makes a directory.
    pub fn directory(&self, path: &Path) -> Result<(), Trouble> {
        self.dir.ensure_dir(path, 0o755)?;
        Ok(())
    }

    /// Notes a symbolic link, which is made when everything else is there.
    pub fn link(&mut self, path: PathBuf, target: OsString) {
        self.links.push((path, target));
    }

    /// Makes the links.
    pub fn finish(self) -> Result<(), Trouble> {
        for (path, target) in &self.links {
            self.dir.make_link(path, OsStr::new(target))?;
        }
        Ok(())
    }

    /// Copies an entry of a directory that others may change meanwhile; what is gone is left out.
    pub fn copy(&mut self, root: &Dir, path: &Path) -> Result<(), Trouble> {
        let wrong = |error: io::Error| Trouble::Sources(format!("{}: {error}", root.path().join(path).display()));
        let mut from = match root.find(path)? {
            None | Some(Found::Directory) => return Ok(()),
            Some(Found::Link(target)) => {
                self.link(path.to_owned(), target);
                return Ok(());
            }
            Some(Found::Other) => {
                let shown = root.path().join(path);
                return Err(Trouble::Sources(format!("{} is neither a file nor a directory nor a symbolic link", shown.display())));
            }
            Some(Found::File(file)) => file,
        };
        let meta = from.metadata().map_err(wrong)?;
        self.take_room(meta.len())?;
        let mut to = self.file(path, meta.permissions().mode() & 0o100 != 0)?;
        let mut buffer = vec![0; PIECE.min(usize::try_from(meta.len()).unwrap_or(PIECE)).max(1)];
        let mut left = meta.len();
        while left > 0 {
            if self.watch.cancelled() {
                return Err(Trouble::Ended(BuildError::Interrupted { attribute: self.attribute.to_owned() }));
            }
            let piece = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match from.read(&mut buffer[..piece]).map_err(wrong)? {
                0 => break,
                read => {
                    to.write_all(&buffer[..read]).map_err(wrong)?;
                    left -= read as u64;
                }
            }
        }
        Ok(())
    }

    fn parent(&self, path: &Path) -> Result<(), Trouble> {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.directory(parent),
            _ => Ok(()),
        }
    }
}

/// Finds a directory below a tree, through no link: what a link leads to is not part of the flake.
pub(super) fn directory_in(tree: &Path, below: &Path) -> Result<PathBuf, String> {
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    let found = plain.then(|| Dir::open(tree).and_then(|dir| dir.try_dir(below)));
    match found {
        Some(Ok(Some(_))) => Ok(tree.join(below)),
        Some(Ok(None)) => Err(format!("it has no directory {}", below.display())),
        Some(Err(_)) | None => Err(format!("its directory {} leads out of it", below.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Is over after so many questions.
    struct Patience(AtomicUsize);

    impl BuildWatch for Patience {
        fn line(&self, _line: &str) {}

        fn cancelled(&self) -> bool {
            self.0.fetch_sub(1, Ordering::Relaxed) == 0
        }
    }

    fn said(trouble: Trouble) -> String {
        trouble.of("path:/f").to_string()
    }

    #[test]
    fn what_was_a_directory_and_is_a_link_by_now_brings_nothing_from_elsewhere() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("key"), "secret").unwrap();
        let from = tempfile::tempdir().unwrap();
        symlink(outside.path(), from.path().join("dir")).unwrap();
        symlink("key", from.path().join("link")).unwrap();
        fs::write(from.path().join("program"), "x").unwrap();
        fs::set_permissions(from.path().join("program"), fs::Permissions::from_mode(0o700)).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, from.path().join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let to = tempfile::tempdir().unwrap();
        let root = Dir::open(from.path()).unwrap();
        let watch = Patience(AtomicUsize::new(1000));
        let mut tree = Tree::make(&to.path().join("tree"), 1, "a", &watch).unwrap();
        assert!(tree.copy(&root, Path::new("dir/key")).is_err());
        assert!(said(tree.copy(&root, Path::new("pipe")).unwrap_err()).contains("neither a file"));
        assert!(tree.copy(&root, Path::new("../x")).is_err());
        for name in ["dir", "link", "program", "gone"] {
            tree.copy(&root, Path::new(name)).map_err(said).unwrap();
        }
        // What the sources call by the name of a link is not written through it, whatever comes first.
        tree.file(Path::new("dir/new"), false).map_err(said).unwrap();
        assert!(tree.finish().is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        let program = fs::metadata(to.path().join("tree/program")).unwrap();
        assert_eq!((program.len(), program.permissions().mode() & 0o777), (1, 0o755));
    }

    #[test]
    fn a_copy_is_bounded_and_can_be_ended() {
        let from = tempfile::tempdir().unwrap();
        File::create(from.path().join("hole")).unwrap().set_len(64 << 20).unwrap();
        let to = tempfile::tempdir().unwrap();
        let root = Dir::open(from.path()).unwrap();
        let watch = Patience(AtomicUsize::new(8));
        let mut small = Tree::make(&to.path().join("small"), 1, "a", &watch).unwrap();
        assert!(said(small.copy(&root, Path::new("hole")).unwrap_err()).ends_with("it has more than 1 MiB"));
        let mut tree = Tree::make(&to.path().join("tree"), 100, "a", &watch).unwrap();
        assert!(matches!(tree.copy(&root, Path::new("hole")), Err(Trouble::Ended(BuildError::Interrupted { .. }))));
        assert!(fs::metadata(to.path().join("tree/hole")).unwrap().len() < 16 << 20);
    }

    #[test]
    fn a_flake_lies_in_its_sources() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("sub")).unwrap();
        symlink("/etc", tree.path().join("link")).unwrap();
        assert_eq!(directory_in(tree.path(), Path::new("sub")), Ok(tree.path().join("sub")));
        for bad in ["link", "../x", "/etc"] {
            assert!(directory_in(tree.path(), Path::new(bad)).unwrap_err().ends_with("leads out of it"), "{bad}");
        }
        assert!(directory_in(tree.path(), Path::new("none")).unwrap_err().starts_with("it has no directory"));
    }
}
