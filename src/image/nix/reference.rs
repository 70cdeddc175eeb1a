//! What a flake reference means, as far as its sources lie on this host.

use std::fmt::Write;
use std::path::{Component, Path, PathBuf};

/// The longest reference, in bytes.
const MOST: usize = 1024;

/// A flake reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A directory as it is.
    Path {
        /// The directory with `flake.nix`.
        dir: PathBuf,
    },
    /// A git repository of this host.
    Git {
        /// Its work tree, or the bare repository.
        root: PathBuf,
        /// Where in it the flake lies.
        dir: Option<PathBuf>,
        /// Which branch or tag; the work tree with its changes without one.
        branch: Option<String>,
        /// Which commit.
        rev: Option<String>,
    },
    /// Something that only nix knows how to find.
    Other(String),
}

/// Checks a reference as it is declared; looks at nothing.
///
/// # Errors
/// A sentence: what is wrong with it and what would be right.
pub fn check(text: &str) -> Result<(), String> {
    parse(text).map(drop)
}

/// Parses a reference; looks at nothing.
fn parse(text: &str) -> Result<Reference, String> {
    const RIGHT: &str = "a flake is a directory such as /srv/flake, path:/srv/flake, git+file:///srv/repository, or e.g. github:owner/name";
    let shown = || format!("{:?}", text.chars().take(80).collect::<String>());
    if text.is_empty() || text.len() > MOST || text.chars().any(|c| c.is_control() || c.is_whitespace()) || text.starts_with('-') {
        return Err(format!("{} is no flake reference; {RIGHT}", shown()));
    }
    if text.contains('#') {
        return Err(format!("{} names an attribute; leave out `#` and what follows: it comes from the role and the profile", shown()));
    }
    if text.starts_with('/') {
        return Ok(Reference::Path { dir: absolute(text).map_err(|why| format!("{} {why}", shown()))? });
    }
    if let Some(rest) = text.strip_prefix("path:") {
        let (path, query) = split(rest);
        // What a lock adds to a path is no choice of the operator's.
        if query.iter().any(|(key, _)| *key == "dir") {
            return Err(format!("{} has dir=; name the directory of the flake itself", shown()));
        }
        let path = decoded(path.strip_prefix("//").unwrap_or(path)).map_err(|why| format!("{} {why}", shown()))?;
        return Ok(Reference::Path { dir: absolute(&path).map_err(|why| format!("{} {why}", shown()))? });
    }
    if let Some(rest) = text.strip_prefix("git+file:") {
        let (path, query) = split(rest);
        let path = decoded(path.strip_prefix("//").unwrap_or(path)).map_err(|why| format!("{} {why}", shown()))?;
        let root = absolute(&path).map_err(|why| format!("{} {why}", shown()))?;
        let (mut dir, mut branch, mut rev) = (None, None, None);
        for (key, value) in query {
            let value = decoded(value).map_err(|why| format!("{} {why}", shown()))?;
            match key {
                "dir" => dir = Some(below(&value).ok_or_else(|| format!("{}: dir={value:?} leads out of the repository", shown()))?),
                "ref" => branch = Some(value),
                "rev" => rev = Some(value),
                "lastModified" | "narHash" | "revCount" | "shallow" | "submodules" | "allRefs" | "dirtyRev" | "dirtyShortRev" => {}
                _ => return Err(format!("{} has {key}=, which is unknown; known are dir=, ref= and rev=", shown())),
            }
        }
        return Ok(Reference::Git { root, dir, branch, rev });
    }
    let scheme = text.split_once(':').map(|(scheme, _)| scheme);
    let known = |scheme: &str| {
        scheme.starts_with(|c: char| c.is_ascii_lowercase()) && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    };
    match scheme {
        Some(scheme) if known(scheme) => Ok(Reference::Other(text.to_owned())),
        // Relative paths would mean another flake in each directory that mvm runs in; names are looked up in a registry that changes.
        _ => Err(format!("{} is no flake reference; {RIGHT}", shown())),
    }
}

impl Reference {
    /// Parses a reference, and looks whether a directory belongs to a git repository: nix then takes what git knows of.
    ///
    /// # Errors
    /// A sentence: what is wrong with it and what would be right.
    pub fn locate(text: &str) -> Result<Reference, String> {
        let parsed = parse(text)?;
        match &parsed {
            Reference::Path { dir } if text.starts_with('/') => {
                if !dir.is_dir() {
                    return Err(format!("{} is not a directory", dir.display()));
                }
                match dir.ancestors().find(|at| at.join(".git").exists()) {
                    Some(root) => {
                        let below = dir.strip_prefix(root).expect("an ancestor is a prefix");
                        let dir = (!below.as_os_str().is_empty()).then(|| below.to_owned());
                        Ok(Reference::Git { root: root.to_owned(), dir, branch: None, rev: None })
                    }
                    None => Ok(parsed),
                }
            }
            Reference::Path { dir } | Reference::Git { root: dir, .. } if !dir.is_dir() => {
                Err(format!("{} is not a directory", dir.display()))
            }
            _ => Ok(parsed),
        }
    }

    /// The flake's directory, where its sources lie on this host as they are.
    pub fn directory(&self) -> Option<PathBuf> {
        match self {
            Reference::Path { dir } => Some(dir.clone()),
            Reference::Git { root, dir, branch: None, rev: None } => Some(dir.as_ref().map_or_else(|| root.clone(), |dir| root.join(dir))),
            _ => None,
        }
    }

    /// Where in its sources the flake lies, if not at their top.
    pub fn dir(&self) -> Option<PathBuf> {
        match self {
            Reference::Path { .. } => None,
            Reference::Git { dir, .. } => dir.clone(),
            Reference::Other(text) => {
                let (_, query) = split(text);
                let (_, value) = query.into_iter().find(|(key, _)| *key == "dir")?;
                Some(decoded(value).map_or_else(|_| PathBuf::from(value), PathBuf::from))
            }
        }
    }

    /// The reference as nix reads it, of sources with this hash and no others.
    pub fn with_hash(&self, hash: &str) -> String {
        let text = self.to_nix();
        let (path, query) = split(&text);
        let mut pairs: Vec<String> =
            query.iter().filter(|(key, _)| *key != "narHash").map(|(key, value)| format!("{key}={value}")).collect();
        pairs.push(format!("narHash={}", encoded(Path::new(hash))));
        format!("{path}?{}", pairs.join("&"))
    }

    /// The reference as nix reads it, without anything left to guess.
    pub fn to_nix(&self) -> String {
        match self {
            Reference::Path { dir } => format!("path:{}", encoded(dir)),
            Reference::Git { root, dir, branch, rev } => {
                let mut query = Vec::new();
                query.extend(dir.as_ref().map(|dir| format!("dir={}", encoded(dir))));
                query.extend(branch.as_ref().map(|branch| format!("ref={}", encoded(Path::new(branch)))));
                query.extend(rev.as_ref().map(|rev| format!("rev={}", encoded(Path::new(rev)))));
                let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
                format!("git+file://{}{query}", encoded(root))
            }
            Reference::Other(text) => text.clone(),
        }
    }
}

fn split(rest: &str) -> (&str, Vec<(&str, &str)>) {
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    (path, query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect())
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    let path = Path::new(path);
    let plain = path.is_absolute() && path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if plain { Ok(path.components().collect()) } else { Err("is not an absolute path without `..`".to_owned()) }
}

fn below(path: &str) -> Option<PathBuf> {
    let plain = !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| PathBuf::from(path))
}

fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest.get(..2).and_then(|two| std::str::from_utf8(two).ok()).and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(digits.ok_or("has a % that is not followed by two hexadecimal digits")?);
        rest = &rest[2..];
    }
    match String::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => Ok(text),
        _ => Err("does not decode to plain text".to_owned()),
    }
}

/// Percent-encodes what has a meaning of its own in a reference (RFC 3986, unreserved and `/`).
fn encoded(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(byte) {
            text.push(char::from(*byte));
        } else {
            write!(text, "%{byte:02X}").expect("a string takes everything");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn references_are_told_apart() {
        assert_eq!(parse("path:/srv/a%20b?narHash=x").unwrap(), Reference::Path { dir: "/srv/a b".into() });
        let git = parse("git+file:///srv/r?dir=sub/f&ref=main").unwrap();
        let expected = Reference::Git { root: "/srv/r".into(), dir: Some("sub/f".into()), branch: Some("main".into()), rev: None };
        assert_eq!(git, expected);
        assert_eq!(git.to_nix(), "git+file:///srv/r?dir=sub/f&ref=main");
        assert_eq!(parse("github:acme/flake").unwrap(), Reference::Other("github:acme/flake".into()));
        assert_eq!(parse("/srv//f/").unwrap().to_nix(), "path:/srv/f");
        assert_eq!(Reference::Path { dir: "/srv/a b#?".into() }.to_nix(), "path:/srv/a%20b%23%3F");
    }

    #[test]
    fn what_was_fetched_is_named_by_its_hash() {
        let other = Reference::Other("https://example.org/f.tar.gz?dir=a%20b&narHash=old".into());
        assert_eq!(other.dir(), Some("a b".into()));
        assert_eq!(other.with_hash("sha256-a+b="), "https://example.org/f.tar.gz?dir=a%20b&narHash=sha256-a%2Bb%3D");
        let plain = Reference::Other("github:acme/flake".into());
        assert_eq!((plain.dir(), plain.with_hash("sha256-a").as_str()), (None, "github:acme/flake?narHash=sha256-a"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = format!("/{}", "a".repeat(2000));
        for bad in [
            "",
            "-x",
            "--help",
            "flake",
            "./flake",
            "../flake",
            "a b",
            "a\0",
            "path:flake",
            "path:/a/../b",
            "/a/..",
            "github:a/b#x",
            &long,
            "git+file:///r?dir=../x",
            "git+file:///r?dir=/etc",
            "git+file:///r?what=1",
            "path:/f?dir=x",
            "path:/a%2",
            "path:/a%00b",
            "$(x):y",
            ":x",
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        assert!(check("github:a/b#c").unwrap_err().contains("comes from the role and the profile"));
        assert!(Reference::locate("path:/nowhere/at/all").unwrap_err().contains("is not a directory"));
    }

    #[test]
    fn a_directory_in_a_repository_is_what_git_knows_of() {
        let dir = tempfile::tempdir().unwrap();
        let flake = dir.path().join("sub/flake");
        std::fs::create_dir_all(&flake).unwrap();
        let text = flake.to_str().unwrap();
        assert_eq!(Reference::locate(text).unwrap(), Reference::Path { dir: flake.clone() });
        std::fs::create_dir(dir.path().join(".git")).unwrap();
        let expected = Reference::Git { root: dir.path().into(), dir: Some("sub/flake".into()), branch: None, rev: None };
        assert_eq!(Reference::locate(text).unwrap(), expected);
        assert_eq!(Reference::locate(&format!("path:{text}")).unwrap(), Reference::Path { dir: flake });
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(path in "/[^/\0\\pC]{1,20}(/[^/\0\\pC]{1,20}){0,3}") {
            prop_assume!(absolute(&path).is_ok());
            let reference = Reference::Path { dir: PathBuf::from(&path) };
            prop_assert_eq!(parse(&reference.to_nix()).unwrap(), reference);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}") {
            let _ = parse(&text);
        }
    }
}
