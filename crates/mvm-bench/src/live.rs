//! A fleet of real microVMs, one of 128 and one of 512 MiB, of which only one runs at a time.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::Selection;
use crate::bare::Machine;
use crate::figure::Figure;
use crate::inside::tell;
use crate::program;
use crate::{start, wake};

/// The fleet; drained and stopped at once, since nothing is at work in it.
const FLEET: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "small"
instance_resources = { vcpus = 1, mem_mib = 128, data_disk_mib = 64 }
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0, min_warm_seconds = 0, drain_timeout_seconds = 5 }
[[tenants.pools]]
pool_id = "large"
instance_resources = { vcpus = 1, mem_mib = 512, data_disk_mib = 64 }
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0, min_warm_seconds = 0, drain_timeout_seconds = 5 }
"#;

/// The bridge of its tenant.
pub const BRIDGE: &str = "br-tenant-7";

/// Where the built-in image is made once for all runs: in the target directory, where cargo lets tests keep things, too.
pub fn images() -> PathBuf {
    program::measured().with_file_name("../tmp/live-images")
}

/// Measures what is wanted; also tells how guests were executed, when there were any.
pub fn measure(dir: &Path, selection: &Selection) -> Result<(Vec<Figure>, Option<String>), String> {
    let wanted = |names: &[&str]| names.iter().any(|name| selection.wants(name));
    let (starts, wakes) = (wanted(&start::NAMES), wanted(&wake::NAMES));
    if !starts && !wakes {
        return Ok((Vec::new(), None));
    }
    tell("a fleet of two microVMs");
    let live = Live::new(dir)?;
    let mut figures = Vec::new();
    if starts {
        figures.extend(start::measure(&live, selection)?);
    }
    if wakes {
        figures.extend(wake::measure(&live, selection)?);
    }
    Ok((figures, Some(live.acceleration)))
}

/// The fleet.
pub struct Live {
    dir: PathBuf,
    /// The instance with 128 MiB.
    pub small: String,
    /// The instance with 512 MiB.
    pub large: String,
    acceleration: String,
}

impl Live {
    /// Brings it up, and stops its instances again.
    fn new(dir: &Path) -> Result<Live, String> {
        let failed = |error| format!("cannot make {}: {error}", dir.display());
        fs::create_dir_all(dir.join("state")).map_err(failed)?;
        fs::create_dir_all(dir.join("run")).map_err(failed)?;
        fs::write(dir.join("fleet.toml"), FLEET).map_err(failed)?;
        let images = images();
        program::printed(Command::new("cp").arg("-a").arg(&images).arg(dir.join("state/images")))?;
        let mut live = Live { dir: dir.to_owned(), small: String::new(), large: String::new(), acceleration: String::new() };
        program::printed(live.mvm(&["apply", "-f"]).arg(dir.join("fleet.toml")))?;
        let listed: Value = live.json(&["instance", "list"])?;
        let named = |pool: &str| {
            let mut names = listed.as_array().into_iter().flatten().filter_map(|one| one["instance"].as_str());
            names.find(|name| name.starts_with(pool)).map(str::to_owned).ok_or_else(|| format!("there is no instance {pool}"))
        };
        (live.small, live.large) = (named("acme/small/")?, named("acme/large/")?);
        let info = live.info(&live.small)?;
        let acceleration = info["document"]["state"]["vm"]["stamp"]["acceleration"].as_str();
        live.acceleration =
            acceleration.ok_or_else(|| format!("how {} is executed is not in its document: {info}", live.small))?.to_owned();
        for instance in [&live.small, &live.large] {
            live.kill(instance)?;
        }
        Ok(live)
    }

    /// `mvm` on this fleet.
    fn mvm(&self, args: &[&str]) -> Command {
        program::mvm(&self.dir.join("state"), &self.dir.join("run"), args)
    }

    fn json(&self, args: &[&str]) -> Result<Value, String> {
        let text = program::printed(&mut self.mvm(&[args, &["--output", "json"]].concat()))?;
        serde_json::from_str(&text).map_err(|error| format!("mvm {args:?} printed no JSON: {error}"))
    }

    /// Asks something of an instance, as a user does, and tells how long it took.
    pub fn ask(&self, verb: &str, at: &str) -> Result<Duration, String> {
        program::took(&mut self.mvm(&["instance", verb, at]))
    }

    /// Ends an instance at once.
    pub fn kill(&self, at: &str) -> Result<(), String> {
        program::took(&mut self.mvm(&["instance", "stop", "--force", at])).map(drop)
    }

    /// An instance as its document says.
    fn info(&self, at: &str) -> Result<Value, String> {
        self.json(&["instance", "info", at])
    }

    /// Learns from an instance that runs how QEMU was started for it.
    pub fn machine(&self, at: &str) -> Result<Machine, String> {
        let pid = self.info(at)?["pid"].as_i64().ok_or_else(|| format!("{at} does not run"))?;
        Machine::of(pid)
    }

    /// A directory of an instance.
    pub fn state_of(&self, at: &str) -> Result<PathBuf, String> {
        let [tenant, pool, instance] = at.split('/').collect::<Vec<_>>()[..] else { return Err(format!("{at} is no instance")) };
        Ok(self.dir.join("state/tenants").join(tenant).join("pools").join(pool).join("instances").join(instance))
    }

    /// A directory for a bare machine.
    pub fn bare_dir(&self, name: &str) -> Result<PathBuf, String> {
        let dir = self.dir.join("bare").join(name);
        fs::create_dir_all(&dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        Ok(dir)
    }
}
