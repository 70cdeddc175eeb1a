//! `mvm exec`, `shell`, `cp` and `logs`: into a guest, without SSH.

use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use mvm_types::{InstanceAddress, InstanceSelector, Role};

use super::CliResult;
use super::args::resolve;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, Opened, VmmChoice, open};
use crate::audit::Entry;
use crate::guest::{ExecRequest, Follow, GuestClient, LogSource, Purpose};
use crate::vm::error::with_causes;
use crate::vm::instance::{InstanceState, StateName};
use crate::vm::node::Node;
use crate::vmm::Liveness;

/// How long a guest that runs is tried to be reached.
const REACH: Duration = Duration::from_secs(10);

/// Arguments of `mvm exec`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mvm exec acme/web/1a2b -- uname -a\n  echo hello | mvm exec -i acme/web/1a2b -- cat\n  mvm exec -it acme/web/1a2b -- sh\n\nThe exit code is the command's own; 128 and the signal's number when a signal ended it."
)]
pub struct ExecArgs {
    /// The instance; the start of its id is enough
    #[arg(value_name = "TENANT/POOL/INSTANCE")]
    instance: InstanceSelector,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Start in this directory
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run as this user
    #[arg(short, long)]
    user: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

/// Arguments of `mvm shell`.
#[derive(Debug, Args)]
pub struct ShellArgs {
    /// The instance; the start of its id is enough
    #[arg(value_name = "TENANT/POOL/INSTANCE")]
    instance: InstanceSelector,
}

/// Arguments of `mvm cp`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  mvm cp app.tar acme/web/1a2b:/data/\n  mvm cp acme/web/1a2b:/data/report.csv .")]
pub struct CpArgs {
    /// From: a path here, or TENANT/POOL/INSTANCE:PATH
    source: String,
    /// To: a path here, or TENANT/POOL/INSTANCE:PATH
    target: String,
}

/// Arguments of `mvm logs`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mvm logs acme/web/1a2b\n  mvm logs -f acme/web/1a2b --tail 10\n  mvm logs acme/web/1a2b --source console"
)]
pub struct LogsArgs {
    /// The instance; the start of its id is enough
    #[arg(value_name = "TENANT/POOL/INSTANCE")]
    instance: InstanceSelector,
    /// Go on as more is written
    #[arg(short, long)]
    follow: bool,
    /// Whose words
    #[arg(long, default_value = "workload")]
    source: Source,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    tail: Option<u32>,
}

/// Whose words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// What the workload prints
    Workload,
    /// What the guest agent says
    Agent,
    /// The guest's console, also of an instance that does not run
    Console,
    /// What the VMM says
    Vmm,
}

/// A guest that can be talked to.
struct Reached {
    opened: Opened,
    at: InstanceAddress,
    role: Role,
    client: GuestClient,
    begun: Instant,
}

fn reach(globals: &Globals, selector: &InstanceSelector, what: &str) -> Result<Reached, CliError> {
    let begun = Instant::now();
    let opened = open(globals, Intent::Change)?;
    let at = resolve(&opened.node, selector)?;
    let vm = running(&opened.node, &at, what)?;
    if globals.vmm == VmmChoice::Simulated {
        return Err(CliError::new(Exit::Refused, format!("cannot {what} {at}: its machine is simulated, and runs nothing")));
    }
    let client = GuestClient::connect(&vm, Purpose::Interactive, Instant::now() + REACH)?;
    let role = opened.node.instance(&at)?.role;
    Ok(Reached { opened, at, role, client, begun })
}

/// Returns the run directory of an instance that runs.
fn running(node: &Node, at: &InstanceAddress, what: &str) -> Result<PathBuf, CliError> {
    let refused =
        |state: StateName, remedy: &str| Err(CliError::new(Exit::Refused, format!("cannot {what} {at}: it is {state}; {remedy}")));
    match node.instance(at)?.state {
        InstanceState::Running { vm, .. } | InstanceState::Warm { vm, .. } if node.vmm().liveness(&vm) == Liveness::Gone => {
            let why = format!("cannot {what} {at}: its virtual machine died; `mvm apply` or `mvm instance start {at}` boots it again");
            Err(CliError::new(Exit::Refused, why))
        }
        InstanceState::Running { vm, .. } => Ok(vm.run_dir),
        InstanceState::Warm { .. } => refused(StateName::Warm, &format!("`mvm instance resume {at}` lets it run")),
        InstanceState::Sleeping { .. } => refused(StateName::Sleeping, &format!("`mvm instance wake {at}` lets it run")),
        other => refused(other.name(), &format!("`mvm instance start {at}` boots it")),
    }
}

/// Records that something is going to be done in a guest: what cannot be recorded is not done.
fn begin(reached: &Reached, action: &str) -> Result<(), CliError> {
    let entry = Entry { object: reached.at.to_string(), role: Some(reached.role), action: action.to_owned(), ..Entry::default() };
    Ok(reached.opened.node.audit().record(&reached.at.tenant, entry)?)
}

/// Records it once more when it failed. It is done, so that a record that cannot be written changes nothing about how it ended.
fn end<T>(reached: &Reached, action: &str, result: Result<T, CliError>) -> Result<T, CliError> {
    let Err(error) = &result else { return result };
    let entry = Entry {
        object: reached.at.to_string(),
        role: Some(reached.role),
        action: action.to_owned(),
        error: Some(error.text.clone()),
        took: reached.begun.elapsed(),
        ..Entry::default()
    };
    if let Err(error) = reached.opened.node.audit().record(&reached.at.tenant, entry) {
        eprintln!("mvm: warning: that it failed cannot be recorded: {}", with_causes(&error));
    }
    result
}

/// `mvm exec`.
pub fn exec(globals: &Globals, args: ExecArgs) -> CliResult {
    use std::os::unix::ffi::OsStringExt;
    let mut reached = reach(globals, &args.instance, "run a command in")?;
    let program = shorten(&args.command[0].to_string_lossy());
    let request = ExecRequest {
        argv: args.command.into_iter().map(OsStringExt::into_vec).collect(),
        env: args.env.into_iter().map(String::into_bytes).collect(),
        cwd: args.workdir,
        user: args.user,
    };
    let action = format!("exec {program}");
    begin(&reached, &action)?;
    let result = run_in(&mut reached.client, request, args.interactive, args.tty);
    end(&reached, &action, result)
}

/// Runs a command in a guest with this process's streams.
pub(super) fn run_in(client: &mut GuestClient, request: ExecRequest, interactive: bool, tty: bool) -> CliResult {
    let end = if tty {
        if !std::io::stdin().is_terminal() {
            return Err(CliError::new(Exit::Usage, "standard input is not a terminal; leave -t away"));
        }
        client.exec_on_terminal(request)?
    } else {
        let stdin = interactive.then(std::io::stdin);
        client.exec(request, stdin, &mut std::io::stdout(), &mut std::io::stderr())?
    };
    Ok(Exit::Guest(end.code()))
}

/// `mvm shell`.
pub fn shell(globals: &Globals, args: &ShellArgs) -> CliResult {
    let mut reached = reach(globals, &args.instance, "open a shell in")?;
    let request = ExecRequest { argv: vec![b"/bin/sh".to_vec(), b"-l".to_vec()], ..ExecRequest::default() };
    let tty = std::io::stdin().is_terminal();
    begin(&reached, "shell")?;
    let result = run_in(&mut reached.client, request, true, tty);
    end(&reached, "shell", result)
}

/// `mvm cp`.
pub fn cp(globals: &Globals, args: &CpArgs) -> CliResult {
    let (source, target) = (place(&args.source)?, place(&args.target)?);
    let (reached, action, copied) = match (source, target) {
        (Place::Here(from), Place::Guest(selector, to)) => {
            std::fs::symlink_metadata(&from).map_err(|error| CliError::new(Exit::NotFound, format!("{}: {error}", from.display())))?;
            let mut reached = reach(globals, &selector, "copy to")?;
            let action = format!("cp to {}", shorten(&to));
            begin(&reached, &action)?;
            let copied = reached.client.upload(&from, &to);
            (reached, action, copied)
        }
        (Place::Guest(selector, from), Place::Here(to)) => {
            let mut reached = reach(globals, &selector, "copy from")?;
            let action = format!("cp from {}", shorten(&from));
            begin(&reached, &action)?;
            let copied = reached.client.download(&from, &to);
            (reached, action, copied)
        }
        (Place::Here(_), Place::Here(_)) => {
            return Err(CliError::new(Exit::Usage, "neither path is in an instance: write TENANT/POOL/INSTANCE:PATH"));
        }
        (Place::Guest(..), Place::Guest(..)) => {
            return Err(CliError::new(Exit::Usage, "both paths are in instances; copy to a file here first"));
        }
    };
    end(&reached, &action, copied.map_err(CliError::from))?;
    Ok(Exit::Done)
}

enum Place {
    Here(PathBuf),
    Guest(InstanceSelector, String),
}

/// Tells a path here from one in a guest: what stands before the first colon is an instance, or the whole is a path.
fn place(given: &str) -> Result<Place, CliError> {
    match given.split_once(':') {
        Some((instance, path)) if !instance.starts_with(['.', '/']) && instance.contains('/') => {
            let selector = instance.parse().map_err(|error: mvm_types::AddressError| CliError::new(Exit::Usage, error.to_string()))?;
            if path.is_empty() {
                return Err(CliError::new(Exit::Usage, format!("{given}: the path in the instance is missing")));
            }
            Ok(Place::Guest(selector, path.to_owned()))
        }
        _ => Ok(Place::Here(PathBuf::from(given))),
    }
}

fn shorten(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(80).collect()
}

/// `mvm logs`.
pub fn logs(globals: &Globals, args: &LogsArgs) -> CliResult {
    let source = match args.source {
        Source::Workload => LogSource::Workload,
        Source::Agent => LogSource::Agent,
        Source::Console | Source::Vmm => {
            let opened = open(globals, Intent::Look)?;
            let at = resolve(&opened.node, &args.instance)?;
            let paths = &opened.node.paths;
            let file = if args.source == Source::Console { paths.console_log(&at) } else { paths.vmm_log(&at) };
            print_file(&file, args.tail, args.follow)?;
            return Ok(Exit::Done);
        }
    };
    let mut reached = reach(globals, &args.instance, "read the logs of")?;
    let follow = if args.follow { Follow::Yes } else { Follow::No };
    reached.client.logs(source, follow, args.tail, &mut std::io::stdout())?;
    Ok(Exit::Done)
}

/// Writes a log file, whole or its end, and what is added to it.
fn print_file(path: &Path, tail: Option<u32>, follow: bool) -> Result<(), CliError> {
    const PAUSE: Duration = Duration::from_millis(100);
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(CliError::new(Exit::Failed, format!("{}: {error}", path.display()))),
    };
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    let begin = tail.map_or(0, |lines| {
        let body = content.strip_suffix(b"\n").unwrap_or(&content);
        match lines {
            0 => content.len(),
            n => body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').nth(n as usize - 1).map_or(0, |(at, _)| at + 1),
        }
    });
    let mut out = std::io::stdout();
    let mut write = |bytes: &[u8]| match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        other => other.map(|()| true),
    };
    let mut wanted = write(&content[begin..])?;
    while follow && wanted {
        std::thread::sleep(PAUSE);
        content.clear();
        // Trimmed since: begin again at its start.
        if file.metadata()?.len() < file.stream_position()? {
            file.seek(SeekFrom::Start(0))?;
        }
        file.read_to_end(&mut content)?;
        wanted = write(&content)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_an_instance_before_a_colon_are_in_it() {
        assert!(matches!(place("acme/web/1a:/data"), Ok(Place::Guest(_, path)) if path == "/data"));
        assert!(matches!(place("./acme/web/1a:/data"), Ok(Place::Here(_))));
        assert!(matches!(place("file:with-colon"), Ok(Place::Here(_))));
        assert!(place("acme/web/1a:").is_err());
        assert!(place("acme/web:/data").is_err());
    }
}
