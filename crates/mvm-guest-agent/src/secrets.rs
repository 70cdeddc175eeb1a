//! Secrets, kept out of whatever a snapshot holds.
//!
//! A mounted file system would leave its files in the page cache, and the page cache goes into a snapshot. So the
//! drive is read around the cache (`O_DIRECT`) by an ext4 reader of its own into a tmpfs, whose files are overwritten
//! before a sleep.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use ext4_view::{Ext4, Ext4Read};
use mvm_guest_api::{LABEL_SECRETS, SECRETS_DIR, limits};
use rustix::fs::OFlags;
use rustix::mount::MountFlags;
use zeroize::Zeroize;

use crate::drives::{Device, Mounted, unmount};

/// `O_DIRECT` wants places, lengths and memory in multiples of the device's block; 4096 does for all.
const ALIGN: usize = 4096;

/// Reads the drive into a fresh tmpfs.
///
/// # Errors
/// A sentence: what could not be read or written.
pub fn mount(device: &Device) -> Result<Mounted, String> {
    if is_mounted().map_err(|error| format!("{SECRETS_DIR}: {error}"))? {
        // Left by an agent that was started again.
        wipe()?;
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // noswap needs Linux 6.4; guests have no swap.
    rustix::mount::mount("mvm-secrets", SECRETS_DIR, "tmpfs", flags, Some(c"mode=0755,size=64m"))
        .map_err(|error| format!("{SECRETS_DIR}: {error}"))?;
    let filled = fill(&device.path, Path::new(SECRETS_DIR));
    crate::wiping::wipe_stack();
    let outcome = filled.and_then(|()| {
        rustix::mount::mount_remount(SECRETS_DIR, flags | MountFlags::RDONLY, "").map_err(|error| format!("{SECRETS_DIR}: {error}"))
    });
    if let Err(why) = outcome {
        // Half the secrets are worse than none.
        let _ = wipe();
        return Err(why);
    }
    Ok(Mounted { label: LABEL_SECRETS.into(), at: SECRETS_DIR, read_only: true, size: device.size })
}

/// Whether the directory is a file system of its own.
fn is_mounted() -> io::Result<bool> {
    let parent = Path::new(SECRETS_DIR).parent().expect("the directory is not the root");
    Ok(fs::metadata(SECRETS_DIR)?.dev() != fs::metadata(parent)?.dev())
}

/// Overwrites and removes the secrets and their tmpfs.
///
/// # Errors
/// A sentence: what could not be overwritten. The tmpfs is gone all the same, if it could be unmounted.
pub fn wipe() -> Result<(), String> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let remounted = rustix::mount::mount_remount(SECRETS_DIR, flags, "");
    let wiped = match remounted {
        Ok(()) => overwrite_all(Path::new(SECRETS_DIR)),
        Err(error) => Err(error.into()),
    };
    unmount(SECRETS_DIR).map_err(|error| format!("{SECRETS_DIR}: {error}"))?;
    wiped.map_err(|error| format!("secrets could not be overwritten: {error}"))
}

fn overwrite_all(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            overwrite_all(&path)?;
            continue;
        }
        let length = entry.metadata()?.len() as usize;
        let file = OpenOptions::new().write(true).open(&path)?;
        file.write_all_at(&vec![0; length], 0)?;
        drop(file);
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn fill(device: &Path, target: &Path) -> Result<(), String> {
    let wrong = |error: ext4_view::Ext4Error| format!("drive {LABEL_SECRETS}: {error}");
    let reader = Direct::open(device).map_err(|error| format!("{}: {error}", device.display()))?;
    let drive = Ext4::load(Box::new(reader)).map_err(wrong)?;
    let mut count = 0;
    for entry in drive.read_dir("/").map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        let meta = entry.metadata().map_err(wrong)?;
        if !meta.file_type().is_regular_file() {
            continue;
        }
        let name = entry.file_name();
        let name = name.as_str().map_err(|_| "a secret has a name that is not UTF-8")?;
        count += 1;
        if count > limits::MAX_SECRETS || meta.len() > limits::MAX_SECRET {
            return Err(format!("secret {name:?}: more than {} secrets or {} bytes", limits::MAX_SECRETS, limits::MAX_SECRET));
        }
        let mut content = drive.read(entry.path().as_path()).map_err(wrong)?;
        let written = write_secret(&target.join(name), &content, meta.uid(), meta.gid());
        content.zeroize();
        written.map_err(|error| format!("{SECRETS_DIR}/{name}: {error}"))?;
    }
    Ok(())
}

fn write_secret(path: &Path, content: &[u8], uid: u32, gid: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    file.write_all(content)?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(gid))
}

/// Reads a device around the page cache and wipes what it held.
struct Direct {
    device: File,
    buffer: Vec<u8>,
}

impl Direct {
    fn open(device: &Path) -> io::Result<Direct> {
        let device = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(device)?;
        Ok(Direct { device, buffer: vec![0; 17 * ALIGN] })
    }
}

impl Ext4Read for Direct {
    fn read(&mut self, start: u64, mut wanted: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let first = self.buffer.as_ptr().align_offset(ALIGN);
        let room = &mut self.buffer[first..first + 16 * ALIGN];
        let mut place = start;
        while !wanted.is_empty() {
            let skip = (place % ALIGN as u64) as usize;
            let length = (skip + wanted.len()).next_multiple_of(ALIGN).min(room.len());
            let count = self.device.read_at(&mut room[..length], place - skip as u64)?;
            let usable = count.saturating_sub(skip).min(wanted.len());
            if usable == 0 {
                return Err(Box::new(io::Error::from(io::ErrorKind::UnexpectedEof)));
            }
            let (now, rest) = wanted.split_at_mut(usable);
            now.copy_from_slice(&room[skip..skip + usable]);
            room.zeroize();
            place += usable as u64;
            wanted = rest;
        }
        Ok(())
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        self.buffer.zeroize();
    }
}
