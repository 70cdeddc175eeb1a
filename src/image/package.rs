//! Distribution packages, downloaded and unpacked without being installed.

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
    fn what_is_no_package_name_is_passed_over() {
        assert!(is_package_name("linux-image-6.1.0-56-cloud-amd64"));
        for name in ["-o", "", "<linux-initramfs-tool>", "a b", "../x", "A"] {
            assert!(!is_package_name(name), "{name}");
        }
    }
}
