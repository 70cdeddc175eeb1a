//! Files as tar streams, the same on both ends of `cp`.
//!
//! Guarantees of [`unpack`], whatever the stream holds: nothing is written outside the target, also not through
//! symbolic links that the stream itself makes; only files, directories, symbolic and hard links are made; counts and
//! sizes are capped; set-user-id bits and owners are not taken over.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, Entry, EntryType, Header};

use crate::limits;

/// What was packed or unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Entries of any kind.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
    /// Sockets, pipes and devices, which are left out.
    pub skipped: u64,
}

/// Packs a file or a directory with what is below it; the last component of `path` names the top entry.
///
/// Symbolic links are packed as links, except `path` itself.
///
/// # Errors
/// When something cannot be read, the writer fails, or a cap is exceeded.
pub fn pack(path: &Path, writer: impl Write) -> io::Result<Copied> {
    let resolved = fs::canonicalize(path).map_err(|error| named(path, error))?;
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) => PathBuf::from(name),
        // `.`, `..` and `/` have no name of their own to give.
        _ => resolved.file_name().map_or_else(|| PathBuf::from("root"), PathBuf::from),
    };
    let mut builder = Builder::new(writer);
    let mut copied = Copied::default();
    let mut waiting = vec![(resolved, name)];
    while let Some((source, name)) = waiting.pop() {
        let meta = fs::symlink_metadata(&source).map_err(|error| named(&source, error))?;
        let kind = meta.file_type();
        if copied.entries == 0 && !kind.is_dir() && !kind.is_file() && !kind.is_symlink() {
            return Err(refused(format!("{} is neither a file nor a directory", source.display())));
        }
        let mut header = Header::new_gnu();
        header.set_mode(meta.mode() & 0o777);
        header.set_mtime(meta.mtime().max(0) as u64);
        header.set_size(0);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            builder.append_data(&mut header, &name, io::empty())?;
            let entries = fs::read_dir(&source).map_err(|error| named(&source, error))?;
            for entry in entries {
                let entry = entry.map_err(|error| named(&source, error))?;
                waiting.push((entry.path(), name.join(entry.file_name())));
            }
        } else if kind.is_file() {
            header.set_entry_type(EntryType::Regular);
            // NOFOLLOW: what was a file a moment ago may be a link now.
            let mut file = File::options().read(true).custom_flags(NOFOLLOW).open(&source).map_err(|error| named(&source, error))?;
            // Files of /proc and /sys say that they are empty, and are not.
            let mut unsaid = Vec::new();
            if meta.len() == 0 {
                Read::by_ref(&mut file).take(MOST_UNSAID + 1).read_to_end(&mut unsaid).map_err(|error| named(&source, error))?;
                if unsaid.len() as u64 > MOST_UNSAID {
                    let why = format!("{} has no size and more than {} MiB of content", source.display(), MOST_UNSAID >> 20);
                    return Err(refused(why));
                }
            }
            let length = meta.len().max(unsaid.len() as u64);
            header.set_size(length);
            // A file that shrinks meanwhile is filled up, one that grows is cut: the header is written already.
            builder.append_data(&mut header, &name, unsaid.as_slice().chain(file).chain(io::repeat(0)).take(length))?;
            copied.bytes += length;
        } else if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            let link = fs::read_link(&source).map_err(|error| named(&source, error))?;
            builder.append_link(&mut header, &name, link)?;
        } else {
            copied.skipped += 1;
            continue;
        }
        copied.entries += 1;
        check(&copied)?;
    }
    builder.into_inner()?.flush()?;
    Ok(copied)
}

/// The most that is read of a file that does not say how long it is, in bytes.
const MOST_UNSAID: u64 = 4 << 20;

/// `O_NOFOLLOW`, the same number on every Linux that this runs on (x86-64 and, with another value, arm64).
const NOFOLLOW: i32 = if cfg!(target_arch = "aarch64") { 0o100_000 } else { 0o400_000 };

/// Unpacks a stream into `path`: below it when it is a directory; or else its one top entry as `path`.
///
/// # Errors
/// When the stream is not a tar stream that may be unpacked here, or something cannot be written. What was unpacked
/// below an existing directory before the error stays.
pub fn unpack(reader: impl Read, path: &Path) -> io::Result<Copied> {
    if path.is_dir() {
        return unpack_below(reader, path);
    }
    let (Some(parent), Some(Component::Normal(_))) = (path.parent(), path.components().next_back()) else {
        return Err(refused(format!("{} is no place for a file", path.display())));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    if !parent.is_dir() {
        return Err(named(parent, io::ErrorKind::NotFound.into()));
    }
    let staging = Staging::new(parent)?;
    let copied = unpack_below(reader, &staging.0)?;
    take_out(&staging, path)?;
    Ok(copied)
}

/// Unpacks what was asked for by the name `source` into `path`: below it when it is a directory, or else as `path`.
///
/// The name is that of the last component of `source`, whatever the stream calls it: whoever made the stream chooses no name here.
/// A file of that name is replaced, a directory is not.
///
/// # Errors
/// When the stream is not a tar stream of one file or directory that may be unpacked here, or something cannot be written; nothing
/// of it is left then.
pub fn unpack_asked(reader: impl Read, source: &Path, path: &Path) -> io::Result<Copied> {
    if !path.is_dir() {
        return unpack(reader, path);
    }
    let Some(Component::Normal(name)) = source.components().next_back() else {
        return Err(refused(format!("{} has no name of its own; write the name that it shall have here", source.display())));
    };
    let staging = Staging::new(path)?;
    let copied = unpack_below(reader, &staging.0)?;
    take_out(&staging, &path.join(name))?;
    Ok(copied)
}

/// Unpacks plain files of these names, each at most once, into a directory; of at most `most` bytes together.
///
/// Stricter than [`unpack`], for streams of which even the headers may have been made to harm: anything that is not a file of one of
/// the names is refused, also the headers that change what follows them, so that nothing is kept in memory.
///
/// # Errors
/// When the stream holds anything else, or something cannot be written. What was unpacked before the error stays.
pub fn unpack_files(reader: impl Read, names: &[&str], most: u64, directory: &Path) -> io::Result<Copied> {
    let mut archive = Archive::new(reader);
    let mut copied = Copied::default();
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let given = entry.path_bytes().into_owned();
        let name = names.iter().find(|name| name.as_bytes() == given.as_slice());
        let (Some(name), EntryType::Regular) = (name, entry.header().entry_type()) else {
            let shown: String = String::from_utf8_lossy(&given).chars().take(100).collect();
            return Err(refused(format!("entry {shown:?} is none of the files {}", names.join(", "))));
        };
        let size = entry.size();
        copied.entries += 1;
        copied.bytes = copied.bytes.saturating_add(size);
        if copied.bytes > most {
            return Err(refused(format!("with {name} it is larger than {} MiB", most >> 20)));
        }
        let path = directory.join(name);
        // A file that is there already, as by an entry before, is not replaced.
        let mut file = File::create_new(&path).map_err(|error| named(&path, error))?;
        if io::copy(&mut entry, &mut file).map_err(|error| named(&path, error))? != size {
            return Err(refused(format!("{name} is cut off")));
        }
    }
    Ok(copied)
}

/// Moves the one top entry to where it belongs.
fn take_out(staging: &Staging, path: &Path) -> io::Result<()> {
    let mut entries = fs::read_dir(&staging.0)?;
    let (Some(top), None) = (entries.next(), entries.next()) else {
        return Err(refused(format!("the stream has not just one top entry to be named {}", path.display())));
    };
    let top = top?;
    // `pack` follows a link that is asked for: one here would let whoever made the stream choose what is written to next.
    if top.file_type()?.is_symlink() {
        return Err(refused(format!("the stream has only a symbolic link to be named {}", path.display())));
    }
    fs::rename(top.path(), path).map_err(|error| named(path, error))
}

/// A directory that is gone afterwards.
struct Staging(PathBuf);

impl Staging {
    fn new(parent: &Path) -> io::Result<Staging> {
        for attempt in 0..100 {
            let path = parent.join(format!(".mvm-cp-{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(named(parent, error)),
                Ok(()) => return Ok(Staging(path)),
            }
        }
        Err(named(parent, io::ErrorKind::AlreadyExists.into()))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // What is left over does no harm but is not wanted either.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The size of a tar block, in bytes (POSIX.1-1988 ustar).
const BLOCK: usize = 512;
/// The longest name that a header of its own gives, in bytes: twice `PATH_MAX`.
const MOST_NAME: u64 = 8192;

/// A tar stream whose headers are looked at before the reader of the archive sees them.
///
/// That reader takes a name that has an entry of its own into memory, however long it is said to be. Such entries are capped here, and
/// those that could give the next one another size than its header says are refused: [`pack`] writes none of them.
struct Guarded<R> {
    inner: R,
    header: [u8; BLOCK],
    /// How many bytes of the header are there, and how many were passed on.
    have: usize,
    passed: usize,
    /// What is left of the entry's body with its padding.
    left: u64,
}

impl<R: Read> Guarded<R> {
    fn new(inner: R) -> Self {
        Self { inner, header: [0; BLOCK], have: 0, passed: 0, left: 0 }
    }

    fn next_header(&mut self) -> io::Result<()> {
        (self.have, self.passed) = (0, 0);
        while self.have < BLOCK {
            match self.inner.read(&mut self.header[self.have..])? {
                0 => return Ok(()),
                read => self.have += read,
            }
        }
        if self.header.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let header = Header::from_byte_slice(&self.header);
        let size = header.entry_size()?;
        match header.entry_type() {
            EntryType::GNULongName | EntryType::GNULongLink if size > MOST_NAME => {
                return Err(refused(format!("a name of {size} bytes is longer than {MOST_NAME}")));
            }
            kind @ (EntryType::XHeader | EntryType::XGlobalHeader | EntryType::GNUSparse) => {
                return Err(refused(format!("an entry is a {kind:?}, and only files, directories and links are unpacked")));
            }
            _ => {}
        }
        self.left = size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| refused(format!("an entry has {size} bytes")))?;
        Ok(())
    }
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.passed == self.have {
            if self.left > 0 {
                let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                let read = self.inner.read(&mut buffer[..most])?;
                self.left -= read as u64;
                return Ok(read);
            }
            self.next_header()?;
        }
        let read = buffer.len().min(self.have - self.passed);
        buffer[..read].copy_from_slice(&self.header[self.passed..self.passed + read]);
        self.passed += read;
        Ok(read)
    }
}

fn unpack_below(reader: impl Read, directory: &Path) -> io::Result<Copied> {
    let mut archive = Archive::new(Guarded::new(reader));
    archive.set_preserve_permissions(false);
    archive.set_preserve_ownerships(false);
    archive.set_unpack_xattrs(false);
    let mut copied = Copied::default();
    let mut directories: Vec<Entry<'_, _>> = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        let name = entry.path()?.into_owned();
        let known =
            matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::Directory | EntryType::Symlink | EntryType::Link);
        if !known {
            return Err(refused(format!("entry {name:?} is a {kind:?}, and only files, directories and links are unpacked")));
        }
        if name.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
            return Err(refused(format!("entry {name:?} leads out of the target")));
        }
        copied.entries += 1;
        copied.bytes = copied.bytes.saturating_add(entry.size());
        check(&copied)?;
        if kind == EntryType::Directory {
            directories.push(entry);
            continue;
        }
        unpack_entry(&mut entry, directory)?;
    }
    // Directories last and deepest first: one that may not be written would keep its own content out.
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut entry in directories {
        unpack_entry(&mut entry, directory)?;
    }
    Ok(copied)
}

fn unpack_entry<R: Read>(entry: &mut Entry<'_, R>, directory: &Path) -> io::Result<()> {
    if entry.unpack_in(directory)? {
        return Ok(());
    }
    Err(refused(format!("entry {:?} leads out of the target", entry.path()?)))
}

fn check(copied: &Copied) -> io::Result<()> {
    if copied.entries > limits::MAX_TAR_ENTRIES || copied.bytes > limits::MAX_TAR_BYTES {
        return Err(refused(format!("more than {} entries or {} bytes", limits::MAX_TAR_ENTRIES, limits::MAX_TAR_BYTES)));
    }
    Ok(())
}

fn refused(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn packed(path: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        pack(path, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_name_without_end_is_refused_before_it_is_read() {
        let long = |kind: EntryType, size: u64| {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(size);
            header.set_cksum();
            header.as_bytes().as_slice().to_vec()
        };
        let dir = tempfile::tempdir().unwrap();
        for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader, EntryType::XGlobalHeader, EntryType::GNUSparse] {
            let stream = long(kind, 1 << 40);
            let error = unpack(stream.as_slice().chain(io::repeat(b'x')), dir.path()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{kind:?}: {error}");
        }
        // A long name that is one is as good as a short one.
        let name = "n".repeat(200);
        fs::create_dir(dir.path().join("from")).unwrap();
        fs::write(dir.path().join("from").join(&name), "x").unwrap();
        let mut stream = Vec::new();
        pack(&dir.path().join("from"), &mut stream).unwrap();
        fs::create_dir(dir.path().join("to")).unwrap();
        unpack(stream.as_slice(), &dir.path().join("to")).unwrap();
        assert_eq!(fs::read(dir.path().join("to/from").join(&name)).unwrap(), b"x");
    }

    #[test]
    fn files_that_hide_their_size_are_packed_and_devices_are_refused() {
        let mut stream = Vec::new();
        let copied = pack(Path::new("/proc/version"), &mut stream).unwrap();
        let version = fs::read("/proc/version").unwrap();
        assert_eq!(copied.bytes, version.len() as u64);
        let dir = tempfile::tempdir().unwrap();
        unpack(stream.as_slice(), dir.path()).unwrap();
        assert_eq!(fs::read(dir.path().join("version")).unwrap(), version);
        let refused = pack(Path::new("/dev/zero"), Vec::new()).unwrap_err().to_string();
        assert!(refused.contains("/dev/zero is neither a file nor a directory"), "{refused}");
    }

    #[test]
    fn a_tree_arrives_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("sub/deep")).unwrap();
        fs::write(tree.join("sub/script"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(tree.join("sub/script"), fs::Permissions::from_mode(0o750)).unwrap();
        symlink("script", tree.join("sub/link")).unwrap();
        symlink("/etc/passwd", tree.join("outside")).unwrap();
        fs::set_permissions(tree.join("sub"), fs::Permissions::from_mode(0o555)).unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let copied = unpack(&packed(&tree)[..], &out).unwrap();
        assert_eq!((copied.entries, copied.bytes, copied.skipped), (6, 10, 0));
        let mode = |p: &str| fs::metadata(out.join(p)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode("tree/sub/script"), 0o750);
        assert_eq!(mode("tree/sub"), 0o555);
        assert_eq!(fs::read_link(out.join("tree/outside")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read_link(out.join("tree/sub/link")).unwrap(), Path::new("script"));
    }

    #[test]
    fn a_file_takes_a_new_name_and_replaces_an_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, "new").unwrap();
        let target = dir.path().join("b");
        fs::write(&target, "old").unwrap();
        unpack(&packed(&file)[..], &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left over");
        let missing = dir.path().join("no/where");
        let error = unpack(&packed(&file)[..], &missing).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    /// A stream made by hand, since the library refuses to write such names.
    fn hostile(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o4777);
            header.set_size(0);
            if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.set_link_name_literal(content).unwrap();
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
            } else {
                header.set_size(content.len() as u64);
                header.set_cksum();
                bytes.extend_from_slice(header.as_bytes());
                let mut block = content.as_bytes().to_vec();
                block.resize(content.len().next_multiple_of(512), 0);
                bytes.extend_from_slice(&block);
            }
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    #[test]
    fn a_hostile_stream_writes_nothing_outside() {
        use EntryType as T;
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "kept").unwrap();
        let at = outside.to_str().unwrap();
        let kept = format!("{at}/kept");
        let absolute = format!("{at}/new");
        let streams: &[&[(&str, EntryType, &str)]] = &[
            &[("../outside/new", T::Regular, "x")],
            &[(&absolute, T::Regular, "x")],
            &[("link", T::Symlink, at), ("link/new", T::Regular, "x")],
            &[("link", T::Symlink, at), ("link/new", T::Directory, "")],
            &[("link", T::Symlink, &kept), ("link", T::Regular, "x")],
            &[("hard", T::Link, &kept), ("hard", T::Regular, "x")],
            &[("hard", T::Link, "../outside/kept")],
            &[("a", T::Symlink, "."), ("a/b", T::Symlink, at), ("b/new", T::Regular, "x")],
            &[("null", T::Char, "")],
            &[("pipe", T::Fifo, "")],
        ];
        for (number, entries) in streams.iter().enumerate() {
            let target = dir.path().join(format!("target{number}"));
            fs::create_dir(&target).unwrap();
            let _ = unpack(&hostile(entries)[..], &target);
            let names: Vec<_> = fs::read_dir(&outside).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, ["kept"], "{entries:?}");
            assert_eq!(fs::read(outside.join("kept")).unwrap(), b"kept", "{entries:?}");
            assert_eq!(fs::metadata(outside.join("kept")).unwrap().nlink(), 1, "{entries:?}");
        }
    }

    #[test]
    fn only_files_that_were_named_are_taken() {
        use EntryType as T;
        const NAMES: [&str; 2] = ["vmlinux", "rootfs"];
        let take = |entries: &[(&str, EntryType, &str)]| {
            let dir = tempfile::tempdir().unwrap();
            let outcome = unpack_files(&hostile(entries)[..], &NAMES, 8, dir.path());
            let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            (outcome.map(|copied| copied.bytes).map_err(|error| error.to_string()), names.join(" "))
        };
        assert_eq!(take(&[("rootfs", T::Regular, "root"), ("vmlinux", T::Regular, "kern")]), (Ok(8), "rootfs vmlinux".into()));
        assert_eq!(take(&[]), (Ok(0), String::new()));
        type Entries<'a> = &'a [(&'a str, EntryType, &'a str)];
        let streams: &[(&str, Entries<'_>)] = &[
            ("none of the files", &[("../vmlinux", T::Regular, "x")]),
            ("none of the files", &[("./vmlinux", T::Regular, "x")]),
            ("none of the files", &[("vmlinux", T::Symlink, "/etc/passwd")]),
            ("none of the files", &[("vmlinux", T::Link, "/etc/passwd")]),
            ("none of the files", &[("vmlinux", T::Directory, "")]),
            ("none of the files", &[("vmlinux", T::GNUSparse, "x")]),
            ("none of the files", &[("long", T::GNULongName, "vmlinux"), ("x", T::Regular, "x")]),
            ("none of the files", &[("pax", T::XHeader, "11 size=99\n"), ("vmlinux", T::Regular, "x")]),
            ("File exists", &[("vmlinux", T::Regular, "x"), ("vmlinux", T::Regular, "y")]),
            ("larger than 0 MiB", &[("vmlinux", T::Regular, "123456789")]),
            ("larger than 0 MiB", &[("vmlinux", T::Regular, "12345"), ("rootfs", T::Regular, "12345")]),
        ];
        for (expected, entries) in streams {
            let (outcome, _) = take(entries);
            assert!(outcome.clone().unwrap_err().contains(expected), "{entries:?}: {outcome:?}");
        }
        // A length that is a lie.
        let whole = hostile(&[("vmlinux", T::Regular, "1234567")]);
        let dir = tempfile::tempdir().unwrap();
        assert!(unpack_files(&whole[..515], &NAMES, 8, dir.path()).is_err());
    }

    #[test]
    fn whoever_made_the_stream_chooses_no_name() {
        use EntryType as T;
        let asked = Path::new("/data/report.csv");
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("home");
        fs::create_dir(&target).unwrap();
        fs::write(target.join(".bashrc"), "mine").unwrap();
        fs::write(target.join("report.csv"), "old").unwrap();
        let names = || {
            let mut names: Vec<_> = fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        unpack_asked(&hostile(&[(".bashrc", T::Regular, "new")])[..], asked, &target).unwrap();
        assert_eq!(fs::read(target.join("report.csv")).unwrap(), b"new");
        let refused: &[&[(&str, EntryType, &str)]] = &[
            &[],
            &[("report.csv", T::Regular, "x"), (".bashrc", T::Regular, "x")],
            &[("report.csv", T::Symlink, "/etc/passwd")],
            &[("../.bashrc", T::Regular, "x")],
        ];
        for stream in refused {
            assert!(unpack_asked(&hostile(stream)[..], asked, &target).is_err(), "{stream:?}");
        }
        assert!(unpack_asked(&hostile(&[("a", T::Regular, "x")])[..], Path::new("/data/.."), &target).is_err());
        assert_eq!(fs::read(target.join(".bashrc")).unwrap(), b"mine");
        assert_eq!(fs::read(target.join("report.csv")).unwrap(), b"new");
        assert_eq!(names(), [".bashrc", "report.csv"], "nothing is left over");
        let other = target.join("other");
        unpack_asked(&hostile(&[(".bashrc", T::Regular, "new")])[..], asked, &other).unwrap();
        assert_eq!(fs::read(other).unwrap(), b"new");
    }

    #[test]
    fn set_user_id_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        unpack(&hostile(&[("su", EntryType::Regular, "x")])[..], dir.path()).unwrap();
        let mode = fs::metadata(dir.path().join("su")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7000, 0);
    }

    #[test]
    fn a_cut_or_wrong_stream_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, vec![7; 2000]).unwrap();
        let whole = packed(&file);
        let target = dir.path().join("t");
        fs::create_dir(&target).unwrap();
        for end in [100, 512, 600, 2000] {
            assert!(unpack(&whole[..end], &target).is_err(), "{end}");
        }
        assert!(unpack(&vec![0x5a; 4096][..], &target).is_err());
    }
}
