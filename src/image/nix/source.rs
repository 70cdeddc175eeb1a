//! Brings a flake's sources to where they do not change while they are built.

use std::path::{Path, PathBuf};

use mvm_hostd::dir::Dir;

use super::fingerprint::{Seen, commit, look};
use super::process::Run;
use super::tree::{Tree, Trouble, directory_in};
use super::{BuildError, BuildWatch, BuilderKind, Limits, Reference, git, host};

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

/// Fetches the sources of a reference into the Nix store, or brings them to `work` for a builder that does not share that store.
///
/// Guarantee for the latter: nothing of the flake is evaluated on this host, none of its inputs is fetched by it, and nothing of it comes
/// into this host's store.
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
    match kind {
        BuilderKind::Vm => apart(reference, attribute, work, limits, watch),
        BuilderKind::Host => {
            if let Reference::Git { root, .. } = reference {
                git::check_owner(root, attribute, limits, work, watch).map_err(|trouble| trouble.of(&text))?;
            }
            into_store(&text, attribute, work, limits, watch)
        }
    }
}

/// By nix, into the store of this host.
fn into_store(text: &str, attribute: &str, work: &Path, limits: &Limits, watch: &dyn BuildWatch) -> Result<Source, BuildError> {
    let unreachable = |why: String| BuildError::Unreachable { flake_ref: text.to_owned(), why };
    let metadata = host::metadata(text, attribute, limits, work, watch)?;
    let tree = match &metadata.locked.dir {
        Some(dir) => directory_in(&metadata.path, dir).map_err(unreachable)?,
        None => metadata.path,
    };
    // A directory, or a work tree with changes, may have changed since it was copied: what counts is the copy.
    let at_rest = metadata.locked.kind != "path" && metadata.locked.rev.is_some();
    let flake_ref = if at_rest { metadata.url.clone() } else { Reference::Path { dir: tree.clone() }.to_nix() };
    Ok(Source { tree, locked: metadata.url, flake_ref })
}

/// Into the work directory, for a builder that has nothing of this host.
fn apart(reference: &Reference, attribute: &str, work: &Path, limits: &Limits, watch: &dyn BuildWatch) -> Result<Source, BuildError> {
    let text = reference.to_nix();
    let unreachable = |why: String| BuildError::Unreachable { flake_ref: text.clone(), why };
    let tree = work.join("tree");
    let (whole, dir, locked) = match reference {
        Reference::Other(_) => {
            let fetched = host::prefetch(&text, attribute, limits, work, watch)?;
            (fetched.store_path, reference.dir(), reference.with_hash(&fetched.hash))
        }
        Reference::Git { root, dir, branch, .. } if commit(reference).map_err(unreachable)?.is_some() => {
            let commit = commit(reference).map_err(unreachable)?.unwrap_or_default();
            host::in_scratch(work, |scratch| {
                let run = Run::new(attribute, limits, scratch, watch);
                let into = Tree::make(&tree, limits.disk_mib, attribute, watch);
                into.and_then(|into| git::export(&run, root, &commit, scratch, into)).map_err(|trouble| trouble.of(&text))
            })?;
            let locked = Reference::Git { root: root.clone(), dir: dir.clone(), branch: branch.clone(), rev: Some(commit) };
            (tree, dir.clone(), locked.to_nix())
        }
        Reference::Path { .. } | Reference::Git { .. } => {
            let sources = look(reference, &mut Seen::default()).map_err(unreachable)?;
            let sources = sources.ok_or_else(|| unreachable("it is not on this host".into()))?;
            copy(&sources.root, &sources.files, &tree, limits, attribute, watch).map_err(|trouble| trouble.of(&text))?;
            let dir = if let Reference::Git { dir, .. } = reference { dir.clone() } else { None };
            (tree, dir, text.clone())
        }
    };
    let tree = match dir {
        Some(dir) => directory_in(&whole, &dir).map_err(unreachable)?,
        None => whole,
    };
    if !tree.join("flake.nix").is_file() {
        return Err(unreachable("it has no flake.nix".into()));
    }
    let flake_ref = Reference::Path { dir: tree.clone() }.to_nix();
    Ok(Source { tree, locked, flake_ref })
}

fn copy(root: &Path, files: &[PathBuf], tree: &Path, limits: &Limits, attribute: &str, watch: &dyn BuildWatch) -> Result<(), Trouble> {
    let from = Dir::open(root)?;
    let mut tree = Tree::make(tree, limits.disk_mib, attribute, watch)?;
    for file in files {
        tree.copy(&from, file)?;
    }
    tree.finish()
}
