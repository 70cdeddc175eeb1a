//! Puts the node together from the options: which directories, which driver.

use std::net::Ipv4Addr;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use mvm_types::NodeId;

use super::exit::{CliError, Exit};
use super::vmm::VmmOptions;
use crate::audit::Audit;
use crate::guest::SerialChannel;
use crate::host::{FakeHost, LocalHost};
use crate::infra::clock::SystemClock;
use crate::infra::display::OutputFormat;
use crate::infra::paths::{DEFAULT_STATE_DIR, Paths};
use crate::net::UidRange;
use crate::store::{DocumentStore, Documents, FileStore};
use crate::vm::builder::EgressChoice;
use crate::vm::node::{Node, NodeDoc, Seams, VmmUids};
use crate::vm::pool::{BuilderChoice, NodeImages, SimulatedImages};
use crate::vm::tenant::NodeSealer;
use crate::vmm::simulated::{Script, SimulatedVmm};

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// Where the node's state is kept
    #[arg(long, global = true, env = "MVM_STATE_DIR", default_value = DEFAULT_STATE_DIR, value_name = "DIR", help_heading = "Global options")]
    pub state_dir: PathBuf,
    /// Where sockets and locks are kept [default: /run/mvm, or /run/mvm-<hash> for another state directory]
    #[arg(long, global = true, env = "MVM_RUN_DIR", value_name = "DIR", help_heading = "Global options")]
    pub run_dir: Option<PathBuf>,
    /// Which virtual machine monitor; `simulated` rehearses a fleet without touching the host
    #[arg(long, global = true, env = "MVM_VMM", default_value = "auto", value_name = "VMM", help_heading = "Global options")]
    pub vmm: VmmChoice,
    /// How QEMU executes guests; `auto` takes KVM where a guest boots with it, and software (TCG) elsewhere
    #[arg(long, global = true, env = "MVM_ACCEL", default_value = "auto", value_name = "ACCEL", help_heading = "Global options")]
    pub accel: AccelChoice,
    /// Options of the drivers.
    #[command(flatten)]
    pub drivers: VmmOptions,
    /// Where flakes are built; `auto` takes this host for its only tenant, and a microVM otherwise
    #[arg(long, global = true, env = "MVM_BUILDER", default_value = "auto", value_name = "BUILDER", help_heading = "Global options")]
    pub builder: WhichBuilder,
    /// What a microVM reaches that builds a flake: nothing, which is enough for a flake without inputs, or what lies outside of the
    /// host and of all tenants
    #[arg(long, global = true, env = "MVM_BUILDER_EGRESS", default_value = "none", value_name = "EGRESS", help_heading = "Global options")]
    pub builder_egress: WhichEgress,
    /// A script of delays and failures for `--vmm simulated` (TOML)
    #[arg(long, global = true, env = "MVM_SIMULATION", value_name = "FILE", help_heading = "Global options")]
    pub simulation: Option<PathBuf>,
    /// How listings are written
    #[arg(long, short, global = true, default_value = "table", value_name = "FORMAT", help_heading = "Global options")]
    pub output: OutputChoice,
    /// Tell more on standard error (twice: everything)
    #[arg(long, short, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
    /// How messages on standard error are written
    #[arg(long, global = true, default_value = "text", value_name = "FORMAT", help_heading = "Global options")]
    pub log_format: LogFormat,
}

/// Which driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum VmmChoice {
    /// Firecracker where it boots guests, else QEMU
    Auto,
    /// Firecracker, in its jail
    Firecracker,
    /// QEMU's microvm machine
    Qemu,
    /// A simulation
    Simulated,
}

/// How QEMU executes guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AccelChoice {
    /// KVM where a guest boots with it, else TCG
    Auto,
    /// In hardware
    Kvm,
    /// In software
    Tcg,
}

/// Where flakes are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WhichBuilder {
    /// This host for its only tenant, else a microVM
    Auto,
    /// This host, with its own nix
    Host,
    /// A microVM that is thrown away
    Vm,
}

/// What a microVM reaches that builds a flake.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WhichEgress {
    /// Nothing
    None,
    /// What lies outside of the host and of all tenants, through the network of the pool's tenant
    Internet,
}

impl From<WhichEgress> for EgressChoice {
    fn from(which: WhichEgress) -> Self {
        match which {
            WhichEgress::None => EgressChoice::None,
            WhichEgress::Internet => EgressChoice::Internet,
        }
    }
}

impl From<WhichBuilder> for BuilderChoice {
    fn from(which: WhichBuilder) -> Self {
        match which {
            WhichBuilder::Auto => BuilderChoice::Auto,
            WhichBuilder::Host => BuilderChoice::Host,
            WhichBuilder::Vm => BuilderChoice::Vm,
        }
    }
}

/// How listings are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputChoice {
    /// The columns that matter most
    Table,
    /// All columns
    Wide,
    /// JSON
    Json,
}

/// How messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

impl Globals {
    /// How listings are written.
    pub fn format(&self) -> OutputFormat {
        match self.output {
            OutputChoice::Table => OutputFormat::Table,
            OutputChoice::Wide => OutputFormat::Wide,
            OutputChoice::Json => OutputFormat::Json,
        }
    }

    /// The node's directories.
    pub fn paths(&self) -> Paths {
        let absolute = |dir: &PathBuf| std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
        Paths::new(absolute(&self.state_dir), self.run_dir.as_ref().map(absolute))
    }
}

/// An open node, and what has to be written when the command is over.
pub struct Opened {
    /// The node.
    pub node: Node,
    simulation: Option<(SimulatedVmm, FakeHost)>,
    intent: Intent,
}

impl Opened {
    /// Keeps the simulated machines for the next command, and reports when that fails; dropping keeps them too, since most errors
    /// leave machines behind.
    pub fn close(mut self) -> Result<(), CliError> {
        Ok(self.keep()?)
    }

    fn keep(&mut self) -> std::io::Result<()> {
        // A command that only looks has nothing to keep, and may not be allowed to.
        let simulation = self.simulation.take().filter(|_| self.intent == Intent::Change);
        if let Some((vmm, host)) = simulation {
            vmm.save()?;
            host.save()?;
        }
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Err(error) = self.keep() {
            tracing::error!(%error, "the simulated machines could not be kept for the next command");
        }
        for warning in self.node.vmm().warnings() {
            eprintln!("mvm: warning: {warning}");
        }
    }
}

/// What a command is going to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intent {
    /// Only look.
    Look,
    /// Change something.
    Change,
}

/// Opens the node.
pub fn open(globals: &Globals, intent: Intent) -> Result<Opened, CliError> {
    open_as(globals, intent, None)
}

/// Opens the node, whose id is the given one if it has none yet.
pub fn open_as(globals: &Globals, intent: Intent, wanted: Option<&NodeId>) -> Result<Opened, CliError> {
    let paths = globals.paths();
    let store: Arc<dyn DocumentStore> = Arc::new(FileStore::new(paths.state().to_owned(), paths.run().join("locks")));
    let documents = Documents::new(store.clone());
    let clock = Arc::new(SystemClock::new());
    let audit = Audit::new(store, clock.clone(), who());
    let simulated = globals.vmm == VmmChoice::Simulated;
    if intent == Intent::Change && !simulated && !rustix::process::geteuid().is_root() {
        return Err(CliError::new(
            Exit::Refused,
            "mvm changes bridges, packet filter rules and processes, for which it has to be root; try it with sudo, or rehearse with --vmm simulated",
        ));
    }
    check_readable(&paths)?;
    check_simulation(&paths, simulated, intent)?;
    let random = Box::new(|bytes: &mut [u8]| {
        let mut rest = bytes;
        while !rest.is_empty() {
            // Only an interrupted call gives less, and it is repeated.
            let got = rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()).unwrap_or(0);
            rest = &mut rest[got..];
        }
    });
    let uid_range = uid_range(globals, &documents)?;
    if intent == Intent::Change {
        Node::ensure_doc(&documents, &*random, wanted, uid_range)?;
    }
    let sealer = Arc::new(NodeSealer::new(paths.state().to_owned()));
    let uids = if rustix::process::geteuid().is_root() { VmmUids::PerInstance } else { VmmUids::Own };
    let open = |paths, seams| match intent {
        Intent::Look => Node::open_to_look(paths, seams, uids),
        Intent::Change => Node::open(paths, seams, uids),
    };
    if simulated {
        let script = match &globals.simulation {
            None => Script::default(),
            Some(file) => {
                let invalid = |why: String| CliError::new(Exit::Usage, format!("{}: {why}", file.display()));
                let text = std::fs::read_to_string(file).map_err(|error| invalid(error.to_string()))?;
                toml::from_str(&text).map_err(|error| invalid(error.to_string()))?
            }
        };
        let unreadable = |file: &str, error: std::io::Error| CliError::new(Exit::Failed, format!("{file} of the run directory: {error}"));
        let vmm = SimulatedVmm::kept_in(paths.run().join("simulated-vmm.json"), script)
            .map_err(|error| unreadable("simulated-vmm.json", error))?;
        let host = FakeHost::kept_in(paths.run().join("simulated-host.json")).map_err(|error| unreadable("simulated-host.json", error))?;
        let seams = Seams {
            documents,
            host: Arc::new(host.clone()),
            vmm: Arc::new(vmm.clone()),
            guests: Arc::new(vmm.clone()),
            images: Arc::new(SimulatedImages),
            clock,
            random,
            sealer,
            audit,
        };
        let simulation = Some((vmm, host));
        return Ok(Opened { node: open(paths, seams)?, simulation, intent });
    }
    if intent == Intent::Change {
        // Sockets and locks are root's only.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(paths.run())?;
    }
    let drivers = super::vmm::drivers(globals, &paths, uid_range)?;
    // The node's mark on bridges needs the id before the node is open.
    let doc = documents.read::<NodeDoc>(crate::vm::keys::NODE).map_err(crate::vm::error::LifecycleError::from)?;
    let id = doc.map_or_else(Node::unborn, |doc| doc.node_id);
    let seams = Seams {
        documents,
        host: Arc::new(LocalHost::new(paths.clone(), &id)),
        vmm: Arc::new(drivers),
        guests: Arc::new(SerialChannel),
        images: Arc::new(NodeImages::new(paths.images())),
        clock,
        random,
        sealer,
        audit,
    };
    let mut node = open(paths, seams)?;
    node.dns = name_servers();
    node.builder = globals.builder.into();
    node.builder_egress = globals.builder_egress.into();
    Ok(Opened { node, simulation: None, intent })
}

/// The users of the node's VMMs: those that it began with.
fn uid_range(globals: &Globals, documents: &Documents) -> Result<UidRange, CliError> {
    let doc = documents.read::<NodeDoc>(crate::vm::keys::NODE).map_err(crate::vm::error::LifecycleError::from)?;
    match (doc.map(|doc| doc.uids), globals.drivers.first_uid) {
        (Some(kept), Some(given)) if kept != given => {
            let (kept, given) = (u32::from(kept), u32::from(given));
            let text = format!(
                "--first-uid {given}: the users of this node's VMMs begin at {kept}, to whom its files belong; leave it out, or begin another \
                 node with --state-dir DIR"
            );
            Err(CliError::new(Exit::Refused, text))
        }
        (kept, given) => Ok(kept.or(given).unwrap_or_default()),
    }
}

/// Finds QEMU.
pub fn find_qemu() -> Option<PathBuf> {
    find_program(&format!("qemu-system-{}", std::env::consts::ARCH))
}

/// Sockets, documents and locks are root's only.
fn check_readable(paths: &Paths) -> Result<(), CliError> {
    for dir in [paths.state(), paths.run()] {
        match std::fs::read_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                let text = format!("{} is not readable for this user; try it with sudo", dir.display());
                return Err(CliError::new(Exit::Refused, text));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A state directory is either simulated or real for its whole life: its instances are not where the other driver looks.
fn check_simulation(paths: &Paths, simulated: bool, intent: Intent) -> Result<(), CliError> {
    let mark = paths.state().join("simulated");
    let real = paths.state().join("node.json").exists() && !mark.exists();
    if simulated && real {
        let text = format!("{} holds a real fleet; rehearse in another one: --vmm simulated --state-dir DIR", paths.state().display());
        return Err(CliError::new(Exit::Refused, text));
    }
    if !simulated && mark.exists() {
        let text = format!("{} holds a simulated fleet; add --vmm simulated, or take another state directory", paths.state().display());
        return Err(CliError::new(Exit::Refused, text));
    }
    if simulated && intent == Intent::Change && !mark.exists() {
        std::fs::create_dir_all(paths.state())?;
        std::fs::write(&mark, "The instances of this state directory are simulated (mvm --vmm simulated).\n")?;
    }
    Ok(())
}

/// Finds a program in `PATH`, and where Debian keeps those of root.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into(), "/usr/bin".into()]);
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Who asks: the user behind sudo, if there is one, and the command without its arguments' values.
fn who() -> String {
    let uid = rustix::process::getuid().as_raw();
    let user = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER")).unwrap_or_else(|_| format!("uid {uid}"));
    let words: Vec<String> =
        std::env::args().skip(1).take_while(|word| word != "--").filter(|word| !word.starts_with('-')).take(3).collect();
    // Nouns below nouns have a third word; of the others the third is an argument.
    let words = if words.first().is_some_and(|word| word == "tenant") && words.get(1).is_some_and(|word| word == "secrets") {
        &words[..]
    } else {
        &words[..words.len().min(2)]
    };
    let user: String = user.chars().filter(|c| c.is_ascii_graphic()).take(32).collect();
    format!("{user} (uid {uid}): mvm {}", words.join(" "))
}

/// The host's name servers that a guest can reach: not those on loopback.
fn name_servers() -> Vec<Ipv4Addr> {
    const MOST: usize = 3;
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let parse = |text: String| -> Vec<Ipv4Addr> {
        let servers = text.lines().filter_map(|line| line.strip_prefix("nameserver")).filter_map(|rest| rest.trim().parse().ok());
        servers.filter(|server: &Ipv4Addr| !server.is_loopback()).take(MOST).collect()
    };
    let direct = parse(read("/etc/resolv.conf"));
    // systemd-resolved puts itself, on loopback, into resolv.conf, and what it asks here.
    if direct.is_empty() { parse(read("/run/systemd/resolve/resolv.conf")) } else { direct }
}
