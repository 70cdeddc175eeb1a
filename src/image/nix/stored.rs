//! An image that a flake described, as it is kept on this node.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use mvm_types::RevisionId;
use serde::{Deserialize, Serialize};

use super::BuildError;
use super::contents::{VmmConfig, check};
use crate::image::{FileEntry, ImageError, MANIFEST};

/// The version of the manifest that describes an image from a flake; 1 describes the built-in one.
pub const VERSION: u32 = 2;

/// The files of an image, as builders deliver them.
pub const FILES: [&str; 4] = ["vmlinux", "initrd", "rootfs", "vmm.json"];

/// `manifest.json` of an image from a flake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlakeManifest {
    /// Always 2.
    pub version: u32,
    /// Names the image by its contents.
    pub revision: RevisionId,
    /// What it needs of the machine that boots it.
    pub vmm: VmmConfig,
    /// Its files in the order of [`FILES`]; not every image has an initrd.
    pub files: Vec<FileEntry>,
}

/// An image from a flake that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlakeImage {
    /// Where it lies.
    pub directory: PathBuf,
    /// What it consists of.
    pub manifest: FlakeManifest,
}

impl FlakeManifest {
    /// One of its files.
    pub fn file(&self, name: &str) -> Option<&FileEntry> {
        self.files.iter().find(|file| file.name == name)
    }

    fn of(files: Vec<FileEntry>, vmm: VmmConfig) -> FlakeManifest {
        // Names before hashes, so that no two sets of files give the same bytes.
        let mut hasher = blake3::Hasher::new();
        for file in &files {
            hasher.update(format!("{}\0{}\0", file.name, file.blake3).as_bytes());
        }
        let revision = RevisionId::from_hash(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"));
        FlakeManifest { version: VERSION, revision, vmm, files }
    }
}

impl FlakeImage {
    /// Reads the manifest in a directory and compares the sizes of its files; `None` when the manifest is of the built-in form.
    ///
    /// # Errors
    /// When it is not what its manifest says.
    pub fn open(directory: &Path) -> Result<Option<FlakeImage>, ImageError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let damaged = |why: String| ImageError::Damaged { directory: directory.to_owned(), why };
        let bytes = fs::read(directory.join(MANIFEST)).map_err(|error| damaged(format!("{MANIFEST}: {error}")))?;
        let parse = |error: serde_json::Error| damaged(format!("{MANIFEST}: {error}"));
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(parse)?;
        if version != VERSION {
            return Ok(None);
        }
        let manifest: FlakeManifest = serde_json::from_slice(&bytes).map_err(parse)?;
        for file in &manifest.files {
            if !FILES.contains(&file.name.as_str()) {
                return Err(damaged(format!("its manifest names {:?}", file.name)));
            }
            match fs::metadata(directory.join(&file.name)) {
                Ok(meta) if meta.len() == file.size => {}
                Ok(meta) => return Err(damaged(format!("{} has {} bytes, not {}", file.name, meta.len(), file.size))),
                Err(error) => return Err(damaged(format!("{}: {error}", file.name))),
            }
        }
        if let Some(missing) = ["vmlinux", "rootfs", "vmm.json"].into_iter().find(|name| manifest.file(name).is_none()) {
            return Err(damaged(format!("its manifest does not have {missing}")));
        }
        Ok(Some(FlakeImage { directory: directory.to_owned(), manifest }))
    }

    /// Compares the content of every file with the manifest; reads them all.
    ///
    /// # Errors
    /// When one differs.
    pub fn verify(&self) -> Result<(), ImageError> {
        for file in &self.manifest.files {
            if FileEntry::of(&self.directory, &file.name)?.blake3 != file.blake3 {
                let why = format!("the content of {} is not what it was when it was built", file.name);
                return Err(ImageError::Damaged { directory: self.directory.clone(), why });
            }
        }
        Ok(())
    }

    /// One of its files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes what a builder delivered an image of the node, unless it has that image already: durably, all or nothing.
    ///
    /// # Errors
    /// When it is no image, or the disk is full.
    pub fn adopt(delivered: &Path, images: &Path, attribute: &str) -> Result<FlakeImage, BuildError> {
        let vmm = check(delivered, attribute)?;
        let mut files = Vec::new();
        for name in FILES {
            let path = delivered.join(name);
            if !path.exists() {
                continue;
            }
            files.push(FileEntry::of(delivered, name).map_err(from_image)?);
            // Guests run as users of their own; what an image holds is no secret.
            fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).map_err(BuildError::at(&path))?;
            File::open(&path).and_then(|file| file.sync_all()).map_err(BuildError::at(&path))?;
        }
        let manifest = FlakeManifest::of(files, vmm);
        let directory = images.join(manifest.revision.as_str());
        if let Ok(Some(there)) = FlakeImage::open(&directory) {
            if there.manifest != manifest {
                let why = format!("{} is another image of the same name", directory.display());
                return Err(BuildError::Builder { what: format!("keep the image {}", manifest.revision), why });
            }
            if there.verify().is_ok() {
                return Ok(there);
            }
        }
        let path = delivered.join(MANIFEST);
        let text = serde_json::to_vec_pretty(&manifest).expect("strings and numbers can be written");
        crate::image::manifest::write_durably(&path, &text).map_err(BuildError::at(&path))?;
        fs::set_permissions(delivered, std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(BuildError::at(delivered))?;
        File::open(delivered).and_then(|dir| dir.sync_all()).map_err(BuildError::at(delivered))?;
        if directory.exists() {
            // Damaged. Machines that run keep the files that they have open.
            fs::remove_dir_all(&directory).map_err(BuildError::at(&directory))?;
        }
        fs::rename(delivered, &directory).map_err(BuildError::at(&directory))?;
        File::open(images).and_then(|dir| dir.sync_all()).map_err(BuildError::at(images))?;
        Ok(FlakeImage { directory, manifest })
    }
}

fn from_image(error: ImageError) -> BuildError {
    match error {
        ImageError::File { path, source } => BuildError::File { path, source },
        other => BuildError::Builder { what: "measure the image".into(), why: other.to_string() },
    }
}
