//! Leases by which programs in the guest ask not to be put to sleep.
//!
//! A lease is a file in [`mvm_guest_api::BUSY_DIR`] that holds a number of seconds, counted from when it was written
//! (`echo 300 > /run/mvm/busy.d/import`); an empty one holds for a minute, removing it ends it. So any program in any
//! language can take one, and a forgotten one ends by itself.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mvm_guest_api::limits;
use mvm_guest_api::proto::BusyLease;

/// Seconds of a lease that names none.
const DEFAULT_SECONDS: u64 = 60;

/// The leases that hold now.
pub fn leases(directory: &Path) -> Vec<BusyLease> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.flatten().take(limits::MAX_LEASES).filter_map(|entry| lease(&entry.path())).collect()
}

fn lease(path: &Path) -> Option<BusyLease> {
    let meta = std::fs::symlink_metadata(path).ok().filter(|meta| meta.is_file())?;
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
    let seconds = match text.trim() {
        "" => DEFAULT_SECONDS,
        number => number.parse().ok()?,
    };
    let end = meta.modified().ok()? + Duration::from_secs(seconds.min(limits::MAX_LEASE_SECONDS));
    let remaining = end.duration_since(SystemTime::now()).ok()?;
    Some(BusyLease { holder: path.file_name()?.to_string_lossy().into_owned(), remaining_ms: remaining.as_millis() as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_for_its_seconds() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("long"), "300\n").unwrap();
        std::fs::write(dir.path().join("plain"), "").unwrap();
        std::fs::write(dir.path().join("over"), "0").unwrap();
        std::fs::write(dir.path().join("wrong"), "soon").unwrap();
        std::fs::write(dir.path().join("huge"), "18446744073709551615").unwrap();
        std::os::unix::fs::symlink("long", dir.path().join("link")).unwrap();
        let mut found = leases(dir.path());
        found.sort_by(|a, b| a.holder.cmp(&b.holder));
        let names: Vec<_> = found.iter().map(|l| l.holder.as_str()).collect();
        assert_eq!(names, ["huge", "long", "plain"]);
        assert!(found[0].remaining_ms <= limits::MAX_LEASE_SECONDS * 1000);
        assert!((290_000..=300_000).contains(&found[1].remaining_ms));
        assert!((50_000..=60_000).contains(&found[2].remaining_ms));
    }
}
