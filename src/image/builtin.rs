//! The built-in image, made once per node and kept by what went in.
//!
//! ```text
//!  <images>/.lock          one maker at a time
//!  <images>/parts/         vmlinux, modules, busybox and parts.json: what was taken from packages
//!  <images>/<revision>/    vmlinux, initrd, rootfs.ext4, manifest.json: immutable
//!  <images>/builder/       the root file system of builder microVMs, see [`super::builder`]
//!  <images>/.new-*         being made; removed by the next maker
//! ```

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{hash_file, write_durably};
use super::modules::Module;
use super::{Image, ImageError, Inputs, Manifest, agent_binary, initramfs, kernel, modules, package, rootfs};

/// Told what is being done, in a few words, as each part of long work begins.
pub type Progress<'a> = &'a dyn Fn(&str);

/// Changes whenever the same inputs make another image.
const RECIPE: u32 = 2;
/// Kernel arguments that a guest of the built-in image starts best with.
///
/// The kernel's own tests of its cryptography are two thirds of the instructions until the guest is ready (QEMU 7.2,
/// TCG, `-icount shift=0`, Debian's 6.1 cloud kernel: 1.36 s with them and 0.48 s without), and a serial console that
/// says everything is slow: `quiet` leaves warnings.
pub const KERNEL_ARGS: [&str; 2] = ["quiet", "cryptomgr.notests"];

/// The least memory that the image boots with, in MiB: with Debian's kernel 6.1, its modules and the agent, 112 was seen to do under QEMU 7.2,
/// and 104 not to.
pub const MIN_MEM_MIB: u32 = 112;

/// What was taken from packages, below the directory of images.
const PARTS: &str = "parts";
/// Describes [`PARTS`]; written last.
const PARTS_FILE: &str = "parts.json";

/// Makes the built-in image, or returns the one that is there.
///
/// Guarantees: an image that is returned has its files in their full size; a second maker waits for the first; what a
/// killed maker left is removed, and an image that lost a file is made again. Once made, nothing is downloaded and no
/// program is run.
///
/// # Errors
/// When a package, a program or the agent is missing, or the disk is full; nothing half-made is left to be used.
pub fn ensure(images: &Path, agent: &Path, progress: Progress<'_>) -> Result<Image, ImageError> {
    fs::create_dir_all(images).map_err(ImageError::at(images))?;
    let agent = agent_binary::read(agent)?;
    if let Some(image) = existing(images, &agent)? {
        return Ok(image);
    }
    let _lock = lock(images)?;
    // Another maker may have been quicker.
    if let Some(image) = existing(images, &agent)? {
        return Ok(image);
    }
    sweep(images)?;
    let parts = match Parts::open(images) {
        Some(parts) => parts,
        None => Parts::make(images, progress)?,
    };
    let new = NewDirectory::make(images)?;
    progress("initramfs");
    let initrd = new.path.join("initrd");
    let content = initramfs::write(&agent, &parts.modules()?).map_err(ImageError::at(&initrd))?;
    write_durably(&initrd, &content).map_err(ImageError::at(&initrd))?;
    progress("root file system");
    let tree = NewDirectory::make(images)?;
    rootfs::build(&parts.at("busybox"), &tree.path, &new.path.join("rootfs.ext4"))?;
    let vmlinux = new.path.join("vmlinux");
    fs::hard_link(parts.at("vmlinux"), &vmlinux).map_err(ImageError::at(&vmlinux))?;
    progress("manifest");
    let manifest = Manifest::write(&new.path, parts.inputs(&agent))?;
    let directory = images.join(manifest.revision.as_str());
    new.replace(&directory)?;
    Ok(Image { directory, manifest })
}

/// The revision of the image that [`ensure`] would return, where that can be told: it was made once, and the agent can be read.
pub fn current(images: &Path, agent: &Path) -> Option<mvm_types::RevisionId> {
    let agent = agent_binary::read(agent).ok()?;
    Some(Parts::open(images)?.inputs(&agent).revision())
}

/// Forgets the kernel, busybox and what builders consist of, so that the next [`ensure`] takes the distribution's newest. Images
/// stay.
///
/// # Errors
/// When they cannot be removed.
pub fn refresh(images: &Path) -> Result<(), ImageError> {
    if !images.is_dir() {
        return Ok(());
    }
    let _lock = lock(images)?;
    for parts in [PARTS, super::builder::DIRECTORY].map(|name| images.join(name)) {
        match fs::remove_dir_all(&parts) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(ImageError::at(&parts)(error)),
            _ => {}
        }
    }
    Ok(())
}

/// The busybox of the parts that were taken, which an image was made of before.
pub(super) fn busybox(images: &Path) -> PathBuf {
    images.join(PARTS).join("busybox")
}

/// The image of this agent and the parts that are there; nothing when it is not there or damaged.
fn existing(images: &Path, agent: &[u8]) -> Result<Option<Image>, ImageError> {
    let Some(parts) = Parts::open(images) else {
        return Ok(None);
    };
    match Image::open(&images.join(parts.inputs(agent).revision().as_str())) {
        Err(ImageError::Damaged { .. }) => Ok(None),
        outcome => outcome,
    }
}

/// Waits until no other process makes images here.
pub(super) fn lock(images: &Path) -> Result<File, ImageError> {
    let path = images.join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(ImageError::at(&path))?;
    file.lock().map_err(ImageError::at(&path))?;
    Ok(file)
}

/// Removes what a killed maker left. Only under the lock.
pub(super) fn sweep(images: &Path) -> Result<(), ImageError> {
    for entry in fs::read_dir(images).map_err(ImageError::at(images))? {
        let entry = entry.map_err(ImageError::at(images))?;
        if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
            fs::remove_dir_all(entry.path()).map_err(ImageError::at(&entry.path()))?;
        }
    }
    Ok(())
}

/// A directory being made; removed unless it takes its place.
pub(super) struct NewDirectory {
    pub(super) path: PathBuf,
}

impl NewDirectory {
    pub(super) fn make(images: &Path) -> Result<NewDirectory, ImageError> {
        let made = tempfile::Builder::new().prefix(".new-").tempdir_in(images).map_err(ImageError::at(images))?;
        let new = NewDirectory { path: made.keep() };
        // Guests run as users of their own; what an image holds is no secret.
        fs::set_permissions(&new.path, fs::Permissions::from_mode(0o755)).map_err(ImageError::at(&new.path))?;
        Ok(new)
    }

    /// Puts it in its place, durably. What is there already, damaged, goes.
    pub(super) fn replace(self, place: &Path) -> Result<(), ImageError> {
        for entry in fs::read_dir(&self.path).map_err(ImageError::at(&self.path))? {
            let path = entry.map_err(ImageError::at(&self.path))?.path();
            File::open(&path).and_then(|file| file.sync_all()).map_err(ImageError::at(&path))?;
        }
        File::open(&self.path).and_then(|file| file.sync_all()).map_err(ImageError::at(&self.path))?;
        if place.exists() {
            fs::remove_dir_all(place).map_err(ImageError::at(place))?;
        }
        fs::rename(&self.path, place).map_err(ImageError::at(place))?;
        let parent = place.parent().unwrap_or(Path::new("/"));
        File::open(parent).and_then(|file| file.sync_all()).map_err(ImageError::at(parent))
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        // Gone already when it took its place; otherwise the next maker sweeps what cannot be removed now.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// What was taken from packages.
struct Parts {
    directory: PathBuf,
    list: PartsList,
}

/// The document in [`PARTS_FILE`].
#[derive(Serialize, Deserialize)]
struct PartsList {
    kernel_package: String,
    kernel_version: String,
    kernel_release: String,
    kernel: String,
    busybox: String,
    /// Name and virtio device, in the order in which they are loaded.
    modules: Vec<(String, u32)>,
}

impl Parts {
    /// The parts that are there; none when they were never taken, or by a version of mvm that wrote something else.
    fn open(images: &Path) -> Option<Parts> {
        let directory = images.join(PARTS);
        let bytes = fs::read(directory.join(PARTS_FILE)).ok()?;
        let list = serde_json::from_slice(&bytes).ok()?;
        Some(Parts { directory, list })
    }

    fn make(images: &Path, progress: Progress<'_>) -> Result<Parts, ImageError> {
        let new = NewDirectory::make(images)?;
        let packages = NewDirectory::make(images)?;
        progress("kernel package");
        let found = package::find_kernel()?;
        let version = package::download(&found.image, &packages.path)?;
        if let Some(modules) = &found.modules {
            package::download(modules, &packages.path)?;
        }
        progress("kernel");
        let release = only_release(&packages.path)?;
        let packed = packages.path.join("boot").join(format!("vmlinuz-{release}"));
        let bytes = fs::read(&packed).map_err(ImageError::at(&packed))?;
        let vmlinux = kernel::extract(&bytes).map_err(|why| ImageError::Kernel { path: packed, why })?;
        let write = |name: &str, content: &[u8]| {
            let path = new.path.join(name);
            write_durably(&path, content).map_err(ImageError::at(&path))
        };
        write("vmlinux", &vmlinux)?;
        let modules = modules::resolve(&module_directory(&packages.path).join(&release))?;
        for module in &modules {
            write(&format!("{}.ko", module.name), &module.content)?;
        }
        progress("busybox");
        let busybox = package::busybox(&packages.path)?;
        let copy = new.path.join("busybox");
        fs::copy(&busybox, &copy).map_err(ImageError::at(&copy))?;
        let list = PartsList {
            kernel_package: found.image,
            kernel_version: version,
            kernel_release: release,
            kernel: blake3::hash(&vmlinux).to_hex().to_string(),
            busybox: hash_file(&copy)?,
            modules: modules.into_iter().map(|module| (module.name, module.device)).collect(),
        };
        write(PARTS_FILE, &serde_json::to_vec_pretty(&list).expect("strings and numbers can be written"))?;
        let directory = images.join(PARTS);
        new.replace(&directory)?;
        Ok(Parts { directory, list })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn modules(&self) -> Result<Vec<Module>, ImageError> {
        let read = |(name, device): &(String, u32)| {
            let path = self.at(&format!("{name}.ko"));
            let content = fs::read(&path).map_err(ImageError::at(&path))?;
            Ok(Module { name: name.clone(), device: *device, content })
        };
        self.list.modules.iter().map(read).collect()
    }

    fn inputs(&self, agent: &[u8]) -> Inputs {
        Inputs {
            kernel_package: self.list.kernel_package.clone(),
            kernel_version: self.list.kernel_version.clone(),
            kernel_release: self.list.kernel_release.clone(),
            kernel: self.list.kernel.clone(),
            agent: blake3::hash(agent).to_hex().to_string(),
            busybox: self.list.busybox.clone(),
            recipe: RECIPE,
        }
    }
}

/// `lib/modules`, or `usr/lib/modules` where the distribution has merged the two.
fn module_directory(unpacked: &Path) -> PathBuf {
    let merged = unpacked.join("usr/lib/modules");
    if merged.is_dir() { merged } else { unpacked.join("lib/modules") }
}

/// The release of the one kernel that was unpacked.
fn only_release(unpacked: &Path) -> Result<String, ImageError> {
    let directory = module_directory(unpacked);
    let entries = fs::read_dir(&directory).map_err(ImageError::at(&directory))?;
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    match (names.pop(), names.is_empty()) {
        (Some(release), true) => Ok(release),
        _ => Err(ImageError::Kernel { path: directory, why: "the package does not hold the modules of just one kernel".into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_maker_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(".new-abc/tree")).unwrap();
        fs::create_dir(dir.path().join("0123456789abcdef")).unwrap();
        sweep(dir.path()).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["0123456789abcdef"]);
    }

    #[test]
    fn a_new_directory_takes_its_place_or_goes() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("image");
        fs::create_dir(&place).unwrap();
        fs::write(place.join("old"), "").unwrap();
        let new = NewDirectory::make(dir.path()).unwrap();
        fs::write(new.path.join("file"), "x").unwrap();
        new.replace(&place).unwrap();
        drop(NewDirectory::make(dir.path()).unwrap());
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["image"]);
        assert!(place.join("file").exists() && !place.join("old").exists());
    }
}
