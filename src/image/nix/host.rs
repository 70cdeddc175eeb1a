//! The builder that is this host's own nix.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::process::Run;
use super::{BuildError, BuildWatch, BuilderKind, ClosurePath, FILES, FlakeBuilder, Job, Limits, Provenance};

/// Temporary files of nix; the same beginning tells what a killed build left.
pub(super) const TMP_PREFIX: &str = "mvm-nix-";

/// The builder that is this host's own nix.
pub struct HostBuilder;

/// What an evaluation tells of a flake's packages.
#[derive(Deserialize)]
pub struct Packages {
    /// What there is.
    pub names: Vec<String>,
    /// Whether the one that was asked for is among them.
    pub there: bool,
    /// Its derivation, if it is one.
    pub drv: Option<String>,
    /// Its output, if it is one.
    pub out: Option<String>,
}

/// The function of Nix that tells of a flake's packages, for one of them; its name was checked.
pub fn attributes(name: &str) -> String {
    format!(
        "p: let there = p ? \"{name}\"; one = p.\"{name}\"; is = there && builtins.isAttrs one && one ? drvPath && one ? outPath; in \
         {{ names = builtins.attrNames p; inherit there; drv = if is then one.drvPath else null; out = if is then one.outPath else null; }}"
    )
}

impl FlakeBuilder for HostBuilder {
    fn kind(&self) -> BuilderKind {
        BuilderKind::Host
    }

    fn build(&self, job: &Job, into: &Path, watch: &dyn BuildWatch) -> Result<Provenance, BuildError> {
        let work = into.parent().unwrap_or(into);
        in_scratch(work, |tmp| {
            let run = Run::new(&job.attribute, &job.limits, tmp, watch);
            // What the flake is called for this build is nobody's business.
            let run = run.naming(&job.flake_ref, &job.shown).naming(&job.tree.display().to_string(), &job.shown);
            build(&run, job, work, into)
        })
    }
}

/// Does something with a directory for temporary files, which is gone afterwards.
pub(super) fn in_scratch<T>(work: &Path, act: impl FnOnce(&Path) -> Result<T, BuildError>) -> Result<T, BuildError> {
    let tmp = temporary(work)?;
    let outcome = act(&tmp);
    remove(&tmp);
    outcome
}

/// A directory for nix's temporary files that its build users can enter, noted so that a killed build's is found.
fn temporary(work: &Path) -> Result<PathBuf, BuildError> {
    let made = tempfile::Builder::new().prefix(TMP_PREFIX).tempdir().map_err(BuildError::at(&std::env::temp_dir()))?;
    let tmp = made.keep();
    let note = work.join(TMP_NOTE);
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o755)).map_err(BuildError::at(&tmp))?;
    fs::write(&note, tmp.as_os_str().as_encoded_bytes()).map_err(BuildError::at(&note))?;
    Ok(tmp)
}

/// Where a build's work directory notes its temporary files.
const TMP_NOTE: &str = "tmp";

/// Removes what a build left outside of its work directory.
pub fn sweep(work: &Path) {
    let Ok(noted) = fs::read_to_string(work.join(TMP_NOTE)) else { return };
    let tmp = Path::new(&noted);
    let ours = tmp.parent() == Some(&std::env::temp_dir())
        && tmp.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(TMP_PREFIX.as_bytes()));
    if ours {
        remove(tmp);
    }
}

fn remove(tmp: &Path) {
    if let Err(error) = fs::remove_dir_all(tmp)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %tmp.display(), %error, "nix's temporary files could not be removed");
    }
}

fn build(run: &Run<'_>, job: &Job, work: &Path, into: &Path) -> Result<Provenance, BuildError> {
    let drv = evaluate(run, job)?;
    let root = work.join("result");
    let output = format!("{drv}!out");
    // By the derivation, which is evaluated already; `nix-store` does the same in all versions. The root keeps the result from a
    // collection of garbage until it is copied.
    let realise = ["--realise", &output, "--add-root"].map(OsStr::new);
    let ended = run.nix("nix-store", &[&realise[..], &[root.as_os_str()]].concat())?;
    if !ended.status.success() {
        // Nix's words for a build that it ended by `max-build-log-size`, in all versions.
        let flood = format!("killed after writing more than {} bytes of log output", job.limits.log_bytes);
        return Err(match ended.said.contains(&flood) {
            true => BuildError::Flood { attribute: job.attribute.clone(), limit: job.limits.log_bytes },
            false => BuildError::Failed { attribute: job.attribute.clone(), said: ended.said },
        });
    }
    let store_path = fs::canonicalize(&root).map_err(BuildError::at(&root))?;
    let closure = closure(run, job, &store_path)?;
    copy(&store_path, into, job)?;
    Ok(Provenance { store_path: store_path.display().to_string(), closure })
}

/// Finds the attribute's derivation.
fn evaluate(run: &Run<'_>, job: &Job) -> Result<String, BuildError> {
    let Job { flake_ref, shown, attribute, .. } = job;
    let (set, name) = attribute.rsplit_once('.').unwrap_or(("packages", attribute));
    // They are made of names that were checked; a quote would end the string below.
    let plain = attribute.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !plain {
        return Err(BuildError::Builder { what: format!("build {attribute:?}"), why: "it is no attribute".into() });
    }
    let installable = format!("{flake_ref}#{set}");
    let apply = attributes(name);
    let ended = run.nix("nix", &["eval", "--json", "--no-write-lock-file", &installable, "--apply", &apply].map(OsStr::new))?;
    let missing = |known| BuildError::NoAttribute { flake_ref: shown.clone(), attribute: attribute.clone(), known };
    if !ended.status.success() {
        // Nix's words for a flake without packages, in all versions.
        if ended.said.contains("does not provide attribute") {
            return Err(missing(Vec::new()));
        }
        return Err(BuildError::Evaluation { flake_ref: shown.clone(), said: ended.said });
    }
    let packages: Packages = serde_json::from_slice(&ended.answer)
        .map_err(|error| BuildError::Builder { what: format!("read what nix says of {shown}"), why: error.to_string() })?;
    match packages.drv {
        Some(drv) => Ok(drv),
        None if packages.there => Err(BuildError::NoDerivation { flake_ref: shown.clone(), attribute: attribute.clone() }),
        None => Err(missing(packages.names)),
    }
}

/// Everything that a result refers to.
fn closure(run: &Run<'_>, job: &Job, store_path: &Path) -> Result<Vec<ClosurePath>, BuildError> {
    let args = ["path-info", "--json", "--recursive"].map(OsStr::new);
    let ended = run.nix("nix", &[&args[..], &[store_path.as_os_str()]].concat())?;
    if !ended.status.success() {
        return Err(BuildError::Failed { attribute: job.attribute.clone(), said: ended.said });
    }
    parse_closure(&ended.answer).map_err(|why| BuildError::Builder { what: format!("read the closure of {}", store_path.display()), why })
}

/// Reads both forms of `nix path-info --json`: a list of paths up to 2.18, an object by path after it.
pub fn parse_closure(answer: &[u8]) -> Result<Vec<ClosurePath>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Info {
        path: Option<String>,
        nar_hash: String,
        nar_size: u64,
    }
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Answer {
        List(Vec<Info>),
        Object(std::collections::BTreeMap<String, Info>),
    }
    let closure_path = |path: String, info: Info| ClosurePath { path, nar_hash: info.nar_hash, nar_size: info.nar_size };
    let mut paths: Vec<ClosurePath> = match serde_json::from_slice(answer).map_err(|error| error.to_string())? {
        Answer::List(list) => list
            .into_iter()
            .map(|mut info| info.path.take().map(|path| closure_path(path, info)).ok_or_else(|| "a path has no name".to_owned()))
            .collect::<Result<_, _>>()?,
        Answer::Object(object) => object.into_iter().map(|(path, info)| closure_path(path, info)).collect(),
    };
    paths.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(paths)
}

/// Copies the files of an image out of the store.
fn copy(store_path: &Path, into: &Path, job: &Job) -> Result<(), BuildError> {
    let wrong = |file: &str, why: String| BuildError::Output { attribute: job.attribute.clone(), file: file.to_owned(), why };
    if !store_path.is_dir() {
        return Err(wrong("its result", format!("is a file, and should be a directory with {}", FILES.join(", "))));
    }
    let store = store_path.parent().unwrap_or(store_path);
    let mut left = job.limits.disk_mib << 20;
    for name in FILES {
        let path = store_path.join(name);
        if path.symlink_metadata().is_err() {
            continue;
        }
        let real = fs::canonicalize(&path).map_err(|error| wrong(name, format!("leads nowhere: {error}")))?;
        if !real.starts_with(store) {
            return Err(wrong(name, format!("leads out of the Nix store, to {}", real.display())));
        }
        // Opened without waiting for a writer, should it be a pipe.
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(&real, flags, rustix::fs::Mode::empty()).map_err(|error| BuildError::at(&real)(error.into()))?;
        let mut file = File::from(file);
        let meta = file.metadata().map_err(BuildError::at(&real))?;
        if !meta.is_file() {
            return Err(wrong(name, "is not a regular file".into()));
        }
        if meta.len() > left {
            return Err(wrong(
                name,
                format!("has {} bytes, with which the image is larger than the {} MiB that it may have", meta.len(), job.limits.disk_mib),
            ));
        }
        left -= meta.len();
        let target = into.join(name);
        let mut copy = File::create_new(&target).map_err(BuildError::at(&target))?;
        // By the file's own length, not by what it may have become.
        io::copy(&mut Read::by_ref(&mut file).take(meta.len()), &mut copy).map_err(BuildError::at(&target))?;
    }
    Ok(())
}

/// What `nix flake metadata` tells of a flake.
#[derive(Debug, Deserialize)]
pub struct Metadata {
    /// Its sources in the Nix store.
    pub path: PathBuf,
    /// The locked reference.
    pub url: String,
    /// The locked reference in parts.
    pub locked: Locked,
}

/// The parts of a locked reference that matter here.
#[derive(Debug, Deserialize)]
pub struct Locked {
    /// `path`, `git`, `github`, ...
    #[serde(rename = "type")]
    pub kind: String,
    /// The commit; none for a work tree with changes.
    pub rev: Option<String>,
    /// Where in its sources the flake lies.
    pub dir: Option<PathBuf>,
}

/// Asks nix where a flake's sources are, and copies them into its store, with all of its inputs: the flake is evaluated for that.
pub fn metadata(flake_ref: &str, attribute: &str, limits: &Limits, work: &Path, watch: &dyn BuildWatch) -> Result<Metadata, BuildError> {
    let ended = in_scratch(work, |tmp| {
        let run = Run::new(attribute, limits, tmp, watch);
        run.nix("nix", &["flake", "metadata", "--json", "--no-write-lock-file", flake_ref].map(OsStr::new))
    })?;
    if !ended.status.success() {
        return Err(BuildError::Unreachable { flake_ref: flake_ref.to_owned(), why: without_body(&ended.said) });
    }
    serde_json::from_slice(&ended.answer)
        .map_err(|error| BuildError::Builder { what: format!("read what nix says of {flake_ref}"), why: error.to_string() })
}

/// What `nix flake prefetch` tells of sources.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prefetched {
    /// The hash of their NAR, e.g. `sha256-…`.
    pub hash: String,
    /// Where they are in the store that they were fetched into; below its root, where it has one.
    pub store_path: PathBuf,
}

/// Fetches what a reference names and nothing else, into a store of the build's own, which lies in its work directory and goes with it.
///
/// The flake is not evaluated, its inputs are not looked at, and nothing of it comes into the store of this host.
pub fn prefetch(flake_ref: &str, attribute: &str, limits: &Limits, work: &Path, watch: &dyn BuildWatch) -> Result<Prefetched, BuildError> {
    let registry = work.join("registry.json");
    fs::write(&registry, r#"{"version":2,"flakes":[]}"#).map_err(BuildError::at(&registry))?;
    let (store, cache) = (work.join("store"), work.join("cache"));
    let ended = in_scratch(work, |tmp| {
        let run = Run::new(attribute, limits, tmp, watch).filling(work);
        let mut args = ["flake", "prefetch", "--json", "--store"].map(OsStr::new).to_vec();
        args.push(store.as_os_str());
        // Nothing is built, so that it needs no users for builds.
        args.extend(["--option", "build-users-group", ""].map(OsStr::new));
        // Only a name is looked up among those that the world has agreed on; nix asks for all of them.
        if !flake_ref.starts_with("flake:") {
            args.extend(["--option", "flake-registry"].map(OsStr::new));
            args.push(registry.as_os_str());
        }
        args.push(OsStr::new(flake_ref));
        run.nix_with("nix", &args, &[("XDG_CACHE_HOME", cache.as_os_str())])
    })?;
    if !ended.status.success() {
        return Err(BuildError::Unreachable { flake_ref: flake_ref.to_owned(), why: without_body(&ended.said) });
    }
    let told = |why: String| BuildError::Builder { what: format!("read what nix says of {flake_ref}"), why };
    let mut fetched: Prefetched = serde_json::from_slice(&ended.answer).map_err(|error| told(error.to_string()))?;
    let below =
        fetched.store_path.strip_prefix("/nix/store").map_err(|_| told(format!("{} is not in its store", fetched.store_path.display())))?;
    fetched.store_path = super::tree::directory_in(&store.join("nix/store"), below).map_err(told)?;
    Ok(fetched)
}

/// What nix says of a download that failed, without what the server answered: that may be a service of this host's network, and the
/// error is for the tenant too.
fn without_body(said: &str) -> String {
    said.split("response body:").next().unwrap_or_default().trim_end_matches([' ', ';']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_answered_is_not_told() {
        let said = "error: unable to download 'http://169.254.169.254/': HTTP error 500; response body:; the secret";
        assert_eq!(without_body(said), "error: unable to download 'http://169.254.169.254/': HTTP error 500");
        assert_eq!(without_body("error: no"), "error: no");
    }

    #[test]
    fn both_forms_of_a_closure_are_read() {
        let old = br#"[{"path":"/nix/store/b-x","narHash":"sha256-B","narSize":2,"references":[]},{"path":"/nix/store/a-x","narHash":"sha256-A","narSize":1}]"#;
        let new = br#"{"/nix/store/a-x":{"narHash":"sha256-A","narSize":1},"/nix/store/b-x":{"narHash":"sha256-B","narSize":2}}"#;
        let expected = [("/nix/store/a-x", "sha256-A", 1), ("/nix/store/b-x", "sha256-B", 2)].map(|(path, hash, size)| ClosurePath {
            path: path.into(),
            nar_hash: hash.into(),
            nar_size: size,
        });
        assert_eq!(parse_closure(old).unwrap(), expected);
        assert_eq!(parse_closure(new).unwrap(), expected);
        assert!(parse_closure(b"[{\"path\":null}]").is_err());
        assert!(parse_closure(b"").is_err());
    }

    #[test]
    fn only_regular_files_of_the_store_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (store, into) = (dir.path().join("store"), dir.path().join("into"));
        let result = store.join("abc-image");
        fs::create_dir_all(&result).unwrap();
        fs::create_dir_all(&into).unwrap();
        let job = |disk_mib| Job {
            flake_ref: "path:/f".into(),
            shown: "path:/f".into(),
            tree: "/f".into(),
            attribute: "packages.x.y".into(),
            limits: Limits { disk_mib, ..Limits::default() },
        };
        fs::write(store.join("abc-kernel"), "kernel").unwrap();
        std::os::unix::fs::symlink(store.join("abc-kernel"), result.join("vmlinux")).unwrap();
        fs::write(result.join("other"), "not wanted").unwrap();
        copy(&result, &into, &job(1)).unwrap();
        assert_eq!(fs::read(into.join("vmlinux")).unwrap(), b"kernel");
        assert_eq!(fs::read_dir(&into).unwrap().count(), 1);

        let refused = |job: &Job| {
            let into = tempfile::tempdir().unwrap();
            copy(&result, into.path(), job).unwrap_err().to_string()
        };
        fs::write(dir.path().join("secret"), "secret").unwrap();
        std::os::unix::fs::symlink(dir.path().join("secret"), result.join("rootfs")).unwrap();
        assert!(refused(&job(1)).contains("rootfs leads out of the Nix store"), "{}", refused(&job(1)));
        fs::remove_file(result.join("rootfs")).unwrap();
        std::os::unix::fs::symlink("nowhere", result.join("rootfs")).unwrap();
        assert!(refused(&job(1)).contains("rootfs leads nowhere"));
        fs::remove_file(result.join("rootfs")).unwrap();
        fs::create_dir(result.join("rootfs")).unwrap();
        assert!(refused(&job(1)).contains("rootfs is not a regular file"));
        fs::remove_dir(result.join("rootfs")).unwrap();
        File::create(result.join("rootfs")).unwrap().set_len(2 << 20).unwrap();
        assert!(refused(&job(1)).contains("larger than the 1 MiB"));
        assert!(
            copy(&store.join("abc-kernel"), &into, &job(1))
                .unwrap_err()
                .to_string()
                .contains("its result is a file, and should be a directory")
        );
    }

    #[test]
    fn only_what_a_build_noted_as_its_own_is_swept() {
        let work = tempfile::tempdir().unwrap();
        let other = tempfile::tempdir().unwrap();
        fs::write(work.path().join(TMP_NOTE), other.path().to_str().unwrap()).unwrap();
        sweep(work.path());
        assert!(other.path().exists());
        let own = temporary(work.path()).unwrap();
        assert!(own.exists());
        sweep(work.path());
        assert!(!own.exists());
    }
}
