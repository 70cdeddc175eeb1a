//! The root file system of the built-in image: busybox, and the places that everything else is mounted on.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{ImageError, package};

/// Sets the file system's identity, so that the same tree makes the same file system.
const UUID: &str = "6d766d2d-726f-6f74-8000-6275696c7469";
/// The label of a root drive.
const LABEL: &str = "rootfs";
/// What the file system says of its own making: 2026-01-01.
const EPOCH: &str = "1767225600";
const BLOCK: u64 = 4096;

const DIRECTORIES: [&str; 24] = [
    "bin",
    "sbin",
    "usr/bin",
    "usr/sbin",
    "usr/local/bin",
    "usr/share",
    "lib",
    "etc/mvm-config",
    "etc/mvm/hooks/drain.d",
    "etc/mvm/hooks/pre-sleep.d",
    "etc/mvm/hooks/post-wake.d",
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "data",
    "root",
    "home",
    "mnt",
    "srv",
    "opt",
    "var/lib",
    "var/cache",
];

const FILES: [(&str, &str); 8] = [
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    ("etc/hosts", "127.0.0.1\tlocalhost\n"),
    ("etc/os-release", "NAME=\"mvm built-in\"\nID=mvm\nPRETTY_NAME=\"mvm built-in image\"\n"),
    ("etc/profile", "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\h:\\w\\$ '\n"),
    ("etc/shells", "/bin/sh\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
    ("etc/protocols", "icmp\t1\tICMP\ntcp\t6\tTCP\nudp\t17\tUDP\n"),
];

const LINKS: [(&str, &str); 4] =
    [("etc/resolv.conf", "/run/resolv.conf"), ("etc/mtab", "/proc/mounts"), ("var/run", "/run"), ("var/tmp", "/tmp")];

/// Lays out the tree in `tree` and makes `image` of it.
pub fn build(busybox: &Path, tree: &Path, image: &Path) -> Result<(), ImageError> {
    lay_out(busybox, tree)?;
    make_file_system(tree, image)
}

/// Makes a read-only file system of a tree, as a drive for a guest, in a file that is there; refuses one that takes more than
/// `most` bytes.
///
/// # Errors
/// When the tree is larger, cannot be read, or `mke2fs` fails.
pub fn make_drive(tree: &Path, label: &str, file: &Path, most: u64) -> Result<(), ImageError> {
    let (blocks, inodes) = measure(tree)?;
    if blocks.saturating_mul(BLOCK) > most {
        return Err(ImageError::TooLarge { tree: tree.to_owned(), mib: blocks.saturating_mul(BLOCK) >> 20, most_mib: most >> 20 });
    }
    run_mke2fs(tree, label, file, blocks, inodes)
}

/// Lays out busybox and the places of what is mounted.
pub(super) fn lay_out(busybox: &Path, tree: &Path) -> Result<(), ImageError> {
    for directory in DIRECTORIES {
        let path = tree.join(directory);
        fs::create_dir_all(&path).map_err(ImageError::at(&path))?;
    }
    for (name, content) in FILES {
        let path = tree.join(name);
        fs::write(&path, content).map_err(ImageError::at(&path))?;
    }
    for (name, target) in LINKS {
        let path = tree.join(name);
        symlink(target, &path).map_err(ImageError::at(&path))?;
    }
    let path = tree.join("bin/busybox");
    fs::copy(busybox, &path).map_err(ImageError::at(&path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(ImageError::at(&path))?;
    let applets = package::finish("busybox", "busybox-static", Command::new(&path).arg("--list-full").stdin(Stdio::null()))?;
    for applet in applets.lines().filter(|applet| is_applet(applet)) {
        let path = tree.join(applet);
        if path.symlink_metadata().is_err() && path.parent().is_some_and(Path::is_dir) {
            symlink("/bin/busybox", &path).map_err(ImageError::at(&path))?;
        }
    }
    Ok(())
}

/// `usr/bin/awk`; nothing that leads elsewhere.
fn is_applet(applet: &str) -> bool {
    let mut parts = applet.rsplit('/');
    let name = parts.next().unwrap_or_default();
    !name.is_empty()
        && !name.starts_with('.')
        && ["bin", "sbin", "usr/bin", "usr/sbin"].contains(&applet.rsplit_once('/').map_or("", |(directory, _)| directory))
}

/// Makes a root file system of a tree.
pub(super) fn make_file_system(tree: &Path, image: &Path) -> Result<(), ImageError> {
    let (blocks, inodes) = measure(tree)?;
    run_mke2fs(tree, LABEL, image, blocks, inodes)
}

fn run_mke2fs(tree: &Path, label: &str, image: &Path, blocks: u64, inodes: u64) -> Result<(), ImageError> {
    // 256 bytes an inode; the rest is for the superblock, bitmaps and directories' second blocks.
    let blocks = blocks + inodes * 256 / BLOCK + 64 + blocks / 64;
    let mut command = Command::new("mke2fs");
    command
        .args(["-q", "-F", "-t", "ext4", "-b", &BLOCK.to_string(), "-m", "0", "-I", "256"])
        // Read-only for ever: nothing to journal, nothing to grow.
        .args(["-O", "^has_journal,^resize_inode,^orphan_file"])
        .args(["-N", &(inodes + 16).to_string(), "-L", label, "-U", UUID])
        .args(["-E", &format!("hash_seed={UUID},root_owner=0:0,lazy_itable_init=0")])
        .arg("-d")
        .args([tree, image])
        .arg(blocks.to_string())
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .env("E2FSPROGS_FAKE_TIME", EPOCH)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    package::finish("mke2fs", "e2fsprogs", &mut command).map(drop)
}

/// Blocks and inodes of a tree.
fn measure(directory: &Path) -> Result<(u64, u64), ImageError> {
    let (mut blocks, mut inodes) = (1, 1);
    for entry in fs::read_dir(directory).map_err(ImageError::at(directory))? {
        let entry = entry.map_err(ImageError::at(directory))?;
        let meta = entry.metadata().map_err(ImageError::at(&entry.path()))?;
        if meta.is_dir() {
            let (more_blocks, more_inodes) = measure(&entry.path())?;
            blocks += more_blocks;
            inodes += more_inodes;
        } else {
            inodes += 1;
            blocks += if meta.is_file() { meta.len().div_ceil(BLOCK) } else { 0 };
        }
    }
    // A directory's entries: about 40 bytes each.
    Ok((blocks + inodes * 40 / BLOCK, inodes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_applets_in_known_places_are_linked() {
        assert!(is_applet("bin/sh") && is_applet("usr/sbin/chroot"));
        for odd in ["", "bin/", "../bin/sh", "/bin/sh", "etc/passwd", "bin/.x", "bin/../x", "sh"] {
            assert!(!is_applet(odd), "{odd}");
        }
    }
}
