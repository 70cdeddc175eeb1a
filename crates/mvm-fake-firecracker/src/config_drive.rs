//! The agent's configuration, out of the drive that mvm made for it: an ext4 image as `mvm-hostd` writes it, of 1 KiB
//! blocks, whose files have one extent each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const LABEL: &[u8] = b"mvm-config";
const NAME: &[u8] = b"config.json";
const BLOCK: usize = 1024;
const ROOT: usize = 2;
/// More is none of mvm's.
const MAX_FILE: usize = 4 << 20;

/// The document, if the file is such a drive.
pub fn read(path: &Path) -> Option<Vec<u8>> {
    let image = File::open(path).ok()?;
    // Only what it consists of: a whole image takes as long as all else that is done with it.
    find(|at, length| {
        let mut bytes = vec![0; length];
        image.read_exact_at(&mut bytes, at as u64).ok()?;
        Some(bytes)
    })
}

/// Finds it in an image of which some bytes can be had: from where, and how many.
fn find(bytes: impl Fn(usize, usize) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
    let superblock = bytes(BLOCK, BLOCK)?;
    let label = superblock.get(0x78..0x88)?;
    let is_ext4 = half(&superblock, 0x38)? == 0xef53 && word(&superblock, 0x18)? == 0;
    if !is_ext4 || label.split(|byte| *byte == 0).next()? != LABEL {
        return None;
    }
    let inode_size = usize::from(half(&superblock, 0x58)?);
    let table = usize::try_from(word(&bytes(2 * BLOCK + 8, 4)?, 0)?).ok()?;
    let file = |inode: usize| -> Option<Vec<u8>> {
        let inode = bytes(table * BLOCK + (inode.checked_sub(1)?) * inode_size, inode_size)?;
        let size = usize::try_from(word(&inode, 4)?).ok().filter(|size| *size <= MAX_FILE)?;
        // One extent in the inode itself: header of 12 bytes, then block, length and start.
        let has_one = half(&inode, 0x28)? == 0xf30a && half(&inode, 0x2a)? == 1 && half(&inode, 0x2e)? == 0;
        let start = usize::try_from(word(&inode, 0x28 + 12 + 8)?).ok()? * BLOCK;
        if has_one { bytes(start, size) } else { None }
    };
    let folder = file(ROOT)?;
    let mut at = 0;
    while at + 8 <= folder.len() {
        let length = usize::from(half(&folder, at + 4)?);
        let name = folder.get(at + 8..at + 8 + usize::from(folder[at + 6]))?;
        if name == NAME {
            return file(usize::try_from(word(&folder, at)?).ok()?);
        }
        at += length.max(8);
    }
    None
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use mvm_hostd::drive::{ImageFile, build_image};

    use super::*;

    #[test]
    fn what_mvm_writes_is_read() {
        let content = br#"{"version":1}"#.repeat(300);
        let files =
            [ImageFile { name: "other", content: b"x", mode: 0o600 }, ImageFile { name: "config.json", content: &content, mode: 0o600 }];
        let find_in = |image: &[u8]| find(|at, length| Some(image.get(at..at + length)?.to_vec()));
        let image = build_image("mvm-config", &files, 0).unwrap();
        assert_eq!(find_in(&image), Some(content.clone()));
        assert_eq!(find_in(&build_image("mvm-secrets", &files, 0).unwrap()), None);
        assert_eq!(find_in(&build_image("mvm-config", &files[..1], 0).unwrap()), None);
        for end in 0..image.len() {
            // Whatever is cut off, it does not panic.
            let _ = find_in(&image[..end]);
        }
    }
}
