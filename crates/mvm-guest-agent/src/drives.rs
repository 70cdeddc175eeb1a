//! Block devices by the label of their ext4 file system.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use mvm_guest_api::proto;
use mvm_guest_api::{CONFIG_DIR, DATA_DIR, LABEL_CONFIG, LABEL_DATA};
use rustix::mount::{MountFlags, UnmountFlags};

/// A file system that the agent mounted.
#[derive(Clone, Debug)]
pub struct Mounted {
    /// Of the file system.
    pub label: String,
    /// Where it is.
    pub at: &'static str,
    /// Whether it cannot be written.
    pub read_only: bool,
    /// Of the device.
    pub size: u64,
}

impl Mounted {
    /// For Status.
    pub fn to_proto(&self) -> proto::Drive {
        proto::Drive { label: self.label.clone(), mount_point: self.at.into(), read_only: self.read_only, size_bytes: self.size }
    }
}

/// A block device with an ext4 file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// In `/dev`.
    pub path: PathBuf,
    /// Of the file system.
    pub label: String,
    /// Of the device, in bytes.
    pub size: u64,
    /// Of the file system, in bytes.
    pub fs_size: u64,
    /// Of one block of the file system, in bytes.
    pub block_size: u64,
}

/// All virtio block devices with a labelled ext4 file system.
pub fn devices() -> Vec<Device> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"vd"))
        .filter_map(|entry| probe(&Path::new("/dev").join(entry.file_name())))
        .collect()
}

/// Looks at one device.
fn probe(path: &Path) -> Option<Device> {
    let mut file = File::open(path).ok()?;
    let size = file.seek(SeekFrom::End(0)).ok()?;
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024).ok()?;
    let superblock = Superblock::parse(&superblock)?;
    Some(Device {
        path: path.into(),
        label: superblock.label,
        size,
        fs_size: superblock.blocks * superblock.block_size,
        block_size: superblock.block_size,
    })
}

/// What is needed of an ext4 superblock (kernel documentation, filesystems/ext4/super.rst).
#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    label: String,
    blocks: u64,
    block_size: u64,
}

impl Superblock {
    fn parse(bytes: &[u8; 1024]) -> Option<Superblock> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u16_at(0x38) != 0xef53 {
            return None;
        }
        let log_block_size = u32_at(0x18);
        if log_block_size > 6 {
            return None;
        }
        // INCOMPAT_64BIT: the upper half of the block count counts.
        let upper = if u32_at(0x60) & 0x80 != 0 { u32_at(0x150) } else { 0 };
        let label = &bytes[0x78..0x88];
        let end = label.iter().position(|&b| b == 0).unwrap_or(label.len());
        let block_size = 1024u64 << log_block_size;
        let blocks = u64::from(upper) << 32 | u64::from(u32_at(0x4));
        blocks.checked_mul(block_size)?;
        Some(Superblock { label: String::from_utf8_lossy(&label[..end]).into_owned(), blocks, block_size })
    }
}

/// Mounts an ext4 file system, unless it is there already: an agent that was started again finds what the last one did.
fn mount(device: &Device, at: &str, flags: MountFlags, data: Option<&CStr>) -> io::Result<()> {
    match rustix::mount::mount(&device.path, at, "ext4", flags, data) {
        Err(rustix::io::Errno::BUSY) if fs::metadata(at)?.dev() == fs::metadata(&device.path)?.rdev() => Ok(()),
        outcome => Ok(outcome?),
    }
}

/// Mounts the data drive, grown to the size of its device.
///
/// # Errors
/// What the kernel said. A file system that cannot be grown is mounted all the same, and the second part says why.
pub fn mount_data(device: &Device) -> io::Result<(Mounted, Result<(), String>)> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    mount(device, DATA_DIR, flags, None)?;
    let grown = if device.size / device.block_size > device.fs_size / device.block_size {
        grow(DATA_DIR, device.size / device.block_size).map_err(|error| error.to_string())
    } else {
        Ok(())
    };
    let mounted = Mounted { label: LABEL_DATA.into(), at: DATA_DIR, read_only: false, size: device.size };
    Ok((mounted, grown))
}

/// Mounts the config drive.
///
/// # Errors
/// What the kernel said.
pub fn mount_config(device: &Device) -> io::Result<Mounted> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // Without a journal to replay the drive is never written: the host may share it read-only.
    mount(device, CONFIG_DIR, flags, Some(c"noload"))?;
    Ok(Mounted { label: LABEL_CONFIG.into(), at: CONFIG_DIR, read_only: true, size: device.size })
}

/// Unmounts, whether or not something still uses it.
///
/// # Errors
/// What the kernel said.
pub fn unmount(at: &str) -> io::Result<()> {
    match rustix::mount::unmount(at, UnmountFlags::empty()) {
        Err(rustix::io::Errno::BUSY) => Ok(rustix::mount::unmount(at, UnmountFlags::DETACH)?),
        outcome => Ok(outcome?),
    }
}

/// Forgets what the kernel cached of a block device, so that a drive the host has rebuilt is read anew.
pub fn forget_cache(device: &Path) -> io::Result<()> {
    // BLKFLSBUF, linux/fs.h: _IO(0x12, 97).
    const BLKFLSBUF: rustix::ioctl::Opcode = rustix::ioctl::opcode::none(0x12, 97);
    let file = File::open(device)?;
    // SAFETY: BLKFLSBUF takes no argument.
    unsafe { rustix::ioctl::ioctl(file.as_fd(), rustix::ioctl::NoArg::<BLKFLSBUF>::new())? };
    Ok(())
}

/// Grows a mounted ext4 file system.
fn grow(at: &str, blocks: u64) -> io::Result<()> {
    // EXT4_IOC_RESIZE_FS, fs/ext4/ext4.h: _IOW('f', 16, __u64), takes the new number of blocks.
    const RESIZE: rustix::ioctl::Opcode = rustix::ioctl::opcode::write::<u64>(b'f', 16);
    let root = File::open(at)?;
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64, which lives through the call.
    unsafe { rustix::ioctl::ioctl(root.as_fd(), rustix::ioctl::Setter::<RESIZE, u64>::new(blocks))? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_superblock_is_read() {
        let mut bytes = [0; 1024];
        assert_eq!(Superblock::parse(&bytes), None);
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x18] = 2;
        bytes[0x4] = 9;
        bytes[0x78..0x80].copy_from_slice(b"mvm-data");
        let expected = Superblock { label: "mvm-data".into(), blocks: 9, block_size: 4096 };
        assert_eq!(Superblock::parse(&bytes), Some(expected));
        bytes[0x18] = 200;
        assert_eq!(Superblock::parse(&bytes), None);
    }
}
