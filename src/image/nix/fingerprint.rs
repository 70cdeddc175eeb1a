//! Tells whether the sources of a flake are what they were, without a process and, as a rule, without reading them.
//!
//! The fingerprint is over names, kinds and contents. The hash of a file's content is kept with the file's size, times and inode, so that
//! an unchanged tree costs one `lstat` a file.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::{Reference, git_index};

/// The most files of a flake.
const MOST_FILES: usize = 200_000;
/// The most bytes of a flake's files: nix copies all of them into its store.
const MOST_BYTES: u64 = 2 << 30;
/// How deep directories may lie in each other.
const MOST_DEPTH: usize = 64;
/// The largest index or reference of git that is read, in bytes.
const MOST_GIT: u64 = 256 << 20;
/// How long a file must have been left alone before its hash is kept: a change in the same tick of the file system's clock would not be
/// seen in its times.
const SETTLED_NS: i128 = 2_000_000_000;

/// The hashes of files by their path, as they were seen last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    files: BTreeMap<PathBuf, SeenFile>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SeenFile {
    size: u64,
    ino: u64,
    mtime_ns: i128,
    ctime_ns: i128,
    blake3: String,
}

/// Sources as they are now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// Over everything that nix would take.
    pub fingerprint: String,
    /// Its files and symbolic links, relative to [`Sources::root`], in order.
    pub files: Vec<PathBuf>,
    /// The directory that nix would copy.
    pub root: PathBuf,
}

/// Looks at the sources of a reference; `None` when they are not on this host, or are a commit, of which only git knows the files.
///
/// `seen` is used and brought up to date.
///
/// # Errors
/// A sentence: what cannot be read.
pub fn look(reference: &Reference, seen: &mut Seen) -> Result<Option<Sources>, String> {
    match reference {
        Reference::Other(_) => Ok(None),
        Reference::Path { dir } => {
            let mut files = Vec::new();
            walk(dir, Path::new(""), 0, &mut files)?;
            sources(dir, files, "path", seen).map(Some)
        }
        Reference::Git { rev: Some(_), .. } | Reference::Git { branch: Some(_), .. } => Ok(None),
        Reference::Git { root, .. } => {
            let git = git_dir(root)?;
            let head = head(&git)?;
            let index = read(&git.join("index"))?.unwrap_or_default();
            let files = if index.is_empty() { Vec::new() } else { git_index::paths(&index)? };
            sources(root, files, &format!("git {head}"), seen).map(Some)
        }
    }
}

/// Tells whether a file of the flake's directory is part of the flake, where its sources lie on this host as they are: of a repository,
/// only what git tracks is.
///
/// # Errors
/// A sentence: what cannot be read.
pub fn has(reference: &Reference, name: &str) -> Result<bool, String> {
    match (reference, reference.directory()) {
        (_, None) => Ok(false),
        (Reference::Git { root, dir, .. }, Some(_)) => {
            let index = read(&git_dir(root)?.join("index"))?.unwrap_or_default();
            let file = dir.as_deref().unwrap_or(Path::new("")).join(name);
            Ok(!index.is_empty() && git_index::paths(&index)?.contains(&file))
        }
        (_, Some(dir)) => Ok(dir.join(name).symlink_metadata().is_ok()),
    }
}

/// The fingerprint of a reference's sources; `None` when only nix can tell.
///
/// # Errors
/// A sentence: what cannot be read.
pub fn fingerprint(reference: &Reference, seen: &mut Seen) -> Result<Option<String>, String> {
    match reference {
        Reference::Git { rev: Some(_), .. } | Reference::Git { branch: Some(_), .. } => {
            Ok(commit(reference)?.map(|commit| format!("rev:{commit}")))
        }
        _ => Ok(look(reference, seen)?.map(|sources| sources.fingerprint)),
    }
}

/// The commit that a reference names; `None` when it is a work tree, or not on this host.
///
/// # Errors
/// A sentence: why it names none.
pub fn commit(reference: &Reference) -> Result<Option<String>, String> {
    match reference {
        // A commit does not change.
        Reference::Git { rev: Some(rev), .. } if is_commit(rev) => Ok(Some(rev.clone())),
        Reference::Git { rev: Some(rev), .. } => Err(format!("rev={rev} is no commit; write its whole name, 40 or 64 hexadecimal digits")),
        Reference::Git { root, branch: Some(branch), .. } => {
            let git = git_dir(root)?;
            for name in [format!("refs/heads/{branch}"), format!("refs/tags/{branch}"), branch.clone()] {
                if let Some(commit) = resolve(&git, &name, 0)? {
                    return Ok(Some(commit));
                }
            }
            Err(format!("the repository {} has no branch or tag {branch:?}", root.display()))
        }
        _ => Ok(None),
    }
}

fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn walk(root: &Path, below: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<(), String> {
    let dir = root.join(below);
    let wrong = |error: io::Error| format!("{}: {error}", dir.display());
    if depth > MOST_DEPTH {
        return Err(format!("{}: directories lie more than {MOST_DEPTH} deep in each other", root.display()));
    }
    for entry in fs::read_dir(&dir).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        let kind = entry.file_type().map_err(wrong)?;
        // What git keeps changes whenever somebody looks at the repository, and no image depends on it.
        if depth == 0 && entry.file_name() == ".git" {
            continue;
        }
        let path = below.join(entry.file_name());
        if kind.is_dir() {
            walk(root, &path, depth + 1, files)?;
        } else {
            files.push(path);
        }
        if files.len() > MOST_FILES {
            return Err(format!("{} has more than {MOST_FILES} files", root.display()));
        }
    }
    Ok(())
}

fn sources(root: &Path, mut files: Vec<PathBuf>, kind: &str, seen: &mut Seen) -> Result<Sources, String> {
    files.sort();
    if files.len() > MOST_FILES {
        return Err(format!("{} has more than {MOST_FILES} files", root.display()));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i128::try_from(since.as_nanos()).unwrap_or(i128::MAX));
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind.as_bytes());
    let mut still = BTreeMap::new();
    let mut there = Vec::with_capacity(files.len());
    let mut left = MOST_BYTES;
    for file in files {
        let path = root.join(&file);
        let wrong = |error: io::Error| format!("{}: {error}", path.display());
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            // Tracked by git and removed from the work tree.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(wrong(error)),
        };
        let (form, content) = if meta.is_symlink() {
            ("link", blake3::hash(fs::read_link(&path).map_err(wrong)?.as_os_str().as_encoded_bytes()).to_hex().to_string())
        } else if meta.is_dir() {
            // A submodule, which nix leaves out.
            continue;
        } else if meta.is_file() {
            // Before any of it is read: it may be a hole of terabytes.
            left = left.checked_sub(meta.len()).ok_or_else(|| {
                let (root, most) = (root.display(), MOST_BYTES >> 20);
                format!("{root} has more than {most} MiB with {}; move what is no source out of the flake", file.display())
            })?;
            let hash = content_hash(&file, &path, &meta, now, seen, &mut still).map_err(wrong)?;
            (if meta.mode() & 0o100 == 0 { "file" } else { "program" }, hash)
        } else {
            return Err(format!("{} is neither a file nor a directory nor a symbolic link", path.display()));
        };
        hasher.update(&(file.as_os_str().len() as u64).to_le_bytes());
        hasher.update(file.as_os_str().as_encoded_bytes());
        hasher.update(format!("\0{form}\0{content}\0").as_bytes());
        there.push(file);
    }
    seen.files = still;
    Ok(Sources { fingerprint: hasher.finalize().to_hex()[..32].to_owned(), files: there, root: root.to_owned() })
}

fn content_hash(
    file: &Path,
    path: &Path,
    meta: &Metadata,
    now: i128,
    seen: &Seen,
    still: &mut BTreeMap<PathBuf, SeenFile>,
) -> io::Result<String> {
    let ns = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    let mut as_seen = SeenFile {
        size: meta.len(),
        ino: meta.ino(),
        mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
        ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
        blake3: String::new(),
    };
    if let Some(before) = seen.files.get(file) {
        as_seen.blake3.clone_from(&before.blake3);
        if as_seen == *before {
            still.insert(file.to_owned(), as_seen);
            return Ok(before.blake3.clone());
        }
    }
    let mut hasher = blake3::Hasher::new();
    // Somebody else may have put a link or a pipe in its place since it was looked at.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !open.metadata()?.is_file() {
        return Err(io::Error::other("it changes while it is read"));
    }
    hasher.update_reader(open.take(meta.len()))?;
    as_seen.blake3 = hasher.finalize().to_hex().to_string();
    let hash = as_seen.blake3.clone();
    if now - as_seen.mtime_ns.max(as_seen.ctime_ns) > SETTLED_NS {
        still.insert(file.to_owned(), as_seen);
    }
    Ok(hash)
}

/// The directory of a repository: `.git`, what a `.git` file of a work tree names, or the directory itself where it is bare.
pub(super) fn git_dir(root: &Path) -> Result<PathBuf, String> {
    let dot = root.join(".git");
    match fs::metadata(&dot) {
        Ok(meta) if meta.is_dir() => Ok(dot),
        Ok(_) => {
            let text = read_text(&dot)?.unwrap_or_default();
            let named =
                text.trim().strip_prefix("gitdir: ").ok_or_else(|| format!("{} does not say where the repository is", dot.display()))?;
            Ok(root.join(named))
        }
        Err(_) if root.join("HEAD").is_file() => Ok(root.to_owned()),
        Err(_) => Err(format!("{} is no git repository", root.display())),
    }
}

/// The commit that is checked out; `none` before the first.
fn head(git: &Path) -> Result<String, String> {
    let text = read_text(&git.join("HEAD"))?.ok_or_else(|| format!("{} has no HEAD", git.display()))?;
    match text.trim().strip_prefix("ref: ") {
        Some(name) => Ok(resolve(git, name, 0)?.unwrap_or_else(|| "none".to_owned())),
        None if is_commit(text.trim()) => Ok(text.trim().to_owned()),
        None => Err(format!("{} names no commit", git.join("HEAD").display())),
    }
}

/// What a work tree of its own shares with the repository that it belongs to: branches and objects.
pub(super) fn common_dir(git: &Path) -> Result<PathBuf, String> {
    Ok(match read_text(&git.join("commondir"))? {
        Some(dir) => git.join(dir.trim()),
        None => git.to_owned(),
    })
}

/// Finds the commit of a reference of git; `None` when there is no such reference.
fn resolve(git: &Path, name: &str, depth: u32) -> Result<Option<String>, String> {
    let plain = Path::new(name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if !plain || depth > 5 {
        return Err(format!("{name:?} is no reference of git"));
    }
    let common = common_dir(git)?;
    for dir in [git, common.as_path()] {
        if let Some(text) = read_text(&dir.join(name))? {
            return match text.trim().strip_prefix("ref: ") {
                Some(next) => resolve(git, next, depth + 1),
                // By a link it may be any file of this host, of which nothing is shown.
                None if !is_commit(text.trim()) => Err(format!("{} names no commit", dir.join(name).display())),
                None => Ok(Some(text.trim().to_owned())),
            };
        }
    }
    let packed = read_text(&common.join("packed-refs"))?.unwrap_or_default();
    Ok(packed.lines().find_map(|line| line.strip_suffix(name)?.strip_suffix(' ')).map(str::to_owned))
}

fn read_text(path: &Path) -> Result<Option<String>, String> {
    Ok(read(path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, String> {
    match fs::metadata(path) {
        Ok(meta) if !meta.is_file() => return Ok(None),
        Ok(meta) if meta.len() > MOST_GIT => return Err(format!("{} has {} bytes, which is too much", path.display(), meta.len())),
        _ => {}
    }
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::process::Command;

    use super::*;

    fn fingerprint_of(reference: &Reference) -> String {
        fingerprint(reference, &mut Seen::default()).unwrap().unwrap()
    }

    #[test]
    fn everything_that_makes_another_flake_makes_another_fingerprint() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let reference = Reference::Path { dir: dir.path().into() };
        let mut all = vec![fingerprint_of(&reference)];
        fs::create_dir_all(path("sub/empty")).unwrap();
        let changes: [&dyn Fn(); 7] = [
            &|| fs::write(path("flake.nix"), "{}").unwrap(),
            &|| fs::write(path("flake.nix"), "{ }").unwrap(),
            &|| fs::set_permissions(path("flake.nix"), fs::Permissions::from_mode(0o755)).unwrap(),
            &|| fs::rename(path("flake.nix"), path("sub/flake.nix")).unwrap(),
            &|| symlink("a", path("link")).unwrap(),
            &|| {
                fs::remove_file(path("link")).unwrap();
                symlink("b", path("link")).unwrap();
            },
            &|| {
                fs::remove_file(path("link")).unwrap();
                fs::write(path("link"), "b").unwrap();
            },
        ];
        for change in changes {
            change();
            all.push(fingerprint_of(&reference));
        }
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        // What is only touched is the same.
        fs::write(path("link"), "b").unwrap();
        fs::create_dir(path(".git")).unwrap();
        fs::write(path(".git/index"), "x").unwrap();
        assert_eq!(fingerprint_of(&reference), *all.last().unwrap());
    }

    #[test]
    fn what_was_seen_is_not_read_again_and_every_change_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("flake.nix");
        fs::write(&file, "one").unwrap();
        let reference = Reference::Path { dir: dir.path().into() };
        let mut seen = Seen::default();
        let first = fingerprint(&reference, &mut seen).unwrap();
        assert_eq!(seen, Seen::default(), "what changed just now is not taken for settled");
        // As if it had been left alone: the content of the cache is believed.
        let meta = fs::symlink_metadata(&file).unwrap();
        let mut still = BTreeMap::new();
        content_hash(Path::new("flake.nix"), &file, &meta, i128::MAX, &Seen::default(), &mut still).unwrap();
        still.get_mut(Path::new("flake.nix")).unwrap().blake3 = "believed".into();
        let mut seen = Seen { files: still };
        assert_ne!(fingerprint(&reference, &mut seen).unwrap(), first);
        // The same size and time, and another content: the change of the inode's time tells.
        fs::write(&file, "two").unwrap();
        File::options().write(true).open(&file).unwrap().set_modified(meta.modified().unwrap()).unwrap();
        let changed = fingerprint(&reference, &mut seen).unwrap();
        assert_eq!(changed, fingerprint(&reference, &mut Seen::default()).unwrap());
        assert_ne!(changed, first);
    }

    #[test]
    fn a_repository_is_what_git_tracks() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let output = Command::new("git")
                .args(["-c", "user.name=t", "-c", "user.email=t@example.org", "-C"])
                .arg(dir.path())
                .args(args)
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        git(&["init", "-q", "-b", "main"]);
        let reference = Reference::Git { root: dir.path().into(), dir: None, branch: None, rev: None };
        let empty = fingerprint_of(&reference);
        fs::write(dir.path().join("flake.nix"), "{}").unwrap();
        assert_eq!(fingerprint_of(&reference), empty, "git does not know of it");
        git(&["add", "flake.nix"]);
        let added = fingerprint_of(&reference);
        assert!(has(&reference, "flake.nix").unwrap());
        assert_ne!(added, empty);
        git(&["commit", "-q", "-m", "first"]);
        let committed = fingerprint_of(&reference);
        assert_ne!(committed, added, "nix locks another revision");
        fs::write(dir.path().join("untracked"), "x").unwrap();
        assert!(!has(&reference, "untracked").unwrap());
        git(&["status"]);
        assert_eq!(fingerprint_of(&reference), committed);
        fs::write(dir.path().join("flake.nix"), "{ }").unwrap();
        assert_ne!(fingerprint_of(&reference), committed);
        let main = Reference::Git { root: dir.path().into(), dir: None, branch: Some("main".into()), rev: None };
        let commit = fingerprint_of(&main);
        assert!(commit.starts_with("rev:") && commit.len() == 44, "{commit}");
        git(&["pack-refs", "--all"]);
        assert_eq!(fingerprint_of(&main), commit);
        let work = dir.path().join("work");
        git(&["worktree", "add", "-q", "-b", "other", work.to_str().unwrap()]);
        let other = Reference::Git { root: work, dir: None, branch: None, rev: None };
        assert_eq!(fingerprint_of(&other), committed, "the same commit without changes, in another work tree");
        let missing = Reference::Git { root: dir.path().into(), dir: None, branch: Some("none".into()), rev: None };
        assert!(fingerprint(&missing, &mut Seen::default()).unwrap_err().contains("no branch or tag \"none\""));
    }

    #[test]
    fn an_index_that_does_not_list_all_files_is_refused_with_what_makes_it_whole() {
        let dir = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let output = Command::new("git").arg("-C").arg(dir.path()).args(args).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        };
        git(&["init", "-q", "--object-format=sha256", "-b", "main"]);
        fs::write(dir.path().join("flake.nix"), "{}").unwrap();
        git(&["add", "flake.nix"]);
        let reference = Reference::Git { root: dir.path().into(), dir: None, branch: None, rev: None };
        let whole = fingerprint_of(&reference);
        fs::write(dir.path().join("flake.nix"), "{ }").unwrap();
        assert_ne!(fingerprint_of(&reference), whole);
        git(&["update-index", "--split-index"]);
        let refused = fingerprint(&reference, &mut Seen::default()).unwrap_err();
        assert!(refused.contains("git update-index --no-split-index"), "{refused}");
        git(&["update-index", "--no-split-index"]);
        assert_ne!(fingerprint_of(&reference), whole);
    }

    #[test]
    fn a_flake_that_is_too_large_is_refused_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("hole")).unwrap().set_len(7 << 40).unwrap();
        let reference = Reference::Path { dir: dir.path().into() };
        let refused = fingerprint(&reference, &mut Seen::default()).unwrap_err();
        assert!(refused.contains("more than 2048 MiB with hole"), "{refused}");
    }

    #[test]
    fn a_file_that_is_a_link_or_a_pipe_by_now_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "x").unwrap();
        let meta = fs::symlink_metadata(&path).unwrap();
        let read = || content_hash(Path::new("file"), &path, &meta, 0, &Seen::default(), &mut BTreeMap::new());
        read().unwrap();
        fs::remove_file(&path).unwrap();
        symlink("/etc/hostname", &path).unwrap();
        read().unwrap_err();
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(read().unwrap_err().to_string().contains("it changes while it is read"));
    }

    #[test]
    fn what_is_no_commit_is_not_taken_for_one_nor_shown() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".git/refs/heads")).unwrap();
        symlink("/etc/hostname", dir.path().join(".git/refs/heads/main")).unwrap();
        let reference = |branch: Option<&str>, rev: Option<&str>| Reference::Git {
            root: dir.path().into(),
            dir: None,
            branch: branch.map(str::to_owned),
            rev: rev.map(str::to_owned),
        };
        let refused = commit(&reference(Some("main"), None)).unwrap_err();
        assert!(refused.ends_with("refs/heads/main names no commit"), "{refused}");
        assert!(commit(&reference(None, Some("abc"))).unwrap_err().contains("write its whole name"));
        let whole = "0".repeat(40);
        assert_eq!(commit(&reference(Some("main"), Some(&whole))), Ok(Some(whole)));
    }

    #[test]
    fn a_pipe_in_a_flake_is_refused_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let reference = Reference::Path { dir: dir.path().into() };
        assert!(fingerprint(&reference, &mut Seen::default()).unwrap_err().contains("neither a file"));
    }
}
