//! The root file system of builder microVMs: nix and what it needs, from the distribution's packages.
//!
//! ```text
//!  apt, as if nothing were installed -> nix-bin, git, certificates and all that they need -> unpacked   } rootfs.ext4
//!  busybox, users for builds, nix.conf, build.sh                                                        }
//! ```
//!
//! No script of a package runs. Kernel and initramfs, with the guest agent in it, are those of [`super::builtin`]. It is made once
//! per node, and again when what mvm itself puts in has changed; `builder.json` beside it says what it was made of.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::builtin::{NewDirectory, Progress, busybox, lock, sweep};
use super::manifest::write_durably;
use super::package::{Catalogue, unpack};
use super::{FileEntry, ImageError, rootfs};

/// Where it is below the directory of images.
pub(super) const DIRECTORY: &str = "builder";
/// Describes it; written last.
const DESCRIPTION: &str = "builder.json";
const ROOTFS: &str = "rootfs.ext4";

/// Changes whenever the same packages and the same files below make another root.
const RECIPE: u32 = 1;
/// What a build may call besides nix itself: git fetches inputs.
const PACKAGES: [&str; 3] = ["nix-bin", "git", "ca-certificates"];
/// Does in the guest what the host asks for.
const SCRIPT: &str = include_str!("builder/build.sh");
/// Where it is in the guest.
pub const SCRIPT_PATH: &str = "/usr/libexec/mvm-build";
/// Builds run as users of their own in the microVM, so that one that goes wrong does not change what nix itself wrote.
const BUILD_USERS: u32 = 16;
const BUILD_GROUP: u32 = 30_000;

const NIX_CONF: &str = "\
experimental-features = nix-command flakes
build-users-group = nixbld
sandbox = false
";

/// A builder's root file system that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuilderRoot {
    /// The file.
    pub rootfs: PathBuf,
    /// The packages that it was made of, with their versions.
    pub packages: Vec<String>,
}

/// The document in [`DESCRIPTION`].
#[derive(Serialize, Deserialize)]
struct Description {
    /// BLAKE3 of all that mvm itself puts in.
    recipe: String,
    packages: Vec<String>,
    rootfs: FileEntry,
}

/// Makes the root, or returns the one that is there; the built-in image must have been made before.
///
/// Guarantees as those of [`super::builtin::ensure`].
///
/// # Errors
/// When packages cannot be had, a program is missing, or the disk is full; nothing half-made is left to be used.
pub fn ensure(images: &Path, progress: Progress<'_>) -> Result<BuilderRoot, ImageError> {
    if let Some(root) = existing(images) {
        return Ok(root);
    }
    let _lock = lock(images)?;
    // Another maker may have been quicker.
    if let Some(root) = existing(images) {
        return Ok(root);
    }
    sweep(images)?;
    let tree = NewDirectory::make(images)?;
    let packages = lay_out(images, &tree.path, progress)?;
    progress("root file system of builders");
    let new = NewDirectory::make(images)?;
    rootfs::make_file_system(&tree.path, &new.path.join(ROOTFS))?;
    let description = Description { recipe: recipe(), packages, rootfs: FileEntry::of(&new.path, ROOTFS)? };
    let path = new.path.join(DESCRIPTION);
    let bytes = serde_json::to_vec_pretty(&description).expect("strings and numbers can be written");
    write_durably(&path, &bytes).map_err(ImageError::at(&path))?;
    let directory = images.join(DIRECTORY);
    new.replace(&directory)?;
    Ok(BuilderRoot { rootfs: directory.join(ROOTFS), packages: description.packages })
}

/// The root that is there, whole as far as its size tells, and made by this recipe.
pub fn existing(images: &Path) -> Option<BuilderRoot> {
    let directory = images.join(DIRECTORY);
    let description: Description = serde_json::from_slice(&fs::read(directory.join(DESCRIPTION)).ok()?).ok()?;
    let rootfs = directory.join(ROOTFS);
    let whole = fs::metadata(&rootfs).is_ok_and(|meta| meta.len() == description.rootfs.size);
    (whole && description.recipe == recipe()).then_some(BuilderRoot { rootfs, packages: description.packages })
}

fn recipe() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&RECIPE.to_le_bytes());
    for part in PACKAGES.iter().chain(&[SCRIPT, NIX_CONF]) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.update(&BUILD_USERS.to_le_bytes());
    hasher.finalize().to_hex().to_string()
}

/// Lays out the tree; returns the packages.
fn lay_out(images: &Path, tree: &Path, progress: Progress<'_>) -> Result<Vec<String>, ImageError> {
    let scratch = NewDirectory::make(images)?;
    progress("packages of builders");
    let catalogue = Catalogue::with_nix(&scratch.path, progress)?;
    let fetched = catalogue.fetch(&PACKAGES)?;
    // Packages come with either, and want to find both.
    for name in ["bin", "sbin", "lib", "lib64"] {
        let merged = tree.join("usr").join(name);
        fs::create_dir_all(&merged).map_err(ImageError::at(&merged))?;
        let link = tree.join(name);
        symlink(format!("usr/{name}"), &link).map_err(ImageError::at(&link))?;
    }
    progress("unpack the packages of builders");
    for package in &fetched {
        unpack(&package.deb, tree)?;
    }
    let var = tree.join("var");
    remove(&var)?;
    rootfs::lay_out(&busybox(images), tree)?;
    complete(tree)?;
    Ok(fetched.into_iter().map(|package| package.name).collect())
}

/// Writes what the packages' scripts would have made, and what is mvm's own.
fn complete(tree: &Path) -> Result<(), ImageError> {
    let write = |name: &str, content: &[u8], mode: u32| {
        let path = tree.join(name);
        let parent = path.parent().unwrap_or(tree);
        fs::create_dir_all(parent).map_err(ImageError::at(parent))?;
        fs::write(&path, content).map_err(ImageError::at(&path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(ImageError::at(&path))
    };
    for name in ["nix", "job"] {
        let path = tree.join(name);
        fs::create_dir_all(&path).map_err(ImageError::at(&path))?;
    }
    let users: Vec<String> = (1..=BUILD_USERS).map(|number| format!("nixbld{number}")).collect();
    let mut passwd = String::from("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    for (number, user) in users.iter().enumerate() {
        passwd += &format!("{user}:x:{}:{BUILD_GROUP}::/var/empty:/bin/false\n", BUILD_GROUP as usize + 1 + number);
    }
    write("etc/passwd", passwd.as_bytes(), 0o644)?;
    write("etc/group", format!("root:x:0:\ntty:x:5:\nnogroup:x:65534:\nnixbld:x:{BUILD_GROUP}:{}\n", users.join(",")).as_bytes(), 0o644)?;
    write("etc/nix/nix.conf", NIX_CONF.as_bytes(), 0o644)?;
    write(SCRIPT_PATH.trim_start_matches('/'), SCRIPT.as_bytes(), 0o755)?;
    write("etc/ssl/certs/ca-certificates.crt", &certificates(&tree.join("usr/share/ca-certificates"))?, 0o644)
}

/// All certificates below a directory, one after another, in order.
fn certificates(directory: &Path) -> Result<Vec<u8>, ImageError> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(ImageError::at(directory))? {
        let path = entry.map_err(ImageError::at(directory))?.path();
        if path.is_dir() {
            for inner in fs::read_dir(&path).map_err(ImageError::at(&path))? {
                paths.push(inner.map_err(ImageError::at(&path))?.path());
            }
        }
    }
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "crt"));
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        all.extend(fs::read(&path).map_err(ImageError::at(&path))?);
        if !all.ends_with(b"\n") {
            all.push(b'\n');
        }
    }
    Ok(all)
}

fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(ImageError::at(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(images: &Path, recipe: String) {
        let directory = images.join(DIRECTORY);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(ROOTFS), "root").unwrap();
        let rootfs = FileEntry::of(&directory, ROOTFS).unwrap();
        let description = Description { recipe, packages: vec!["nix-bin_1_amd64".into()], rootfs };
        fs::write(directory.join(DESCRIPTION), serde_json::to_vec(&description).unwrap()).unwrap();
    }

    #[test]
    fn a_root_that_is_there_is_taken_unless_it_is_cut_off_or_of_another_recipe() {
        let images = tempfile::tempdir().unwrap();
        assert_eq!(existing(images.path()), None);
        described(images.path(), recipe());
        assert_eq!(ensure(images.path(), &|_| {}).unwrap().packages, ["nix-bin_1_amd64"]);
        fs::write(images.path().join(DIRECTORY).join(ROOTFS), "ro").unwrap();
        assert_eq!(existing(images.path()), None);
        described(images.path(), "another".into());
        assert_eq!(existing(images.path()), None);
    }

    #[test]
    fn what_no_package_script_made_is_made() {
        let tree = tempfile::tempdir().unwrap();
        let certificates = tree.path().join("usr/share/ca-certificates/mozilla");
        fs::create_dir_all(&certificates).unwrap();
        fs::write(certificates.join("b.crt"), "B\n").unwrap();
        fs::write(certificates.join("a.crt"), "A").unwrap();
        fs::write(certificates.join("README"), "no").unwrap();
        complete(tree.path()).unwrap();
        let read = |name: &str| fs::read_to_string(tree.path().join(name)).unwrap();
        assert_eq!(read("etc/ssl/certs/ca-certificates.crt"), "A\nB\n");
        assert_eq!(read("etc/passwd").lines().count() as u32, 2 + BUILD_USERS);
        assert!(read("etc/group").contains("nixbld:x:30000:nixbld1,nixbld2,"));
        let mode = fs::metadata(tree.path().join(SCRIPT_PATH.trim_start_matches('/'))).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o755);
    }

    #[test]
    fn the_script_is_one() {
        let checked = std::process::Command::new("sh").args(["-n", "-c", SCRIPT]).status().unwrap();
        assert!(checked.success());
    }
}
