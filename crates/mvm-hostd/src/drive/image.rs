//! Writes a small ext4 image of a flat directory. Pure, and a few microseconds' work where `mke2fs -d` needs a process, a
//! staging directory with the secrets in plain text, and some 5 ms.
//!
//! Only what every ext4 driver since 2.6.28 reads: one block group of 1 KiB blocks, no journal, no checksums, each file one
//! extent. Layout: <https://docs.kernel.org/filesystems/ext4/>.
//!
//! ```text
//! block 0   1           2            3             4             5 …            …             …
//! (boot)    superblock  descriptor   block bitmap  inode bitmap  inode table    root folder   files, one after another
//! ```

use zeroize::Zeroizing;

/// The size of every such drive, in bytes.
pub const DRIVE_BYTES: u64 = 1 << 20;

const BLOCK: usize = 1024;
const BLOCKS: usize = DRIVE_BYTES as usize / BLOCK;
const INODE: usize = 256;
/// The first inode that is not reserved; the root folder is number 2.
const FIRST_INODE: usize = 11;
const ROOT_INODE: usize = 2;
const INODE_TABLE: usize = 5;

/// Why an image was not built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// More than the drive holds.
    #[error("{files} files with {bytes} bytes do not fit; a drive holds {DRIVE_BYTES} bytes less about 1 KiB a file")]
    Full {
        /// How many files there are.
        files: usize,
        /// Their bytes together.
        bytes: usize,
    },
    /// The label is too long.
    #[error("label {label:?} is longer than 16 bytes")]
    Label {
        /// The label.
        label: String,
    },
    /// A file's name is not one.
    #[error("{name:?} cannot be a file's name: 1 to 255 bytes, no slash, no zero, not . or .., each name once")]
    Name {
        /// The name.
        name: String,
    },
}

/// One file of an image.
#[derive(Clone, Copy)]
pub struct ImageFile<'a> {
    /// Its name at the root of the drive.
    pub name: &'a str,
    /// Its content.
    pub content: &'a [u8],
    /// Its permission bits; it belongs to root.
    pub mode: u16,
}

/// Builds the image up to its last used block; the drive's remaining bytes, up to [`DRIVE_BYTES`], are zero.
pub fn build_image(label: &str, files: &[ImageFile<'_>], time: u32) -> Result<Zeroizing<Vec<u8>>, ImageError> {
    if label.len() > 16 {
        return Err(ImageError::Label { label: label.to_owned() });
    }
    let mut names = std::collections::BTreeSet::new();
    for file in files {
        let name = file.name;
        let plain = !name.is_empty() && name.len() <= 255 && name != "." && name != ".." && !name.contains(['/', '\0']);
        if !plain || !names.insert(name) {
            return Err(ImageError::Name { name: name.chars().take(64).collect() });
        }
    }
    let bytes: usize = files.iter().map(|file| file.content.len()).sum();
    let full = || ImageError::Full { files: files.len(), bytes };

    let folder = folder_blocks(files);
    let inodes = (FIRST_INODE - 1 + files.len()).next_multiple_of(BLOCK / INODE * 8).max(32);
    let folder_block = INODE_TABLE + inodes * INODE / BLOCK;
    let first_data = folder_block + folder.len() / BLOCK;
    let used = first_data + files.iter().map(|file| file.content.len().div_ceil(BLOCK)).sum::<usize>();
    // One bitmap block names 8192 inodes.
    if used > BLOCKS || inodes > BLOCK * 8 {
        return Err(full());
    }

    let mut image = Image(Zeroizing::new(vec![0; used * BLOCK]));
    image.superblock(label, inodes, used, files.len(), time);
    image.descriptor(inodes, used, files.len());
    image.bitmap(3, used - 1, BLOCKS - 1);
    image.bitmap(4, FIRST_INODE - 1 + files.len(), inodes);
    image.bytes(folder_block * BLOCK, &folder);
    image.inode(ROOT_INODE, &Inode { mode: 0o040_755, links: 2, size: folder.len(), block: folder_block, time });
    let mut block = first_data;
    for (index, file) in files.iter().enumerate() {
        image.bytes(block * BLOCK, file.content);
        let mode = 0o100_000 | (file.mode & 0o7777);
        image.inode(FIRST_INODE + index, &Inode { mode, links: 1, size: file.content.len(), block, time });
        block += file.content.len().div_ceil(BLOCK);
    }
    Ok(image.0)
}

/// The root folder's entries: they do not cross blocks, and the last of a block reaches to its end.
fn folder_blocks(files: &[ImageFile<'_>]) -> Vec<u8> {
    const FOLDER: u8 = 2;
    const PLAIN: u8 = 1;
    let own = [(ROOT_INODE, ".", FOLDER), (ROOT_INODE, "..", FOLDER)];
    let entries = own.into_iter().chain(files.iter().enumerate().map(|(index, file)| (FIRST_INODE + index, file.name, PLAIN)));
    let mut blocks = Vec::new();
    let mut last = 0;
    for (inode, name, kind) in entries {
        let length = (8 + name.len()).next_multiple_of(4);
        let left = blocks.len().next_multiple_of(BLOCK) - blocks.len();
        if !blocks.is_empty() && left < length {
            end_block(&mut blocks, last);
        }
        last = blocks.len();
        blocks.extend(number(inode).to_le_bytes());
        blocks.extend(half(length).to_le_bytes());
        blocks.extend([u8::try_from(name.len()).expect("names were checked to have at most 255 bytes"), kind]);
        blocks.extend(name.as_bytes());
        blocks.resize(last + length, 0);
    }
    end_block(&mut blocks, last);
    blocks
}

fn end_block(blocks: &mut Vec<u8>, last: usize) {
    let end = blocks.len().next_multiple_of(BLOCK);
    blocks[last + 4..last + 6].copy_from_slice(&half(end - last).to_le_bytes());
    blocks.resize(end, 0);
}

struct Inode {
    mode: u16,
    links: u16,
    size: usize,
    block: usize,
    time: u32,
}

struct Image(Zeroizing<Vec<u8>>);

impl Image {
    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn superblock(&mut self, label: &str, inodes: usize, used: usize, files: usize, time: u32) {
        let at = BLOCK;
        self.u32(at, number(inodes));
        self.u32(at + 4, number(BLOCKS));
        self.u32(at + 12, number(BLOCKS - used));
        self.u32(at + 16, number(inodes - (FIRST_INODE - 1) - files));
        self.u32(at + 20, 1); // The first block that holds data, as with all 1 KiB blocks.
        self.u32(at + 32, 8192); // Blocks, and clusters, of a group.
        self.u32(at + 36, 8192);
        self.u32(at + 40, number(inodes));
        self.u32(at + 48, time); // Written at.
        self.u16(at + 54, u16::MAX); // Checked never by count of mounts.
        self.u16(at + 56, 0xEF53);
        self.u16(at + 58, 1); // Clean.
        self.u16(at + 60, 2); // On errors: read-only.
        self.u32(at + 64, time); // Checked at.
        self.u32(at + 76, 1); // Revision with features and inode sizes.
        self.u32(at + 84, number(FIRST_INODE));
        self.u16(at + 88, half(INODE));
        self.u32(at + 96, 0x2 | 0x40); // Incompatible features: kinds in folders, extents.
        self.u32(at + 100, 0x1 | 0x2 | 0x40); // Read-only compatible: sparse superblocks, large files, larger inodes.
        let uuid = blake3::hash(label.as_bytes());
        self.bytes(at + 104, &uuid.as_bytes()[..16]);
        self.bytes(at + 120, label.as_bytes());
        self.u32(at + 264, time); // Made at.
        self.u16(at + 348, 32); // Every inode has, and new ones want, 32 bytes more than the old 128.
        self.u16(at + 350, 32);
    }

    fn descriptor(&mut self, inodes: usize, used: usize, files: usize) {
        let at = 2 * BLOCK;
        self.u32(at, 3);
        self.u32(at + 4, 4);
        self.u32(at + 8, number(INODE_TABLE));
        self.u16(at + 12, half(BLOCKS - used));
        self.u16(at + 14, half(inodes - (FIRST_INODE - 1) - files));
        self.u16(at + 16, 1);
    }

    /// Marks the first `used` of `count` as taken, and all beyond the count.
    fn bitmap(&mut self, block: usize, used: usize, count: usize) {
        for bit in (0..used).chain(count..BLOCK * 8) {
            self.0[block * BLOCK + bit / 8] |= 1 << (bit % 8);
        }
    }

    fn inode(&mut self, inode_number: usize, inode: &Inode) {
        let at = INODE_TABLE * BLOCK + (inode_number - 1) * INODE;
        let blocks = inode.size.div_ceil(BLOCK);
        self.u16(at, inode.mode);
        self.u32(at + 4, number(inode.size));
        for time in [8, 12, 16] {
            self.u32(at + time, inode.time);
        }
        self.u16(at + 26, inode.links);
        self.u32(at + 28, number(blocks * BLOCK / 512));
        self.u32(at + 32, 0x8_0000); // Its blocks are named by extents.
        self.u16(at + 40, 0xF30A);
        self.u16(at + 42, u16::from(blocks > 0)); // Extents in use, of 4.
        self.u16(at + 44, 4);
        if blocks > 0 {
            self.u16(at + 56, half(blocks));
            self.u32(at + 60, number(inode.block));
        }
        self.u16(at + 128, 32);
    }
}

fn number(value: usize) -> u32 {
    u32::try_from(value).expect("nothing in a drive of 1 MiB is larger than 32 bits")
}

fn half(value: usize) -> u16 {
    u16::try_from(value).expect("a drive of 1 MiB has 1024 blocks, and a group at most 8192 inodes")
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn write_whole(directory: &Path, image: &[u8]) -> PathBuf {
        let path = directory.join("drive.img");
        std::fs::write(&path, image).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(DRIVE_BYTES).unwrap();
        path
    }

    /// The reference implementation finds nothing wrong but that there is no folder for lost files, and reads every file.
    fn check(files: &[(String, Vec<u8>)]) {
        let images: Vec<_> = files.iter().map(|(name, content)| ImageFile { name, content, mode: 0o400 }).collect();
        let image = build_image("mvm-secrets", &images, 1_700_000_000).unwrap();
        let top = tempfile::tempdir().unwrap();
        let path = write_whole(top.path(), &image);
        let output = Command::new("/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).replace("/lost+found not found.  Create? no\n", "");
        let complaints: Vec<_> = text.lines().filter(|line| line.contains('?') || line.contains("WARNING")).collect();
        assert!(complaints.is_empty(), "{text}");
        for (name, content) in files {
            let output = Command::new("/sbin/debugfs").args(["-R", &format!("cat \"{name}\"")]).arg(&path).output().unwrap();
            assert_eq!(&output.stdout, content, "{name}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }

    #[test]
    fn the_reference_tools_read_it() {
        check(&[]);
        check(&[("config.json".into(), b"{}".to_vec())]);
        check(&[
            ("empty".into(), vec![]),
            ("block".into(), vec![7; BLOCK]),
            ("more".into(), vec![9; BLOCK + 1]),
            ("large".into(), vec![1; 900_000]),
        ]);
        check(&(0..300).map(|n| (format!("{n:0>60}"), vec![n as u8; n])).collect::<Vec<_>>());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let content = vec![0; 1 << 20];
        let error = build_image("mvm-config", &[ImageFile { name: "a", content: &content, mode: 0o400 }], 0).unwrap_err();
        assert_eq!(error.to_string(), "1 files with 1048576 bytes do not fit; a drive holds 1048576 bytes less about 1 KiB a file");
        let many: Vec<_> = (0..5000).map(|n| n.to_string()).collect();
        let files: Vec<_> = many.iter().map(|name| ImageFile { name, content: b"x", mode: 0o400 }).collect();
        assert!(matches!(build_image("mvm-config", &files, 0), Err(ImageError::Full { .. })));
    }

    #[test]
    fn hostile_names_are_refused() {
        for name in ["", ".", "..", "a/b", "a\0", &"x".repeat(256)] {
            let file = ImageFile { name, content: b"", mode: 0o400 };
            assert!(matches!(build_image("mvm-config", &[file], 0), Err(ImageError::Name { .. })), "{name:?}");
        }
        let twice = [ImageFile { name: "a", content: b"", mode: 0o400 }; 2];
        assert!(matches!(build_image("mvm-config", &twice, 0), Err(ImageError::Name { .. })));
        assert!(matches!(build_image("a label of 17 by.", &[], 0), Err(ImageError::Label { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_files_come_back(files in prop::collection::btree_map("[a-zA-Z0-9_.-]{1,60}", prop::collection::vec(any::<u8>(), 0..5000), 0..12)) {
            check(&files.into_iter().filter(|(name, _)| name != "." && name != "..").collect::<Vec<_>>());
        }
    }
}
