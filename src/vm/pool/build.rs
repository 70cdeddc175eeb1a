//! How a pool's image comes to be: from its flake, or from what mvm carries itself.
//!
//! ```text
//!  flake_ref -> sources -> mvm-profiles.toml? -> attribute -> built before? -> FlakeBuilder -> images/<revision>/
//!                              found:  packages.<system>.tenant-<role>-<profile>
//!                              none:   packages.<system>.tenant-<profile>
//! ```
//!
//! Two records keep nix from being asked again: one by the fingerprint of the sources, role and profile, which costs no process, and one
//! by what was locked and the attribute.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mvm_types::RevisionId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::config::{BUILTIN, PoolSpec};
use super::nix_manifest::{MANIFEST_FILE, ManifestError, NixManifest};
use super::revision::{Origin, OriginFile, closure_hash};
use super::role::RoleTraits;
use crate::image;
use crate::image::nix::fingerprint::{Seen, fingerprint, has};
use crate::image::nix::{BuildError, BuildWatch, FlakeBuilder, FlakeImage, Job, Limits, Record, Reference};

/// The system that images are built for, as nix names it.
pub const SYSTEM: &str = if cfg!(target_arch = "aarch64") { "aarch64-linux" } else { "x86_64-linux" };

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
    /// The least memory that it boots with, in MiB.
    pub min_mem_mib: u32,
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
    /// Its flake could not be built.
    #[error("cannot build the image of {flake_ref}, profile {profile}")]
    Flake {
        /// The flake reference.
        flake_ref: String,
        /// The profile.
        profile: String,
        /// What went wrong.
        #[source]
        source: Box<BuildError>,
    },
    /// Its flake's manifest is wrong, or does not have what was asked for.
    #[error("flake {flake_ref}")]
    Manifest {
        /// The flake reference.
        flake_ref: String,
        /// What is wrong.
        #[source]
        source: Box<ManifestError>,
    },
    /// It is not there, or not what was built.
    #[error("image {revision} cannot be used: {why}; `mvm pool build` builds it again")]
    Unusable {
        /// The revision.
        revision: RevisionId,
        /// What is wrong.
        why: String,
    },
    /// The images of the node cannot be looked at or changed.
    #[error("the images of this node cannot be changed: {why}")]
    Store {
        /// What is wrong.
        why: String,
    },
}

impl ImageError {
    /// Tells whether somebody ended the build.
    pub fn is_interrupted(&self) -> bool {
        matches!(self, ImageError::Flake { source, .. } if matches!(**source, BuildError::Interrupted { .. }))
    }

    /// Tells whether trying the same again can help.
    pub fn retry_can_help(&self) -> bool {
        match self {
            ImageError::Flake { source, .. } => source.retry_can_help(),
            ImageError::Manifest { .. } => false,
            _ => true,
        }
    }
}

/// What to build, by whom and how.
pub struct BuildRequest<'a> {
    /// The pool's declaration.
    pub spec: &'a PoolSpec,
    /// Who builds a flake.
    pub builder: &'a dyn FlakeBuilder,
    /// What the build may use.
    pub limits: Limits,
    /// Follows the build, and can end it.
    pub watch: &'a dyn BuildWatch,
    /// Where the log of a build is kept, if it comes to one.
    pub log: Option<PathBuf>,
}

/// An image that lies on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Its revision.
    pub revision: RevisionId,
    /// What its files take, in bytes.
    pub size: u64,
    /// When it was made.
    pub made: SystemTime,
    /// Whether something other than a pool needs it: the built-in image of this mvm.
    pub pinned: bool,
}

/// Where images come from.
pub trait ImageSource: Send + Sync {
    /// Builds the image that a declaration asks for, unless it is there.
    fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError>;

    /// Makes the image that mvm carries itself, unless it is there; tells of its progress in words.
    fn ensure_builtin(&self, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError>;

    /// What the pool's role means by the manifest of its flake; `None` where there is no manifest, or none that can be read without
    /// fetching the flake.
    ///
    /// # Errors
    /// When the manifest is not right, or lacks the role or the profile.
    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError>;

    /// Tells whether a flake lies on this host, where its manifest can be read without fetching it.
    fn is_here(&self, flake_ref: &str) -> bool {
        Reference::locate(flake_ref).is_ok_and(|reference| reference.directory().is_some())
    }

    /// Finds a built image and checks that it is whole, as far as sizes tell.
    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError>;

    /// Tells a flake's sources from others without a process; `None` where only nix can.
    ///
    /// # Errors
    /// A sentence: what cannot be read.
    fn fingerprint(&self, flake_ref: &str) -> Result<Option<String>, String>;

    /// Lists the images that lie on this node.
    fn stored(&self) -> Result<Vec<StoredImage>, ImageError>;

    /// Removes an image.
    fn remove(&self, revision: &RevisionId) -> Result<(), ImageError>;

    /// Removes what killed builds left, and records of images that are gone; tells what.
    fn sweep(&self) -> Result<Vec<String>, ImageError>;
}

/// The images of a node, in a directory.
///
/// ```text
///  <images>/<revision>/          immutable
///  <images>/.builds/<key>.json   what came of a build
///  <images>/.builds/seen-*.json  hashes of sources' files
///  <images>/.builds/slot-*.lock  one build of the same thing at a time
///  <images>/.builds/work-*/      being built; locked by its maker, removed by the next when that is gone
/// ```
pub struct NodeImages {
    images: PathBuf,
}

/// How many locks builds share.
const SLOTS: u8 = 32;

impl NodeImages {
    /// Takes the directory; nothing is made yet.
    pub fn new(images: PathBuf) -> Self {
        Self { images }
    }

    fn builds(&self) -> PathBuf {
        self.images.join(".builds")
    }

    fn builtin(&self, progress: &dyn Fn(&str)) -> Result<(image::Manifest, Duration), String> {
        let begun = Instant::now();
        let said = |error: image::ImageError| crate::vm::error::with_causes(&error);
        let agent = image::find_agent(std::env::var_os(image::AGENT_VARIABLE).as_deref()).map_err(said)?;
        let built = image::builtin::ensure(&self.images, &agent, progress).map_err(said)?;
        Ok((built.manifest, begun.elapsed()))
    }

    fn flake(&self, request: &BuildRequest<'_>) -> Result<Origin, FlakeFailure> {
        let BuildRequest { spec, builder, limits, watch, .. } = request;
        let begun = Instant::now();
        let unreachable = |why: String| BuildError::Unreachable { flake_ref: spec.flake_ref.clone(), why };
        let reference = Reference::locate(&spec.flake_ref).map_err(unreachable)?;
        let declared = reference.to_nix();
        let builds = self.builds();
        fs::create_dir_all(&builds).map_err(BuildError::at(&builds))?;
        let mut before = self.look(&reference).map_err(unreachable)?;
        let quick = |fingerprint: &Option<String>| {
            fingerprint.as_ref().map(|fingerprint| key(&["sources", &declared, fingerprint, spec.role.as_str(), spec.profile.as_str()]))
        };
        if let Some(known) = quick(&before).and_then(|key| self.known(&key)) {
            return Ok(self.retold(known, spec, before));
        }
        let work = Work::make(&builds)?;
        let begun_fetching = Instant::now();
        let mut tries = 0;
        let source = loop {
            let dir = work.path.join(format!("source-{tries}"));
            fs::create_dir(&dir).map_err(BuildError::at(&dir))?;
            let left = Limits { time: limits.time.saturating_sub(begun_fetching.elapsed()), ..limits.clone() };
            let source = image::nix::fetch(&reference, "the flake's sources", builder.kind(), &dir, &left, *watch)
                .map_err(|error| error.of_whole_time(limits.time))?;
            // What was fetched is what the fingerprint is of, unless somebody changed it meanwhile.
            let after = self.look(&reference).map_err(unreachable)?;
            if after == before {
                break source;
            }
            before = after;
            tries += 1;
            if tries == 5 {
                return Err(unreachable("it changes all the time while it is read".into()).into());
            }
        };
        let fetched = begun_fetching.elapsed();
        let (name, traits) = match NixManifest::load(&source.tree)? {
            Some(manifest) => {
                let traits = Arc::new(manifest.role_requirements(spec.role)?.clone());
                (manifest.resolve(spec.role, &spec.profile)?.attribute, Some(traits))
            }
            None if !spec.role.is_built_in() => return Err(ManifestError::Missing { role: spec.role }.into()),
            None => (format!("tenant-{}", spec.profile), None),
        };
        let attribute = format!("packages.{SYSTEM}.{name}");
        let sources = before.as_ref().unwrap_or(&source.locked);
        let exact = key(&["attribute", &declared, sources, &attribute]);
        let _turn = self.turn(&exact, &attribute, *watch)?;
        if let Some(known) = self.known(&exact) {
            let origin = self.retold(known, spec, before.clone());
            if let Some(key) = quick(&before) {
                self.keep(&key, &origin)?;
            }
            return Ok(origin);
        }
        let into = work.path.join("out");
        fs::create_dir(&into).map_err(BuildError::at(&into))?;
        let job = Job {
            flake_ref: source.flake_ref.clone(),
            shown: declared.clone(),
            tree: source.tree.clone(),
            attribute: attribute.clone(),
            // One time for both; others' turns are not this build's.
            limits: Limits { time: limits.time.saturating_sub(fetched), ..limits.clone() },
        };
        watch.line(&format!("building {name} of {}", source.locked));
        let recorder = Recorder { watch: *watch, record: std::sync::Mutex::default() };
        let built = builder
            .build(&job, &into, &recorder)
            .map_err(|error| error.of_whole_time(limits.time))
            .and_then(|provenance| Ok((provenance, FlakeImage::adopt(&into, &self.images, &attribute)?)));
        if let Some(log) = &request.log {
            recorder.save(log, built.as_ref().err());
        }
        let (provenance, image) = built?;
        let file = |entry: &image::FileEntry| (entry.name.clone(), OriginFile { size: entry.size, blake3: entry.blake3.clone() });
        let origin = Origin {
            revision: image.manifest.revision.clone(),
            flake_ref: spec.flake_ref.clone(),
            profile: spec.profile.clone(),
            locked: source.locked,
            attribute: Some(attribute),
            store_path: Some(provenance.store_path),
            closure_hash: Some(closure_hash(&provenance.closure)),
            closure: provenance.closure,
            files: image.manifest.files.iter().map(file).collect(),
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            builder: Some(builder.kind()),
            fingerprint: before.clone(),
            traits,
        };
        self.keep(&exact, &origin)?;
        if let Some(key) = quick(&before) {
            self.keep(&key, &origin)?;
        }
        Ok(origin)
    }

    /// What came of an earlier build, if its image is still there.
    fn known(&self, key: &str) -> Option<Origin> {
        let origin: Origin = read(&self.builds().join(format!("{key}.json")))?;
        self.open(&origin.revision).is_ok().then_some(origin)
    }

    /// The origin as another declaration of the same flake has it.
    fn retold(&self, origin: Origin, spec: &PoolSpec, fingerprint: Option<String>) -> Origin {
        Origin { flake_ref: spec.flake_ref.clone(), profile: spec.profile.clone(), fingerprint, ..origin }
    }

    fn keep(&self, key: &str, origin: &Origin) -> Result<(), BuildError> {
        let path = self.builds().join(format!("{key}.json"));
        write(&path, origin).map_err(BuildError::at(&path))
    }

    /// The fingerprint of a flake's sources; what is remembered of their files is brought up to date.
    fn look(&self, reference: &Reference) -> Result<Option<String>, String> {
        let path = self.builds().join(format!("seen-{}.json", key(&[&reference.to_nix()])));
        let before: Seen = read(&path).unwrap_or_default();
        let mut seen = before.clone();
        let found = fingerprint(reference, &mut seen)?;
        // Without it the next look reads the files again; who only looks may not be allowed to write.
        if seen != before && self.builds().is_dir() {
            let _ = write(&path, &seen);
        }
        Ok(found)
    }

    /// Waits until nobody else builds the same.
    fn turn(&self, key: &str, attribute: &str, watch: &dyn BuildWatch) -> Result<File, BuildError> {
        const NAP: Duration = Duration::from_millis(50);
        let slot = u8::from_str_radix(&key[..2], 16).unwrap_or(0) % SLOTS;
        let path = self.builds().join(format!("slot-{slot:02}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(BuildError::at(&path))?;
        let mut told = false;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(error)) => return Err(BuildError::at(&path)(error)),
            }
            if !told {
                watch.line("another build goes on; waiting for its end");
                told = true;
            }
            if watch.cancelled() {
                return Err(BuildError::Interrupted { attribute: attribute.to_owned() });
            }
            std::thread::sleep(NAP);
        }
    }

    fn store(error: std::io::Error) -> ImageError {
        ImageError::Store { why: error.to_string() }
    }
}

/// What can go wrong with a flake.
enum FlakeFailure {
    Build(BuildError),
    Manifest(ManifestError),
}

impl From<BuildError> for FlakeFailure {
    fn from(error: BuildError) -> Self {
        FlakeFailure::Build(error)
    }
}

impl From<ManifestError> for FlakeFailure {
    fn from(error: ManifestError) -> Self {
        FlakeFailure::Manifest(error)
    }
}

fn key(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(SYSTEM.as_bytes());
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// Reads what can be made again when it is lost.
fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn write<T: Serialize>(path: &Path, value: &T) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(".record-").tempfile_in(dir)?;
    serde_json::to_writer(&mut file, value)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

/// A directory that something is built in; it goes with the build.
struct Work {
    path: PathBuf,
    _lock: File,
}

impl Work {
    fn make(builds: &Path) -> Result<Work, BuildError> {
        // While it is made, nobody takes it for one whose maker was killed.
        let _gate = Work::gate(builds).map_err(BuildError::at(builds))?;
        Work::sweep(builds).map_err(BuildError::at(builds))?;
        let path = tempfile::Builder::new().prefix("work-").tempdir_in(builds).map_err(BuildError::at(builds))?.keep();
        let lock = File::create(path.join("lock")).and_then(|lock| lock.lock().map(|()| lock)).map_err(BuildError::at(&path))?;
        Ok(Work { path, _lock: lock })
    }

    fn gate(builds: &Path) -> std::io::Result<File> {
        let file = File::options().create(true).truncate(false).write(true).open(builds.join("work.lock"))?;
        file.lock()?;
        Ok(file)
    }

    /// Removes what killed builds left. Only behind the gate.
    fn sweep(builds: &Path) -> std::io::Result<Vec<String>> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(builds)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let stale_record = name.starts_with(".record-");
            if name.starts_with("work-") {
                if File::open(entry.path().join("lock")).is_ok_and(|lock| lock.try_lock().is_err()) {
                    continue;
                }
                image::nix::sweep(&entry.path());
                fs::remove_dir_all(entry.path())?;
                removed.push(format!("an unfinished build ({name})"));
            } else if stale_record && entry.metadata().and_then(|meta| meta.modified()).is_ok_and(is_old) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(removed)
    }
}

/// Older than any write takes.
fn is_old(modified: SystemTime) -> bool {
    modified.elapsed().is_ok_and(|age| age > Duration::from_secs(60))
}

impl Drop for Work {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next build.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Writes down what a build says.
struct Recorder<'a> {
    watch: &'a dyn BuildWatch,
    record: std::sync::Mutex<Record>,
}

impl Recorder<'_> {
    fn save(&self, path: &Path, error: Option<&BuildError>) {
        let mut record = self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(error) = error {
            record.push(&format!("mvm: {}", crate::vm::error::with_causes(error)));
        }
        // The log is for reading; the build's own end says more than a failure to keep it.
        if let Err(error) = record.save(path) {
            tracing::warn!(path = %path.display(), %error, "the log of the build could not be kept");
        }
    }
}

impl BuildWatch for Recorder<'_> {
    fn line(&self, line: &str) {
        self.record.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(line);
        self.watch.line(line);
    }

    fn cancelled(&self) -> bool {
        self.watch.cancelled()
    }
}

impl ImageSource for NodeImages {
    fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError> {
        let spec = request.spec;
        let (flake_ref, profile) = (spec.flake_ref.clone(), spec.profile.to_string());
        if spec.flake_ref != BUILTIN {
            return self.flake(request).map_err(|failure| match failure {
                FlakeFailure::Build(source) => ImageError::Flake { flake_ref, profile, source: source.into() },
                FlakeFailure::Manifest(source) => ImageError::Manifest { flake_ref, source: source.into() },
            });
        }
        let (manifest, took) =
            self.builtin(&|text| request.watch.line(text)).map_err(|why| ImageError::Build { flake_ref, profile, why })?;
        let file = |entry: &image::FileEntry| (entry.name.clone(), OriginFile { size: entry.size, blake3: entry.blake3.clone() });
        Ok(Origin {
            revision: manifest.revision.clone(),
            flake_ref: spec.flake_ref.clone(),
            profile: spec.profile.clone(),
            locked: format!("{BUILTIN}, {} {}", manifest.inputs.kernel_package, manifest.inputs.kernel_version),
            attribute: None,
            store_path: None,
            closure: Vec::new(),
            closure_hash: None,
            files: [&manifest.vmlinux, &manifest.initrd, &manifest.rootfs].map(file).into(),
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            builder: None,
            fingerprint: None,
            traits: None,
        })
    }

    fn ensure_builtin(&self, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        let refused = |why| ImageError::Build { flake_ref: BUILTIN.to_owned(), profile: "minimal".to_owned(), why };
        Ok(self.builtin(progress).map_err(refused)?.0.revision)
    }

    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        role_traits(spec)
    }

    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        let unusable = |why: String| ImageError::Unusable { revision: revision.clone(), why };
        let damaged = |error: image::ImageError| unusable(crate::vm::error::with_causes(&error));
        let directory = self.images.join(revision.as_str());
        if !directory.is_dir() {
            return Err(unusable("it is not there".to_owned()));
        }
        if let Some(image) = FlakeImage::open(&directory).map_err(damaged)? {
            return Ok(Image {
                revision: revision.clone(),
                kernel: image.path("vmlinux"),
                initrd: image.manifest.file("initrd").map(|_| image.path("initrd")),
                rootfs: image.path("rootfs"),
                kernel_args: image.manifest.vmm.kernel_args,
                min_mem_mib: image.manifest.vmm.min_mem_mib,
            });
        }
        let image = image::Image::open(&directory).map_err(damaged)?.ok_or_else(|| unusable("it is not there".to_owned()))?;
        Ok(Image {
            revision: revision.clone(),
            kernel: image.vmlinux(),
            initrd: Some(image.initrd()),
            rootfs: image.rootfs(),
            kernel_args: image::builtin::KERNEL_ARGS.iter().map(|arg| (*arg).to_owned()).collect(),
            min_mem_mib: image::builtin::MIN_MEM_MIB,
        })
    }

    fn fingerprint(&self, flake_ref: &str) -> Result<Option<String>, String> {
        self.look(&Reference::locate(flake_ref)?)
    }

    fn stored(&self) -> Result<Vec<StoredImage>, ImageError> {
        let entries = match fs::read_dir(&self.images) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Self::store(error)),
        };
        let agent = image::find_agent(std::env::var_os(image::AGENT_VARIABLE).as_deref()).ok();
        let current = agent.and_then(|agent| image::builtin::current(&self.images, &agent));
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Self::store)?;
            let Some(revision) = entry.file_name().to_str().and_then(|name| name.parse::<RevisionId>().ok()) else { continue };
            let mut size = 0;
            for file in fs::read_dir(entry.path()).map_err(Self::store)? {
                size += file.and_then(|file| file.metadata()).map_err(Self::store)?.len();
            }
            let builtin = matches!(FlakeImage::open(&entry.path()), Ok(None));
            // Which of them this mvm uses cannot be told without its agent.
            let pinned = builtin && current.as_ref().is_none_or(|current| *current == revision);
            let made = entry.metadata().and_then(|meta| meta.modified()).map_err(Self::store)?;
            found.push(StoredImage { revision, size, made, pinned });
        }
        found.sort_by(|a, b| a.revision.cmp(&b.revision));
        Ok(found)
    }

    fn remove(&self, revision: &RevisionId) -> Result<(), ImageError> {
        // Out of sight in one step: what is half removed is no image.
        let (place, gone) = (self.images.join(revision.as_str()), self.images.join(format!(".gone-{revision}")));
        let removed = fs::rename(&place, &gone).and_then(|()| fs::remove_dir_all(&gone));
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Self::store(error)),
            _ => Ok(()),
        }
    }

    fn sweep(&self) -> Result<Vec<String>, ImageError> {
        let mut removed = Vec::new();
        for entry in fs::read_dir(&self.images).into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(b".gone-") {
                fs::remove_dir_all(entry.path()).map_err(Self::store)?;
                removed.push(format!("an image that was half removed ({})", entry.file_name().display()));
            }
        }
        let builds = self.builds();
        if !builds.is_dir() {
            return Ok(removed);
        }
        let _gate = Work::gate(&builds).map_err(Self::store)?;
        removed.extend(Work::sweep(&builds).map_err(Self::store)?);
        for entry in fs::read_dir(&builds).map_err(Self::store)? {
            let path = entry.map_err(Self::store)?.path();
            let is_record =
                path.extension().is_some_and(|extension| extension == "json") && path.file_stem().is_some_and(|stem| stem.len() == 32);
            if is_record && read::<Origin>(&path).is_none_or(|origin| self.open(&origin.revision).is_err()) {
                fs::remove_file(&path).map_err(Self::store)?;
            }
        }
        Ok(removed)
    }
}

/// What a role means by the manifest of a flake that lies on this host.
fn role_traits(spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
    // Only mvm's own roles are accepted for the built-in image. That a flake is not there is for its build to say.
    let Ok(reference) = Reference::locate(&spec.flake_ref) else { return Ok(None) };
    let Some(flake) = reference.directory().filter(|_| has(&reference, MANIFEST_FILE).unwrap_or(false)) else { return Ok(None) };
    let wrong = |source: ManifestError| ImageError::Manifest { flake_ref: spec.flake_ref.clone(), source: source.into() };
    match NixManifest::load(&flake).map_err(wrong)? {
        None => Ok(None),
        Some(manifest) => {
            manifest.resolve(spec.role, &spec.profile).map_err(wrong)?;
            Ok(Some(manifest.role_requirements(spec.role).map_err(wrong)?.clone()))
        }
    }
}

/// Images that need no building and boot nothing: for the simulation.
pub struct SimulatedImages;

impl ImageSource for SimulatedImages {
    fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError> {
        let spec = request.spec;
        let hash = blake3::hash(format!("{}\0{}", spec.flake_ref, spec.profile).as_bytes());
        Ok(Origin {
            revision: RevisionId::from_hash(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes")),
            flake_ref: spec.flake_ref.clone(),
            profile: spec.profile.clone(),
            locked: spec.flake_ref.clone(),
            attribute: None,
            store_path: None,
            closure: Vec::new(),
            closure_hash: None,
            files: BTreeMap::new(),
            took_ms: 0,
            builder: None,
            fingerprint: None,
            traits: role_traits(spec)?.map(Arc::new),
        })
    }

    fn ensure_builtin(&self, _progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        Ok(RevisionId::from_hash([0; 8]))
    }

    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        role_traits(spec)
    }

    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        let nowhere = PathBuf::from("/dev/null");
        Ok(Image {
            revision: revision.clone(),
            kernel: nowhere.clone(),
            initrd: None,
            rootfs: nowhere,
            kernel_args: Vec::new(),
            min_mem_mib: 0,
        })
    }

    fn fingerprint(&self, _flake_ref: &str) -> Result<Option<String>, String> {
        Ok(None)
    }

    fn stored(&self) -> Result<Vec<StoredImage>, ImageError> {
        Ok(Vec::new())
    }

    fn remove(&self, _revision: &RevisionId) -> Result<(), ImageError> {
        Ok(())
    }

    fn sweep(&self) -> Result<Vec<String>, ImageError> {
        Ok(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::image::nix::{BuilderKind, ClosurePath, Provenance};

    /// A builder that shares no store with this host and needs no nix; counts what it is asked for.
    #[derive(Default)]
    struct Fake {
        asked: Mutex<Vec<String>>,
        fails: AtomicBool,
        delivers_no_kernel: AtomicBool,
    }

    impl FlakeBuilder for Fake {
        fn kind(&self) -> BuilderKind {
            BuilderKind::Vm
        }

        fn build(&self, job: &Job, into: &Path, watch: &dyn BuildWatch) -> Result<Provenance, BuildError> {
            self.asked.lock().unwrap().push(job.attribute.clone());
            assert!(job.limits.time < Limits::default().time, "what fetching took is taken off");
            assert!(job.flake_ref.contains("/.builds/work-") && !job.shown.contains(".builds"), "{job:?}");
            watch.line("at work");
            let mut kernel = vec![0; 4096];
            kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
            kernel[0x12] = 62;
            if !self.delivers_no_kernel.load(Ordering::SeqCst) {
                fs::write(into.join("vmlinux"), kernel).unwrap();
            }
            fs::write(into.join("rootfs"), [b"hsqs", &fs::read(job.tree.join("content")).unwrap()[..]].concat()).unwrap();
            fs::write(into.join("vmm.json"), r#"{"version":1,"root_format":"squashfs","min_mem_mib":256}"#).unwrap();
            if self.fails.load(Ordering::SeqCst) {
                return Err(BuildError::Failed { attribute: job.attribute.clone(), said: "no".into() });
            }
            let closure = vec![ClosurePath { path: "/nix/store/a-image".into(), nar_hash: "sha256-a".into(), nar_size: 1 }];
            Ok(Provenance { store_path: "/nix/store/a-image".into(), closure })
        }
    }

    struct Bench {
        dir: tempfile::TempDir,
        images: NodeImages,
        builder: Fake,
    }

    impl Bench {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("flake/nix")).unwrap();
            let bench = Self { images: NodeImages::new(dir.path().join("images")), dir, builder: Fake::default() };
            bench.write("flake.nix", "{}");
            bench.write("content", "one");
            bench
        }

        fn write(&self, name: &str, content: &str) {
            fs::write(self.dir.path().join("flake").join(name), content).unwrap();
        }

        fn spec(&self, role: &str) -> PoolSpec {
            let mut spec = PoolSpec::new("web".parse().unwrap(), role.parse().unwrap());
            spec.flake_ref = format!("path:{}", self.dir.path().join("flake").display());
            spec
        }

        fn build(&self, role: &str) -> Result<Origin, ImageError> {
            let request = BuildRequest {
                spec: &self.spec(role),
                builder: &self.builder,
                limits: Limits::default(),
                watch: &super::super::Quiet,
                log: Some(self.dir.path().join("log")),
            };
            self.images.ensure(&request)
        }

        fn asked(&self) -> Vec<String> {
            std::mem::take(&mut self.builder.asked.lock().unwrap())
        }
    }

    #[test]
    fn an_image_is_built_once_for_the_same_sources_and_again_for_others() {
        let bench = Bench::new();
        let first = bench.build("worker").unwrap();
        assert_eq!(bench.asked(), [format!("packages.{SYSTEM}.tenant-minimal")]);
        let image = bench.images.open(&first.revision).unwrap();
        assert_eq!((image.min_mem_mib, image.initrd), (256, None));
        assert!(fs::read_to_string(bench.dir.path().join("log")).unwrap().contains("at work"));
        assert_eq!(bench.build("worker").unwrap(), first);
        // Without a manifest the role makes no difference.
        assert_eq!(bench.build("gateway").unwrap().revision, first.revision);
        assert_eq!(bench.asked(), Vec::<String>::new());
        bench.write("content", "two");
        let second = bench.build("worker").unwrap();
        assert_ne!(second.revision, first.revision);
        assert_ne!(second.fingerprint, first.fingerprint);
        assert_eq!(bench.asked().len(), 1);
        // Back to what it was: known already.
        bench.write("content", "one");
        assert_eq!(bench.build("worker").unwrap().revision, first.revision);
        assert_eq!(bench.asked(), Vec::<String>::new());
        // Other sources with the same result are the same image.
        bench.write("comment", "");
        assert_eq!(bench.build("worker").unwrap().revision, first.revision);
        assert_eq!(bench.asked().len(), 1);
        // An image that lost a file is built again.
        fs::remove_file(bench.dir.path().join("images").join(first.revision.as_str()).join("rootfs")).unwrap();
        assert!(bench.images.open(&first.revision).is_err());
        assert_eq!(bench.build("worker").unwrap().revision, first.revision);
        bench.images.open(&first.revision).unwrap();
    }

    #[test]
    fn a_manifest_decides_by_role_and_profile() {
        let bench = Bench::new();
        bench.write("nix/any.nix", "{ }");
        let manifest = "[meta]\nversion = 1\n[profiles.minimal]\nmodule = \"nix/any.nix\"\n[roles.worker]\nmodule = \"nix/any.nix\"\n";
        bench.write("mvm-profiles.toml", manifest);
        let built = bench.build("worker").unwrap();
        assert_eq!(built.attribute, Some(format!("packages.{SYSTEM}.tenant-worker-minimal")));
        let refused = crate::vm::error::with_causes(&bench.build("gateway").unwrap_err());
        assert!(refused.ends_with("role \"gateway\" is not in mvm-profiles.toml; it has: worker"), "{refused}");
        assert_eq!(bench.asked().len(), 1);
    }

    #[test]
    fn a_role_that_left_its_manifest_is_refused_as_where_a_pool_is_made() {
        let bench = Bench::new();
        bench.write("nix/any.nix", "{ }");
        let manifest =
            "[meta]\nversion = 1\n[profiles.minimal]\nmodule = \"nix/any.nix\"\n[roles.cache]\nmodule = \"nix/any.nix\"\npriority = 0\n";
        bench.write("mvm-profiles.toml", manifest);
        let built = bench.build("cache").unwrap();
        assert_eq!(built.traits.unwrap().priority, 0);
        fs::remove_file(bench.dir.path().join("flake/mvm-profiles.toml")).unwrap();
        let error = bench.build("cache").unwrap_err();
        let refused = crate::vm::error::with_causes(&error);
        assert!(refused.contains(&mvm_types::RoleError::unknown("cache".parse().unwrap()).to_string()), "{refused}");
        assert!(refused.ends_with(", and the flake has no manifest that defines it") && !error.retry_can_help(), "{refused}");
        // A worker is one without a manifest too.
        assert_eq!(bench.build("worker").unwrap().traits, None);
        assert_eq!(bench.asked().len(), 2);
    }

    #[test]
    fn what_fails_leaves_nothing_and_can_be_tried_again() {
        let bench = Bench::new();
        let left = || {
            fs::read_dir(bench.dir.path().join("images")).unwrap().filter(|entry| entry.as_ref().unwrap().file_name() != ".builds").count()
        };
        bench.builder.fails.store(true, Ordering::SeqCst);
        assert!(!bench.build("worker").unwrap_err().retry_can_help());
        assert!(fs::read_to_string(bench.dir.path().join("log")).unwrap().contains("mvm: the build of"));
        bench.builder.fails.store(false, Ordering::SeqCst);
        bench.builder.delivers_no_kernel.store(true, Ordering::SeqCst);
        let said = crate::vm::error::with_causes(&bench.build("worker").unwrap_err());
        assert!(said.contains("yields no image: vmlinux is missing"), "{said}");
        assert_eq!(left(), 0);
        let works = fs::read_dir(bench.images.builds()).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count();
        assert_eq!(works, 0);
        bench.builder.delivers_no_kernel.store(false, Ordering::SeqCst);
        bench.build("worker").unwrap();
        assert_eq!((left(), bench.asked().len()), (1, 3));
    }

    #[test]
    fn records_of_images_that_are_gone_are_swept() {
        let bench = Bench::new();
        let built = bench.build("worker").unwrap();
        let records =
            || fs::read_dir(bench.images.builds()).unwrap().filter(|entry| entry.as_ref().unwrap().file_name().len() == 37).count();
        assert_eq!(bench.images.stored().unwrap().len(), 1);
        assert_eq!((bench.images.sweep().unwrap(), records()), (Vec::<String>::new(), 2));
        bench.images.remove(&built.revision).unwrap();
        bench.images.remove(&built.revision).unwrap();
        assert_eq!(bench.images.stored().unwrap(), Vec::new());
        bench.images.sweep().unwrap();
        assert_eq!(records(), 0);
    }
}
