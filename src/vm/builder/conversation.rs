//! What is said to the guest: prepare, evaluate, build, collect.

use std::time::{Duration, Instant};

use super::watchman::{Answer, LogStream, Watchman};
use crate::guest::{ExecEnd, ExecRequest, GuestClient, GuestError};
use crate::image::builder::SCRIPT_PATH;
use crate::image::nix::{BuildError, FILES, Packages, Provenance, attributes, parse_closure};

/// Where the guest has the flake's sources.
pub(super) const TREE: &str = "/run/job/tree";

/// How long the guest may take to talk to a second caller, once it was ready.
const CONNECT: Duration = Duration::from_secs(30);

const ENVIRONMENT: [&str; 5] =
    ["HOME=/nix/home", "TMPDIR=/nix/tmp", "LC_ALL=C.UTF-8", "NO_COLOR=1", "NIX_SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"];

/// Codes of the guest's script.
const TOO_MANY_PROCESSES: i32 = 120;
const OUT_OF_MEMORY: i32 = 121;
const DISK_FULL: i32 = 122;
const NO_DIRECTORY: i32 = 123;
const RESULT_TOO_LARGE: i32 = 124;

/// Why there is no result.
pub(super) enum Trouble {
    /// The build's own end.
    Build(BuildError),
    /// The guest does not talk any more.
    Guest(GuestError),
}

impl From<BuildError> for Trouble {
    fn from(error: BuildError) -> Self {
        Trouble::Build(error)
    }
}

impl From<GuestError> for Trouble {
    fn from(error: GuestError) -> Self {
        Trouble::Guest(error)
    }
}

/// A conversation with a builder.
pub(super) struct Conversation<'a> {
    watchman: &'a Watchman<'a>,
    client: GuestClient,
    offline: bool,
}

/// How a program ended.
struct Ended {
    code: i32,
    answer: Vec<u8>,
}

impl<'a> Conversation<'a> {
    /// Opens it with a guest that is ready.
    pub fn open(run_dir: &std::path::Path, watchman: &'a Watchman<'a>, offline: bool) -> Result<Self, Trouble> {
        let client = GuestClient::connect(run_dir, crate::guest::Purpose::Interactive, Instant::now() + CONNECT)?;
        Ok(Self { watchman, client, offline })
    }

    /// Has the guest do everything, up to the archive on the result drive.
    pub fn build(&mut self) -> Result<Provenance, Trouble> {
        let job = self.watchman.job;
        let prepared = self.exec(&[SCRIPT_PATH, "prepare", &job.limits.processes.to_string()])?;
        if prepared.code != 0 {
            return Err(BuildError::Builder { what: "prepare its microVM".into(), why: self.watchman.said() }.into());
        }
        let (drv, out) = self.evaluate()?;
        let realise = ["nix-store", "--realise", &drv, "--add-root", "/nix/result"];
        let realise = [&realise[..], if self.offline { &NO_SUBSTITUTES } else { &[] }].concat();
        let built = self.run(&realise)?;
        if built.code != 0 {
            return Err(BuildError::Failed { attribute: job.attribute.clone(), said: self.watchman.said() }.into());
        }
        // It is all there: nothing is asked of anybody.
        let told = self.run(&["nix", "path-info", "--offline", "--json", "--recursive", &out])?;
        let closure = parse_closure(&told.answer)
            .map_err(|why| BuildError::Builder { what: format!("read the closure of {out}"), why })
            .and_then(|closure| match told.code {
                0 => Ok(closure),
                _ => Err(BuildError::Failed { attribute: job.attribute.clone(), said: self.watchman.said() }),
            })?;
        let wrong = |why: String| BuildError::Output { attribute: job.attribute.clone(), file: "its result".into(), why };
        match self.exec(&[SCRIPT_PATH, "collect", &out])?.code {
            0 => Ok(Provenance { store_path: out, closure }),
            NO_DIRECTORY => Err(wrong(format!("is a file, and should be a directory with {}", FILES.join(", "))).into()),
            RESULT_TOO_LARGE => Err(wrong(format!("is larger than the {} MiB that it may have", job.limits.disk_mib)).into()),
            _ => Err(BuildError::Builder { what: "collect the result".into(), why: self.watchman.said() }.into()),
        }
    }

    /// Finds the attribute's derivation and its output.
    fn evaluate(&mut self) -> Result<(String, String), Trouble> {
        let job = self.watchman.job;
        let (set, name) = job.attribute.rsplit_once('.').unwrap_or(("packages", &job.attribute));
        let apply = attributes(name);
        let installable = format!("path:{TREE}#{set}");
        let ask = ["nix", "eval", "--json", "--no-write-lock-file", &installable, "--apply", &apply];
        let ended = self.run(&[&ask[..], if self.offline { &["--offline"] } else { &[] }].concat())?;
        let missing = |known| BuildError::NoAttribute { flake_ref: job.shown.clone(), attribute: job.attribute.clone(), known };
        if ended.code != 0 {
            let said = self.watchman.said();
            // Nix's words for a flake without packages, in all versions.
            if said.contains("does not provide attribute") {
                return Err(missing(Vec::new()).into());
            }
            let flake_ref = job.shown.clone();
            return Err(match self.offline && FETCHES.iter().any(|words| said.contains(words)) {
                true => BuildError::NoEgress { flake_ref, said },
                false => BuildError::Evaluation { flake_ref, said },
            }
            .into());
        }
        let packages: Packages = serde_json::from_slice(&ended.answer)
            .map_err(|error| BuildError::Builder { what: "read what nix says of the flake".into(), why: error.to_string() })?;
        match (packages.drv, packages.out) {
            (Some(drv), Some(out)) if is_store_path(&drv) && is_store_path(&out) => Ok((drv, out)),
            (Some(drv), _) => {
                let why = format!("{:?} is no path of its store", crate::image::nix::printable(&drv));
                Err(BuildError::Builder { what: "read what nix says of the flake".into(), why }.into())
            }
            (None, _) if packages.there => {
                Err(BuildError::NoDerivation { flake_ref: job.shown.clone(), attribute: job.attribute.clone() }.into())
            }
            (None, _) => Err(missing(words(packages.names)).into()),
        }
    }

    /// Runs one of nix's programs within the build's own limits.
    fn run(&mut self, command: &[&str]) -> Result<Ended, Trouble> {
        let ended = self.exec(&[&[SCRIPT_PATH, "run"], command].concat())?;
        let (attribute, limits) = (self.watchman.job.attribute.clone(), &self.watchman.job.limits);
        match ended.code {
            TOO_MANY_PROCESSES => Err(BuildError::Processes { attribute, limit: limits.processes }.into()),
            OUT_OF_MEMORY => Err(BuildError::Memory { attribute, limit_mib: limits.mem_mib }.into()),
            DISK_FULL => Err(BuildError::Disk { attribute, limit_mib: limits.disk_mib }.into()),
            // Nix makes room again before anybody could look how much there was.
            1.. if self.watchman.said().contains(NO_SPACE) => Err(BuildError::Disk { attribute, limit_mib: limits.disk_mib }.into()),
            _ => Ok(ended),
        }
    }

    fn exec(&mut self, command: &[&str]) -> Result<Ended, Trouble> {
        self.watchman.next();
        let bytes = |text: &&str| text.as_bytes().to_vec();
        let request = ExecRequest {
            argv: command.iter().map(bytes).collect(),
            env: ENVIRONMENT.iter().map(bytes).collect(),
            cwd: Some("/".into()),
            user: None,
        };
        let (mut answer, mut log) = (Answer::new(self.watchman), LogStream::new(self.watchman));
        let ended = self.client.exec(request, None::<std::io::Empty>, &mut answer, &mut log);
        log.end();
        let code = match ended? {
            ExecEnd::Code(code) => code,
            ExecEnd::Signal(signal) => 128 + signal,
        };
        Ok(Ended { code, answer: answer.bytes })
    }
}

/// How the C library calls it (strerror of ENOSPC).
const NO_SPACE: &str = "No space left on device";

/// Nix's words, in all versions, for inputs that it fetches or looks up.
const FETCHES: [&str; 4] = ["while updating the flake input", "while fetching the input", "unable to download", "in the flake registries"];
/// Options for a builder without a network.
const NO_SUBSTITUTES: [&str; 3] = ["--option", "substituters", ""];

/// A path in the guest's store, as every program there can take it: no option, nothing that is not of its alphabet.
fn is_store_path(text: &str) -> bool {
    let name = text.strip_prefix("/nix/store/").unwrap_or_default();
    !name.is_empty() && name.len() < 256 && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-._?=".contains(c))
}

/// Names that can be shown.
fn words(names: Vec<String>) -> Vec<String> {
    const MOST: usize = 100;
    let short = |name: String| crate::image::nix::printable(&name.chars().take(100).collect::<String>());
    names.into_iter().take(MOST).map(short).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_of_the_store_are_taken() {
        assert!(is_store_path("/nix/store/ww42944cgjn44pbzh9128h854406vkvi-tenant-minimal.drv"));
        for odd in ["", "/nix/store/", "--help", "/etc/passwd", "/nix/store/a/../../etc", "/nix/store/a b", "/nix/store/a\n"] {
            assert!(!is_store_path(odd), "{odd:?}");
        }
    }

    #[test]
    fn names_of_a_flake_are_bounded_and_printable() {
        let given: Vec<String> = (0..1000).map(|n| format!("\x1b[31m{n}{}", "x".repeat(1000))).collect();
        let shown = words(given);
        assert_eq!(shown.len(), 100);
        assert!(shown.iter().all(|name| name.len() <= 100 && !name.chars().any(char::is_control)));
    }
}
