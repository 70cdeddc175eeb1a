//! The command line: one file per noun, from arguments to library calls to [`crate::infra::display`].

mod agent;
mod apply;
mod args;
mod doctor;
mod events;
pub mod exit;
mod guest;
mod init;
mod instance;
pub mod late;
mod net;
mod node;
pub mod open;
mod pool;
mod progress;
mod reference;
mod revisions;
mod status;
mod tenant;
mod throwaway;
pub mod vmm;

use clap::{CommandFactory, Parser, Subcommand};

use exit::{CliError, Exit};
use late::Late;
use open::Globals;

pub use reference::reference;

/// What a command ends with.
pub type CliResult = Result<Exit, CliError>;

/// Runs fleets of microVMs for many tenants from a declared state
#[derive(Debug, Parser)]
#[command(
    name = "mvm",
    version,
    propagate_version = true,
    max_term_width = 120,
    after_help = "Examples:\n  mvm apply -f fleet.toml          make what the file declares\n  mvm status                       what there is\n  mvm exec acme/web/1a2b -- ps     run a command in an instance\n\nExit codes: 0 done, 1 failed, 2 usage or invalid input, 3 not found, 4 refused by policy, quota or state, 5 timed out, 6 partly done; `exec` and `run` give the guest command's own."
)]
pub struct Top<C: Subcommand> {
    /// Options of every command.
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    command: C,
}

/// A command line.
pub type Cli = Top<Command>;

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make what a file declares, and wait until it is ready
    Apply(Late<apply::ApplyArgs>),
    /// Show what apply would do, and change nothing
    Plan(Late<apply::PlanArgs>),
    /// Show tenants, pools and instances
    Status(Late<status::StatusArgs>),
    /// One reconcile pass, and the document that describes what is there
    #[command(subcommand)]
    Agent(Late<agent::AgentCommand>),
    /// Tenants: the boundary of security, quota and network
    #[command(subcommand)]
    Tenant(Late<tenant::TenantCommand>),
    /// Pools: groups of equal instances
    #[command(subcommand)]
    Pool(Late<pool::PoolCommand>),
    /// Instances: microVMs
    #[command(subcommand)]
    Instance(Late<instance::InstanceCommand>),
    /// Run a command in an instance
    Exec(Late<guest::ExecArgs>),
    /// Open a shell in an instance
    Shell(Late<guest::ShellArgs>),
    /// Copy files to and from an instance
    Cp(Late<guest::CpArgs>),
    /// Show what an instance's workload, agent, console or VMM says
    Logs(Late<guest::LogsArgs>),
    /// Show what was done, or check that the record was not changed
    Events(Late<events::EventsArgs>),
    /// Write a flake for images of your own: a manifest, a profile and a role
    Init(Late<init::InitArgs>),
    /// Run a command in a throw-away microVM
    Run(Late<throwaway::RunArgs>),
    /// This host
    #[command(subcommand)]
    Node(Late<node::NodeCommand>),
    /// The tenants' networks
    #[command(subcommand)]
    Net(Late<net::NetCommand>),
    /// Check whether this host can run microVMs, and say how to mend what is wrong
    Doctor,
    /// Write the JSON Schema of the desired-state document
    Schema,
    /// Write completions for a shell
    #[command(after_help = "Example:\n  mvm completions bash > /etc/bash_completion.d/mvm")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the reference of all commands as Markdown
    #[command(hide = true)]
    Reference,
}

/// Carries out a command.
pub fn run(cli: Cli) -> CliResult {
    let globals = &cli.globals;
    match cli.command {
        Command::Apply(Late(args)) => apply::apply(globals, &args),
        Command::Plan(Late(args)) => apply::plan(globals, &args),
        Command::Status(Late(args)) => status::status(globals, &args),
        Command::Agent(Late(command)) => agent::run(globals, command),
        Command::Tenant(Late(command)) => tenant::run(globals, command),
        Command::Pool(Late(command)) => pool::run(globals, command),
        Command::Instance(Late(command)) => instance::run(globals, command),
        Command::Exec(Late(args)) => guest::exec(globals, args),
        Command::Shell(Late(args)) => guest::shell(globals, &args),
        Command::Cp(Late(args)) => guest::cp(globals, &args),
        Command::Logs(Late(args)) => guest::logs(globals, &args),
        Command::Events(Late(args)) => events::run(globals, &args),
        Command::Init(Late(args)) => init::run(globals, &args),
        Command::Run(Late(args)) => throwaway::run(globals, args),
        Command::Node(Late(command)) => node::run(globals, &command),
        Command::Net(Late(command)) => net::run(globals, &command),
        Command::Doctor => doctor::run(globals),
        Command::Schema => {
            crate::infra::display::write_out(&crate::infra::display::to_json(&crate::agent::desired::json_schema())?)?;
            Ok(Exit::Done)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "mvm", &mut script);
            crate::infra::display::write_out(&String::from_utf8_lossy(&script))?;
            Ok(Exit::Done)
        }
        Command::Reference => {
            crate::infra::display::write_out(&reference())?;
            Ok(Exit::Done)
        }
    }
}
