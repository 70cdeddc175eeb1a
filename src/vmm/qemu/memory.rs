//! Guest RAM: where it lives, and how it becomes a snapshot's memory file.
//!
//! ```text
//!  after a boot:   memfd, shared            -> a new file: the memfd's data, without pages of zeros
//!  after a wake:   snapshot file, private   -> the same file, in place: only the pages written since
//! ```
//!
//! In place is safe against a crash of mvm: a page that is written to the file is one of which QEMU has its own copy, so the
//! machine, still there and paused, does not see the change, and can be resumed or copied once more. It is safe against a crash of
//! the host because a snapshot is resumed once: whoever resumes it says so before, and a torn file is never restored. (Copying an
//! unchanged gigabyte at each sleep would be the price of a new file.)

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, memfd_create, seek};
use rustix::io::Errno;

use super::extents::{PAGE, page_runs, private_runs};

/// How much is copied at once, in bytes.
const CHUNK: usize = 1 << 20;

/// Makes the RAM of a new machine. Its size cannot be changed any more.
pub(super) fn create(bytes: u64) -> io::Result<OwnedFd> {
    let fd = memfd_create("mvm-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// Copies the RAM of a paused machine into `dir/<name>`, durably.
pub(super) fn save(pid: i32, bytes: u64, dir: &Path, name: &str) -> io::Result<Copied> {
    let ram = find(pid, bytes)?;
    let target = dir.join(name);
    match ram.mapping {
        Mapping::Shared => replace(dir, name, |file| {
            file.set_len(bytes)?;
            copy_data(&ram.file, file, bytes)
        }),
        Mapping::Private => {
            let mapped = ram.file.metadata()?;
            match fs::metadata(&target) {
                Ok(there) if (there.dev(), there.ino()) == (mapped.dev(), mapped.ino()) => {
                    let file = OpenOptions::new().read(true).write(true).open(&target)?;
                    let copied = copy_private(pid, &ram, &file)?;
                    file.sync_data()?;
                    Ok(copied)
                }
                _ => replace(dir, name, |file| {
                    file.set_len(bytes)?;
                    let base = copy_data(&ram.file, file, bytes)?;
                    let written = copy_private(pid, &ram, file)?;
                    Ok(Copied { bytes: base.bytes + written.bytes })
                }),
            }
        }
    }
}

/// What a copy was about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copied {
    /// How much was written, in bytes.
    pub bytes: u64,
}

/// Writes a new file beside the old one and puts it in its place, durably.
pub(super) fn replace<T>(dir: &Path, name: &str, fill: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
    let new = dir.join(format!("{name}.new"));
    let attempt = || {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let value = fill(&file)?;
        file.sync_all()?;
        fs::rename(&new, dir.join(name))?;
        File::open(dir)?.sync_all()?;
        Ok(value)
    };
    attempt().inspect_err(|_: &io::Error| drop(fs::remove_file(&new)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    Shared,
    Private,
}

/// The RAM of a running QEMU.
#[derive(Debug)]
struct Ram {
    /// Where it is in QEMU's address space.
    start: u64,
    end: u64,
    mapping: Mapping,
    /// What it maps.
    file: File,
}

/// One line of `/proc/<pid>/maps`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MapLine {
    start: u64,
    end: u64,
    mapping: Mapping,
    offset: u64,
    inode: u64,
}

fn parse_map_line(line: &str) -> Option<MapLine> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = fields.next()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some(MapLine {
        start: hex(start)?,
        end: hex(end)?,
        mapping: if permissions.ends_with('s') { Mapping::Shared } else { Mapping::Private },
        offset: hex(offset)?,
        inode,
    })
}

/// Joins neighbouring lines of one mapping, which the kernel splits where their advice differs, and picks the one of this size.
fn find_mapping(maps: &str, bytes: u64) -> Option<MapLine> {
    let mut joined: Vec<MapLine> = Vec::new();
    for line in maps.lines().filter_map(parse_map_line).filter(|line| line.inode != 0) {
        match joined.last_mut() {
            Some(last)
                if last.end == line.start
                    && last.inode == line.inode
                    && last.mapping == line.mapping
                    && last.offset + (last.end - last.start) == line.offset =>
            {
                last.end = line.end;
            }
            _ => joined.push(line),
        }
    }
    joined.into_iter().find(|line| line.offset == 0 && line.end - line.start == bytes)
}

/// Finds the RAM of a QEMU: the only file mapping of exactly its size, and the file among QEMU's descriptors.
fn find(pid: i32, bytes: u64) -> io::Result<Ram> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let not_found = || io::Error::new(io::ErrorKind::NotFound, format!("QEMU maps no file of {bytes} bytes as guest memory"));
    let line = find_mapping(&maps, bytes).ok_or_else(not_found)?;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let Ok(seen) = fs::metadata(&path) else { continue };
        if seen.ino() == line.inode && seen.is_file() && seen.len() == bytes {
            let file = File::open(path)?;
            return Ok(Ram { start: line.start, end: line.end, mapping: line.mapping, file });
        }
    }
    Err(not_found())
}

/// Copies what a sparse file holds; holes and pages of zeros stay holes.
fn copy_data(from: &File, to: &File, bytes: u64) -> io::Result<Copied> {
    let mut buffer = vec![0; CHUNK];
    let (mut at, mut copied) = (0, 0);
    while at < bytes {
        let start = match seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data from here on.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?.min(bytes);
        at = start;
        while at < end {
            let chunk = &mut buffer[..CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK))];
            from.read_exact_at(chunk, at)?;
            for (run, zero) in page_runs(chunk) {
                if !zero {
                    copied += run.len() as u64;
                    to.write_all_at(&chunk[run.clone()], at + run.start as u64)?;
                }
            }
            at += chunk.len() as u64;
        }
    }
    Ok(Copied { bytes: copied })
}

/// Writes the pages of which QEMU has its own copy over those of the file it mapped.
fn copy_private(pid: i32, ram: &Ram, to: &File) -> io::Result<Copied> {
    let mut pagemap = vec![0; usize::try_from((ram.end - ram.start) / PAGE as u64 * 8).map_err(io::Error::other)?];
    File::open(format!("/proc/{pid}/pagemap"))?.read_exact_at(&mut pagemap, ram.start / PAGE as u64 * 8)?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut buffer = vec![0; CHUNK];
    let mut copied = 0;
    for run in private_runs(&pagemap) {
        let mut at = run.start;
        while at < run.end {
            let chunk = &mut buffer[..CHUNK.min(usize::try_from(run.end - at).unwrap_or(CHUNK))];
            memory.read_exact_at(chunk, ram.start + at)?;
            for (part, zero) in page_runs(chunk) {
                let offset = at + part.start as u64;
                copied += part.len() as u64;
                if !(zero && punch(to, offset, part.len() as u64)?) {
                    to.write_all_at(&chunk[part], offset)?;
                }
            }
            at += chunk.len() as u64;
        }
    }
    Ok(Copied { bytes: copied })
}

/// Makes a hole; returns false where the file system cannot.
fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<bool> {
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55d0c0a00000-55d0c0b00000 r--p 00000000 fe:00 111                        /usr/bin/qemu-system-x86_64
7f0000000000-7f0004000000 rw-p 00000000 fe:00 5349500                    /var/lib/mvm/snapshot/mem ory
7f0004000000-7f0008000000 rw-p 04000000 fe:00 5349500                    /var/lib/mvm/snapshot/mem ory
7f0008000000-7f0010000000 rw-p 00000000 00:00 0
7f0020000000-7f0021000000 rw-s 00000000 00:01 77                         /memfd:mvm-ram (deleted)
";

    #[test]
    fn the_ram_is_the_file_mapping_of_its_size() {
        let found = find_mapping(MAPS, 128 << 20).unwrap();
        assert_eq!((found.start, found.end, found.mapping, found.inode), (0x7f00_0000_0000, 0x7f00_0800_0000, Mapping::Private, 5_349_500));
        assert_eq!(find_mapping(MAPS, 16 << 20).unwrap().mapping, Mapping::Shared);
        assert_eq!(find_mapping(MAPS, 64 << 20), None);
        assert_eq!(find_mapping("nonsense\n1-2 r 3 4\n", 1), None);
    }

    #[test]
    fn a_copy_keeps_holes() {
        let ram = File::from(create(64 << 20).unwrap());
        ram.write_all_at(b"here", 5 << 20).unwrap();
        ram.write_all_at(&[0; 3 * PAGE], 9 << 20).unwrap();
        ram.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let copied = replace(dir.path(), "memory", |file| {
            file.set_len(64 << 20)?;
            copy_data(&ram, file, 64 << 20)
        })
        .unwrap();
        assert_eq!(copied.bytes, 2 * PAGE as u64);
        let copy = File::open(dir.path().join("memory")).unwrap();
        let meta = copy.metadata().unwrap();
        assert_eq!((meta.len(), meta.mode() & 0o777), (64 << 20, 0o600));
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        let mut bytes = [0; 4];
        copy.read_exact_at(&mut bytes, 5 << 20).unwrap();
        assert_eq!(&bytes, b"here");
    }

    #[test]
    fn the_size_of_ram_is_fixed() {
        let ram = File::from(create(1 << 20).unwrap());
        assert!(ram.set_len(1).is_err());
        assert!(ram.set_len(2 << 20).is_err());
    }

    #[test]
    fn a_failed_replacement_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory"), "old").unwrap();
        replace(dir.path(), "memory", |_| Err::<(), _>(io::Error::other("full"))).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read(dir.path().join("memory")).unwrap(), b"old");
    }
}
