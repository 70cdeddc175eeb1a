//! Brings a flake's sources to where they do not change while they are built.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::fingerprint::{Seen, look};
use super::{BuildError, BuildWatch, BuilderKind, Limits, Reference, host};

/// A flake's sources at rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The flake's directory.
    pub tree: PathBuf,
    /// The reference as locked: names the very same sources again, where such a name exists.
    pub locked: String,
    /// What to hand to nix: the locked reference, or the directory where that would be looked at again.
    pub flake_ref: String,
}

/// Fetches the sources of a reference into the Nix store, or copies those of this host to `work` for a builder that does not share
/// that store.
///
/// # Errors
/// When they cannot be had.
pub fn fetch(
    reference: &Reference,
    attribute: &str,
    kind: BuilderKind,
    work: &Path,
    limits: &Limits,
    watch: &dyn BuildWatch,
) -> Result<Source, BuildError> {
    let text = reference.to_nix();
    let unreachable = |why: String| BuildError::Unreachable { flake_ref: text.clone(), why };
    if let Reference::Path { dir } = reference
        && !dir.join("flake.nix").is_file()
    {
        return Err(unreachable("it has no flake.nix".into()));
    }
    if kind == BuilderKind::Vm
        && let Some(sources) = look(reference, &mut Seen::default()).map_err(unreachable)?
    {
        let tree = work.join("tree");
        copy(&sources.root, &sources.files, &tree, limits).map_err(unreachable)?;
        let below = match reference {
            Reference::Git { dir: Some(dir), .. } => tree.join(dir),
            _ => tree,
        };
        if !below.join("flake.nix").is_file() {
            return Err(unreachable("it has no flake.nix".into()));
        }
        let flake_ref = Reference::Path { dir: below.clone() }.to_nix();
        return Ok(Source { tree: below, locked: text, flake_ref });
    }
    let metadata = host::metadata(&text, attribute, limits, work, watch)?;
    let tree = match &metadata.locked.dir {
        Some(dir) if dir.components().all(|part| matches!(part, std::path::Component::Normal(_))) => metadata.path.join(dir),
        Some(dir) => return Err(unreachable(format!("its directory {} leads out of it", dir.display()))),
        None => metadata.path,
    };
    // A directory, or a work tree with changes, may have changed since it was copied: what counts is the copy.
    let at_rest = metadata.locked.kind != "path" && metadata.locked.rev.is_some();
    let flake_ref = if at_rest { metadata.url.clone() } else { Reference::Path { dir: tree.clone() }.to_nix() };
    Ok(Source { tree, locked: metadata.url, flake_ref })
}

fn copy(root: &Path, files: &[PathBuf], tree: &Path, limits: &Limits) -> Result<(), String> {
    let mut left = limits.disk_mib << 20;
    let wrong = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| format!("{path}: {error}")
    };
    fs::create_dir_all(tree).map_err(wrong(tree))?;
    for file in files {
        let (from, to) = (root.join(file), tree.join(file));
        let parent = to.parent().unwrap_or(tree);
        fs::create_dir_all(parent).map_err(wrong(parent))?;
        let meta = fs::symlink_metadata(&from).map_err(wrong(&from))?;
        if meta.is_symlink() {
            let target = fs::read_link(&from).map_err(wrong(&from))?;
            std::os::unix::fs::symlink(target, &to).map_err(wrong(&to))?;
            continue;
        }
        left = left.checked_sub(meta.len()).ok_or_else(|| format!("it has more than {} MiB", limits.disk_mib))?;
        fs::copy(&from, &to).map_err(wrong(&from))?;
    }
    Ok(())
}
