//! Takes the files of a commit out of a repository of this host, without running anything that the repository names.
//!
//! ```text
//!  objects of the repository ─┐
//!                             ├─ git ls-tree, git cat-file --batch, as the repository's owner ─> files
//!  a configuration of ours ───┘
//! ```
//!
//! The repository's configuration, hooks, attributes and remotes are not read: filters, lazy fetches and the like are somebody else's
//! commands. As the owner's process git reads nothing by a link or an alternate that he could not read himself.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::fingerprint::{common_dir, git_dir};
use super::process::{Reader, Run, User};
use super::tree::{Tree, Trouble};
use super::{BuildError, host};

/// The most files of a commit.
const MOST_FILES: usize = 200_000;
/// What git may tell of their names, in bytes.
const MOST_LIST: usize = 64 << 20;
/// The longest symbolic link, in bytes (Linux `PATH_MAX`).
const MOST_LINK: u64 = 4096;

/// What a commit has.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    path: PathBuf,
    form: Form,
    object: String,
    size: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    File,
    Program,
    Link,
}

/// Writes the files of a commit into a tree.
pub(super) fn export(run: &Run<'_>, root: &Path, commit: &str, scratch: &Path, mut tree: Tree<'_>) -> Result<(), Trouble> {
    let git = git_dir(root).map_err(Trouble::Sources)?;
    let objects = common_dir(&git).map_err(Trouble::Sources)?.join("objects");
    let user = owner(root, &git);
    let own = lay_out(scratch, commit.len() == SHA256).map_err(Trouble::Ended)?;
    let of = |args: &[&str], input: Option<File>, sink: &mut dyn FnMut(&[u8]) -> Result<(), BuildError>| {
        let args: Vec<&OsStr> = args.iter().map(OsStr::new).collect();
        let env = [
            ("GIT_DIR", own.as_os_str()),
            ("GIT_OBJECT_DIRECTORY", objects.as_os_str()),
            ("GIT_CONFIG_NOSYSTEM", OsStr::new("1")),
            ("GIT_CONFIG_GLOBAL", OsStr::new("/dev/null")),
            ("GIT_ATTR_NOSYSTEM", OsStr::new("1")),
            ("GIT_NO_REPLACE_OBJECTS", OsStr::new("1")),
            ("GIT_NO_LAZY_FETCH", OsStr::new("1")),
            ("GIT_ALLOW_PROTOCOL", OsStr::new("")),
            ("GIT_OPTIONAL_LOCKS", OsStr::new("0")),
            ("GIT_TERMINAL_PROMPT", OsStr::new("0")),
            ("HOME", own.as_os_str()),
        ];
        let reader = Reader { program: "git", package: "git", args: &args, env: &env, input, user };
        let (status, said) = run.reader(reader, sink).map_err(Trouble::Ended)?;
        if status.success() { Ok(()) } else { Err(Trouble::Sources(format!("git cannot read {}: {said}", root.display()))) }
    };
    let mut list = Vec::new();
    let mut too_long = false;
    of(&["ls-tree", "-r", "-l", "-z", "--full-tree", commit], None, &mut |bytes| {
        too_long |= list.len() + bytes.len() > MOST_LIST;
        if !too_long {
            list.extend_from_slice(bytes);
        }
        Ok(())
    })?;
    let many = || Trouble::Sources(format!("{} has more than {MOST_FILES} files", root.display()));
    if too_long {
        return Err(many());
    }
    let entries = parse_list(&list).map_err(Trouble::Sources)?;
    if entries.len() > MOST_FILES {
        return Err(many());
    }
    let failed = |error: std::io::Error| Trouble::Sources(format!("the list of a commit's files: {error}"));
    let mut wanted = tempfile::tempfile().map_err(failed)?;
    for entry in &entries {
        tree.take_room(entry.size)?;
        writeln!(wanted, "{}", entry.object).map_err(failed)?;
    }
    wanted.seek(SeekFrom::Start(0)).map_err(failed)?;
    let mut batch = Batch { entries: &entries, next: 0, state: State::Header(Vec::new()), tree, trouble: None };
    of(&["cat-file", "--batch"], Some(wanted), &mut |bytes| {
        if batch.trouble.is_none() {
            batch.trouble = batch.take(bytes).err();
        }
        // Only a wish to end ends it at once; for the rest what git says is more.
        match batch.trouble.take() {
            Some(Trouble::Ended(error)) => Err(error),
            trouble => {
                batch.trouble = trouble;
                Ok(())
            }
        }
    })?;
    batch.end()
}

/// The length of a commit's name in a repository with SHA-256, in digits.
const SHA256: usize = 64;

/// A repository of ours with nothing in it, for the objects of another one.
fn lay_out(scratch: &Path, sha256: bool) -> Result<PathBuf, BuildError> {
    let own = scratch.join("git");
    for dir in ["refs", "objects"] {
        let path = own.join(dir);
        fs::create_dir_all(&path).map_err(BuildError::at(&path))?;
    }
    let config = if sha256 {
        "[core]\n\trepositoryformatversion = 1\n\tbare = true\n[extensions]\n\tobjectformat = sha256\n"
    } else {
        "[core]\n\trepositoryformatversion = 0\n\tbare = true\n"
    };
    for (name, content) in [("HEAD", "ref: refs/heads/none\n"), ("config", config)] {
        let path = own.join(name);
        fs::write(&path, content).map_err(BuildError::at(&path))?;
    }
    Ok(own)
}

/// Reads `git ls-tree -r -l -z`: `MODE TYPE OBJECT SIZE\tPATH\0`. Submodules, which nix leaves out, are left out.
fn parse_list(list: &[u8]) -> Result<Vec<Entry>, String> {
    const ODD: &str = "git tells of its files in a way that is not known";
    let mut entries = Vec::new();
    for line in list.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
        let tab = line.iter().position(|byte| *byte == b'\t').ok_or(ODD)?;
        let words = std::str::from_utf8(&line[..tab]).map_err(|_| ODD)?;
        let [mode, _kind, object, size] = words.split_ascii_whitespace().collect::<Vec<_>>()[..] else { return Err(ODD.to_owned()) };
        let form = match mode {
            "100644" | "100664" => Form::File,
            "100755" => Form::Program,
            "120000" => Form::Link,
            "160000" => continue,
            _ => return Err(ODD.to_owned()),
        };
        let path = PathBuf::from(OsString::from_vec(line[tab + 1..].to_vec()));
        let plain = path.components().all(|part| matches!(part, Component::Normal(name) if !name.eq_ignore_ascii_case(".git")));
        if !plain {
            return Err(format!("it has a file {:?}, which leads out of it", path.display().to_string()));
        }
        let size = size.parse().map_err(|_| ODD)?;
        if form == Form::Link && size > MOST_LINK {
            return Err(format!("its symbolic link {:?} is longer than {MOST_LINK} bytes", path.display().to_string()));
        }
        entries.push(Entry { path, form, object: object.to_owned(), size });
    }
    Ok(entries)
}

/// Takes the stream of `git cat-file --batch`: `OBJECT TYPE SIZE\n`, the content, `\n`, for each that was asked for.
struct Batch<'a, 't> {
    entries: &'a [Entry],
    next: usize,
    state: State,
    tree: Tree<'t>,
    trouble: Option<Trouble>,
}

enum State {
    Header(Vec<u8>),
    File {
        to: File,
        left: u64,
    },
    Link {
        target: Vec<u8>,
        left: u64,
    },
    /// The end of line after a content.
    End,
}

impl Batch<'_, '_> {
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), Trouble> {
        const LONGEST_HEADER: usize = 200;
        while let Some((first, after)) = bytes.split_first() {
            match &mut self.state {
                State::Header(header) if *first != b'\n' && header.len() < LONGEST_HEADER => {
                    header.push(*first);
                    bytes = after;
                }
                State::Header(header) => {
                    let header = std::mem::take(header);
                    self.begin(&header)?;
                    bytes = after;
                }
                State::File { to, left } => {
                    let (piece, rest) = split(bytes, *left);
                    let shown = &self.entries[self.next].path;
                    to.write_all(piece).map_err(|error| Trouble::Sources(format!("{}: {error}", shown.display())))?;
                    *left -= piece.len() as u64;
                    bytes = rest;
                }
                State::Link { target, left } => {
                    let (piece, rest) = split(bytes, *left);
                    target.extend_from_slice(piece);
                    *left -= piece.len() as u64;
                    bytes = rest;
                }
                State::End => {
                    self.state = State::Header(Vec::new());
                    bytes = after;
                }
            }
            self.complete();
        }
        Ok(())
    }

    fn begin(&mut self, header: &[u8]) -> Result<(), Trouble> {
        let entry = self.entries.get(self.next).ok_or_else(|| Trouble::Sources("git gives more than was asked for".to_owned()))?;
        if header != format!("{} blob {}", entry.object, entry.size).as_bytes() {
            let said = super::printable(&String::from_utf8_lossy(header));
            return Err(Trouble::Sources(format!("git does not give the content of {}: {said}", entry.path.display())));
        }
        self.state = match entry.form {
            Form::Link => State::Link { target: Vec::new(), left: entry.size },
            form => State::File { to: self.tree.file(&entry.path, form == Form::Program)?, left: entry.size },
        };
        self.complete();
        Ok(())
    }

    /// Goes on to the next when a content is whole.
    fn complete(&mut self) {
        match &mut self.state {
            State::File { left: 0, .. } => {}
            State::Link { target, left: 0 } => {
                let target = OsString::from_vec(std::mem::take(target));
                self.tree.link(self.entries[self.next].path.clone(), target);
            }
            _ => return,
        }
        self.next += 1;
        self.state = State::End;
    }

    fn end(self) -> Result<(), Trouble> {
        if let Some(trouble) = self.trouble {
            return Err(trouble);
        }
        if self.next < self.entries.len() {
            return Err(Trouble::Sources(format!("git does not give the content of {}", self.entries[self.next].path.display())));
        }
        self.tree.finish()
    }
}

fn split(bytes: &[u8], left: u64) -> (&[u8], &[u8]) {
    bytes.split_at(bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)))
}

/// Whose repository it is, if not mvm's own. A work tree may say that its repository is somebody else's: that makes it his no more.
fn owner(root: &Path, git: &Path) -> Option<User> {
    let me = rustix::process::geteuid().as_raw();
    let owners = [root, git].into_iter().filter_map(|path| fs::metadata(path).ok());
    owners.map(|meta| User { uid: meta.uid(), gid: meta.gid() }).find(|user| user.uid != me)
}

/// Says what is to be done about a repository that git refuses to read for this user.
///
/// # Errors
/// When it refuses.
pub(super) fn check_owner(
    root: &Path,
    attribute: &str,
    limits: &super::Limits,
    work: &Path,
    watch: &dyn super::BuildWatch,
) -> Result<(), Trouble> {
    let git = git_dir(root).map_err(Trouble::Sources)?;
    let me = rustix::process::geteuid().as_raw();
    let Some(User { uid: owner, .. }) = owner(root, &git) else { return Ok(()) };
    // Git knows best: it may have been told to trust the directory.
    let said = host::in_scratch(work, |scratch| {
        let run = Run::new(attribute, limits, scratch, watch);
        let env: Vec<(&'static str, OsString)> =
            ["HOME", "XDG_CONFIG_HOME", "SUDO_UID"].into_iter().filter_map(|name| Some((name, std::env::var_os(name)?))).collect();
        let env: Vec<(&'static str, &OsStr)> = env.iter().map(|(name, value)| (*name, value.as_os_str())).collect();
        let args = [OsStr::new("-C"), root.as_os_str(), OsStr::new("rev-parse"), OsStr::new("--git-dir")];
        let reader = Reader { program: "git", package: "git", args: &args, env: &env, input: None, user: None };
        run.reader(reader, &mut |_| Ok(()))
    })
    .map_err(Trouble::Ended)?;
    let (status, said) = said;
    if status.success()
        || !(said.contains("dubious ownership") || said.contains("safe.directory") || said.contains("is owned by someone else"))
    {
        return Ok(());
    }
    Err(Trouble::Sources(format!(
        "the repository {root} belongs to user {owner}, and git refuses it to user {me}; allow it with `git config --global --add safe.directory {root}`, give it to user {me}, or build with `--builder vm`",
        root = root.display()
    )))
}
