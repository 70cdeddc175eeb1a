//! What a pass that changes nothing asks of the kernel, counted by `strace -c`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::program;
use crate::simulated::{Fleet, Fleets};

/// How many processes or threads there were beside the first.
pub const PROCESSES: &str = "pass/processes";
/// How many system calls changed a file.
pub const WRITES: &str = "pass/writes";

/// What starts a process or a thread. The first `execve` is the command's own.
const STARTING: [&str; 6] = ["execve", "execveat", "fork", "vfork", "clone", "clone3"];
/// What changes a file, its name or what is known of it. One `write` is the command's own word on its standard output.
const CHANGING: [&str; 32] = [
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "sendfile",
    "splice",
    "copy_file_range",
    "truncate",
    "ftruncate",
    "fallocate",
    "fsync",
    "fdatasync",
    "sync",
    "syncfs",
    "sync_file_range",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "symlink",
    "symlinkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "mknod",
    "mknodat",
    "fchmod",
    "utimensat",
];

/// Counts over fleets of these sizes.
pub fn measure(fleets: &Fleets, sizes: &[usize]) -> Result<Vec<Figure>, String> {
    let (mut started, mut changed) = (0, 0);
    for size in sizes {
        let fleet = fleets.of(*size)?;
        tell(&format!("strace of a pass over {size}"));
        let before = found(fleet)?;
        let calls = calls(fleet)?;
        let count = |names: &[&str]| names.iter().filter_map(|name| calls.get(*name)).sum::<u64>();
        started += count(&STARTING).saturating_sub(1);
        changed += count(&CHANGING).saturating_sub(1);
        // What strace cannot tell apart from a look, an open that makes a file, is seen by what is there afterwards.
        changed += difference(&before, &found(fleet)?);
    }
    let over = sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let figure = |name: &str, measured: u64, what: &str| Figure {
        name: name.to_owned(),
        measured: measured as f64,
        unit: Unit::Count,
        limit: Some(Limit::AtMost(0.0)),
        samples: sizes.len(),
        detail: format!("{what} of mvm agent reconcile over {over} instances, by strace -c"),
    };
    Ok(vec![figure(PROCESSES, started, "processes and threads"), figure(WRITES, changed, "writing system calls and changed files")])
}

/// The system calls of one pass with how many there were of each.
fn calls(fleet: &Fleet) -> Result<BTreeMap<String, u64>, String> {
    let inner = fleet.mvm(&["agent", "reconcile", "--desired"]);
    let mut command = Command::new("strace");
    command.args(["-f", "-c", "-o"]).arg(fleet.summary()).arg("--").arg(inner.get_program()).args(inner.get_args()).arg(fleet.file());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let said = program::printed(&mut command)?;
    if !said.starts_with("Nothing to do") {
        return Err(format!("the pass did something: {said}"));
    }
    let path = fleet.summary();
    let summary = fs::read_to_string(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let calls: BTreeMap<String, u64> = summary.lines().filter_map(line).collect();
    if calls.contains_key("execve") { Ok(calls) } else { Err(format!("strace counted nothing:\n{summary}")) }
}

/// Reads a line of `strace -c`: share, seconds, microseconds a call, calls, errors where there were any, name.
fn line(line: &str) -> Option<(String, u64)> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let name = fields.last().filter(|name| **name != "total")?;
    Some(((*name).to_owned(), fields.get(3)?.parse().ok()?))
}

/// What shows that a file was changed: inode, size, and when it last was.
type Trace = (u64, u64, i64, i64);

/// Every file that a pass could write to.
fn found(fleet: &Fleet) -> Result<BTreeMap<PathBuf, Trace>, String> {
    let mut found = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = fleet.places().into();
    while let Some(dir) = dirs.pop() {
        let failed = |error| format!("cannot look at {}: {error}", dir.display());
        found.insert(dir.clone(), seen(&dir).map_err(failed)?);
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_type().map_err(failed)?.is_dir() {
                dirs.push(entry.path());
            } else {
                found.insert(entry.path(), seen(&entry.path()).map_err(failed)?);
            }
        }
    }
    Ok(found)
}

fn seen(path: &Path) -> std::io::Result<Trace> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()))
}

fn difference(before: &BTreeMap<PathBuf, Trace>, after: &BTreeMap<PathBuf, Trace>) -> u64 {
    let changed = after.iter().filter(|(path, seen)| before.get(*path) != Some(seen)).count();
    let gone = before.keys().filter(|path| !after.contains_key(*path)).count();
    (changed + gone) as u64
}
