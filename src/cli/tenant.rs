//! `mvm tenant`.

use std::io::{BufRead, IsTerminal, Read};
use std::path::Path;

use clap::Subcommand;
use mvm_types::{PoolAddress, SecretName, TenantId};
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use serde::Serialize;
use zeroize::Zeroizing;

use super::CliResult;
use super::args::{QuotaArgs, ValueArgs, confirm};
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, open};
use crate::infra::display::{Row, TenantRow, Width, print_info, print_rows};
use crate::net::{Subnet, TenantNetId};
use crate::vm::instance::StateName;
use crate::vm::node::Node;
use crate::vm::tenant::{MAX_SECRET, NetworkSpec, Quotas, SecretChange};
use crate::vm::usage::Usage;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum TenantCommand {
    /// Make a tenant
    #[command(after_help = "Example:\n  mvm tenant create acme --net-id 7 --subnet 10.240.7.0/24 --max-running 20")]
    Create {
        /// Its name
        tenant: TenantId,
        /// Its network id, 0 to 4095; never given to another tenant again
        #[arg(long, value_parser = net_id)]
        net_id: TenantNetId,
        /// Its subnet inside 10.240.0.0/12
        #[arg(long)]
        subnet: Subnet,
        #[command(flatten)]
        quotas: Box<QuotaArgs>,
    },
    /// List the tenants
    List,
    /// Show a tenant with its quotas and what it uses
    Info {
        /// Its name
        tenant: TenantId,
    },
    /// Change a tenant's quotas
    Update {
        /// Its name
        tenant: TenantId,
        #[command(flatten)]
        quotas: Box<QuotaArgs>,
    },
    /// Remove a tenant with its pools, instances, data and secrets
    Destroy {
        /// Its name
        tenant: TenantId,
        /// Do not ask
        #[arg(long, short, visible_alias = "force")]
        yes: bool,
    },
    /// A tenant's secrets: files below /run/secrets of its instances
    #[command(subcommand)]
    Secrets(SecretsCommand),
}

/// The verbs of secrets.
#[derive(Debug, Subcommand)]
pub enum SecretsCommand {
    /// Set a secret from standard input or a file
    #[command(
        after_help = "Example:\n  mvm tenant secrets set acme api-token < token.txt\n\nInstances get it at their next start or wake."
    )]
    Set {
        /// The tenant
        tenant: TenantId,
        /// The secret's name
        name: SecretName,
        #[command(flatten)]
        value: ValueArgs,
    },
    /// Replace the value of a secret that is there
    Rotate {
        /// The tenant
        tenant: TenantId,
        /// The secret's name
        name: SecretName,
        #[command(flatten)]
        value: ValueArgs,
    },
    /// List the names of a tenant's secrets, never their values
    List {
        /// The tenant
        tenant: TenantId,
    },
}

fn net_id(given: &str) -> Result<TenantNetId, String> {
    let number: u64 = given.parse().map_err(|_| format!("{given:?} is not a number"))?;
    number.try_into().map_err(|error: crate::net::NetError| error.to_string())
}

#[derive(Serialize)]
struct TenantInfo {
    tenant: TenantId,
    network: NetworkSpec,
    quotas: Quotas,
    secrets_epoch: u64,
    created: String,
    vcpus: u64,
    mem_mib: u64,
    running: u64,
    warm: u64,
    disk_mib: u64,
    pools: Vec<String>,
}

#[derive(Serialize)]
struct SecretRow {
    name: String,
    bytes: usize,
    epoch: u64,
}

impl Row for SecretRow {
    const COLUMNS: &'static [(&'static str, Width)] = &[("NAME", Width::Narrow), ("BYTES", Width::Narrow), ("EPOCH", Width::Narrow)];
    fn cells(&self) -> Vec<String> {
        vec![self.name.clone(), self.bytes.to_string(), self.epoch.to_string()]
    }
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: TenantCommand) -> CliResult {
    let intent = match &command {
        TenantCommand::List | TenantCommand::Info { .. } | TenantCommand::Secrets(SecretsCommand::List { .. }) => Intent::Look,
        _ => Intent::Change,
    };
    let opened = open(globals, intent)?;
    let node = &opened.node;
    match command {
        TenantCommand::Create { tenant, net_id, subnet, quotas } => {
            let quotas = quotas.change(&Quotas::default())?;
            node.tenant_create(&tenant, NetworkSpec { tenant_net_id: net_id, ipv4_subnet: subnet }, quotas)?;
            node.apply_network()?;
        }
        TenantCommand::List => print_rows(&rows(node)?, globals.format())?,
        TenantCommand::Info { tenant } => info(globals, node, &tenant)?,
        TenantCommand::Update { tenant, quotas } => {
            let new = quotas.change(&node.tenant(&tenant)?.quotas)?;
            node.tenant_update(&tenant, new)?;
        }
        TenantCommand::Destroy { tenant, yes } => {
            let instances = node.tenant(&tenant).and_then(|_| node.tenant_instances(&tenant, &mut Vec::new()))?.len();
            confirm(
                yes,
                &format!("Destroy tenant {tenant} with its {}, their data and its secrets?", super::args::count(instances, "instance")),
            )?;
            destroy(node, &tenant)?;
        }
        TenantCommand::Secrets(command) => secrets(globals, node, command)?,
    }
    opened.close()?;
    Ok(Exit::Done)
}

/// Removes a tenant with everything in it, workers before their gateways.
fn destroy(node: &Node, tenant: &TenantId) -> Result<(), CliError> {
    let mut pools = Vec::new();
    for id in node.pools(tenant)? {
        let pool = PoolAddress::new(tenant.clone(), id);
        pools.push((node.pool(&pool)?.role_traits().priority, pool));
    }
    pools.sort_by(|a, b| b.cmp(a));
    for (_, pool) in pools {
        super::pool::destroy(node, &pool)?;
    }
    node.tenant_destroy(tenant)?;
    Ok(node.apply_network()?)
}

fn rows(node: &Node) -> Result<Vec<TenantRow>, CliError> {
    let mut rows = Vec::new();
    for id in node.tenants()? {
        let doc = node.tenant(&id)?;
        let instances = node.tenant_instances(&id, &mut Vec::new())?;
        rows.push(TenantRow {
            tenant: id.to_string(),
            net_id: doc.network.tenant_net_id.get(),
            subnet: doc.network.ipv4_subnet.to_string(),
            pools: node.pools(&id)?.len(),
            instances: instances.len(),
            running: instances.iter().filter(|doc| doc.state.name() == StateName::Running).count(),
            secrets_epoch: doc.secrets_epoch,
        });
    }
    Ok(rows)
}

fn info(globals: &Globals, node: &Node, tenant: &TenantId) -> Result<(), CliError> {
    let doc = node.tenant(tenant)?;
    let usage = Usage::of(&node.tenant_instances(tenant, &mut Vec::new())?);
    let pools: Vec<String> = node.pools(tenant)?.iter().map(ToString::to_string).collect();
    let of = |used: u64, quota: Option<u64>| match quota {
        Some(quota) => format!("{used} of {quota}"),
        None => format!("{used} (no quota)"),
    };
    let quotas = &doc.quotas;
    let lines = [
        ("tenant", tenant.to_string()),
        ("net id", doc.network.tenant_net_id.to_string()),
        ("subnet", doc.network.ipv4_subnet.to_string()),
        ("bridge", doc.network.network().bridge()),
        ("running", of(usage.running, quotas.max_running.map(u64::from))),
        ("warm", of(usage.warm, quotas.max_warm.map(u64::from))),
        ("vcpus", of(usage.vcpus, quotas.max_vcpus.map(u64::from))),
        ("memory MiB", of(usage.mem_mib, quotas.max_mem_mib)),
        ("disk GiB", of(usage.disk_mib.div_ceil(1024), quotas.max_disk_gib)),
        ("pools", of(pools.len() as u64, quotas.max_pools.map(u64::from))),
        ("secrets epoch", doc.secrets_epoch.to_string()),
        ("created", doc.created.to_rfc3339()),
    ];
    let info = TenantInfo {
        tenant: tenant.clone(),
        network: doc.network.clone(),
        quotas: doc.quotas.clone(),
        secrets_epoch: doc.secrets_epoch,
        created: doc.created.to_rfc3339(),
        vcpus: usage.vcpus,
        mem_mib: usage.mem_mib,
        running: usage.running,
        warm: usage.warm,
        disk_mib: usage.disk_mib,
        pools,
    };
    Ok(print_info(&info, &lines, globals.format())?)
}

fn secrets(globals: &Globals, node: &Node, command: SecretsCommand) -> Result<(), CliError> {
    let (tenant, name, value, change) = match command {
        SecretsCommand::List { tenant } => {
            let secrets = node.secrets(&node.tenant(&tenant)?)?.secrets;
            let rows: Vec<SecretRow> =
                secrets.iter().map(|(name, secret)| SecretRow { name: name.to_string(), bytes: secret.len, epoch: secret.epoch }).collect();
            return Ok(print_rows(&rows, globals.format())?);
        }
        SecretsCommand::Set { tenant, name, value } => (tenant, name, value, SecretChange::Set),
        SecretsCommand::Rotate { tenant, name, value } => (tenant, name, value, SecretChange::Rotate),
    };
    node.tenant(&tenant)?;
    let value = read_value(&value.from_file)?;
    let epoch = node.secret_set(&tenant, &name, &value, change)?;
    eprintln!("Secret {name} of {tenant} is set (epoch {epoch}); instances get it at their next start or wake.");
    Ok(())
}

/// Reads one line from the terminal without showing it; its end is not part of the value.
fn ask_for(value: &mut Vec<u8>, limit: u64) -> std::io::Result<usize> {
    eprint!("The secret's value, which is not shown (Enter ends it): ");
    let silence = Silence::begin()?;
    let read = std::io::stdin().lock().take(limit).read_until(b'\n', value);
    drop(silence);
    eprintln!();
    if value.last() == Some(&b'\n') {
        value.pop();
    }
    read
}

/// The terminal does not show what is typed until this is dropped.
struct Silence(Termios);

impl Silence {
    fn begin() -> std::io::Result<Silence> {
        let before = termios::tcgetattr(std::io::stdin())?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        termios::tcsetattr(std::io::stdin(), OptionalActions::Flush, &silent)?;
        Ok(Silence(before))
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

fn read_value(file: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let invalid = |why: String| CliError::new(Exit::Usage, format!("{}: {why}", file.display()));
    let mut value = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    let limit = MAX_SECRET as u64 + 1;
    let read = if file == Path::new("-") && std::io::stdin().is_terminal() {
        ask_for(&mut value, limit)
    } else if file == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut value)
    } else {
        std::fs::File::open(file).and_then(|open| open.take(limit).read_to_end(&mut value))
    };
    read.map_err(|error| invalid(error.to_string()))?;
    if value.is_empty() {
        return Err(invalid("the value is empty".to_owned()));
    }
    Ok(value)
}
