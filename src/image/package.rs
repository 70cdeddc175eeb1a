//! Distribution packages, downloaded and unpacked without being installed.
//!
//! [`Catalogue`] asks apt as if nothing were installed, with a configuration of its own, so that it names and fetches all that a
//! program needs, in the newest version, whatever the host has.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::ImageError;

/// Packages that name the current kernel for virtual machines, best first: Debian's, then Ubuntu's.
const KERNELS: [&str; 4] = [
    if cfg!(target_arch = "aarch64") { "linux-image-cloud-arm64" } else { "linux-image-cloud-amd64" },
    "linux-image-virtual",
    "linux-image-generic",
    if cfg!(target_arch = "aarch64") { "linux-image-arm64" } else { "linux-image-amd64" },
];

/// A kernel to be downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelPackages {
    /// The package with `vmlinuz`.
    pub image: String,
    /// Where modules are in a package of their own (Ubuntu).
    pub modules: Option<String>,
}

/// Asks apt which packages hold the kernel.
pub fn find_kernel() -> Result<KernelPackages, ImageError> {
    for meta in KERNELS {
        let Ok(said) = run("apt-cache", "apt", &["depends", "--important", meta], None) else {
            continue;
        };
        if let Some(found) = parse_depends(&said) {
            return with_modules(found);
        }
    }
    Err(ImageError::NoKernelPackage { wanted: KERNELS.iter().map(|name| (*name).to_owned()).collect() })
}

fn with_modules(image: String) -> Result<KernelPackages, ImageError> {
    let said = run("apt-cache", "apt", &["depends", "--important", &image], None)?;
    let modules = dependencies(&said).find(|name| name.starts_with("linux-modules-")).map(str::to_owned);
    Ok(KernelPackages { image, modules })
}

/// The versioned image package among the dependencies of a metapackage.
fn parse_depends(said: &str) -> Option<String> {
    dependencies(said).find(|name| name.starts_with("linux-image-") && name.bytes().any(|b| b.is_ascii_digit())).map(str::to_owned)
}

fn dependencies(said: &str) -> impl Iterator<Item = &str> {
    said.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).map(str::trim).filter(|name| is_package_name(name))
}

/// Debian policy 5.6.7; also keeps what apt says from becoming an option.
fn is_package_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-._".contains(&b))
}

/// Downloads a package and unpacks it into `into`. Returns the version from its file name.
pub fn download(name: &str, into: &Path) -> Result<String, ImageError> {
    let place = into.join(format!(".deb-{name}"));
    fs::create_dir_all(&place).map_err(ImageError::at(&place))?;
    // Without a sandbox user: apt's own may not write here.
    run("apt-get", "apt", &["-qq", "-o", "APT::Sandbox::User=root", "download", name], Some(&place))?;
    let deb = fs::read_dir(&place)
        .map_err(ImageError::at(&place))?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .ok_or_else(|| ImageError::NoKernelPackage { wanted: vec![name.to_owned()] })?;
    run("dpkg-deb", "dpkg", &["--extract", &deb.to_string_lossy(), &into.to_string_lossy()], None)?;
    let version = deb.file_stem().and_then(|stem| stem.to_str()?.split('_').nth(1)).unwrap_or("unknown").replace("%3a", ":");
    fs::remove_dir_all(&place).map_err(ImageError::at(&place))?;
    Ok(version)
}

/// The oldest nix that evaluates what is written today (the `lib/minver.nix` of nixpkgs since 2025).
const NIX_VERSION: (u64, u64) = (2, 18);
/// The release of Debian that has one, for hosts whose own is older.
const NEWER_SUITE: &str = "trixie";
/// Debian's keys, its next release's among them.
const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What apt offers, as seen by a host on which nothing is installed.
pub struct Catalogue {
    /// `apt.conf`, the empty list of installed packages, and what is fetched.
    place: PathBuf,
}

/// A package that was fetched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fetched {
    /// Its name and version, as its file says: `nix-bin_2.26.3+dfsg-1_amd64`.
    pub name: String,
    /// The package.
    pub deb: PathBuf,
}

impl Catalogue {
    /// Opens the catalogue with a nix that is new enough, if there is one: the host's own, or for an older Debian that of a newer
    /// release. `place` is an empty directory.
    pub fn with_nix(place: &Path, progress: &dyn Fn(&str)) -> Result<Catalogue, ImageError> {
        let own = Catalogue::open(place, None)?;
        let offered = own.version("nix-bin")?;
        if offered.as_deref().and_then(major_minor).is_some_and(|version| version >= NIX_VERSION) {
            return Ok(own);
        }
        let newer =
            newer_sources(&own.apt("apt-get", &["indextargets", "--format", "$(ORIGIN) $(CREATED_BY) $(SITE) $(RELEASE) $(COMPONENT)"])?);
        if newer.is_empty() {
            return if offered.is_some() { Ok(own) } else { Err(ImageError::NoPackage { wanted: "nix-bin" }) };
        }
        progress("lists of packages with a newer nix");
        let catalogue = Catalogue::open(place, Some(&newer))?;
        match (catalogue.apt("apt-get", &["-qq", "-o", "Acquire::Languages=none", "update"]), offered) {
            (Ok(_), _) => Ok(catalogue),
            (Err(error), None) => Err(error),
            (Err(error), Some(version)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    version,
                    "the builder gets the nix of this release, which is too old for present-day nixpkgs"
                );
                Catalogue::open(place, None)
            }
        }
    }

    fn open(place: &Path, sources: Option<&str>) -> Result<Catalogue, ImageError> {
        let write = |name: &str, content: &str| {
            let path = place.join(name);
            fs::write(&path, content).map_err(ImageError::at(&path))
        };
        for directory in ["archives/partial", "lists/partial"] {
            let path = place.join(directory);
            fs::create_dir_all(&path).map_err(ImageError::at(&path))?;
        }
        let at = place.display();
        let mut settings = format!(
            "Dir::State::status \"{at}/status\";\nDir::Cache \"{at}\";\nDir::Cache::archives \"{at}/archives\";\nAPT::Sandbox::User \"root\";\n"
        );
        if let Some(sources) = sources {
            write("sources.list", sources)?;
            settings += &format!(
                "Dir::State \"{at}\";\nDir::State::lists \"{at}/lists\";\nDir::Etc::sourcelist \"{at}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n"
            );
        }
        write("status", "")?;
        write("apt.conf", &settings)?;
        Ok(Catalogue { place: place.to_owned() })
    }

    fn apt(&self, program: &'static str, arguments: &[&str]) -> Result<String, ImageError> {
        let mut command = Command::new(program);
        command.args(arguments).env("LC_ALL", "C").env("APT_CONFIG", self.place.join("apt.conf")).env("DEBIAN_FRONTEND", "noninteractive");
        finish(program, "apt", command.stdin(Stdio::null()))
    }

    /// The version that would be fetched.
    fn version(&self, name: &str) -> Result<Option<String>, ImageError> {
        Ok(parse_candidate(&self.apt("apt-cache", &["policy", name])?))
    }

    /// Fetches packages with all that they need.
    pub fn fetch(&self, names: &[&str]) -> Result<Vec<Fetched>, ImageError> {
        let arguments = ["-qq", "--yes", "--no-install-recommends", "--download-only", "-o", "Debug::NoLocking=true", "install"];
        self.apt("apt-get", &[&arguments[..], names].concat())?;
        let archives = self.place.join("archives");
        let mut fetched = Vec::new();
        for entry in fs::read_dir(&archives).map_err(ImageError::at(&archives))? {
            let deb = entry.map_err(ImageError::at(&archives))?.path();
            if let Some(name) = deb.file_name().and_then(|name| name.to_str()?.strip_suffix(".deb")) {
                fetched.push(Fetched { name: name.replace("%3a", ":"), deb: deb.clone() });
            }
        }
        fetched.sort();
        Ok(fetched)
    }
}

/// `2.26.3+dfsg-1`.
fn major_minor(version: &str) -> Option<(u64, u64)> {
    let mut parts = version.split('.');
    let mut number = || parts.next()?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok();
    Some((number()?, number()?))
}

fn parse_candidate(said: &str) -> Option<String> {
    let version = said.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

/// The same archives as Debian's own in apt's lists of indexes, with the newer release; empty where there are none.
fn newer_sources(targets: &str) -> String {
    let mut lines = std::collections::BTreeSet::new();
    for target in targets.lines() {
        let ["Debian", "Packages", site, release, component] = target.split(' ').collect::<Vec<_>>()[..] else { continue };
        // `bookworm`, `bookworm-updates`, `bookworm-security`.
        let Some(rest) = release.split_once('-').map_or(Some(""), |(_, rest)| matches!(rest, "updates" | "security").then_some(rest))
        else {
            continue;
        };
        if component == "main" {
            let dash = if rest.is_empty() { "" } else { "-" };
            lines.insert(format!("deb [signed-by={DEBIAN_KEYS}] {site} {NEWER_SUITE}{dash}{rest} main\n"));
        }
    }
    lines.into_iter().collect()
}

/// Unpacks a package below `into`, where directories may be links to others, without what only people read.
pub fn unpack(deb: &Path, into: &Path) -> Result<(), ImageError> {
    const UNWANTED: [&str; 9] = [
        "./usr/share/doc/*",
        "./usr/share/man/*",
        "./usr/share/info/*",
        "./usr/share/locale/*",
        "./usr/share/lintian/*",
        "./usr/share/bash-completion/*",
        "./usr/share/gitweb/*",
        "*/gconv/*",
        "*/perl*",
    ];
    let mut unpacking = Command::new("dpkg-deb");
    unpacking.arg("--fsys-tarfile").arg(deb).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let no_program = |program, package| move |source| ImageError::NoProgram { program, package, source };
    let mut unpacking = unpacking.spawn().map_err(no_program("dpkg-deb", "dpkg"))?;
    let stream = unpacking.stdout.take().expect("its output was asked to be a pipe");
    let mut writing = Command::new("tar");
    writing.args(["--extract", "--keep-directory-symlink", "--no-same-owner", "--directory"]).arg(into);
    writing.args(UNWANTED.map(|pattern| format!("--exclude={pattern}"))).env("LC_ALL", "C").stdin(stream);
    let written = finish("tar", "tar", &mut writing);
    let status = unpacking.wait().map_err(no_program("dpkg-deb", "dpkg"))?;
    written?;
    if !status.success() {
        return Err(ImageError::Program { program: "dpkg-deb", status, said: format!("it cannot unpack {}", deb.display()) });
    }
    Ok(())
}

/// Runs a program to its end and returns what it printed.
pub fn run(program: &'static str, package: &'static str, arguments: &[&str], directory: Option<&Path>) -> Result<String, ImageError> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").stdin(Stdio::null());
    if let Some(directory) = directory {
        command.current_dir(directory);
    }
    finish(program, package, &mut command)
}

/// As [`run`], with a command that was made already.
pub fn finish(program: &'static str, package: &'static str, command: &mut Command) -> Result<String, ImageError> {
    let output = command.output().map_err(|source| ImageError::NoProgram { program, package, source })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        let said = last.into_iter().rev().collect::<Vec<_>>().join("; ");
        return Err(ImageError::Program { program, status: output.status, said });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Finds a static busybox: the installed one, or that of the package, unpacked below `scratch`.
pub fn busybox(scratch: &Path) -> Result<PathBuf, ImageError> {
    let is_static = |path: &Path| fs::read(path).is_ok_and(|bytes| super::agent_binary::check(&bytes).is_ok());
    let installed = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    if let Some(path) = installed.into_iter().find(|path| is_static(path)) {
        return Ok(path);
    }
    let place = scratch.join("busybox");
    fs::create_dir_all(&place).map_err(ImageError::at(&place))?;
    download("busybox-static", &place)?;
    let found = ["bin/busybox", "usr/bin/busybox"].map(|at| place.join(at)).into_iter().find(|path| is_static(path));
    found.ok_or_else(|| ImageError::Agent { path: place, why: "is not a static busybox".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_kernel_package_is_read_off_the_metapackage() {
        let debian = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(parse_depends(debian).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        let ubuntu = "linux-image-virtual\n  Depends: linux-image-6.8.0-45-generic\n  Depends: linux-firmware\n";
        assert_eq!(parse_depends(ubuntu).as_deref(), Some("linux-image-6.8.0-45-generic"));
        assert_eq!(parse_depends("linux-image-virtual\n  Depends: <linux-image>\n"), None);
    }

    #[test]
    fn an_older_debian_is_given_the_newer_release_of_its_own_archives() {
        let targets = "Debian Packages http://mirror.example/debian bookworm main\nDebian Translations http://mirror.example/debian bookworm main\n\
                       Debian Packages http://mirror.example/debian bookworm-updates main\nDebian Packages http://mirror.example/security bookworm-security main\n\
                       Debian Packages http://mirror.example/debian bookworm contrib\nDebian Packages http://mirror.example/debian bookworm-backports main\n\
                       Somebody Packages https://other.example/debian stable main\n";
        let sources = newer_sources(targets);
        let lines: Vec<_> = sources.lines().map(|line| line.split_once("] ").unwrap().1).collect();
        assert_eq!(
            lines,
            [
                "http://mirror.example/debian trixie main",
                "http://mirror.example/debian trixie-updates main",
                "http://mirror.example/security trixie-security main"
            ]
        );
        assert_eq!(newer_sources("Ubuntu Packages http://mirror.example/ubuntu noble main\n"), "");
    }

    #[test]
    fn versions_are_compared_by_number() {
        assert_eq!(major_minor("2.8.0-1.1+b1"), Some((2, 8)));
        assert!(major_minor("2.26.3+dfsg-1") > Some(NIX_VERSION) && major_minor("2.8.0") < Some(NIX_VERSION));
        assert_eq!(major_minor("unknown"), None);
        assert_eq!(parse_candidate("nix-bin:\n  Installed: (none)\n  Candidate: 2.18.1+dfsg-1\n").as_deref(), Some("2.18.1+dfsg-1"));
        assert_eq!(parse_candidate("nix-bin:\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }

    #[test]
    fn what_is_no_package_name_is_passed_over() {
        assert!(is_package_name("linux-image-6.1.0-56-cloud-amd64"));
        for name in ["-o", "", "<linux-initramfs-tool>", "a b", "../x", "A"] {
            assert!(!is_package_name(name), "{name}");
        }
    }
}
