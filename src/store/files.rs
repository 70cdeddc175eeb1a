//! Documents as files below the state directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use super::{DocumentStore, LockGuard, StoreError, Wait};
use crate::infra::kill_switch::KillSwitch;

/// Files below a directory.
///
/// A write is a temporary file, fsync, exchange of the two names, fsync of the directory. What was there before stays, emptied, as the
/// next write's temporary file: to make and delete a file for each write costs ext4 a search through all those that were deleted
/// within the last minutes, which it does not use again so soon. Locks are `flock`s on files below `locks/` of the run
/// directory: they end with their holder, and the host's reboot clears them.
pub struct FileStore {
    root: PathBuf,
    locks: PathBuf,
    switch: Arc<KillSwitch>,
}

/// The end of a simulated process, on its way out as an error of the system.
#[derive(Debug, thiserror::Error)]
#[error("killed at effect {0}")]
struct Killed(usize);

impl FileStore {
    /// Opens the store; nothing is made before the first write or lock.
    pub fn new(root: PathBuf, locks: PathBuf) -> Self {
        Self { root, locks, switch: KillSwitch::never() }
    }

    /// Returns the same files as the next process sees them, which has its own fate: each call that changes something is an effect.
    pub fn next_process(&self, switch: Arc<KillSwitch>) -> Self {
        Self { root: self.root.clone(), locks: self.locks.clone(), switch }
    }

    fn effect(&self) -> io::Result<()> {
        self.switch.effect().map_err(|n| io::Error::other(Killed(n)))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.effect()?;
        File::open(dir)?.sync_all()
    }

    fn path(&self, key: &str) -> PathBuf {
        debug_assert!(!key.starts_with('/') && !key.split('/').any(|part| part == ".."), "keys are made of ids: {key}");
        self.root.join(key)
    }

    fn error(&self, what: &'static str, key: &str) -> impl FnOnce(io::Error) -> StoreError {
        let key = self.root.join(key).display().to_string();
        move |source| match source.get_ref().and_then(|inner| inner.downcast_ref::<Killed>()) {
            Some(Killed(n)) => StoreError::Killed(*n),
            None => StoreError::Io { what, key, source },
        }
    }

    /// Makes a directory and its parents durable from the first missing one on.
    fn ensure_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        let parent = dir.parent().ok_or(io::ErrorKind::InvalidInput)?;
        self.ensure_dir(parent)?;
        self.effect()?;
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
        self.sync_dir(parent)
    }

    /// Removes directories that a failed write leaves without anything in them: they would look like objects without a document.
    fn remove_empty(&self, dir: &Path) {
        let mut dir = dir;
        while dir != self.root && self.effect().is_ok() && fs::remove_dir(dir).is_ok() {
            let Some(parent) = dir.parent() else { return };
            dir = parent;
        }
    }

    fn write_new(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        // What a killed writer left is overwritten.
        let temporary = temporary(path)?;
        let open = || {
            self.effect()?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)
        };
        let mut file = open().or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            self.ensure_dir(dir)?;
            open()
        })?;
        let mut write = || {
            self.effect()?;
            file.write_all(content)?;
            self.effect()?;
            file.sync_data()?;
            self.effect()?;
            put(&temporary, path)
        };
        let former = match write() {
            Ok(former) => former,
            Err(error) => {
                if self.effect().is_err() {
                    return Err(error);
                }
                // The write failed; what remains of it must not stay either, but its own failure says less than the first one.
                let _ = fs::remove_file(&temporary);
                if !path.exists() {
                    self.remove_empty(dir);
                }
                return Err(error);
            }
        };
        self.sync_dir(dir)?;
        if former == Former::Kept {
            self.effect()?;
            // Not before the exchange is durable. Should it fail, then what is left is what the next write begins with.
            let _ = OpenOptions::new().write(true).truncate(true).open(&temporary);
        }
        Ok(())
    }

    fn lock_path(&self, key: &str) -> PathBuf {
        self.locks.join(key.replace('/', ":"))
    }

    fn open_lock(&self, key: &str) -> Result<File, StoreError> {
        let path = self.lock_path(key);
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        open()
            .or_else(|error| {
                if error.kind() != io::ErrorKind::NotFound {
                    return Err(error);
                }
                fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.locks)?;
                open()
            })
            .map_err(|source| StoreError::Io { what: "open the lock", key: path.display().to_string(), source })
    }
}

/// What became of the file that another one took the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Former {
    /// There was none, or it is gone.
    Gone,
    /// It has the other one's name now.
    Kept,
}

/// Puts a file in its place in one step.
fn put(temporary: &Path, path: &Path) -> io::Result<Former> {
    match renameat_with(CWD, temporary, CWD, path, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(Former::Kept),
        // There is none yet, or the file system cannot exchange names.
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => fs::rename(temporary, path).map(|()| Former::Gone),
        Err(error) => Err(error.into()),
    }
}

/// The one name that a document's temporary file has: writers of a document hold its lock.
fn temporary(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy();
    Ok(path.with_file_name(format!(".{name}.tmp")))
}

/// Reads a file without asking how long it is: a pass reads thousands, each of which fits, and each call counts.
fn read_whole(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut content = vec![0; 4096];
    let read = file.read(&mut content)?;
    let is_whole = read < content.len();
    content.truncate(read);
    if !is_whole {
        file.read_to_end(&mut content)?;
    }
    Ok(content)
}

impl DocumentStore for FileStore {
    fn read(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match read_whole(&self.path(key)) {
            Ok(content) => Ok(Some(content)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(self.error("read", key)(error)),
        }
    }

    fn write(&self, key: &str, content: &[u8]) -> Result<(), StoreError> {
        self.write_new(&self.path(key), content).map_err(self.error("write", key))
    }

    fn append(&self, key: &str, lines: &[u8]) -> Result<(), StoreError> {
        let path = self.path(key);
        let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let opened = open().or_else(|error| {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            self.ensure_dir(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?;
            open()
        });
        let append = |mut file: File| {
            let before = file.seek(SeekFrom::End(0))?;
            self.effect()?;
            file.write_all(lines).inspect_err(|_| {
                // A half-written line would break the chain for every later reader.
                let _ = file.set_len(before);
            })
        };
        opened.and_then(append).map_err(self.error("append to", key))
    }

    fn sync(&self, key: &str) -> Result<(), StoreError> {
        match File::open(self.path(key)) {
            Ok(file) => self.effect().and_then(|()| file.sync_data()).map_err(self.error("sync", key)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.error("sync", key)(error)),
        }
    }

    fn read_from(&self, key: &str, from: u64) -> Result<Vec<u8>, StoreError> {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = File::open(self.path(key))?;
            file.seek(SeekFrom::Start(from))?;
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            Ok(content)
        };
        match read() {
            Ok(content) => Ok(content),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(self.error("read", key)(error)),
        }
    }

    fn exists(&self, key: &str) -> Result<bool, StoreError> {
        self.path(key).try_exists().map_err(self.error("look at", key))
    }

    fn len(&self, key: &str) -> Result<u64, StoreError> {
        match fs::metadata(self.path(key)) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(self.error("look at", key)(error)),
        }
    }

    fn truncate(&self, key: &str, len: u64) -> Result<(), StoreError> {
        let truncate = || {
            self.effect()?;
            OpenOptions::new().write(true).open(self.path(key))?.set_len(len)
        };
        truncate().map_err(self.error("truncate", key))
    }

    fn remove(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        // Its absence is no failure, and what else could fail fails below.
        let _ = self.effect().and_then(|()| temporary(&path)).and_then(fs::remove_file);
        match self.effect().and_then(|()| fs::remove_file(&path)) {
            Ok(()) => path.parent().map_or(Ok(()), |dir| self.sync_dir(dir)).map_err(self.error("remove", key)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.error("remove", key)(error)),
        }
    }

    fn forget(&self, key: &str) -> Result<(), StoreError> {
        match self.effect().and_then(|()| fs::remove_file(self.path(key))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.error("remove", key)(error)),
            _ => Ok(()),
        }
    }

    fn remove_tree(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key);
        let Some((dir, name)) = path.parent().zip(path.file_name()) else { return Ok(()) };
        // Out of sight in one step, so that a kill in between leaves no object without its document.
        let hidden = dir.join(format!(".{}.removed", name.to_string_lossy()));
        let clear = |path: &Path| match self.effect().and_then(|()| fs::remove_dir_all(path)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let remove = || {
            clear(&hidden)?;
            match self.effect().and_then(|()| fs::rename(&path, &hidden)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
            self.sync_dir(dir)?;
            clear(&hidden)
        };
        remove().map_err(self.error("remove", key))
    }

    fn clear_removed(&self, key: &str) -> Result<(), StoreError> {
        let Ok(entries) = fs::read_dir(self.path(key)) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".") && name.as_encoded_bytes().ends_with(b".removed") {
                match self.effect().and_then(|()| fs::remove_dir_all(entry.path())) {
                    // Whoever removes it right now is quicker.
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(self.error("clear", key)(error)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn list(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(self.path(key)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.error("list", key)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.map_err(self.error("list", key))?.file_name();
            match name.to_str() {
                Some(name) if !name.starts_with('.') => names.push(name.to_owned()),
                _ => {}
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn is_unfinished(&self, key: &str) -> Result<bool, StoreError> {
        match fs::read_dir(self.path(key)) {
            Ok(mut entries) => Ok(entries.all(|entry| entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().ends_with(b".tmp")))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(self.error("look at", key)(error)),
        }
    }

    fn place(&self, key: &str) -> String {
        self.path(key).display().to_string()
    }

    fn quarantine(&self, key: &str) -> Result<String, StoreError> {
        let from = self.path(key);
        let name = from.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        for n in 1_u32.. {
            let to = from.with_file_name(format!(".{name}.quarantined-{n}"));
            if !to.exists() {
                self.effect().and_then(|()| fs::rename(&from, &to)).map_err(self.error("quarantine", key))?;
                return Ok(to.display().to_string());
            }
        }
        unreachable!("there are fewer than 2^32 files in a directory")
    }

    fn moved_aside(&self, key: &str) -> Result<Vec<String>, StoreError> {
        let entries = match fs::read_dir(self.path(key)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.error("list", key)(error)),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let name = entry.map_err(self.error("list", key))?.file_name();
            let document = name.to_str().and_then(|name| name.strip_prefix('.')?.split_once(".quarantined-"));
            keys.extend(document.map(|(document, _)| format!("{key}/{document}")));
        }
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }

    fn lock(&self, key: &str, wait: Wait) -> Result<Box<dyn LockGuard>, StoreError> {
        let mut file = self.open_lock(key)?;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if is_same_file(&file, &self.lock_path(key)) => break,
                // Its last holder retired it after it was opened here.
                Ok(()) => {
                    file = self.open_lock(key)?;
                    continue;
                }
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(self.error("lock", key)(error.into())),
            }
            if !matches!(wait, Wait::Until(deadline) if Instant::now() < deadline) {
                return Err(StoreError::Locked { key: key.to_owned(), holder: holder(&file) });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut record = [0_u8; 8];
        let generation = if file.read_exact_at(&mut record, 0).is_ok() { u64::from_le_bytes(record) } else { 0 };
        Ok(Box::new(FileLock { file, generation, path: self.lock_path(key) }))
    }

    fn is_locked(&self, key: &str) -> Result<bool, StoreError> {
        let Ok(file) = File::open(self.lock_path(key)) else { return Ok(false) };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(error) => Err(self.error("look at the lock of", key)(error.into())),
        }
    }
}

/// Finds out who holds a lock: the kernel knows, so that taking one writes nothing.
///
/// A line of `proc_locks(5)`: `1: FLOCK  ADVISORY  WRITE 4242 fe:00:1835010 0 EOF`, the device in hex.
fn holder(file: &File) -> Option<u32> {
    let meta = file.metadata().ok()?;
    let place = format!("{:02x}:{:02x}:{}", rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()), meta.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let fields = locks.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    let held =
        |fields: Vec<&str>| (fields.get(1) == Some(&"FLOCK") && fields.get(5) == Some(&place.as_str())).then(|| fields[4].parse().ok());
    // A process of another namespace has no number here.
    fields.filter_map(held).flatten().find(|pid| *pid != 0)
}

fn is_same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => open.ino() == named.ino() && open.dev() == named.dev(),
        _ => false,
    }
}

struct FileLock {
    file: File,
    path: PathBuf,
    generation: u64,
}

impl LockGuard for FileLock {
    fn generation(&self) -> u64 {
        self.generation
    }

    fn set_generation(&mut self, generation: u64) {
        self.generation = generation;
        // The number is not needed for correctness of the lock itself; a full /run must not stop it.
        if self.file.write_all_at(&generation.to_le_bytes(), 0).is_err() {
            let _ = self.file.set_len(0);
        }
    }

    fn retire(self: Box<Self>) {
        // Left behind it is an empty file in the run directory, which the next boot clears.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, FileStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::new(dir.path().join("state"), dir.path().join("locks"));
        (dir, store)
    }

    #[test]
    fn writes_are_whole_and_leave_nothing_else() {
        let (dir, store) = store();
        let files = || {
            let entries = fs::read_dir(dir.path().join("state/tenants/acme")).unwrap().map(Result::unwrap);
            let mut files: Vec<_> =
                entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect();
            files.sort();
            files
        };
        store.write("tenants/acme/tenant.json", b"first").unwrap();
        assert_eq!(files(), [("tenant.json".to_owned(), 5)]);
        for content in [&b"second"[..], b"x", b"third"] {
            store.write("tenants/acme/tenant.json", content).unwrap();
            assert_eq!(store.read("tenants/acme/tenant.json").unwrap().unwrap(), content);
            // Of what was there before nothing is left but an empty file.
            assert_eq!(files(), [(".tenant.json.tmp".to_owned(), 0), ("tenant.json".to_owned(), content.len() as u64)]);
        }
        store.remove("tenants/acme/tenant.json").unwrap();
        assert_eq!(files(), []);
        store.write("tenants/acme/tenant.json", b"again").unwrap();
        assert_eq!(store.list("tenants").unwrap(), ["acme"]);
        store.remove_tree("tenants/acme").unwrap();
        store.remove_tree("tenants/acme").unwrap();
        assert_eq!(store.read("tenants/acme/tenant.json").unwrap(), None);
    }

    #[test]
    fn a_held_lock_is_refused_and_names_its_holder() {
        let (_dir, store) = store();
        let mut guard = store.lock("agent", Wait::No).unwrap();
        guard.set_generation(7);
        assert!(store.is_locked("agent").unwrap());
        let error = store.lock("agent", Wait::No).err().unwrap();
        assert_eq!(error.to_string(), format!("agent is in use by another mvm (process {})", std::process::id()));
        drop(guard);
        assert!(!store.is_locked("agent").unwrap());
        let guard = store.lock("agent", Wait::Until(Instant::now())).unwrap();
        assert_eq!(guard.generation(), 7);
        guard.retire();
        assert!(!store.lock_path("agent").exists());
        assert_eq!(store.lock("agent", Wait::No).unwrap().generation(), 0);
    }

    #[test]
    fn a_torn_document_is_moved_aside_and_never_overwrites_another() {
        let (_dir, store) = store();
        for n in 1..=2 {
            store.write("a/b.json", b"{").unwrap();
            assert!(store.quarantine("a/b.json").unwrap().ends_with(&format!("a/.b.json.quarantined-{n}")));
            assert_eq!(store.moved_aside("a").unwrap(), ["a/b.json"]);
        }
        assert_eq!(store.list("a").unwrap(), Vec::<String>::new());
    }

    #[test]
    fn appended_lines_add_up() {
        let (_dir, store) = store();
        store.append("a/log", b"1\n").unwrap();
        store.append("a/log", b"2\n").unwrap();
        store.sync("a/log").unwrap();
        assert_eq!(store.read("a/log").unwrap().unwrap(), b"1\n2\n");
        store.truncate("a/log", 2).unwrap();
        assert_eq!(store.len("a/log").unwrap(), 2);
    }
}
