//! `mvm run`.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use clap::Args;

use super::CliResult;
use super::exit::{CliError, Exit};
use super::guest::run_in;
use super::open::{Globals, Intent, VmmChoice, open};
use super::progress::{ProgressLines, interrupted};
use crate::guest::{ExecRequest, GuestClient, Purpose};
use crate::vm::throwaway::Waited;

/// Arguments of `mvm run`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  mvm run -- uname -a\n  mvm run -it -- sh\n  tar c src | mvm run -i --mem 512 -- tar t\n\nThe microVM has no network and no disk, and is gone afterwards, also when mvm is killed."
)]
pub struct RunArgs {
    /// Its memory, in MiB
    #[arg(long, default_value_t = 128, value_name = "MIB", value_parser = clap::value_parser!(u32).range(64..=1_048_576))]
    mem: u32,
    /// Its virtual CPUs
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    vcpus: u8,
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<std::ffi::OsString>,
}

/// Runs a command in a microVM of its own.
pub fn run(globals: &Globals, args: RunArgs) -> CliResult {
    use std::os::unix::ffi::OsStringExt;
    if globals.vmm == VmmChoice::Simulated {
        return Err(CliError::new(Exit::Refused, "a simulated machine runs nothing"));
    }
    let opened = open(globals, Intent::Change)?;
    let lines = ProgressLines::new();
    let bar = lines.spin("throw-away microVM");
    let say = |text: &str| {
        if let Some(bar) = &bar {
            bar.set_message(format!("throw-away microVM: {text}"));
        }
    };
    // Before there is a machine, an interrupt ends this process like any other.
    let image = opened.node.throwaway_image(&say)?;
    let stop = interrupted()?;
    let given_up = || stop.load(Ordering::SeqCst);
    say("boot");
    let machine = opened.node.throwaway(&image, args.vcpus, args.mem)?;
    let waited = machine.wait_ready(&given_up)?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    if waited == Waited::GivenUp {
        return Err(CliError::new(Exit::Interrupted, "interrupted"));
    }
    let vm = machine.vm().clone();
    // The command runs on another thread, so that an interrupt can end the machine under it.
    let (interactive, tty) = (args.interactive, args.tty);
    let request = ExecRequest { argv: args.command.into_iter().map(OsStringExt::into_vec).collect(), ..ExecRequest::default() };
    let running = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut client = GuestClient::connect_while(&vm.run_dir, Purpose::Interactive, deadline, &|| vm.process.is_alive())?;
        run_in(&mut client, request, interactive, tty)
    });
    while !running.is_finished() {
        if given_up() {
            return Err(CliError::new(Exit::Interrupted, "interrupted"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    running.join().unwrap_or_else(|_| Err(CliError::new(Exit::Failed, "the conversation with the guest broke off")))
}
