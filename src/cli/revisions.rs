//! The images of pools on the command line: building them, listing, comparing and removing them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mvm_types::PoolAddress;
use serde::Serialize;

use super::exit::{CliError, Exit};
use super::open::Globals;
use super::progress::interrupted;
use crate::infra::display::{CollectedRow, DifferenceRow, OutputFormat, RevisionRow, print_rows, to_json, write_out};
use crate::vm::collect::{Collect, Collected};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::node::Node;
use crate::vm::pool::{BuildOptions, BuildWatch, Limits, Origin, RevisionDoc, differences};

/// Writes a build's log to standard error, and ends the build on an interrupt.
struct Told {
    interrupted: Arc<AtomicBool>,
}

impl BuildWatch for Told {
    fn line(&self, line: &str) {
        eprintln!("{line}");
    }

    fn cancelled(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

/// What `mvm pool build` gives to programs.
#[derive(Serialize)]
struct Built<'a> {
    pool: String,
    #[serde(flatten)]
    origin: &'a Origin,
}

/// Builds a pool's image where it has none: one that it was rolled back to stays.
pub fn build_first(node: &Node, pool: &PoolAddress) -> Result<(), CliError> {
    if node.pool(pool)?.revision.is_some_and(|revision| node.images().open(&revision).is_ok()) {
        return Ok(());
    }
    node.pool_build(pool, &BuildOptions { watch: &Told { interrupted: interrupted()? }, limits: Limits::default(), others_come: false })?;
    Ok(())
}

/// `mvm pool build`.
pub fn build(globals: &Globals, node: &Node, pool: &PoolAddress, limits: Limits) -> Result<(), CliError> {
    let told = Told { interrupted: interrupted()? };
    let origin = match node.pool_build(pool, &BuildOptions { watch: &told, limits, others_come: false }) {
        Err(LifecycleError::Image(error)) if error.is_interrupted() => return Err(CliError::new(Exit::Interrupted, with_causes(&error))),
        other => other?,
    };
    match globals.format() {
        OutputFormat::Json => write_out(&to_json(&Built { pool: pool.to_string(), origin: &origin })?)?,
        _ => write_out(&format!("{}\n", origin.revision))?,
    }
    Ok(())
}

/// `mvm pool revisions`.
pub fn list(globals: &Globals, node: &Node, pool: &PoolAddress) -> Result<(), CliError> {
    let doc = node.pool(pool)?;
    let mut problems = Vec::new();
    let instances = node.pool_instances(pool, &mut problems)?;
    let revisions = node.pool_revisions(pool, &mut problems)?;
    let row = |RevisionDoc { origin, built, .. }: &RevisionDoc| RevisionRow {
        revision: origin.revision.to_string(),
        current: doc.revision.as_ref() == Some(&origin.revision),
        instances: instances.iter().filter(|one| one.revision.as_ref() == Some(&origin.revision)).count(),
        built: built.to_rfc3339(),
        size: origin.size(),
        took_ms: origin.took_ms,
        builder: origin.builder.map(|builder| builder.as_str().to_owned()),
        attribute: origin.attribute.clone(),
        locked: origin.locked.clone(),
        store_path: origin.store_path.clone(),
        closure_hash: origin.closure_hash.clone(),
        files: origin.files.iter().map(|(name, file)| (name.clone(), file.blake3.clone())).collect(),
        usable: node.images().open(&origin.revision).is_ok(),
    };
    let rows: Vec<RevisionRow> = revisions.iter().map(row).collect();
    for problem in problems {
        tracing::warn!(problem);
    }
    Ok(print_rows(&rows, globals.format())?)
}

/// The first half of `mvm pool rollback`: the pool's document.
pub fn roll_back(node: &Node, pool: &PoolAddress, revision: Option<&str>) -> Result<(), CliError> {
    node.pool(pool)?;
    let target = match revision {
        Some(prefix) => node.pool_revision(pool, prefix)?,
        None => node.pool_revision_before(pool)?,
    };
    node.pool_rollback(pool, &target.origin.revision)?;
    eprintln!("{pool} is at revision {} again, of {}", target.origin.revision, target.origin.locked);
    Ok(())
}

/// `mvm pool diff`.
pub fn diff(globals: &Globals, node: &Node, pool: &PoolAddress, from: Option<&str>, to: Option<&str>) -> Result<(), CliError> {
    let doc = node.pool(pool)?;
    let from = match from {
        Some(prefix) => node.pool_revision(pool, prefix)?,
        None => node.pool_revision_before(pool)?,
    };
    let to = match (to, &doc.revision) {
        (Some(prefix), _) => node.pool_revision(pool, prefix)?,
        (None, Some(current)) => node.pool_revision(pool, current.as_str())?,
        (None, None) => return Err(CliError::new(Exit::NotFound, format!("pool {pool} has no image yet"))),
    };
    let rows: Vec<DifferenceRow> =
        differences(&from.origin, &to.origin).into_iter().map(|one| DifferenceRow { what: one.what, from: one.from, to: one.to }).collect();
    Ok(print_rows(&rows, globals.format())?)
}

/// What `--dry-run` means.
pub fn collect(dry_run: bool) -> Collect {
    if dry_run { Collect::Tell } else { Collect::Remove }
}

/// What was removed, or would be.
pub fn show(globals: &Globals, collected: &[Collected]) -> Result<(), CliError> {
    let row = |one: &Collected| CollectedRow {
        kind: one.kind.to_owned(),
        name: one.name.clone(),
        pool: one.pool.as_ref().map(ToString::to_string),
        size: one.size,
        why: one.why.clone(),
    };
    Ok(print_rows(&collected.iter().map(row).collect::<Vec<_>>(), globals.format())?)
}
