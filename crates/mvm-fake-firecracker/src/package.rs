//! What a copy of this program takes along: the guest agent, a script, and programs for the guest, behind the program.
//!
//! A jail has neither other files nor an environment. Such a copy is written by
//!
//! ```text
//! fake-firecracker --pack OUT --agent FILE [--script FILE] [--file /bin/sh=FILE]…
//!
//! OUT: the program | the files, one after another | an index as JSON | its length (8 bytes) | a mark (16 bytes)
//! ```

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use crate::options::Pack;

const MARK: &[u8; 16] = b"mvm-fake-package";
const TAIL: u64 = 24;
/// Names in the index; all others are files of the guest.
const AGENT: &str = "agent";
const SCRIPT: &str = "script";
/// Beside the program, for whoever packs nothing.
const AGENT_BESIDE: &str = "mvm-guest-agent";
const SCRIPT_BESIDE: &str = "fake-firecracker.json";

/// What was taken along.
#[derive(Debug, Default)]
pub struct Package {
    entries: Vec<(String, Vec<u8>)>,
    beside: Option<PathBuf>,
}

/// A guest agent that can be started.
#[derive(Debug)]
pub enum AgentProgram {
    /// Taken along.
    Memory(OwnedFd),
    /// A file.
    File(PathBuf),
}

impl Package {
    /// Of this very program. In a jail without `/proc` the program is where the jailer puts it.
    pub fn open() -> Self {
        let own = std::env::current_exe().ok().or_else(|| std::env::args_os().next().map(PathBuf::from)).filter(|path| path.is_file());
        let Some(own) = own else { return Self::default() };
        Self { entries: read(&own).unwrap_or_default(), beside: own.parent().map(Path::to_owned) }
    }

    fn entry(&self, name: &str) -> Option<&[u8]> {
        self.entries.iter().find(|(other, _)| other == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// The script's text: packed, of the environment, or beside the program.
    pub fn script(&self) -> Result<Option<String>, String> {
        if let Some(script) = self.entry(SCRIPT) {
            return Ok(Some(String::from_utf8_lossy(script).into_owned()));
        }
        match std::env::var("FAKE_FIRECRACKER_SCRIPT") {
            Ok(text) if text.trim_start().starts_with('{') => Ok(Some(text)),
            Ok(path) => fs::read_to_string(&path).map(Some).map_err(|error| format!("{path}: {error}")),
            Err(_) => Ok(self.beside.as_ref().and_then(|dir| fs::read_to_string(dir.join(SCRIPT_BESIDE)).ok())),
        }
    }

    /// The guest agent: packed, of the environment, or beside the program.
    pub fn agent(&self) -> std::io::Result<Option<AgentProgram>> {
        if let Some(bytes) = self.entry(AGENT) {
            let memory = rustix::fs::memfd_create("guest-agent", MemfdFlags::CLOEXEC)?;
            File::from(memory.try_clone()?).write_all(bytes)?;
            return Ok(Some(AgentProgram::Memory(memory)));
        }
        let named = std::env::var_os("MVM_FAKE_AGENT").map(PathBuf::from);
        let beside = self.beside.as_ref().map(|dir| dir.join(AGENT_BESIDE)).filter(|path| path.is_file());
        Ok(named.or(beside).map(AgentProgram::File))
    }

    /// Puts the guest's files where it looks for them, which is in the jail: nothing is written where there is a `/proc`.
    pub fn furnish(&self) -> std::io::Result<()> {
        if Path::new("/proc").exists() {
            return Ok(());
        }
        // As empty as the device that a jail does not have, for commands without input.
        let nothing = ("/dev/null".to_owned(), Vec::new());
        let files = self.entries.iter().filter(|(name, _)| name.starts_with('/'));
        for (name, bytes) in files.chain([&nothing]) {
            let path = Path::new(name);
            if !path.exists() {
                fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
                fs::write(path, bytes)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
            }
        }
        Ok(())
    }
}

fn read(own: &Path) -> std::io::Result<Vec<(String, Vec<u8>)>> {
    let mut file = File::open(own)?;
    let end = file.seek(SeekFrom::End(0))?;
    let mut before = |end: u64, length: u64| {
        let mut bytes = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
        let at = end.checked_sub(length).ok_or(std::io::ErrorKind::InvalidData)?;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut bytes)?;
        std::io::Result::Ok((at, bytes))
    };
    let (end, tail) = before(end, TAIL)?;
    let Some(length) = tail.strip_suffix(MARK) else { return Ok(Vec::new()) };
    let length = u64::from_le_bytes(length.try_into().map_err(std::io::Error::other)?);
    let (mut end, index) = before(end, length)?;
    let index: Vec<(String, u64)> = serde_json::from_slice(&index)?;
    let mut entries = Vec::with_capacity(index.len());
    for (name, length) in index.into_iter().rev() {
        let (at, bytes) = before(end, length)?;
        end = at;
        entries.push((name, bytes));
    }
    Ok(entries)
}

/// Writes a copy that takes everything along.
pub fn pack(pack: &Pack) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let bytes = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let mut copy = bytes(&own)?;
    let mut index = Vec::new();
    let named = [(AGENT, &pack.agent), (SCRIPT, &pack.script)].into_iter().filter_map(|(name, path)| Some((name, path.as_deref()?)));
    for (name, path) in named.chain(pack.files.iter().map(|(name, path)| (name.as_str(), path.as_path()))) {
        let content = bytes(path)?;
        copy.extend_from_slice(&content);
        index.push((name, content.len()));
    }
    let index = serde_json::to_vec(&index).map_err(|error| error.to_string())?;
    copy.extend_from_slice(&index);
    copy.extend((index.len() as u64).to_le_bytes());
    copy.extend(MARK);
    let written = fs::write(&pack.to, copy).and_then(|()| fs::set_permissions(&pack.to, fs::Permissions::from_mode(0o755)));
    written.map_err(|error| format!("{}: {error}", pack.to.display()))
}
