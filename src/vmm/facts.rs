//! What was found out about a VMM on this host by trying, remembered until the host reboots or the program changes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::infra::process::host_boot_id;

/// What makes the facts stale when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    boot: String,
    binary: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    changed_ns: i128,
}

impl Key {
    /// Looks at a program.
    pub(super) fn of(binary: &Path) -> io::Result<Self> {
        let meta = fs::metadata(binary)?;
        Ok(Self {
            boot: host_boot_id().as_ref().to_owned(),
            binary: binary.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            changed_ns: i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()),
        })
    }
}

/// Reads what was remembered; `None` when there is nothing that can be read.
pub(super) fn read<T: DeserializeOwned>(file: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

/// Remembers it. Failing to is no failure of what was asked: it is found out again next time.
pub(super) fn write<T: Serialize>(file: &Path, facts: &T) -> io::Result<()> {
    let dir = file.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = tempfile::NamedTempFile::new_in(dir)?;
    serde_json::to_writer_pretty(&mut temporary, facts)?;
    temporary.persist(file).map_err(|error| error.error)?;
    Ok(())
}

/// Names the host's CPU: the model, and a hash of its features, which a kernel or microcode update can change.
pub(super) fn host_cpu(cpuinfo: &str) -> String {
    let value = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().map(str::trim) == Some(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let mut features: Vec<String> = value("flags").unwrap_or_default().split_ascii_whitespace().map(str::to_owned).collect();
    features.sort_unstable();
    let model: Vec<String> =
        ["model name", "cpu family", "model", "stepping"].iter().map(|name| value(name).unwrap_or_else(|| "?".into())).collect();
    let hash = blake3::hash(features.join(" ").as_bytes()).to_hex();
    format!("{} ({}.{}.{}) features {}", model[0], model[1], model[2], model[3], &hash[..8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_cpu_is_named_with_its_features() {
        let info = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nstepping\t: 1\nflags\t\t: fpu vme\n";
        let name = host_cpu(info);
        assert!(name.starts_with("AMD EPYC (25.1.1) features "), "{name}");
        assert_ne!(name, host_cpu(&info.replace("vme", "vme avx")));
        assert_eq!(name, host_cpu(&info.replace("fpu vme", "vme fpu")));
    }
}
