//! The first file system of a guest: the agent as `/init`, and kernel modules.

use std::io::{self, Write};

use cpio::newc;

use super::modules::Module;

/// Names the modules with their devices, one a line, in the order in which they must be loaded.
const ORDER: &str = "lib/modules/order";

/// Writes an uncompressed cpio archive: decompressing one costs a guest more than reading it.
pub fn write(agent: &[u8], modules: &[Module]) -> io::Result<Vec<u8>> {
    let total: usize = modules.iter().map(|module| module.content.len()).sum();
    let mut archive = Archive { bytes: Vec::with_capacity(total + agent.len() + (64 << 10)), inode: 0 };
    for directory in ["dev", "proc", "sys", "newroot", "lib", "lib/modules"] {
        archive.add(directory, 0o040_755, (0, 0), b"")?;
    }
    // The kernel opens it for /init before anything can mount a /dev.
    archive.add("dev/console", 0o020_600, (5, 1), b"")?;
    let mut order = String::new();
    for module in modules {
        let file = format!("{}.ko", module.name);
        archive.add(&format!("lib/modules/{file}"), 0o100_644, (0, 0), &module.content)?;
        order.push_str(&format!("{file} {}\n", module.device));
    }
    archive.add(ORDER, 0o100_644, (0, 0), order.as_bytes())?;
    archive.add("init", 0o100_755, (0, 0), agent)?;
    newc::trailer(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let builder = newc::Builder::new(name)
            .ino(self.inode)
            .mode(mode)
            .nlink(if mode & 0o040_000 != 0 { 2 } else { 1 })
            .rdev_major(device.0)
            .rdev_minor(device.1);
        let mut writer = builder.write(&mut self.bytes, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_reads_back() {
        let modules = [Module { name: "virtio".into(), device: 0, content: vec![1; 777] }];
        let archive = write(b"agent", &modules).unwrap();
        let mut rest = &archive[..];
        let mut found = Vec::new();
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let entry = reader.entry();
            found.push((entry.name().to_owned(), entry.mode(), entry.file_size()));
            rest = reader.finish().unwrap();
        }
        assert!(found.contains(&("init".into(), 0o100_755, 5)));
        assert!(found.contains(&("lib/modules/virtio.ko".into(), 0o100_644, 777)));
        assert!(found.contains(&("dev/console".into(), 0o020_600, 0)));
        assert_eq!(write(b"agent", &modules).unwrap(), archive, "the same input makes the same archive");
    }
}
