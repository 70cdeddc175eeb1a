//! The hierarchy of this host in which groups can be limited, or why there is none.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::group::Place;
use super::{BASE, NEEDED};
use crate::error::{During, HostdError};

/// Why no limits can be set on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}; to mend it, {remedy}")]
pub struct NoLimits {
    /// What is missing.
    pub why: String,
    /// How to mend it.
    pub remedy: &'static str,
}

impl NoLimits {
    fn new(why: impl Into<String>, remedy: &'static str) -> Self {
        Self { why: why.into(), remedy }
    }
}

/// A hierarchy of groups in which limits can be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub(super) root: PathBuf,
}

impl Hierarchy {
    /// Finds the hierarchy of this host. Changes nothing.
    ///
    /// # Errors
    /// When there is none that has all of [`NEEDED`] and lets groups be made at its root.
    pub fn find() -> Result<Self, NoLimits> {
        match fs::read_to_string("/proc/self/mountinfo") {
            Ok(mounts) => Self::among(&mounts),
            Err(error) => Err(NoLimits::new(format!("/proc/self/mountinfo cannot be read: {error}"), "mount /proc")),
        }
    }

    /// Finds it among mounts, as `/proc/self/mountinfo` has them.
    pub(super) fn among(mounts: &str) -> Result<Self, NoLimits> {
        let mut first = None;
        for mount in cgroup2_mounts(mounts) {
            match usable(&mount) {
                Ok(()) => return Ok(Self { root: mount.place }),
                Err(why) => drop(first.get_or_insert(why)),
            }
        }
        Err(first.unwrap_or_else(|| NoLimits::new("no cgroup v2 hierarchy is mounted", UNIFIED)))
    }

    /// The directory of groups.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the group of a node's instance is, or would be.
    ///
    /// # Errors
    /// When a name is more than lower-case letters, digits and dashes.
    pub fn place(&self, node: &str, instance: &str) -> Result<Place, HostdError> {
        for name in [node, instance] {
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-') {
                let why = "a group's name consists of lower-case letters, digits and dashes";
                return Err(HostdError::refused(format!("cannot name a cgroup after {name:?}"), why));
            }
        }
        Ok(Place { hierarchy: self.clone(), name: format!("{node}.{instance}") })
    }

    /// Removes the groups of a node that no process is in, that nobody makes just now, and whose instance is not to be kept.
    ///
    /// # Errors
    /// When the kernel refuses. Returns the directories that were removed.
    pub fn sweep(&self, node: &str, keep: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, HostdError> {
        let base = self.root.join(BASE);
        let entries = match fs::read_dir(&base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.during(|| format!("cannot list {}", base.display()))?,
        };
        let mut removed = Vec::new();
        for entry in entries {
            let entry = entry.during(|| format!("cannot list {}", base.display()))?;
            let name = entry.file_name();
            let Some(instance) = name.to_str().and_then(|name| name.strip_prefix(node)?.strip_prefix('.')) else { continue };
            if keep(instance) {
                continue;
            }
            // Another name was not given by mvm.
            let Ok(place) = self.place(node, instance) else { continue };
            let Some(dir) = place.open()? else { continue };
            if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() && !place.is_populated(&dir)? && place.remove()? {
                removed.push(entry.path());
            }
        }
        self.remove_base();
        Ok(removed)
    }

    /// Removes the group above all others, unless one is left or it is gone already.
    pub(super) fn remove_base(&self) {
        // Who makes a group just now makes this one again.
        let _ = fs::remove_dir(self.root.join(BASE));
    }

    /// Makes the group above all others, and has the controllers in it and below it.
    pub(super) fn ensure_base(&self) -> Result<(), HostdError> {
        let base = self.root.join(BASE);
        match fs::create_dir(&base) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).during(|| format!("cannot make the cgroup {}", base.display()));
            }
            _ => {}
        }
        hand_on(&self.root)?;
        hand_on(&base)
    }
}

/// What to do where only a part of the hierarchy is shown.
const ON_THE_HOST: &str = "run mvm on the host itself, or give its container the host's cgroup namespace and /sys/fs/cgroup for writing";
/// What to do where the controllers are those of cgroup v1.
const UNIFIED: &str = "boot the host with systemd.unified_cgroup_hierarchy=1, or cgroup_no_v1=all, on the kernel's command line";

struct Mount {
    place: PathBuf,
    read_only: bool,
}

/// The mounts of cgroup v2, from lines of proc_pid_mountinfo(5).
fn cgroup2_mounts(mounts: &str) -> impl Iterator<Item = Mount> {
    mounts.lines().filter_map(|line| {
        let (fields, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        if kind.next() != Some("cgroup2") {
            return None;
        }
        let mut fields = fields.split(' ').skip(4);
        let (place, options) = (fields.next()?, fields.next()?);
        let read_only = |options: &str| options.split(',').any(|option| option == "ro");
        let place = place.replace(r"\040", " ").into();
        Some(Mount { place, read_only: read_only(options) || kind.nth(1).is_some_and(read_only) })
    })
}

/// Tells whether groups with limits can be made in a hierarchy, or why not.
fn usable(mount: &Mount) -> Result<(), NoLimits> {
    let root = mount.place.display();
    let read = |name: &str| {
        let unreadable = |error| NoLimits::new(format!("{root}/{name} cannot be read: {error}"), ON_THE_HOST);
        fs::read_to_string(mount.place.join(name)).map_err(unreadable)
    };
    let missing = without(&read("cgroup.controllers")?);
    if !missing.is_empty() {
        let missing = missing.join(", ");
        return Err(NoLimits::new(format!("the cgroup v2 hierarchy at {root} does not have {missing}, which cgroup v1 may hold"), UNIFIED));
    }
    if mount.read_only {
        return Err(NoLimits::new(format!("{root} is mounted read-only, as in most containers"), ON_THE_HOST));
    }
    // The hierarchy's own root has no type, and is the only group that may have both processes and groups with controllers.
    let is_inner = mount.place.join("cgroup.type").exists();
    if is_inner && !without(&read("cgroup.subtree_control")?).is_empty() && !read("cgroup.procs")?.trim().is_empty() {
        return Err(NoLimits::new(processes_in(&mount.place), ON_THE_HOST));
    }
    Ok(())
}

fn processes_in(group: &Path) -> String {
    format!("{} has processes in it, and such a group hands no controllers on", group.display())
}

/// The needed controllers that a list does not have.
fn without(list: &str) -> Vec<&'static str> {
    NEEDED.into_iter().filter(|needed| !list.split_whitespace().any(|one| one == *needed)).collect()
}

/// Has a group hand its controllers on to the groups in it.
pub(super) fn hand_on(group: &Path) -> Result<(), HostdError> {
    let file = group.join("cgroup.subtree_control");
    let read = || fs::read_to_string(&file).during(|| format!("cannot read {}", file.display()));
    let missing = without(&read()?);
    if missing.is_empty() {
        return Ok(());
    }
    let wanted: Vec<String> = missing.iter().map(|one| format!("+{one}")).collect();
    let wanted = wanted.join(" ");
    match fs::OpenOptions::new().write(true).open(&file).and_then(|mut file| io::Write::write_all(&mut file, wanted.as_bytes())) {
        Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
            Err(HostdError::refused(format!("cannot write {wanted} to {}", file.display()), processes_in(group)))
        }
        other => other.during(|| format!("cannot write {wanted} to {}", file.display())),
    }
}
