//! Which kernel modules a guest needs, in the order in which they must be loaded.
//!
//! Debian's kernel package has no `modules.dep` (it is made at installation), so dependencies are read where
//! `depmod` reads them too: in each module's `.modinfo` section (`depends=a,b`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{ImageError, kernel};

/// Modules by virtio device: loaded when such a device is there (numbers: virtio specification 1.2, chapter 5).
/// 0 is for those that every guest needs.
const WANTED: [(&str, u32); 7] =
    [("virtio_mmio", 0), ("virtio_blk", 2), ("virtio_console", 3), ("virtio_net", 1), ("virtio_rng", 4), (BALLOON, 5), (VSOCK, 19)];
const BALLOON: &str = "virtio_balloon";
const VSOCK: &str = "vmw_vsock_virtio_transport";
/// Not every kernel has them, and guests do without.
const DISPENSABLE: [&str; 2] = [BALLOON, VSOCK];

/// One module for the initramfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Without directory and endings.
    pub name: String,
    /// The virtio device that asks for it; 0: loaded always.
    pub device: u32,
    /// Uncompressed.
    pub content: Vec<u8>,
}

/// Reads the needed modules below `lib/modules/<release>`, dependencies before dependants.
///
/// # Errors
/// When one is neither there nor built in, or cannot be read.
pub fn resolve(directory: &Path) -> Result<Vec<Module>, ImageError> {
    let mut files = BTreeMap::new();
    collect(&directory.join("kernel"), &mut files)?;
    let builtin = directory.join("modules.builtin");
    let builtin = fs::read_to_string(&builtin).map_err(ImageError::at(&builtin))?;
    let builtin: BTreeSet<String> = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
    let mut order = Order { files, builtin, done: BTreeSet::new(), modules: Vec::new() };
    for (name, device) in WANTED {
        if DISPENSABLE.contains(&name) && !order.files.contains_key(name) {
            continue;
        }
        order.add(name, device, &mut Vec::new())?;
    }
    Ok(order.modules)
}

struct Order {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    done: BTreeSet<String>,
    modules: Vec<Module>,
}

impl Order {
    fn add(&mut self, name: &str, device: u32, on_the_way: &mut Vec<String>) -> Result<(), ImageError> {
        if self.done.contains(name) || self.builtin.contains(name) {
            return Ok(());
        }
        let wrong = |why: &str| ImageError::Module { module: name.to_owned(), why: why.to_owned() };
        if on_the_way.iter().any(|other| other == name) {
            return Err(wrong("depends on itself"));
        }
        let path = self.files.get(name).ok_or_else(|| wrong("is neither in the kernel package nor built in"))?;
        let bytes = fs::read(path).map_err(ImageError::at(path))?;
        let content = if bytes.starts_with(b"\x7fELF") { bytes } else { kernel::decompress(&bytes).map_err(|why| wrong(&why))? };
        let content = without_signature(content);
        let dependencies = depends(&content).ok_or_else(|| wrong("has no readable .modinfo section"))?;
        on_the_way.push(name.to_owned());
        for dependency in &dependencies {
            self.add(dependency, device, on_the_way)?;
        }
        on_the_way.pop();
        self.done.insert(name.to_owned());
        self.modules.push(Module { name: name.to_owned(), device, content });
        Ok(())
    }
}

/// Takes off the appended signature (kernel documentation, admin-guide/module-signing.rst): the guest's kernel does not
/// demand it, and what is in its initramfs is as trusted as the kernel beside it, but checking it costs every boot.
fn without_signature(mut module: Vec<u8>) -> Vec<u8> {
    const MARK: &[u8] = b"~Module signature appended~\n";
    // struct module_signature: eight bytes, then the length of the signature in network order.
    const INFO: usize = 12;
    let Some(body) = module.strip_suffix(MARK) else {
        return module;
    };
    let length = body.last_chunk::<4>().map_or(0, |length| u32::from_be_bytes(*length) as usize);
    if let Some(end) = body.len().checked_sub(INFO).and_then(|end| end.checked_sub(length)) {
        module.truncate(end);
    }
    module
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    for entry in fs::read_dir(directory).map_err(ImageError::at(directory))? {
        let entry = entry.map_err(ImageError::at(directory))?;
        let path = entry.path();
        if entry.file_type().map_err(ImageError::at(&path))?.is_dir() {
            collect(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`, as the kernel writes it.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().find_map(|ending| file.strip_suffix(ending))?;
    Some(stem.replace('-', "_"))
}

/// The names after `depends=` in the section `.modinfo` of an ELF of 64 bits and little endian.
fn depends(module: &[u8]) -> Option<Vec<String>> {
    let number = |at: usize, length: usize| -> Option<u64> {
        let bytes = module.get(at..at.checked_add(length)?)?;
        Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    // ELF-64: e_shoff at 0x28, e_shentsize at 0x3a, e_shnum at 0x3c, e_shstrndx at 0x3e.
    let (table, entry, count) = (number(0x28, 8)? as usize, number(0x3a, 2)? as usize, number(0x3c, 2)? as usize);
    let section = |index: usize| -> Option<(u64, &[u8])> {
        let header = table.checked_add(index.checked_mul(entry)?)?;
        let (name, offset, size) = (number(header, 4)?, number(header.checked_add(0x18)?, 8)?, number(header.checked_add(0x20)?, 8)?);
        Some((name, module.get(offset as usize..(offset as usize).checked_add(size as usize)?)?))
    };
    let (_, names) = section(number(0x3e, 2)? as usize)?;
    let info = (0..count).filter_map(section).find_map(|(name, content)| {
        let name = names.get(name as usize..)?;
        name.starts_with(b".modinfo\0").then_some(content)
    })?;
    let line = info.split(|&byte| byte == 0).find_map(|line| line.strip_prefix(b"depends="))?;
    let line = std::str::from_utf8(line).ok()?;
    Some(line.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A module that holds nothing but its dependencies.
    pub fn module(dependencies: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={dependencies}\0");
        let names = b"\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64, 64 + info.len());
        let table = names_at + names.len();
        let mut elf = vec![0; 64];
        elf[..4].copy_from_slice(b"\x7fELF");
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        elf[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        elf[0x3c..0x3e].copy_from_slice(&3u16.to_le_bytes());
        elf[0x3e..0x40].copy_from_slice(&2u16.to_le_bytes());
        elf.extend(info.as_bytes());
        elf.extend(names);
        for (name, at, size) in [(0u32, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        elf
    }

    /// A tree of modules such as a kernel package has.
    pub fn tree(directory: &Path) {
        let kernel = directory.join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        for (name, dependencies) in [
            ("virtio", ""),
            ("virtio_ring", ""),
            ("virtio_mmio", "virtio,virtio_ring"),
            ("virtio_blk", "virtio_ring,virtio"),
            ("failover", ""),
            ("net_failover", "failover"),
            ("virtio_net", "net_failover,virtio,virtio_ring"),
            ("virtio_console", "virtio,virtio_ring"),
            ("virtio-rng", "virtio,rng-core"),
            ("unwanted", ""),
        ] {
            fs::write(kernel.join(format!("{name}.ko")), module(dependencies)).unwrap();
        }
        fs::write(directory.join("modules.builtin"), "kernel/drivers/char/hw_random/rng-core.ko\n").unwrap();
    }

    #[test]
    fn dependencies_come_first_and_belong_to_the_device() {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        let found: Vec<_> = resolve(dir.path()).unwrap().into_iter().map(|m| (m.name, m.device)).collect();
        let expected = [
            ("virtio", 0),
            ("virtio_ring", 0),
            ("virtio_mmio", 0),
            ("virtio_blk", 2),
            ("virtio_console", 3),
            ("failover", 1),
            ("net_failover", 1),
            ("virtio_net", 1),
            ("virtio_rng", 4),
        ];
        assert_eq!(found, expected.map(|(name, device)| (name.to_owned(), device)));
    }

    #[test]
    fn what_cannot_be_loaded_is_named() {
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        let at = |name: &str| dir.path().join("kernel/drivers").join(name);
        fs::write(at("failover.ko"), module("net_failover")).unwrap();
        assert!(resolve(dir.path()).unwrap_err().to_string().contains("depends on itself"));
        fs::remove_file(at("failover.ko")).unwrap();
        assert_eq!(resolve(dir.path()).unwrap_err().to_string(), "kernel module failover: is neither in the kernel package nor built in");
        fs::write(at("failover.ko"), "junk").unwrap();
        assert!(resolve(dir.path()).is_err());
    }

    #[test]
    fn compressed_modules_are_read() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        tree(dir.path());
        let at = |name: &str| dir.path().join("kernel/drivers").join(name);
        let plain = module("");
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&plain).unwrap();
        fs::write(at("virtio.ko.xz"), xz.finish().unwrap()).unwrap();
        fs::remove_file(at("virtio.ko")).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
        fs::write(at("failover.ko.zst"), zstd).unwrap();
        fs::remove_file(at("failover.ko")).unwrap();
        let modules = resolve(dir.path()).unwrap();
        assert!(modules.iter().filter(|m| m.name == "virtio" || m.name == "failover").all(|m| m.content == plain));
    }

    #[test]
    fn a_signature_is_taken_off() {
        let plain = module("a");
        let mut signed = plain.clone();
        signed.extend([7; 300]);
        signed.extend([0; 8]);
        signed.extend(300u32.to_be_bytes());
        signed.extend(b"~Module signature appended~\n");
        assert_eq!(without_signature(signed), plain);
        assert_eq!(without_signature(plain.clone()), plain);
        let lying = [&[0xff; 12][..], b"~Module signature appended~\n"].concat();
        assert_eq!(without_signature(lying.clone()), lying);
    }

    #[test]
    fn no_bytes_panic() {
        let whole = module("a,b");
        assert_eq!(depends(&whole), Some(vec!["a".to_owned(), "b".to_owned()]));
        for end in 0..whole.len() {
            let _ = depends(&whole[..end]);
            let mut flipped = whole.clone();
            flipped[end] = 0xff;
            let _ = depends(&flipped);
        }
    }
}
