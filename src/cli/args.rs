//! Arguments that several commands share, and what they mean on a node.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use mvm_types::{InstanceAddress, InstanceId, InstanceSelector, PoolAddress, PoolId, ProfileName, Role, SecretName};

use super::exit::{CliError, Exit};
use crate::agent::desired::{DesiredState, Format, MAX_DOCUMENT, parse};
use crate::vm::error::LifecycleError;
use crate::vm::node::Node;
use crate::vm::pool::role::Protocol;
use crate::vm::pool::{Exposure, PoolSpec, RestartPolicy, Workload};
use crate::vm::tenant::Quotas;

/// Reads a desired-state document; `-` is standard input.
pub fn read_document(file: &Path) -> Result<DesiredState, CliError> {
    let invalid = |text: String| CliError::new(Exit::Usage, text);
    let mut bytes = Vec::new();
    let limit = MAX_DOCUMENT as u64 + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file).and_then(|open| open.take(limit).read_to_end(&mut bytes))
    };
    read.map_err(|error| invalid(format!("{}: {error}", file.display())))?;
    let text = String::from_utf8(bytes)
        .map_err(|error| invalid(format!("{}: not UTF-8 at byte {}", file.display(), error.utf8_error().valid_up_to())))?;
    parse(&text, Format::of(file, &text)).map_err(|error| {
        let lines: Vec<String> = error.to_string().lines().map(|line| format!("{}: {line}", file.display())).collect();
        invalid(lines.join("\nmvm: "))
    })
}

/// Finds the one instance that a selector means.
pub fn resolve(node: &Node, selector: &InstanceSelector) -> Result<InstanceAddress, CliError> {
    let pool = PoolAddress::new(selector.tenant.clone(), selector.pool.clone());
    node.pool(&pool)?;
    let ids = node.instances(&pool)?;
    let mut found: Vec<_> = ids.iter().filter(|id| selector.matches(id)).collect();
    // One that was never finished, or whose end was cut off, has a directory and no document.
    let is_there = |id: &InstanceId| {
        let at = InstanceAddress::new(pool.tenant.clone(), pool.pool.clone(), id.clone());
        !matches!(node.instance(&at), Err(LifecycleError::NotFound { .. }))
    };
    found.retain(|id| is_there(id));
    match found[..] {
        [id] => Ok(InstanceAddress::new(pool.tenant, pool.pool, id.clone())),
        [] => {
            let known = ids.iter().map(|id| format!("{pool}/{id}")).collect();
            Err(LifecycleError::NotFound { kind: "instance", name: selector.to_string(), known }.into())
        }
        _ => {
            let list: Vec<String> = found.iter().map(ToString::to_string).collect();
            Err(CliError::new(Exit::Usage, format!("{selector} can mean {}; write more of the id", list.join(", "))))
        }
    }
}

/// Writes a number of things: `1 instance`, `2 instances`.
pub fn count(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// Asks before something is destroyed; without a terminal `--yes` has to say so.
pub fn confirm(yes: bool, question: &str) -> Result<(), CliError> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(CliError::new(Exit::Refused, format!("{question} Say so with --yes")));
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { Err(CliError::new(Exit::Refused, "nothing was changed")) }
}

/// Quotas on the command line; what is left out is not changed, 0 instances mean none at all.
#[derive(Debug, Args)]
pub struct QuotaArgs {
    /// Virtual CPUs of all running and warm instances
    #[arg(long, value_name = "N")]
    max_vcpus: Option<u32>,
    /// Memory of all running and warm instances, in MiB
    #[arg(long, value_name = "MIB")]
    max_mem_mib: Option<u64>,
    /// Running instances
    #[arg(long, value_name = "N")]
    max_running: Option<u32>,
    /// Warm instances
    #[arg(long, value_name = "N")]
    max_warm: Option<u32>,
    /// Pools
    #[arg(long, value_name = "N")]
    max_pools: Option<u32>,
    /// Instances in any state in one pool
    #[arg(long, value_name = "N")]
    max_instances_per_pool: Option<u32>,
    /// Data disks of all instances, in GiB
    #[arg(long, value_name = "GIB")]
    max_disk_gib: Option<u64>,
    /// Lift a quota again, by its name
    #[arg(long, value_name = "QUOTA")]
    unlimited: Vec<String>,
}

impl QuotaArgs {
    /// Changes quotas as the arguments say.
    pub fn change(&self, quotas: &Quotas) -> Result<Quotas, CliError> {
        let mut new = Quotas {
            max_vcpus: self.max_vcpus.or(quotas.max_vcpus),
            max_mem_mib: self.max_mem_mib.or(quotas.max_mem_mib),
            max_running: self.max_running.or(quotas.max_running),
            max_warm: self.max_warm.or(quotas.max_warm),
            max_pools: self.max_pools.or(quotas.max_pools),
            max_instances_per_pool: self.max_instances_per_pool.or(quotas.max_instances_per_pool),
            max_disk_gib: self.max_disk_gib.or(quotas.max_disk_gib),
        };
        for name in &self.unlimited {
            match name.replace('-', "_").as_str() {
                "max_vcpus" => new.max_vcpus = None,
                "max_mem_mib" => new.max_mem_mib = None,
                "max_running" => new.max_running = None,
                "max_warm" => new.max_warm = None,
                "max_pools" => new.max_pools = None,
                "max_instances_per_pool" => new.max_instances_per_pool = None,
                "max_disk_gib" => new.max_disk_gib = None,
                _ => {
                    let known = "max_vcpus, max_mem_mib, max_running, max_warm, max_pools, max_instances_per_pool, max_disk_gib";
                    return Err(CliError::new(Exit::Usage, format!("--unlimited: there is no quota {name:?}; quotas are {known}")));
                }
            }
        }
        Ok(new)
    }
}

/// What a pool's instances are, on the command line; what is left out is not changed.
#[derive(Debug, Args)]
pub struct SpecArgs {
    /// The flake that the image is built from; `builtin` needs none
    #[arg(long, value_name = "REF")]
    flake_ref: Option<String>,
    /// The image's profile
    #[arg(long)]
    profile: Option<ProfileName>,
    /// Virtual CPUs of each instance
    #[arg(long, value_name = "N")]
    vcpus: Option<u8>,
    /// Memory of each instance, in MiB
    #[arg(long, value_name = "MIB")]
    mem_mib: Option<u32>,
    /// Data disk of each instance, in MiB
    #[arg(long, value_name = "MIB")]
    data_disk_mib: Option<u64>,
    /// What each drive of an instance may move in a second, in MiB; 0 for no limit
    #[arg(long, value_name = "MIB")]
    drive_mib_per_second: Option<u32>,
    /// How often in a second an instance may read from or write to each of its drives; 0 for no limit
    #[arg(long, value_name = "N")]
    drive_iops: Option<u32>,
    /// What an instance may send and receive in a second, in Mbit each; 0 for no limit
    #[arg(long, value_name = "MBIT")]
    net_mbit_per_second: Option<u32>,
    /// Whether memory that guests free goes back to the host while they run
    #[arg(long, value_name = "true|false")]
    reclaim_memory: Option<bool>,
    /// How many instances run
    #[arg(long, value_name = "N")]
    pub running: Option<u32>,
    /// How many instances are warm
    #[arg(long, value_name = "N")]
    pub warm: Option<u32>,
    /// How many instances sleep
    #[arg(long, value_name = "N")]
    pub sleeping: Option<u32>,
    /// Seconds that an instance runs at least before a plan takes it down
    #[arg(long, value_name = "SECONDS")]
    min_running_seconds: Option<u32>,
    /// Seconds that an instance is warm at least before a plan takes it down
    #[arg(long, value_name = "SECONDS")]
    min_warm_seconds: Option<u32>,
    /// Seconds that a guest may take to end running work
    #[arg(long, value_name = "SECONDS")]
    drain_timeout_seconds: Option<u32>,
    /// Seconds that a guest may take to shut down
    #[arg(long, value_name = "SECONDS")]
    graceful_shutdown_seconds: Option<u32>,
    /// Seconds that a guest may take from its start until it is ready
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    ready_timeout_seconds: Option<u32>,
    /// A pool of the tenant that must be ready first; can be repeated, and replaces those there are
    #[arg(long, value_name = "POOL")]
    depends_on: Vec<PoolId>,
    /// Wait for no other pool any more
    #[arg(long, conflicts_with = "depends_on")]
    no_depends_on: bool,
    /// Whether no plan takes instances down because there are too many
    #[arg(long, value_name = "true|false")]
    pinned: Option<bool>,
    /// Whether it comes before the others of its role
    #[arg(long, value_name = "true|false")]
    critical: Option<bool>,
    /// An environment variable of the workload; can be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Take an environment variable of the workload away; can be repeated
    #[arg(long, value_name = "NAME")]
    unset_env: Vec<String>,
    /// When the workload is started again: always, on-failure or never
    #[arg(long, value_parser = restart)]
    restart: Option<RestartPolicy>,
    /// A secret of the tenant without which the workload is not started; can be repeated, and replaces those there are
    #[arg(long, value_name = "NAME")]
    needs_secret: Vec<SecretName>,
    /// A port reachable from outside, as far as the role allows; can be repeated, and replaces those there are
    #[arg(long, value_name = "[HOST_PORT:]PORT[/udp]", value_parser = exposure)]
    expose: Vec<Exposure>,
    /// Expose nothing any more
    #[arg(long, conflicts_with = "expose")]
    no_expose: bool,
    /// How many instances a plan leaves running whatever else is wanted
    #[arg(long, value_name = "N")]
    min_running: Option<u32>,
    /// Run no workload any more
    #[arg(long, conflicts_with_all = ["workload", "env", "unset_env", "restart", "needs_secret"])]
    no_workload: bool,
    /// The workload: a program and its arguments
    #[arg(last = true, value_name = "CMD")]
    workload: Vec<String>,
}

impl SpecArgs {
    /// Changes a declaration as the arguments say.
    ///
    /// # Errors
    /// When something is said of a workload and there is none.
    pub fn change(&self, spec: &mut PoolSpec) -> Result<(), CliError> {
        fn set<T: Clone>(field: &mut T, value: &Option<T>) {
            if let Some(value) = value {
                field.clone_from(value);
            }
        }
        set(&mut spec.flake_ref, &self.flake_ref);
        set(&mut spec.profile, &self.profile);
        set(&mut spec.instance_resources.vcpus, &self.vcpus);
        set(&mut spec.instance_resources.mem_mib, &self.mem_mib);
        set(&mut spec.instance_resources.data_disk_mib, &self.data_disk_mib);
        let limit = |given: Option<u32>| given.map(|rate| Some(rate).filter(|rate| *rate > 0));
        set(&mut spec.instance_resources.drive_mib_per_second, &limit(self.drive_mib_per_second));
        set(&mut spec.instance_resources.drive_iops, &limit(self.drive_iops));
        set(&mut spec.instance_resources.net_mbit_per_second, &limit(self.net_mbit_per_second));
        set(&mut spec.instance_resources.reclaim_memory, &self.reclaim_memory);
        set(&mut spec.desired_counts.running, &self.running);
        set(&mut spec.desired_counts.warm, &self.warm);
        set(&mut spec.desired_counts.sleeping, &self.sleeping);
        set(&mut spec.runtime_policy.min_running_seconds, &self.min_running_seconds);
        set(&mut spec.runtime_policy.min_warm_seconds, &self.min_warm_seconds);
        set(&mut spec.runtime_policy.drain_timeout_seconds, &self.drain_timeout_seconds);
        set(&mut spec.runtime_policy.graceful_shutdown_seconds, &self.graceful_shutdown_seconds);
        set(&mut spec.runtime_policy.ready_timeout_seconds, &self.ready_timeout_seconds);
        set(&mut spec.runtime_policy.min_running, &self.min_running);
        set(&mut spec.pinned, &self.pinned);
        set(&mut spec.critical, &self.critical);
        if self.no_expose {
            spec.expose.clear();
        }
        if !self.expose.is_empty() {
            spec.expose.clone_from(&self.expose);
        }
        if self.no_depends_on {
            spec.depends_on.clear();
        }
        if self.no_workload {
            spec.workload = None;
        }
        if !self.depends_on.is_empty() {
            spec.depends_on.clone_from(&self.depends_on);
        }
        if !self.workload.is_empty() {
            let old = spec.workload.take();
            let (env, restart, secrets) = old.map(|old| (old.env, old.restart, old.secrets)).unwrap_or_default();
            spec.workload = Some(Workload { command: self.workload.clone(), env, restart, secrets });
        }
        match &mut spec.workload {
            Some(workload) => {
                for name in &self.unset_env {
                    if workload.env.remove(name).is_none() {
                        return Err(CliError::new(Exit::NotFound, format!("--unset-env: the workload has no variable {name:?}")));
                    }
                }
                workload.env.extend(self.env.iter().cloned());
                if !self.needs_secret.is_empty() {
                    workload.secrets.clone_from(&self.needs_secret);
                }
                set(&mut workload.restart, &self.restart);
                Ok(())
            }
            None if self.env.is_empty() && self.unset_env.is_empty() && self.restart.is_none() && self.needs_secret.is_empty() => Ok(()),
            None => {
                Err(CliError::new(Exit::Usage, "--env, --unset-env, --restart and --needs-secret are about a workload; add one: -- CMD"))
            }
        }
    }
}

fn variable(given: &str) -> Result<(String, String), String> {
    let (name, value) = given.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or("write NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Reads `443`, `8443:443` or `53/udp`.
fn exposure(given: &str) -> Result<Exposure, String> {
    let wrong = || format!("{given:?} is no port; one looks like 443, 8443:443 or 53/udp");
    let (ports, protocol) = match given.split_once('/') {
        None | Some((_, "tcp")) => (given.split('/').next().unwrap_or_default(), Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return Err(wrong()),
    };
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
    Ok(match ports.split_once(':') {
        None => Exposure { port: number(ports)?, host_port: None, protocol },
        Some((host, guest)) => Exposure { port: number(guest)?, host_port: Some(number(host)?), protocol },
    })
}

fn restart(given: &str) -> Result<RestartPolicy, String> {
    match given {
        "always" => Ok(RestartPolicy::Always),
        "on-failure" => Ok(RestartPolicy::OnFailure),
        "never" => Ok(RestartPolicy::Never),
        _ => Err("known are always, on-failure and never".to_owned()),
    }
}

/// Parses a role; the error lists the roles.
pub fn role(given: &str) -> Result<Role, String> {
    given.parse().map_err(|error: mvm_types::IdError| error.to_string())
}

/// Parses a span of time: `90`, `90s`, `5m`, `1h`.
pub fn span(given: &str) -> Result<std::time::Duration, String> {
    let (digits, factor) = match given.trim_end_matches(|c: char| c.is_ascii_alphabetic()) {
        digits if digits.len() == given.len() => (digits, 1),
        digits => match &given[digits.len()..] {
            "s" => (digits, 1),
            "m" => (digits, 60),
            "h" => (digits, 3600),
            _ => return Err(format!("{given:?} is not a span of time; one looks like 90s, 5m or 1h")),
        },
    };
    let number: u64 = digits.parse().map_err(|_| format!("{given:?} is not a span of time; one looks like 90s, 5m or 1h"))?;
    number
        .checked_mul(factor)
        .filter(|seconds| *seconds <= 7 * 86_400)
        .map(std::time::Duration::from_secs)
        .ok_or_else(|| format!("{given:?} is more than a week"))
}

/// Parses an age: `90s`, `5m`, `1h`, `14d`.
pub fn age(given: &str) -> Result<std::time::Duration, String> {
    const MOST_DAYS: u64 = 36_500;
    match given.strip_suffix('d') {
        None => span(given),
        Some(days) => match days.parse::<u64>() {
            Ok(days) if days <= MOST_DAYS => Ok(std::time::Duration::from_secs(days * 86_400)),
            Ok(_) => Err(format!("{given:?} is more than {MOST_DAYS} days")),
            Err(_) => Err(format!("{given:?} is not an age; one looks like 12h or 14d")),
        },
    }
}

/// Where a secret's value comes from: never the argument list, which other users can see.
#[derive(Debug, Args)]
pub struct ValueArgs {
    /// Read the value from a file; `-` is standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub from_file: PathBuf,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn ages_are_days_too() {
        assert_eq!(age("14d"), Ok(Duration::from_secs(14 * 86_400)));
        assert_eq!(age("0d"), Ok(Duration::ZERO));
        assert_eq!(age("12h"), Ok(Duration::from_secs(12 * 3600)));
        for bad in ["d", "-1d", "1.5d", "99999999999999999999d", "40000d", "2w"] {
            assert!(age(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn exposed_ports_are_read_as_docker_has_them() {
        let read = |given: &str| exposure(given).map(|one| (one.on_host(), one.port, one.protocol.as_str()));
        assert_eq!(read("443"), Ok((443, 443, "tcp")));
        assert_eq!(read("8443:443/tcp"), Ok((8443, 443, "tcp")));
        assert_eq!(read("53/udp"), Ok((53, 53, "udp")));
        for bad in ["", "0", "a", "70000", "1:2:3", "1/sctp", ":80", "80:"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_are_seconds_minutes_or_hours() {
        assert_eq!(span("90"), Ok(Duration::from_secs(90)));
        assert_eq!(span("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(span("1h"), Ok(Duration::from_secs(3600)));
        for bad in ["", "m", "5x", "-1", "1.5s", "99999999999999999999", "9999999h"] {
            assert!(span(bad).is_err(), "{bad}");
        }
    }
}
