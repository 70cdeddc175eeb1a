//! What a copy of this program takes along: the guest agent and a script, behind the program itself.
//!
//! A jail has neither other files nor an environment. `--pack OUT --agent FILE --script FILE` writes such a copy:
//!
//! ```text
//! the program | agent | script | length of agent (8) | length of script (8) | mark (16)
//! ```

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;

use crate::options::Pack;

const MARK: &[u8; 16] = b"mvm-fake-package";
/// Beside the program, for whoever packs nothing.
const AGENT_BESIDE: &str = "mvm-guest-agent";
const SCRIPT_BESIDE: &str = "fake-firecracker.json";

/// What was taken along.
#[derive(Debug, Default)]
pub struct Package {
    agent: Option<Vec<u8>>,
    script: Option<String>,
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
        let mut package = read(&own).unwrap_or_default();
        package.beside = own.parent().map(Path::to_owned);
        package
    }

    /// The script's text: packed, of the environment, or beside the program.
    pub fn script(&self) -> Result<Option<String>, String> {
        if let Some(script) = &self.script {
            return Ok(Some(script.clone()));
        }
        match std::env::var("FAKE_FIRECRACKER_SCRIPT") {
            Ok(text) if text.trim_start().starts_with('{') => Ok(Some(text)),
            Ok(path) => fs::read_to_string(&path).map(Some).map_err(|error| format!("{path}: {error}")),
            Err(_) => Ok(self.beside.as_ref().and_then(|dir| fs::read_to_string(dir.join(SCRIPT_BESIDE)).ok())),
        }
    }

    /// The guest agent: packed, of the environment, or beside the program.
    pub fn agent(&self) -> std::io::Result<Option<AgentProgram>> {
        if let Some(bytes) = &self.agent {
            let memory = rustix::fs::memfd_create("guest-agent", MemfdFlags::CLOEXEC)?;
            File::from(memory.try_clone()?).write_all(bytes)?;
            return Ok(Some(AgentProgram::Memory(memory)));
        }
        let named = std::env::var_os("MVM_FAKE_AGENT").map(PathBuf::from);
        let beside = self.beside.as_ref().map(|dir| dir.join(AGENT_BESIDE)).filter(|path| path.is_file());
        Ok(named.or(beside).map(AgentProgram::File))
    }
}

fn read(own: &Path) -> std::io::Result<Package> {
    let mut file = File::open(own)?;
    let mut tail = [0; 32];
    file.seek(SeekFrom::End(-32))?;
    file.read_exact(&mut tail)?;
    if &tail[16..] != MARK {
        return Ok(Package::default());
    }
    let length = |at: usize| u64::from_le_bytes(tail[at..at + 8].try_into().expect("eight bytes"));
    let (agent, script) = (length(0), length(8));
    let back = i64::try_from(32 + agent + script).map_err(std::io::Error::other)?;
    file.seek(SeekFrom::End(-back))?;
    let mut take = |length: u64| {
        let mut bytes = Vec::new();
        Read::by_ref(&mut file).take(length).read_to_end(&mut bytes).map(|_| (length > 0).then_some(bytes))
    };
    let agent = take(agent)?;
    let script = take(script)?.map(String::from_utf8).transpose().map_err(std::io::Error::other)?;
    Ok(Package { agent, script, beside: None })
}

/// Writes a copy that takes everything along.
pub fn pack(pack: &Pack) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let bytes = |path: &Path| fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
    let optional = |path: &Option<PathBuf>| path.as_deref().map(bytes).transpose().map(Option::unwrap_or_default);
    let (agent, script) = (optional(&pack.agent)?, optional(&pack.script)?);
    let mut copy = bytes(&own)?;
    for part in [&agent, &script] {
        copy.extend_from_slice(part);
    }
    copy.extend((agent.len() as u64).to_le_bytes());
    copy.extend((script.len() as u64).to_le_bytes());
    copy.extend(MARK);
    let written = fs::write(&pack.to, copy).and_then(|()| fs::set_permissions(&pack.to, fs::Permissions::from_mode(0o755)));
    written.map_err(|error| format!("{}: {error}", pack.to.display()))
}
