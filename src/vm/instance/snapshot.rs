//! What a snapshot depends on, and whether it may be woken.
//!
//! The manifest is written last and removed first: without it, files in a snapshot directory are no snapshot of anything.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use mvm_types::{InstanceAddress, NodeId, RevisionId};
use serde::{Deserialize, Serialize};

use super::config::InstanceDoc;
use super::state::InstanceState;
use crate::infra::clock::Moment;
use crate::store::Document;
use crate::vm::keys;
use crate::vm::pool::InstanceResources;
use crate::vmm::VmmStamp;
use crate::vmm::files::open_plain;

/// `snapshot/manifest.json` below the instance's directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// The document's version.
    pub version: u32,
    /// The node that made it.
    pub node: NodeId,
    /// The instance, as `tenant/pool/instance`.
    pub instance: String,
    /// The image that the guest booted from.
    pub revision: Option<RevisionId>,
    /// What the guest had.
    pub resources: InstanceResources,
    /// The VMM that made it.
    pub stamp: VmmStamp,
    /// When.
    pub taken: Moment,
    /// Its files by name.
    pub files: BTreeMap<String, FileHash>,
}

impl Document for SnapshotManifest {
    const KIND: &'static str = "snapshot manifest";
    const VERSION: u32 = 1;
    fn version(&self) -> u32 {
        self.version
    }
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Its length in bytes.
    pub len: u64,
    /// BLAKE3 over its chunks of 64 KiB that are not all zeros, each after its offset (8 bytes, little endian); in hex.
    pub blake3: String,
}

/// Why a snapshot cannot be woken.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is none.
    #[error(
        "the snapshot of {instance} is not there or was never finished; `mvm instance stop` and `start` boot it afresh with its data disk"
    )]
    Missing {
        /// The instance.
        instance: String,
    },
    /// It was made under other conditions.
    #[error(
        "the snapshot of {instance} cannot be woken here: {what} was {was:?} and is {is:?}; `mvm instance stop` and `start` boot it afresh with its data disk"
    )]
    Mismatch {
        /// The instance.
        instance: String,
        /// What differs.
        what: &'static str,
        /// When it was made.
        was: String,
        /// Now.
        is: String,
    },
    /// It is not the one that the instance went to sleep with.
    #[error(
        "the snapshot of {instance} is not the one that it went to sleep with, but one of {taken}; `mvm instance stop` and `start` boot it afresh with its data disk"
    )]
    Older {
        /// The instance.
        instance: String,
        /// When it was taken.
        taken: String,
    },
    /// It is whole, and the VMM does not take it.
    #[error("the snapshot of {instance} cannot be woken: {why}; `mvm instance stop` and `start` boot it afresh with its data disk")]
    Refused {
        /// The instance.
        instance: String,
        /// What the VMM says.
        why: String,
    },
    /// A file is not what was written.
    #[error(
        "the snapshot of {instance} is damaged: {file} is not what was written; `mvm instance stop` and `start` boot it afresh with its data disk"
    )]
    Damaged {
        /// The instance.
        instance: String,
        /// The file.
        file: String,
    },
    /// A file cannot be read.
    #[error("cannot read {file} of the snapshot of {instance}")]
    Io {
        /// The instance.
        instance: String,
        /// The file.
        file: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// The key of an instance's manifest.
pub fn manifest_key(at: &InstanceAddress) -> String {
    format!("{}/snapshot/manifest.json", keys::instance_dir(at))
}

impl SnapshotManifest {
    /// Describes the files of a finished snapshot.
    pub fn describe(
        node: &NodeId,
        doc: &InstanceDoc,
        stamp: VmmStamp,
        taken: Moment,
        dir: &Path,
        names: &[&str],
    ) -> Result<Self, SnapshotError> {
        let instance = doc.at().to_string();
        let mut files = BTreeMap::new();
        for name in names {
            let hash = hash_file(&dir.join(name)).map_err(|source| SnapshotError::Io {
                instance: instance.clone(),
                file: (*name).to_owned(),
                source,
            })?;
            files.insert((*name).to_owned(), hash);
        }
        Ok(Self {
            version: Self::VERSION,
            node: node.clone(),
            instance,
            revision: doc.revision.clone(),
            resources: doc.blueprint.resources.clone(),
            stamp,
            taken,
            files,
        })
    }

    /// Checks that the snapshot is of this instance and was made under the present conditions; reads no file.
    pub fn check_conditions(&self, node: &NodeId, doc: &InstanceDoc, stamp: &VmmStamp) -> Result<(), SnapshotError> {
        let json = |value: &InstanceResources| serde_json::to_string(value).unwrap_or_default();
        let revision = |value: &Option<RevisionId>| value.as_ref().map(ToString::to_string).unwrap_or_default();
        let text = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let conditions = [
            ("the instance", self.instance.clone(), doc.at().to_string()),
            ("the node", self.node.to_string(), node.to_string()),
            ("the image", revision(&self.revision), revision(&doc.revision)),
            ("what the guest has", json(&self.resources), json(&doc.blueprint.resources)),
            ("the VMM", self.stamp.vmm.as_str().to_owned(), stamp.vmm.as_str().to_owned()),
            ("the VMM's build", self.stamp.build.clone(), stamp.build.clone()),
            ("the acceleration", text(&self.stamp.acceleration), text(&stamp.acceleration)),
            ("the CPU model", self.stamp.cpu.clone(), stamp.cpu.clone()),
        ];
        if let Some((what, was, is)) = conditions.into_iter().find(|(_, was, is)| was != is) {
            return Err(SnapshotError::Mismatch { instance: doc.at().to_string(), what, was, is });
        }
        match &doc.state {
            // One from before: the guest ran on since then, and its disk with it.
            InstanceState::Sleeping { snapshot: Some(last), .. } if *last != self.id() => {
                Err(SnapshotError::Older { instance: doc.at().to_string(), taken: self.taken.to_rfc3339() })
            }
            _ => Ok(()),
        }
    }

    /// Names just this snapshot: whose it is, when it was taken, and what its files hold.
    pub fn id(&self) -> String {
        let all = serde_json::to_vec(&(&self.instance, &self.taken, &self.files)).unwrap_or_default();
        blake3::hash(&all).to_hex()[..32].to_owned()
    }

    /// Checks that every file is what was written.
    pub fn check_files(&self, dir: &Path) -> Result<(), SnapshotError> {
        for (name, expected) in &self.files {
            let found = hash_file(&dir.join(name));
            match found {
                Ok(found) if found == *expected => {}
                Ok(_) => return Err(SnapshotError::Damaged { instance: self.instance.clone(), file: name.clone() }),
                Err(source) => return Err(SnapshotError::Io { instance: self.instance.clone(), file: name.clone(), source }),
            }
        }
        Ok(())
    }
}

const CHUNK: usize = 64 * 1024;

/// Hashes a file that has this name only, and which may be sparse: holes are not read, and chunks of zeros count as holes.
pub fn hash_file(path: &Path) -> io::Result<FileHash> {
    let file = open_plain(path, rustix::fs::OFlags::RDONLY)?;
    let len = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0_u8; 1024 * 1024];
    let mut at = 0;
    while at < len {
        at = match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
            // Extents need not begin on a chunk of ours.
            Ok(data) => data - data % CHUNK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        // The chunk may begin in a hole before its data: look for the end of the data behind its start.
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at))?;
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data))?;
        while at < hole.min(len) {
            let wanted = buffer.len().min(usize::try_from(len - at).unwrap_or(usize::MAX));
            let wanted = wanted.min(usize::try_from((hole - at).next_multiple_of(CHUNK as u64)).unwrap_or(usize::MAX));
            file.read_exact_at(&mut buffer[..wanted], at)?;
            for (index, chunk) in buffer[..wanted].chunks(CHUNK).enumerate() {
                if !is_zero(chunk) {
                    hasher.update(&(at + (index * CHUNK) as u64).to_le_bytes());
                    hasher.update(chunk);
                }
            }
            at += wanted as u64;
        }
    }
    Ok(FileHash { len, blake3: hasher.finalize().to_hex().to_string() })
}

fn is_zero(chunk: &[u8]) -> bool {
    let (words, rest) = chunk.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    #[test]
    fn holes_and_zeros_hash_alike_and_every_changed_byte_shows() {
        let dir = tempfile::tempdir().unwrap();
        let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
        let mut file = File::create(&sparse).unwrap();
        file.seek(SeekFrom::Start(3_000_001)).unwrap();
        file.write_all(b"data").unwrap();
        file.set_len(9_000_000).unwrap();
        std::fs::write(&full, std::fs::read(&sparse).unwrap()).unwrap();
        let hash = hash_file(&sparse).unwrap();
        assert_eq!(hash_file(&full).unwrap(), hash);
        for at in [0_u64, 3_000_001, 3_000_004, 8_999_999] {
            let file = File::options().read(true).write(true).open(&full).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert_ne!(hash_file(&full).unwrap(), hash, "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        File::options().write(true).open(&full).unwrap().set_len(8_999_999).unwrap();
        assert_ne!(hash_file(&full).unwrap(), hash);
        assert_eq!(hash_file(&dir.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&full, b"").unwrap();
        assert_eq!(hash_file(&full).unwrap().len, 0);
    }
}
