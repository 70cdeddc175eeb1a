//! How a pool's image comes to be: the seam to [`crate::image`], and the step that records the result.

use std::path::{Path, PathBuf};

use mvm_types::RevisionId;

use super::config::{BUILTIN, PoolSpec};
use super::nix_manifest::{ManifestError, NixManifest};
use super::role::RoleTraits;
use crate::image;

/// A built image, ready to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its revision.
    pub revision: RevisionId,
    /// The uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk, where it has one.
    pub initrd: Option<PathBuf>,
    /// The root file system.
    pub rootfs: PathBuf,
    /// Kernel arguments that the image wants.
    pub kernel_args: Vec<String>,
}

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It could not be built.
    #[error("cannot build the image of {flake_ref}, profile {profile}: {why}")]
    Build {
        /// The flake reference.
        flake_ref: String,
        /// The profile.
        profile: String,
        /// What went wrong and how to mend it.
        why: String,
    },
    /// The flake's manifest is not right, or lacks what the pool asks for.
    #[error("flake {flake_ref}")]
    Manifest {
        /// The flake reference.
        flake_ref: String,
        /// What is wrong.
        #[source]
        source: ManifestError,
    },
    /// It is not there, or not what was built.
    #[error("image {revision} cannot be used: {why}; `mvm pool build` builds it again")]
    Unusable {
        /// The revision.
        revision: RevisionId,
        /// What is wrong.
        why: String,
    },
}

/// Where images come from.
pub trait ImageSource: Send + Sync {
    /// Builds the image that a declaration asks for, unless it is there; tells of its progress in words.
    fn ensure(&self, spec: &PoolSpec, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError>;

    /// What the pool's role means by the manifest of its flake; `None` where there is no manifest, or none that can be read without
    /// fetching the flake.
    ///
    /// # Errors
    /// When the manifest is not right, or lacks the role or the profile.
    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError>;

    /// Finds a built image and checks that it is whole, as far as sizes tell.
    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError>;
}

/// The image that mvm carries itself, made once per node below a directory.
pub struct BuiltinImages {
    images: PathBuf,
}

impl BuiltinImages {
    /// Takes the directory; nothing is made yet.
    pub fn new(images: PathBuf) -> Self {
        Self { images }
    }
}

impl ImageSource for BuiltinImages {
    fn ensure(&self, spec: &PoolSpec, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        let refused = |error: crate::image::ImageError| ImageError::Build {
            flake_ref: spec.flake_ref.clone(),
            profile: spec.profile.to_string(),
            why: crate::vm::error::with_causes(&error),
        };
        if spec.flake_ref != BUILTIN {
            let (flake_ref, profile) = (spec.flake_ref.clone(), spec.profile.to_string());
            return Err(ImageError::Build { flake_ref, profile, why: "it is not the built-in image".to_owned() });
        }
        let agent = image::find_agent(std::env::var_os(image::AGENT_VARIABLE).as_deref()).map_err(refused)?;
        let built = image::builtin::ensure(&self.images, &agent, progress).map_err(refused)?;
        Ok(built.manifest.revision.clone())
    }

    fn role_traits(&self, _spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        // Only mvm's own roles are accepted for the built-in image.
        Ok(None)
    }

    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        let unusable = |why: String| ImageError::Unusable { revision: revision.clone(), why };
        let opened =
            image::Image::open(&self.images.join(revision.as_str())).map_err(|error| unusable(crate::vm::error::with_causes(&error)))?;
        let image = opened.ok_or_else(|| unusable("it is not there".to_owned()))?;
        let kernel_args = image::builtin::KERNEL_ARGS.iter().map(|arg| (*arg).to_owned()).collect();
        Ok(Image { revision: revision.clone(), kernel: image.vmlinux(), initrd: Some(image.initrd()), rootfs: image.rootfs(), kernel_args })
    }
}

/// Images that need no building and boot nothing: for the simulation.
pub struct SimulatedImages;

impl ImageSource for SimulatedImages {
    fn ensure(&self, spec: &PoolSpec, _progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        let hash = blake3::hash(format!("{}\0{}", spec.flake_ref, spec.profile).as_bytes());
        Ok(RevisionId::from_hash(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes")))
    }

    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        let Some(flake) = local_directory(&spec.flake_ref) else { return Ok(None) };
        let wrong = |source| ImageError::Manifest { flake_ref: spec.flake_ref.clone(), source };
        let Some(manifest) = NixManifest::load(flake).map_err(wrong)? else { return Ok(None) };
        manifest.resolve(spec.role, &spec.profile).map_err(wrong)?;
        Ok(Some(manifest.role_requirements(spec.role).map_err(wrong)?.clone()))
    }

    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        let nowhere = PathBuf::from("/dev/null");
        Ok(Image { revision: revision.clone(), kernel: nowhere.clone(), initrd: None, rootfs: nowhere, kernel_args: Vec::new() })
    }
}

/// The directory that a reference names plainly.
fn local_directory(flake_ref: &str) -> Option<&Path> {
    let path = Path::new(flake_ref.strip_prefix("path:").unwrap_or(flake_ref));
    path.is_absolute().then_some(path)
}
