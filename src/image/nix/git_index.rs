//! The names of the files that git tracks, from its index (git's Documentation/gitformat-index: versions 2 to 4).

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The lengths of git's two hashes, SHA-1 and SHA-256, in bytes.
const HASHES: [usize; 2] = [20, 32];

/// Reads the paths of an index.
///
/// # Errors
/// A sentence: why it cannot be read.
pub fn paths(index: &[u8]) -> Result<Vec<PathBuf>, String> {
    let [sha1, sha256] = HASHES.map(|hash| read(index, hash));
    // With the wrong length its end is not where it should be. What is wrong with it is said as for the usual one.
    sha1.or_else(|why| sha256.map_err(|_| why))
}

fn read(index: &[u8], hash: usize) -> Result<Vec<PathBuf>, String> {
    const CUT: &str = "git's index is cut off";
    let word = |at: usize| -> Result<u32, String> {
        let bytes = index.get(at..at + 4).ok_or(CUT)?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("four bytes were taken")))
    };
    if index.get(..4) != Some(b"DIRC") {
        return Err("git's index has another form than git writes".to_owned());
    }
    let version = word(4)?;
    if !(2..=4).contains(&version) {
        return Err(format!("git's index has version {version}, and versions 2 to 4 are read"));
    }
    let mut found = Vec::new();
    let mut at = 12;
    let mut name: Vec<u8> = Vec::new();
    for _ in 0..word(8)? {
        // 40 bytes of times and the like, the hash, the flags; version 3 has more of them where bit 14 is set.
        let flags_at = at + 40 + hash;
        let flags = index.get(flags_at..flags_at + 2).ok_or(CUT)?;
        let extended = version >= 3 && flags[0] & 0x40 != 0;
        let start = flags_at + if extended { 4 } else { 2 };
        let rest = index.get(start..).ok_or(CUT)?;
        if version == 4 {
            let (strip, used) = varint(rest).ok_or(CUT)?;
            let tail = &rest[used..];
            let end = tail.iter().position(|byte| *byte == 0).ok_or(CUT)?;
            name.truncate(name.len().checked_sub(strip).ok_or("git's index takes away more of a name than there is")?);
            name.extend(&tail[..end]);
            at = start + used + end + 1;
        } else {
            let end = rest.iter().position(|byte| *byte == 0).ok_or(CUT)?;
            name = rest[..end].to_vec();
            // Entries are padded with 1 to 8 zeros to a multiple of 8 bytes.
            let len = start + end - at;
            at += (len + 8) & !7;
        }
        found.push(PathBuf::from(std::ffi::OsString::from_vec(name.clone())));
    }
    // Extensions up to the hash over everything before it. One in small letters changes what the entries mean.
    while at + hash < index.len() {
        let name = index.get(at..at + 4).ok_or(CUT)?;
        match name {
            b"link" => return Err(format!("git's index is split; {} makes it whole", "`git update-index --no-split-index`")),
            b"sdir" => return Err(format!("git's index is sparse; {} makes it whole", "`git sparse-checkout disable`")),
            _ if name[0].is_ascii_uppercase() => at += 8 + word(at + 4)? as usize,
            _ => return Err(format!("git's index has an extension {:?}, which changes its meaning", String::from_utf8_lossy(name))),
        }
    }
    if at + hash == index.len() { Ok(found) } else { Err(CUT.to_owned()) }
}

/// A number as git's pack files write offsets: seven bits a byte, most significant first, one added for each continuation.
fn varint(bytes: &[u8]) -> Option<(usize, usize)> {
    let mut value = 0_usize;
    for (index, byte) in bytes.iter().enumerate().take(9) {
        value = (value << 7) | usize::from(byte & 0x7f);
        if byte & 0x80 == 0 {
            return Some((value, index + 1));
        }
        value += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(version: u32, names: &[&str]) -> Vec<u8> {
        let mut bytes = b"DIRC".to_vec();
        bytes.extend(version.to_be_bytes());
        bytes.extend((names.len() as u32).to_be_bytes());
        let mut before = "";
        for name in names {
            let begin = bytes.len();
            bytes.extend([7; 60]);
            bytes.extend([0, name.len() as u8]);
            if version == 4 {
                let common = before.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
                bytes.push((before.len() - common) as u8);
                bytes.extend(&name.as_bytes()[common..]);
                bytes.push(0);
            } else {
                bytes.extend(name.as_bytes());
                let len = bytes.len() - begin;
                bytes.resize(begin + ((len + 8) & !7), 0);
            }
            before = name;
        }
        bytes.extend(b"TREE\x00\x00\x00\x03abc");
        bytes.extend([9; 20]);
        bytes
    }

    #[test]
    fn names_are_read_in_all_versions() {
        let names = ["a", "flake.nix", "nix/12345678.nix", "nix/123456789.nix", "nix/z"];
        for version in [2, 3, 4] {
            let found = paths(&index(version, &names)).unwrap();
            assert_eq!(found, names.map(PathBuf::from), "version {version}");
        }
        assert!(paths(&index(5, &[])).unwrap_err().contains("version 5"));
        assert!(paths(b"").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), version in 2_u32..5, count in 0_u32..4) {
            let mut whole = b"DIRC".to_vec();
            whole.extend(version.to_be_bytes());
            whole.extend(count.to_be_bytes());
            whole.extend(bytes);
            let _ = paths(&whole);
        }
    }
}
