//! A directory that vanishes with the processes that use it.

use std::ffi::CString;
use std::path::Path;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::error::{During, HostdError};

/// Mounts memory of at most so many bytes over an existing directory, for the calling thread and what it starts from now on.
///
/// The mount is in a mount namespace of its own, which the kernel takes away with the last process in it, however that ends:
/// nothing of what is written there is ever left. Mounts of the host go on to show up in it, and it shows nothing to the host.
///
/// # Errors
/// When the kernel refuses: only root may.
pub fn mount_scratch(dir: &Path, bytes: u64) -> Result<(), HostdError> {
    let what = || format!("cannot make {} a directory of this process's own", dir.display());
    // SAFETY: the descriptor table stays shared, which is all that `unshare_unsafe` warns of.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.during(what)?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).during(what)?;
    let options = CString::new(format!("size={bytes},mode=0700")).expect("a number has no NUL");
    mount("mvm-scratch", dir, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC, options.as_c_str()).during(what)
}

/// Shows a directory in another place as well, for the same threads and processes as [`mount_scratch`], which comes before.
///
/// # Errors
/// When the kernel refuses.
pub fn show(dir: &Path, place: &Path) -> Result<(), HostdError> {
    mount_bind(dir, place).during(|| format!("cannot show {} as {}", dir.display(), place.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_written_is_seen_by_the_thread_alone_and_limited() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().to_owned();
        std::thread::spawn(move || {
            mount_scratch(&inside, 1 << 20).unwrap();
            fs::write(inside.join("file"), "x").unwrap();
            let other = tempfile::tempdir().unwrap();
            fs::write(other.path().join("shown"), "x").unwrap();
            fs::create_dir(inside.join("place")).unwrap();
            show(other.path(), &inside.join("place")).unwrap();
            assert!(inside.join("place/shown").exists());
            let error = fs::write(inside.join("large"), vec![0; 2 << 20]).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        })
        .join()
        .unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()));
    }
}
