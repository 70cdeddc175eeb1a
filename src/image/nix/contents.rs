//! Judges what a builder delivered: is it an image?

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BuildError;

/// The largest `vmm.json`, in bytes.
const MOST_CONFIG: u64 = 64 << 10;
/// The most that kernel arguments come to; x86-64 takes 2048 bytes (COMMAND_LINE_SIZE), and the driver adds its own.
const MOST_ARGS: usize = 1024;
/// The smallest microVM.
const LEAST_MEM_MIB: u32 = 64;

/// `vmm.json`: what an image needs of the machine that boots it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmConfig {
    /// Always 1.
    pub version: u32,
    /// Kernel arguments; the driver adds its own.
    #[serde(default)]
    pub kernel_args: Vec<String>,
    /// The least memory that it boots with, in MiB.
    #[serde(default = "least")]
    pub min_mem_mib: u32,
    /// What its root file system is.
    pub root_format: RootFormat,
}

fn least() -> u32 {
    LEAST_MEM_MIB
}

/// A read-only root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RootFormat {
    /// squashfs.
    Squashfs,
    /// EROFS.
    Erofs,
    /// ext4.
    Ext4,
}

impl RootFormat {
    /// The name, as in `vmm.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            RootFormat::Squashfs => "squashfs",
            RootFormat::Erofs => "erofs",
            RootFormat::Ext4 => "ext4",
        }
    }

    /// Tells what a file system is from its first 2 KiB.
    fn of(start: &[u8]) -> Option<RootFormat> {
        let at = |offset: usize, magic: &[u8]| start.get(offset..offset + magic.len()) == Some(magic);
        // squashfs: `hsqs` at 0; erofs: 0xE0F5E1E2 at 1024; ext4: 0xEF53 at 56 of the superblock at 1024, all little endian.
        match () {
            () if at(0, b"hsqs") => Some(RootFormat::Squashfs),
            () if at(1024, &0xE0F5_E1E2_u32.to_le_bytes()) => Some(RootFormat::Erofs),
            () if at(1080, &0xEF53_u16.to_le_bytes()) => Some(RootFormat::Ext4),
            () => None,
        }
    }
}

/// Checks what lies in a directory, and returns what it needs.
///
/// # Errors
/// [`BuildError::Output`] with the file that is wrong.
pub fn check(directory: &Path, attribute: &str) -> Result<VmmConfig, BuildError> {
    let wrong = |file: &str, why: String| BuildError::Output { attribute: attribute.to_owned(), file: file.to_owned(), why };
    let open = |name: &str, what: &str| match File::open(directory.join(name)) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(wrong(name, format!("is missing; it should be {what}"))),
        Err(error) => Err(BuildError::at(&directory.join(name))(error)),
    };
    let start = |name: &str, file: &File| {
        let mut bytes = vec![0; 2048];
        let mut len = 0;
        while len < bytes.len() {
            match file.read_at(&mut bytes[len..], len as u64).map_err(BuildError::at(&directory.join(name)))? {
                0 => break,
                read => len += read,
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    };
    for name in super::FILES {
        // Whoever builds for others may deliver anything.
        if directory.join(name).symlink_metadata().is_ok_and(|meta| !meta.is_file()) {
            return Err(wrong(name, "is not a regular file".into()));
        }
    }
    let kernel = open("vmlinux", "the uncompressed kernel, an ELF file")?;
    check_kernel(&start("vmlinux", &kernel)?).map_err(|why| wrong("vmlinux", why))?;
    let rootfs = open("rootfs", "the root file system: squashfs, erofs or ext4")?;
    let found =
        RootFormat::of(&start("rootfs", &rootfs)?).ok_or_else(|| wrong("rootfs", "is neither squashfs nor erofs nor ext4".into()))?;
    match File::open(directory.join("initrd")).and_then(|file| file.metadata()) {
        Ok(meta) if meta.len() == 0 => return Err(wrong("initrd", "is empty; leave it out if there is none".into())),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(BuildError::at(&directory.join("initrd"))(error)),
    }
    let config = open("vmm.json", "what the image needs, e.g. {\"version\": 1, \"root_format\": \"squashfs\"}")?;
    let mut text = Vec::new();
    config.take(MOST_CONFIG + 1).read_to_end(&mut text).map_err(BuildError::at(&directory.join("vmm.json")))?;
    let config = parse_config(&text).map_err(|why| wrong("vmm.json", why))?;
    if config.root_format != found {
        return Err(wrong("vmm.json", format!("says that rootfs is {}, and it is {}", config.root_format.as_str(), found.as_str())));
    }
    Ok(config)
}

fn check_kernel(start: &[u8]) -> Result<(), String> {
    const BZIMAGE: &[u8] = b"HdrS";
    if start.get(0x202..0x206) == Some(BZIMAGE) {
        return Err("is a compressed bzImage; it should be the uncompressed kernel, the ELF file vmlinux of its build".into());
    }
    if cfg!(target_arch = "aarch64") {
        // arm64/booting.rst: the magic of an Image at byte 56.
        return if start.get(56..60) == Some(b"ARM\x64") { Ok(()) } else { Err("is no arm64 Image".into()) };
    }
    if !start.starts_with(b"\x7fELF\x02\x01") {
        return Err("is not an ELF file of 64 bits; it should be the uncompressed kernel".into());
    }
    // e_machine: EM_X86_64.
    match start.get(0x12..0x14) {
        Some([62, 0]) => Ok(()),
        _ => Err("is an ELF file for another processor than x86-64".into()),
    }
}

fn parse_config(text: &[u8]) -> Result<VmmConfig, String> {
    if text.len() as u64 > MOST_CONFIG {
        return Err(format!("is larger than {MOST_CONFIG} bytes"));
    }
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let shorten = |error: serde_json::Error| error.to_string().chars().take(300).collect::<String>();
    let Versioned { version } = serde_json::from_slice(text).map_err(shorten)?;
    if version != 1 {
        return Err(format!("has version {version}, and this mvm reads version 1"));
    }
    let config: VmmConfig = serde_json::from_slice(text).map_err(shorten)?;
    // One argument each: a space would smuggle in another one.
    let plain = |arg: &String| !arg.is_empty() && arg.chars().all(|c| c.is_ascii_graphic());
    if let Some(bad) = config.kernel_args.iter().find(|arg| !plain(arg)) {
        let shown: String = bad.chars().take(60).collect();
        return Err(format!("has the kernel argument {shown:?}, which is not one word of printable ASCII"));
    }
    let len: usize = config.kernel_args.iter().map(|arg| arg.len() + 1).sum();
    if len > MOST_ARGS {
        return Err(format!("has {len} bytes of kernel arguments, and {MOST_ARGS} are allowed"));
    }
    if !(LEAST_MEM_MIB..=1_048_576).contains(&config.min_mem_mib) {
        return Err(format!("has min_mem_mib {}, which is not between {LEAST_MEM_MIB} and 1048576", config.min_mem_mib));
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn image(directory: &Path) {
        let mut kernel = vec![0; 4096];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[0x12] = 62;
        let mut root = vec![0; 4096];
        root[1080..1082].copy_from_slice(&0xEF53_u16.to_le_bytes());
        fs::write(directory.join("vmlinux"), kernel).unwrap();
        fs::write(directory.join("rootfs"), root).unwrap();
        fs::write(directory.join("vmm.json"), r#"{"version":1,"root_format":"ext4","kernel_args":["quiet"],"min_mem_mib":128}"#).unwrap();
    }

    /// What is said of a good image with one file replaced, or taken away.
    fn said(name: &str, content: Option<&[u8]>) -> String {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        match content {
            Some(content) => fs::write(dir.path().join(name), content).unwrap(),
            None => fs::remove_file(dir.path().join(name)).unwrap(),
        }
        check(dir.path(), "a").unwrap_err().to_string()
    }

    #[test]
    fn an_image_is_one() {
        let dir = tempfile::tempdir().unwrap();
        image(dir.path());
        let config = check(dir.path(), "a").unwrap();
        assert_eq!(config, VmmConfig { version: 1, kernel_args: vec!["quiet".into()], min_mem_mib: 128, root_format: RootFormat::Ext4 });
        fs::write(dir.path().join("initrd"), "x").unwrap();
        check(dir.path(), "a").unwrap();
    }

    #[test]
    fn what_is_no_image_is_named() {
        let mut bzimage = vec![0; 4096];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let mut arm = b"\x7fELF\x02\x01".to_vec();
        arm.resize(64, 183);
        let cases: [(&str, Option<&[u8]>, &str); 16] = [
            ("vmlinux", None, "vmlinux is missing; it should be the uncompressed kernel, an ELF file"),
            ("vmlinux", Some(b""), "vmlinux is not an ELF file"),
            ("vmlinux", Some(&bzimage), "vmlinux is a compressed bzImage"),
            ("vmlinux", Some(&arm), "vmlinux is an ELF file for another processor"),
            ("rootfs", None, "rootfs is missing"),
            ("rootfs", Some(b"junk"), "rootfs is neither squashfs nor erofs nor ext4"),
            ("rootfs", Some(b"hsqs and more"), "vmm.json says that rootfs is ext4, and it is squashfs"),
            ("initrd", Some(b""), "initrd is empty"),
            ("vmm.json", None, "vmm.json is missing"),
            ("vmm.json", Some(b"{"), "vmm.json EOF while parsing"),
            ("vmm.json", Some(br#"{"version":2,"new":1}"#), "vmm.json has version 2, and this mvm reads version 1"),
            ("vmm.json", Some(br#"{"version":1,"root_format":"ext4","typo":1}"#), "vmm.json unknown field `typo`"),
            ("vmm.json", Some(br#"{"version":1,"root_format":"zfs"}"#), "vmm.json unknown variant `zfs`"),
            ("vmm.json", Some(br#"{"version":1,"root_format":"ext4","kernel_args":["a b"]}"#), "vmm.json has the kernel argument \"a b\""),
            ("vmm.json", Some(br#"{"version":1,"root_format":"ext4","min_mem_mib":1}"#), "vmm.json has min_mem_mib 1"),
            ("vmm.json", Some(&[b' '; 70_000]), "vmm.json is larger than 65536 bytes"),
        ];
        for (name, content, expected) in cases {
            let said = said(name, content);
            assert!(said.starts_with(&format!("the build of a yields no image: {expected}")), "{name}: {said}");
        }
    }
}
