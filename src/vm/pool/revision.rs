//! What a pool was built from, revision by revision: documents that outlive the image's sources.

use std::collections::BTreeMap;
use std::sync::Arc;

use mvm_types::{PoolAddress, ProfileName, RevisionId};
use serde::{Deserialize, Serialize};

use super::config::{BUILTIN, PoolSpec};
use super::role::{self, RoleTraits};
use crate::image::nix::{BuilderKind, ClosurePath};
use crate::infra::clock::Moment;
use crate::store::Document;
use crate::vm::error::LifecycleError;
use crate::vm::keys;
use crate::vm::node::Node;

/// Where an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The image.
    pub revision: RevisionId,
    /// The flake reference as declared.
    pub flake_ref: String,
    /// The profile.
    pub profile: ProfileName,
    /// The flake reference as locked; as declared where nothing is to lock.
    pub locked: String,
    /// The attribute that was built; none for the built-in image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribute: Option<String>,
    /// The result in the Nix store that it was built in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store_path: Option<String>,
    /// Everything that the result refers to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub closure: Vec<ClosurePath>,
    /// BLAKE3 over the closure, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closure_hash: Option<String>,
    /// The image's files: size and BLAKE3.
    pub files: BTreeMap<String, OriginFile>,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// Where it was built; none for the built-in image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub builder: Option<BuilderKind>,
    /// The flake's sources, where they can be told from others without nix.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
    /// What the pool's role means by the flake's manifest; none without one.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "role::shared")]
    pub traits: Option<Arc<RoleTraits>>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginFile {
    /// In bytes.
    pub size: u64,
    /// In hex.
    pub blake3: String,
}

impl Origin {
    /// The size of the image's files together, in bytes.
    pub fn size(&self) -> u64 {
        self.files.values().map(|file| file.size).sum()
    }
}

/// Hashes a closure: its paths with the hashes of their contents, in order.
pub fn closure_hash(closure: &[ClosurePath]) -> String {
    let mut sorted: Vec<&ClosurePath> = closure.iter().collect();
    sorted.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hasher = blake3::Hasher::new();
    for one in sorted {
        hasher.update(format!("{}\0{}\0{}\0", one.path, one.nar_hash, one.nar_size).as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

/// `tenants/<t>/pools/<p>/revisions/<revision>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevisionDoc {
    /// The document's version.
    pub version: u32,
    /// Where the image came from.
    pub origin: Origin,
    /// When the pool got it last.
    pub built: Moment,
}

impl Document for RevisionDoc {
    const KIND: &'static str = "revision";
    const VERSION: u32 = 1;
    fn version(&self) -> u32 {
        self.version
    }
}

/// What a pool's newest build was of, beside the pool's current revision: after a rollback they differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastBuild {
    /// The flake reference as declared then.
    pub flake_ref: String,
    /// The profile then.
    pub profile: ProfileName,
    /// The flake's sources, where they can be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<String>,
}

impl LastBuild {
    /// Tells whether a declaration asks for what was built, as far as can be told without looking at the flake.
    pub fn is_of(&self, spec: &PoolSpec) -> bool {
        // There is one built-in image, whatever the profile is called.
        self.flake_ref == spec.flake_ref && (self.profile == spec.profile || spec.flake_ref == BUILTIN)
    }
}

/// One difference between two revisions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// What differs: a field, a file, or the name of a package.
    pub what: String,
    /// In the first one; none where it has none.
    pub from: Option<String>,
    /// In the second one.
    pub to: Option<String>,
}

/// Compares two revisions; nothing but what differs is listed.
pub fn differences(a: &Origin, b: &Origin) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut compare = |what: String, from: Option<String>, to: Option<String>| {
        if from != to {
            found.push(Difference { what, from, to });
        }
    };
    compare("flake".into(), Some(a.flake_ref.clone()), Some(b.flake_ref.clone()));
    compare("locked".into(), Some(a.locked.clone()), Some(b.locked.clone()));
    compare("profile".into(), Some(a.profile.to_string()), Some(b.profile.to_string()));
    compare("attribute".into(), a.attribute.clone(), b.attribute.clone());
    compare("store path".into(), a.store_path.clone(), b.store_path.clone());
    let names: std::collections::BTreeSet<&String> = a.files.keys().chain(b.files.keys()).collect();
    let file = |origin: &Origin, name: &String| {
        origin.files.get(name).map(|file| format!("{} bytes, {}", file.size, file.blake3.get(..16).unwrap_or(&file.blake3)))
    };
    for name in names {
        compare(name.clone(), file(a, name), file(b, name));
    }
    let (before, after) = (packages(&a.closure), packages(&b.closure));
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    for name in names {
        let shown = |packages: &BTreeMap<String, Vec<&ClosurePath>>| {
            packages
                .get(name)
                .map(|paths| paths.iter().map(|path| format!("{} ({} bytes)", path.path, path.nar_size)).collect::<Vec<_>>().join(", "))
        };
        compare(format!("package {name}"), shown(&before), shown(&after));
    }
    found
}

/// The paths of a closure by the name that they share over versions: without the hash and from the first `-` before a digit on.
fn packages(closure: &[ClosurePath]) -> BTreeMap<String, Vec<&ClosurePath>> {
    let mut found: BTreeMap<String, Vec<&ClosurePath>> = BTreeMap::new();
    for path in closure {
        let base = path.path.rsplit('/').next().unwrap_or(&path.path);
        let name = base.split_once('-').map_or(base, |(_, name)| name);
        let end = name.as_bytes().windows(2).position(|pair| pair[0] == b'-' && pair[1].is_ascii_digit()).unwrap_or(name.len());
        found.entry(name[..end].to_owned()).or_default().push(path);
    }
    found
}

impl Node {
    /// Reads a pool's revisions, the newest first; those that cannot be read are named in `problems`.
    pub fn pool_revisions(&self, pool: &PoolAddress, problems: &mut Vec<String>) -> Result<Vec<RevisionDoc>, LifecycleError> {
        let names = self.documents().raw().list(&keys::revisions_dir(pool))?;
        let mut docs = Vec::new();
        for name in names {
            let Some(revision) = name.strip_suffix(".json").and_then(|stem| stem.parse::<RevisionId>().ok()) else { continue };
            match self.documents().read::<RevisionDoc>(&keys::revision_doc(pool, &revision)) {
                Ok(doc) => docs.extend(doc),
                Err(error) => problems.push(crate::vm::error::with_causes(&error)),
            }
        }
        docs.sort_by(|a, b| (b.built.wall_ms, &b.origin.revision).cmp(&(a.built.wall_ms, &a.origin.revision)));
        Ok(docs)
    }

    /// Finds a pool's revision by the beginning of its name.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn pool_revision(&self, pool: &PoolAddress, prefix: &str) -> Result<RevisionDoc, LifecycleError> {
        let mut docs = self.pool_revisions(pool, &mut Vec::new())?;
        let known: Vec<String> = docs.iter().map(|doc| doc.origin.revision.to_string()).collect();
        docs.retain(|doc| !prefix.is_empty() && doc.origin.revision.as_str().starts_with(prefix));
        match docs.len() {
            1 => Ok(docs.remove(0)),
            0 => Err(LifecycleError::NotFound { kind: "revision", name: format!("{prefix} of {pool}"), known }),
            _ => {
                let list: Vec<&str> = docs.iter().map(|doc| doc.origin.revision.as_str()).collect();
                Err(LifecycleError::Invalid {
                    place: format!("revision {prefix} of {pool}"),
                    why: format!("it can mean {}; write more of it", list.join(", ")),
                })
            }
        }
    }

    /// The revision that a pool had before its current one.
    ///
    /// # Errors
    /// When there is none.
    pub fn pool_revision_before(&self, pool: &PoolAddress) -> Result<RevisionDoc, LifecycleError> {
        let current = self.pool(pool)?.revision;
        let docs = self.pool_revisions(pool, &mut Vec::new())?;
        let mut older = docs.into_iter().skip_while(|doc| Some(&doc.origin.revision) != current.as_ref()).skip(1);
        older.next().ok_or_else(|| LifecycleError::Refused {
            what: format!("roll {pool} back"),
            why: "it has no revision before the current one; `mvm pool revisions` lists those that there are".to_owned(),
        })
    }

    /// Makes an earlier image the one that instances are made from, and returns it.
    ///
    /// A pass does not undo it: the pool is built again when its flake changes.
    ///
    /// # Errors
    /// When the image is not there any more.
    pub fn pool_rollback(&self, pool: &PoolAddress, revision: &RevisionId) -> Result<(), LifecycleError> {
        let _guard = self.lock(&keys::pool_dir(pool))?;
        let mut doc = self.pool(pool)?;
        let role = doc.spec.role;
        self.audited_pool(&format!("roll back to {revision}"), pool, role, || self.roll_back(pool, revision, &mut doc))
    }

    fn roll_back(&self, pool: &PoolAddress, revision: &RevisionId, doc: &mut super::PoolDoc) -> Result<(), LifecycleError> {
        let _images = self.lock(keys::IMAGES_LOCK)?;
        let Some(known) = self.documents().read::<RevisionDoc>(&keys::revision_doc(pool, revision))? else {
            return Err(LifecycleError::NotFound { kind: "revision", name: format!("{revision} of {pool}"), known: Vec::new() });
        };
        self.images().open(revision)?;
        if doc.revision.as_ref() != Some(revision) {
            doc.revision = Some(revision.clone());
            doc.traits = known.origin.traits;
            doc.failure = None;
            self.documents().write(&keys::pool_doc(pool), doc)?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn origin(revision: &str) -> Origin {
        Origin {
            revision: revision.parse().unwrap(),
            flake_ref: "path:/f".into(),
            profile: "minimal".parse().unwrap(),
            locked: "path:/f?narHash=a".into(),
            attribute: Some("packages.x86_64-linux.tenant-minimal".into()),
            store_path: Some("/nix/store/aaa-image".into()),
            closure: Vec::new(),
            closure_hash: None,
            files: BTreeMap::from([("vmlinux".into(), OriginFile { size: 1, blake3: "0".repeat(64) })]),
            took_ms: 1,
            builder: Some(BuilderKind::Host),
            fingerprint: Some("f".into()),
            traits: None,
        }
    }

    fn path(name: &str) -> ClosurePath {
        ClosurePath { path: format!("/nix/store/{name}"), nar_hash: "sha256-x".into(), nar_size: 7 }
    }

    #[test]
    fn a_difference_names_files_and_packages() {
        let a = Origin { closure: vec![path("aaa-glibc-2.35"), path("bbb-same-1"), path("ccc-old")], ..origin("0000000000000001") };
        let mut b = Origin { closure: vec![path("ddd-glibc-2.37"), path("bbb-same-1")], ..origin("0000000000000002") };
        b.locked = "path:/f?narHash=b".into();
        b.files.insert("initrd".into(), OriginFile { size: 5, blake3: "1".repeat(64) });
        let found = differences(&a, &b);
        let names: Vec<&str> = found.iter().map(|one| one.what.as_str()).collect();
        assert_eq!(names, ["locked", "initrd", "package glibc", "package old"]);
        assert_eq!(found[1].from, None);
        assert_eq!(found[2].to.as_deref(), Some("/nix/store/ddd-glibc-2.37 (7 bytes)"));
        assert!(differences(&a, &a).is_empty());
    }

    #[test]
    fn a_closure_s_hash_does_not_depend_on_its_order() {
        let (a, b) = (path("a"), path("b"));
        assert_eq!(closure_hash(&[a.clone(), b.clone()]), closure_hash(&[b, a.clone()]));
        assert_ne!(closure_hash(&[a]), closure_hash(&[path("c")]));
    }
}
