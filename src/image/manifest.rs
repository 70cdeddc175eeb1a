//! What an image consists of, written beside it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use mvm_types::RevisionId;
use serde::{Deserialize, Serialize};

use super::ImageError;

/// The name of the manifest in an image's directory.
pub const MANIFEST: &str = "manifest.json";
/// The version this code reads and writes.
const VERSION: u32 = 1;

/// The document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always 1.
    pub version: u32,
    /// Names the image by what went in.
    pub revision: RevisionId,
    /// What went in.
    pub inputs: Inputs,
    /// The kernel, to be booted directly.
    pub vmlinux: FileEntry,
    /// The initramfs.
    pub initrd: FileEntry,
    /// The root file system, shared and read-only.
    pub rootfs: FileEntry,
}

/// What went into an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// The package the kernel is from.
    pub kernel_package: String,
    /// Its version.
    pub kernel_version: String,
    /// As `uname -r` says in the guest.
    pub kernel_release: String,
    /// BLAKE3 of the kernel.
    pub kernel: String,
    /// BLAKE3 of the agent.
    pub agent: String,
    /// BLAKE3 of busybox.
    pub busybox: String,
    /// How the parts are put together; grows when that changes.
    pub recipe: u32,
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// In the image's directory.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// BLAKE3, in hexadecimal digits.
    pub blake3: String,
}

/// An image that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it lies.
    pub directory: PathBuf,
    /// What it consists of.
    pub manifest: Manifest,
}

impl Inputs {
    /// Names an image with these inputs.
    pub fn revision(&self) -> RevisionId {
        let text = serde_json::to_vec(self).expect("strings and numbers can be written");
        let hash = blake3::hash(&text);
        RevisionId::from_hash(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }
}

impl FileEntry {
    /// Measures a file.
    pub(super) fn of(directory: &Path, name: &str) -> Result<FileEntry, ImageError> {
        let path = directory.join(name);
        let size = fs::metadata(&path).map_err(ImageError::at(&path))?.len();
        Ok(FileEntry { name: name.to_owned(), size, blake3: hash_file(&path)? })
    }
}

/// BLAKE3 of a file, in hexadecimal digits.
pub(super) fn hash_file(path: &Path) -> Result<String, ImageError> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(ImageError::at(path))?;
    hasher.update_reader(file).map_err(ImageError::at(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

impl Image {
    /// Opens an image and compares the sizes of its files with the manifest; `None` when there is no such directory.
    ///
    /// # Errors
    /// When it is not what its manifest says.
    pub fn open(directory: &Path) -> Result<Option<Image>, ImageError> {
        if !directory.is_dir() {
            return Ok(None);
        }
        let damaged = |why: String| ImageError::Damaged { directory: directory.to_owned(), why };
        let path = directory.join(MANIFEST);
        let bytes = fs::read(&path).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        if manifest.version != VERSION {
            return Err(damaged(format!("its manifest has version {}, not {VERSION}", manifest.version)));
        }
        for file in [&manifest.vmlinux, &manifest.initrd, &manifest.rootfs] {
            if file.name.contains('/') || file.name.starts_with('.') {
                return Err(damaged(format!("its manifest names {:?}", file.name)));
            }
            match fs::metadata(directory.join(&file.name)) {
                Ok(meta) if meta.len() == file.size => {}
                Ok(meta) => return Err(damaged(format!("{} has {} bytes, not {}", file.name, meta.len(), file.size))),
                Err(error) => return Err(damaged(format!("{}: {error}", file.name))),
            }
        }
        Ok(Some(Image { directory: directory.to_owned(), manifest }))
    }

    /// Compares the content of every file with the manifest; reads them all.
    ///
    /// # Errors
    /// When one differs.
    pub fn verify(&self) -> Result<(), ImageError> {
        for file in [&self.manifest.vmlinux, &self.manifest.initrd, &self.manifest.rootfs] {
            let found = hash_file(&self.directory.join(&file.name))?;
            if found != file.blake3 {
                let why = format!("the content of {} is not what it was when it was made", file.name);
                return Err(ImageError::Damaged { directory: self.directory.clone(), why });
            }
        }
        Ok(())
    }

    /// The kernel, to be booted directly.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join(&self.manifest.vmlinux.name)
    }

    /// The initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.directory.join(&self.manifest.initrd.name)
    }

    /// The root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.join(&self.manifest.rootfs.name)
    }
}

impl Manifest {
    /// Measures the files of a directory and writes the manifest beside them.
    pub(super) fn write(directory: &Path, inputs: Inputs) -> Result<Manifest, ImageError> {
        let manifest = Manifest {
            version: VERSION,
            revision: inputs.revision(),
            inputs,
            vmlinux: FileEntry::of(directory, "vmlinux")?,
            initrd: FileEntry::of(directory, "initrd")?,
            rootfs: FileEntry::of(directory, "rootfs.ext4")?,
        };
        let bytes = serde_json::to_vec_pretty(&manifest).expect("strings and numbers can be written");
        let path = directory.join(MANIFEST);
        write_durably(&path, &bytes).map_err(ImageError::at(&path))?;
        Ok(manifest)
    }
}

/// Writes a file that outlives a crash once its directory is synced.
pub(super) fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(directory: &Path) -> Manifest {
        for name in ["vmlinux", "initrd", "rootfs.ext4"] {
            fs::write(directory.join(name), name).unwrap();
        }
        let word = |text: &str| text.to_owned();
        let inputs = Inputs {
            kernel_package: word("linux"),
            kernel_version: word("1"),
            kernel_release: word("1"),
            kernel: word("k"),
            agent: word("a"),
            busybox: word("b"),
            recipe: 1,
        };
        Manifest::write(directory, inputs).unwrap()
    }

    #[test]
    fn an_image_opens_and_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let manifest = image(dir.path());
        let opened = Image::open(dir.path()).unwrap().unwrap();
        assert_eq!(opened.manifest, manifest);
        opened.verify().unwrap();
        fs::write(opened.initrd(), "INITRD").unwrap();
        assert!(opened.verify().unwrap_err().to_string().contains("initrd"));
        fs::write(opened.initrd(), "short").unwrap();
        assert!(Image::open(dir.path()).unwrap_err().to_string().contains("initrd has 5 bytes, not 6"));
        fs::write(dir.path().join(MANIFEST), "{").unwrap();
        assert!(Image::open(dir.path()).is_err());
        assert!(Image::open(&dir.path().join("none")).unwrap().is_none());
    }

    #[test]
    fn another_input_is_another_revision() {
        let dir = tempfile::tempdir().unwrap();
        let inputs = image(dir.path()).inputs;
        let other = Inputs { agent: "other".into(), ..inputs.clone() };
        assert_ne!(inputs.revision(), other.revision());
    }
}
