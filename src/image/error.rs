//! Why an image could not be made.

use std::path::{Path, PathBuf};

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file could not be read or written.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("{program} cannot be started; install the package {package}")]
    NoProgram {
        /// Its name.
        program: &'static str,
        /// The Debian package that has it.
        package: &'static str,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// A program ended with an error.
    #[error("{program} ended with {status}: {said}")]
    Program {
        /// Its name.
        program: &'static str,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last lines of what it said.
        said: String,
    },
    /// No kernel package is known to apt.
    #[error("apt knows none of the packages {}; run apt-get update", wanted.join(", "))]
    NoKernelPackage {
        /// What was looked for.
        wanted: Vec<String>,
    },
    /// A package that nothing can stand in for is unknown to apt.
    #[error("apt does not know the package {wanted}; run apt-get update")]
    NoPackage {
        /// Its name.
        wanted: &'static str,
    },
    /// The kernel has a form that is not understood.
    #[error("the kernel {} cannot be used: {why}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A kernel module is missing or damaged.
    #[error("kernel module {module}: {why}")]
    Module {
        /// Its name.
        module: String,
        /// What is wrong with it.
        why: String,
    },
    /// The agent is nowhere.
    #[error("there is no guest agent at {}; build it with `cargo xtask build` or name it in MVM_GUEST_AGENT", looked_at.join(", "))]
    NoAgent {
        /// Where it was looked for.
        looked_at: Vec<String>,
    },
    /// The agent cannot run in a guest.
    #[error("the guest agent {} {why}; build it with `cargo xtask build`", path.display())]
    Agent {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A tree does not fit on a drive.
    #[error("{} has {mib} MiB, and may have {most_mib} MiB", tree.display())]
    TooLarge {
        /// The tree.
        tree: PathBuf,
        /// What it takes.
        mib: u64,
        /// What it may take.
        most_mib: u64,
    },
    /// The image is not what its manifest says.
    #[error("the image {} is damaged: {why}; remove the directory, and it is made again", directory.display())]
    Damaged {
        /// Where it lies.
        directory: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl ImageError {
    /// Names the file of a system's error.
    pub(super) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> ImageError {
        let path = path.to_owned();
        move |source| ImageError::File { path, source }
    }

    /// Whether trying again may help without anybody mending anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, ImageError::Program { program: "apt-get", .. })
    }
}
