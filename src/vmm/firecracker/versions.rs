//! Which Firecrackers there are on this host, what each is, and how another one is put in place.
//!
//! Several versions lie side by side, since a snapshot is woken by the version that made it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::vmm::facts::{self, Key, host_cpu};
use crate::vmm::files::find_in_path;

/// Where versions lie side by side, each in a directory of its name.
pub const VERSIONS_DIR: &str = "/usr/lib/mvm/firecracker";

/// The oldest version that is used. Before it: wrong VMGenID, jailer that follows links (CVE-2026-1386), PCI that lets guests out
/// (CVE-2026-5747).
pub const MINIMUM: (u32, u32, u32) = (1, 16, 1);

/// How long a program may take to say its version.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most that a release's archive, or a program in it, may have in bytes.
const MOST: u64 = 256 << 20;

/// Whether guests boot here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A guest's kernel booted.
    Usable,
    /// It did not.
    Unusable {
        /// Why, for people.
        why: String,
    },
    /// Nobody has tried.
    Untried,
}

/// One Firecracker of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    key: Key,
    /// The program.
    pub firecracker: PathBuf,
    /// The jailer beside it, where there is one.
    pub jailer: Option<PathBuf>,
    /// Its version, e.g. `1.16.1`.
    pub version: String,
    /// The BLAKE3 hash of the program, its first 16 hex digits.
    pub hash: String,
    /// The host's CPU model, and with it a short hash of its features.
    pub cpu: String,
    /// Whether guests boot here.
    pub verdict: Verdict,
}

impl Installed {
    /// What snapshots name it by.
    pub fn build(&self) -> String {
        format!("Firecracker {} blake3 {}", self.version, self.hash)
    }

    /// Its version as numbers.
    pub(super) fn numbers(&self) -> (u32, u32, u32) {
        numbers(&self.version).unwrap_or_default()
    }
}

/// Looks for Firecrackers: the configured one, those side by side with the newest first, the one in `PATH`.
///
/// What was found out earlier is in `remembered`, which is brought up to date.
///
/// # Errors
/// A sentence, when there is none, or none that can be used: what is wrong with each.
pub(super) fn find(configured: Option<&Path>, versions: &Path, allow_old: bool, remembered: &Path) -> Result<Vec<Installed>, String> {
    let known: Vec<Installed> = facts::read(remembered).unwrap_or_default();
    let mut wrong = Vec::new();
    let mut found: Vec<Installed> = Vec::new();
    let mut side_by_side: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(versions).into_iter().flatten().flatten() {
        let program = entry.path().join("firecracker");
        if !entry.file_name().as_encoded_bytes().starts_with(b".") && program.exists() {
            side_by_side.push(program);
        }
    }
    let mut look = |program: &Path| match known_or_inspected(program, &known) {
        Ok(one) if !allow_old && one.numbers() < MINIMUM => {
            let (major, minor, patch) = MINIMUM;
            wrong.push(format!(
                "{} is version {}, and {major}.{minor}.{patch} or later is needed for its security fixes (--allow-old-firecracker takes it all the same)",
                program.display(),
                one.version
            ));
            None
        }
        Ok(one) => Some(one),
        Err(why) => {
            wrong.push(why);
            None
        }
    };
    found.extend(configured.and_then(&mut look));
    let mut beside: Vec<Installed> = side_by_side.iter().filter_map(|program| look(program)).collect();
    beside.sort_by_key(|one| std::cmp::Reverse(one.numbers()));
    found.extend(beside);
    found.extend(find_in_path("firecracker").as_deref().and_then(&mut look));
    found.dedup_by(|a, b| a.firecracker == b.firecracker);
    if found != known
        && let Err(error) = facts::write(remembered, &found)
    {
        tracing::debug!(file = %remembered.display(), %error, "cannot remember which Firecrackers there are");
    }
    if found.is_empty() {
        let why = match wrong.is_empty() {
            true => {
                format!("there is no firecracker in {} or PATH; `mvm node install-firecracker` puts a release there", versions.display())
            }
            false => wrong.join("; "),
        };
        return Err(why);
    }
    Ok(found)
}

fn known_or_inspected(program: &Path, known: &[Installed]) -> Result<Installed, String> {
    let failed = |error: io::Error| format!("{}: {error}", program.display());
    let key = Key::of(program).map_err(failed)?;
    let jailer = program.with_file_name("jailer");
    let jailer = Some(jailer).filter(|path| path.is_file());
    if let Some(one) = known.iter().find(|one| one.key == key && one.jailer == jailer) {
        return Ok(one.clone());
    }
    let said = version_line(program)?;
    let version = said
        .strip_prefix("Firecracker v")
        .filter(|version| numbers(version).is_some())
        .ok_or_else(|| format!("{} --version says {said:?}, which is not Firecracker", program.display()))?;
    let mut hash = blake3::Hasher::new();
    hash.update_reader(File::open(program).map_err(failed)?).map_err(failed)?;
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").map_err(|error| format!("/proc/cpuinfo: {error}"))?;
    Ok(Installed {
        key,
        firecracker: program.to_owned(),
        jailer,
        version: version.to_owned(),
        hash: hash.finalize().to_hex()[..16].to_owned(),
        cpu: host_cpu(&cpuinfo),
        verdict: Verdict::Untried,
    })
}

/// Remembers whether guests boot with a Firecracker.
pub(super) fn remember_verdict(remembered: &Path, all: &[Installed], about: &Installed, verdict: &Verdict) -> io::Result<()> {
    let with =
        |one: &Installed| Installed { verdict: if one.key == about.key { verdict.clone() } else { one.verdict.clone() }, ..one.clone() };
    facts::write(remembered, &all.iter().map(with).collect::<Vec<_>>())
}

/// Reads the numbers of `1.17.0` or `1.17.0-dev`.
fn numbers(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.split('-').next()?.split('.').map(str::parse);
    let numbers = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    parts.next().is_none().then_some(numbers)
}

/// The first line of what a program says of its version; a log line follows it.
fn version_line(program: &Path) -> Result<String, String> {
    let failed = |error: io::Error| format!("{} cannot be run: {error}", program.display());
    let mut child = Command::new(program)
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let stdout = child.stdout.take();
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => break None,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if ended.is_none() {
        child.kill().and_then(|()| child.wait()).map_err(failed)?;
        return Err(format!("{} --version did not end within {} s", program.display(), PATIENCE.as_secs()));
    }
    let mut text = Vec::new();
    // What the kernel holds of it: more than a pipe's buffer was never written by what has ended.
    stdout.map(|out| out.take(4096).read_to_end(&mut text)).transpose().map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().trim().to_owned())
}

/// Puts a release archive of Firecracker in place, after its hash was found right, and returns what was installed.
///
/// The archive is that of Firecracker's releases: `release-v1.16.1-x86_64/{firecracker,jailer}-v1.16.1-x86_64`. Nothing of a version
/// is seen before all of it is there; the same one again changes nothing.
///
/// # Errors
/// A sentence: what is wrong with the archive or its place.
pub fn install(archive: &Path, sha256: &str, versions: &Path) -> Result<PathBuf, String> {
    let failed = |path: &Path| {
        let path = path.display().to_string();
        move |error: io::Error| format!("{path}: {error}")
    };
    let length = fs::metadata(archive).map_err(failed(archive))?.len();
    if length > MOST {
        return Err(format!("{} has {length} bytes, which is no release of Firecracker", archive.display()));
    }
    let bytes = fs::read(archive).map_err(failed(archive))?;
    let found = hex(&Sha256::digest(&bytes));
    if !found.eq_ignore_ascii_case(sha256.trim()) {
        return Err(format!(
            "{} has the SHA-256 {found}, not {}; fetch it again, or look at the release's SHA256SUMS",
            archive.display(),
            sha256.trim()
        ));
    }
    let programs = unpack(&bytes).map_err(|why| format!("{}: {why}", archive.display()))?;
    fs::DirBuilder::new().recursive(true).mode(0o755).create(versions).map_err(failed(versions))?;
    let new = tempfile::Builder::new().prefix(".new-").tempdir_in(versions).map_err(failed(versions))?;
    fs::set_permissions(new.path(), fs::Permissions::from_mode(0o755)).map_err(failed(new.path()))?;
    for (name, content) in [("firecracker", &programs.firecracker), ("jailer", &programs.jailer)] {
        let path = new.path().join(name);
        fs::write(&path, content).map_err(failed(&path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).map_err(failed(&path))?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(failed(&path))?;
    }
    File::open(new.path()).and_then(|dir| dir.sync_all()).map_err(failed(new.path()))?;
    let said = version_line(&new.path().join("firecracker"))?;
    let version = said.strip_prefix("Firecracker v").filter(|version| numbers(version).is_some());
    let version = version.ok_or_else(|| format!("the firecracker in {} says {said:?} of its version", archive.display()))?;
    let target = versions.join(version);
    match fs::rename(new.path(), &target) {
        Ok(()) => {
            let _ = new.keep();
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
            let same = |name: &str, content: &[u8]| fs::read(target.join(name)).is_ok_and(|there| there == content);
            if !(same("firecracker", &programs.firecracker) && same("jailer", &programs.jailer)) {
                return Err(format!(
                    "{} is there already with another content; remove it first, if nothing was snapshotted with it",
                    target.display()
                ));
            }
        }
        Err(error) => return Err(failed(&target)(error)),
    }
    File::open(versions).and_then(|dir| dir.sync_all()).map_err(failed(versions))?;
    Ok(target)
}

struct Programs {
    firecracker: Vec<u8>,
    jailer: Vec<u8>,
}

fn unpack(bytes: &[u8]) -> Result<Programs, String> {
    let arch = std::env::consts::ARCH;
    let wrong = |error: io::Error| format!("it is no archive of a release: {error}");
    let (mut firecracker, mut jailer) = (None, None);
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    for entry in archive.entries().map_err(wrong)? {
        let mut entry = entry.map_err(wrong)?;
        let path = entry.path().map_err(wrong)?.into_owned();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let place = match name.strip_suffix(&format!("-{arch}")) {
            Some(rest) if rest.starts_with("firecracker-v") => &mut firecracker,
            Some(rest) if rest.starts_with("jailer-v") => &mut jailer,
            _ => continue,
        };
        if entry.header().entry_type() != tar::EntryType::Regular || entry.size() > MOST {
            return Err(format!("{} is no program", path.display()));
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(wrong)?;
        if content.get(..4) != Some(b"\x7fELF") {
            return Err(format!("{} is no program", path.display()));
        }
        if place.replace(content).is_some() {
            return Err(format!("it has {name} twice"));
        }
    }
    match (firecracker, jailer) {
        (Some(firecracker), Some(jailer)) => Ok(Programs { firecracker, jailer }),
        (None, _) => Err(format!("it has no firecracker-v…-{arch}")),
        (_, None) => Err(format!("it has no jailer-v…-{arch}")),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
        fs::create_dir_all(dir).unwrap();
        let path = dir.join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn says(version: &str) -> String {
        format!("#!/bin/sh\necho 'Firecracker v{version}'\necho\necho 'a log line'\n")
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!(numbers("1.17.0-dev"), Some((1, 17, 0)));
        assert_eq!(numbers("1.16.1"), Some((1, 16, 1)));
        assert!(numbers("1.16").is_none() && numbers("x").is_none() && numbers("1.2.3.4").is_none());
    }

    #[test]
    fn the_newest_that_can_be_used_comes_first_and_each_that_cannot_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (versions, remembered) = (dir.path().join("versions"), dir.path().join("facts.json"));
        let find = |configured: Option<&Path>, allow_old| find(configured, &versions, allow_old, &remembered);
        let why = find(None, false).unwrap_err();
        assert!(why.contains("install-firecracker"), "{why}");
        program(&versions.join("1.9.1"), "firecracker", &says("1.9.1"));
        let why = find(None, false).unwrap_err();
        assert!(why.contains("is version 1.9.1, and 1.16.1 or later") && why.contains("--allow-old-firecracker"), "{why}");
        assert_eq!(find(None, true).unwrap()[0].version, "1.9.1");
        for version in ["1.16.1", "1.17.0", "1.16.10"] {
            program(&versions.join(version), "firecracker", &says(version));
        }
        program(&versions.join("1.17.0"), "jailer", "");
        let found = find(None, false).unwrap();
        assert_eq!(found.iter().map(|one| one.version.as_str()).collect::<Vec<_>>(), ["1.17.0", "1.16.10", "1.16.1"]);
        assert!(found[0].jailer.is_some() && found[1].jailer.is_none());
        let own = program(&dir.path().join("own"), "firecracker", &says("1.16.2"));
        assert_eq!(find(Some(&own), false).unwrap()[0].firecracker, own);
        // What is no Firecracker, cannot be run, or is of another machine.
        let refused = |script: &[u8], mode: u32, expected: &str| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("firecracker");
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let none = dir.path().join("none");
            let why = super::find(Some(&path), &none, false, &dir.path().join("f")).unwrap_err();
            assert!(why.contains(expected), "{why}");
        };
        refused(b"#!/bin/sh\necho busybox\n", 0o755, "says \"busybox\", which is not Firecracker");
        refused(b"#!/bin/sh\n", 0o644, "cannot be run: Permission denied");
        refused(b"\x7fELF\x02\x01\x01\x00\0\0\0\0\0\0\0\0\x02\0\xb7\0", 0o755, "cannot be run: Exec format error");
        // Asked once: what is remembered is taken.
        program(&versions.join("1.17.0"), "firecracker", &says("1.17.0"));
        let again = find(None, false).unwrap();
        assert_eq!(again[0].version, "1.17.0");
        remember_verdict(&remembered, &again, &again[1], &Verdict::Usable).unwrap();
        assert_eq!(find(None, false).unwrap()[1].verdict, Verdict::Usable);
    }

    #[test]
    fn a_program_that_says_nothing_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = program(dir.path(), "firecracker", "#!/bin/sh\nexec sleep 60\n");
        let begun = Instant::now();
        let why = version_line(&path).unwrap_err();
        assert!(why.contains("did not end within 5 s") && begun.elapsed() < Duration::from_secs(30), "{why}");
    }

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o755);
            header.set_cksum();
            tar.append_data(&mut header, format!("release-v1.16.1/{name}"), *content).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn a_release_is_put_in_place_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (file, versions) = (dir.path().join("release.tgz"), dir.path().join("versions"));
        let arch = std::env::consts::ARCH;
        let (firecracker, jailer) = (format!("firecracker-v1.16.1-{arch}"), format!("jailer-v1.16.1-{arch}"));
        let sum = |bytes: &[u8]| hex(&Sha256::digest(bytes));
        let try_with = |files: &[(&str, &[u8])]| {
            let bytes = archive(files);
            fs::write(&file, &bytes).unwrap();
            install(&file, &sum(&bytes), &versions)
        };
        let why = try_with(&[(&firecracker, b"\x7fELF")]).unwrap_err();
        assert!(why.contains("it has no jailer-v"), "{why}");
        assert!(try_with(&[(&firecracker, b"text"), (&jailer, b"\x7fELF")]).unwrap_err().contains("is no program"));
        let whole: [(&str, &[u8]); 2] = [(&firecracker, b"\x7fELF"), (&jailer, b"\x7fELF")];
        // A program of no machine.
        let why = try_with(&whole).unwrap_err();
        assert!(why.contains("cannot be run"), "{why}");
        assert!(install(&file, &"0".repeat(64), &versions).unwrap_err().contains("has the SHA-256"));
        fs::write(&file, "no archive").unwrap();
        assert!(install(&file, &sum(b"no archive"), &versions).unwrap_err().contains("it is no archive of a release"));
        assert!(!versions.exists() || fs::read_dir(&versions).unwrap().count() == 0, "nothing is left of what failed");
    }
}
