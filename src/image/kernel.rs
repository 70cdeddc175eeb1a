//! The uncompressed kernel inside a distribution's kernel file.
//!
//! QEMU's and Firecracker's direct boot wants an ELF (x86-64, entered by PVH) or an `Image` (arm64). Distributions ship
//! a `bzImage`: a boot stub and a compressed ELF whose place is in the setup header (kernel documentation,
//! x86/boot.rst: `setup_sects` at 0x1f1, `HdrS` at 0x202, `payload_offset` and `payload_length` at 0x248).

use std::io::Read;

/// No kernel is larger; a compressed one that claims to be is not believed.
const MOST: u64 = 512 << 20;

const ELF: &[u8] = b"\x7fELF";
const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
/// lz4's legacy frame, which `lz4 -l` writes and the kernel's build uses.
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const LZ4: &[u8] = &[0x04, 0x22, 0x4d, 0x18];
/// Blocks of the legacy frame hold at most this much.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;

/// Finds the kernel that can be booted directly in `file`.
///
/// # Errors
/// A sentence: what form the file has, and why that is no use.
pub fn extract(file: &[u8]) -> Result<Vec<u8>, String> {
    if is_bootable(file) {
        return Ok(file.to_vec());
    }
    let kernel = match bzimage_payload(file)? {
        Some(payload) => decompress(payload)?,
        None => decompress(file)?,
    };
    if is_bootable(&kernel) { Ok(kernel) } else { Err("what is compressed in it is neither an ELF nor an arm64 Image".into()) }
}

fn is_bootable(file: &[u8]) -> bool {
    // arm64/booting.rst: the magic of an Image at byte 56.
    file.starts_with(ELF) || file.get(56..60) == Some(b"ARM\x64")
}

fn bzimage_payload(file: &[u8]) -> Result<Option<&[u8]>, String> {
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Ok(None);
    }
    let word = |at: usize| -> Result<usize, String> {
        let bytes = file.get(at..at + 4).ok_or("the setup header is cut off")?;
        Ok(u32::from_le_bytes(bytes.try_into().expect("four bytes were taken")) as usize)
    };
    let sectors = match file[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let end = start + word(0x24c)?;
    file.get(start..end).map(Some).ok_or_else(|| format!("its payload at {start}..{end} lies outside its {} bytes", file.len()))
}

/// Decompresses by magic: lz4 (both frames), zstd, gzip or xz.
///
/// # Errors
/// A sentence: an unknown form, or damaged data.
pub fn decompress(data: &[u8]) -> Result<Vec<u8>, String> {
    let form = |name: &'static str| move |error: std::io::Error| format!("its {name} data is damaged: {error}");
    match data {
        _ if data.starts_with(LZ4_LEGACY) => lz4_legacy(&data[4..]),
        _ if data.starts_with(LZ4) => read_all(lz4_flex::frame::FrameDecoder::new(data)).map_err(form("lz4")),
        _ if data.starts_with(GZIP) => read_all(flate2::bufread::GzDecoder::new(data)).map_err(form("gzip")),
        _ if data.starts_with(XZ) => read_all(lzma_rust2::XzReader::new(data, false)).map_err(form("xz")),
        _ if data.starts_with(ZSTD) => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(data).map_err(|error| format!("its zstd data is damaged: {error}"))?;
            read_all(decoder).map_err(form("zstd"))
        }
        _ if data.starts_with(ELF) => Ok(data.to_vec()),
        _ => Err(format!("its content begins with {:02x?}, which is none of lz4, zstd, gzip, xz and ELF", &data[..data.len().min(6)])),
    }
}

fn read_all(reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    reader.take(MOST + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MOST {
        return Err(std::io::Error::other(format!("more than {MOST} bytes")));
    }
    Ok(content)
}

fn lz4_legacy(mut data: &[u8]) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    // The kernel's build appends the uncompressed length, four bytes that are no block.
    while data.len() > 4 {
        let (size, rest) = data.split_at(4);
        let size = u32::from_le_bytes(size.try_into().expect("four bytes were taken")) as usize;
        let block = rest.get(..size).ok_or("its lz4 data is cut off")?;
        let from = content.len();
        content.resize(from + LZ4_LEGACY_BLOCK, 0);
        let count =
            lz4_flex::block::decompress_into(block, &mut content[from..]).map_err(|error| format!("its lz4 data is damaged: {error}"))?;
        content.truncate(from + count);
        if content.len() as u64 > MOST {
            return Err(format!("more than {MOST} bytes"));
        }
        data = &rest[size..];
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn elf() -> Vec<u8> {
        let mut elf = ELF.to_vec();
        elf.extend((0..100_000u32).flat_map(|n| (n / 7).to_le_bytes()));
        elf
    }

    fn legacy(content: &[u8]) -> Vec<u8> {
        let mut data = LZ4_LEGACY.to_vec();
        for part in content.chunks(LZ4_LEGACY_BLOCK) {
            let block = lz4_flex::block::compress(part);
            data.extend((block.len() as u32).to_le_bytes());
            data.extend(block);
        }
        data.extend((content.len() as u32).to_le_bytes());
        data
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 5 * 512 + 100];
        file[0x1f1] = 4;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x248..0x24c].copy_from_slice(&100u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend(payload);
        file.extend(b"trailer");
        file
    }

    fn every_form() -> Vec<(&'static str, Vec<u8>)> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&elf()).unwrap();
        let mut lz4 = lz4_flex::frame::FrameEncoder::new(Vec::new());
        lz4.write_all(&elf()).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&elf()).unwrap();
        let mut zstd = ruzstd::encoding::compress_to_vec(&elf()[..], ruzstd::encoding::CompressionLevel::Fastest);
        zstd.extend((elf().len() as u32).to_le_bytes());
        vec![
            ("lz4 legacy", legacy(&elf())),
            ("lz4", lz4.finish().unwrap()),
            ("gzip", gzip.finish().unwrap()),
            ("xz", xz.finish().unwrap()),
            ("zstd", zstd),
            ("raw", elf()),
        ]
    }

    #[test]
    fn every_compression_is_undone_alone_and_in_a_bzimage() {
        for (name, data) in every_form() {
            assert!(extract(&data).is_ok_and(|kernel| kernel == elf()), "{name}");
            assert!(extract(&bzimage(&data)).is_ok_and(|kernel| kernel == elf()), "{name} in a bzImage");
        }
    }

    #[test]
    fn blocks_of_the_legacy_frame_are_joined() {
        let mut large = elf();
        large.resize(LZ4_LEGACY_BLOCK * 2 + 5, 9);
        assert!(extract(&legacy(&large)).unwrap() == large);
    }

    #[test]
    fn an_arm64_image_is_taken_as_it_is() {
        let mut image = vec![0; 64];
        image[56..60].copy_from_slice(b"ARM\x64");
        assert_eq!(extract(&image).unwrap(), image);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_a_reason() {
        assert!(extract(b"hello, world").unwrap_err().contains("none of"));
        assert!(extract(&legacy(b"not an ELF")).unwrap_err().contains("neither"));
        let mut cut = bzimage(&legacy(&elf()));
        cut.truncate(3000);
        assert!(extract(&cut).unwrap_err().contains("outside"));
    }

    /// Made once: compressing takes longer than what is tested.
    static FORMS: std::sync::LazyLock<Vec<Vec<u8>>> = std::sync::LazyLock::new(|| every_form().into_iter().map(|(_, data)| data).collect());

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn damage_never_panics(form in 0usize..6, at in 0usize..4000, byte: u8, end in 0usize..100_000) {
            let mut data = FORMS[form].clone();
            data.truncate(end);
            if let Some(place) = data.get_mut(at) {
                *place = byte;
            }
            let _ = extract(&data);
            let _ = extract(&bzimage(&data));
        }
    }
}
