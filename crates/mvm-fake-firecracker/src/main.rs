//! `fake-firecracker`: Firecracker's protocol without a VMM, for tests.
//!
//! ```text
//!  client ---- HTTP/1.1 ----> api ----> machine (phases, files, snapshots)
//!  client ---- CONNECT n ---> vsock --> guest: mvm-guest-agent as a child process
//! ```
//!
//! It says and does what Firecracker 1.17 was seen to say and do; what it cannot do, it does not pretend. A guest is a
//! real guest agent in a process of its own: stopped when vCPUs are paused, started afresh by a restore. Memory is a file
//! of the right size with a few pages in it, enough to tell a merged snapshot from one that is not.
//!
//! `script` says how it is told to misbehave, and `package` how it takes everything along into a jail.

mod api;
mod bodies;
mod config_drive;
mod crc;
mod faults;
mod guest;
mod http;
mod log;
mod machine;
mod options;
mod package;
mod script;
mod signals;
mod snapshot;
mod tap;
mod vsock;

use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;

use machine::Machine;
use options::Command;
use package::Package;
use script::{Script, When};

/// What an abort comes to.
const PANIC: u8 = 134;

fn main() -> ExitCode {
    let package = Package::open();
    let script = match Script::read(&package) {
        Ok(script) => script,
        Err(why) => {
            eprintln!("fake-firecracker: {why}");
            return ExitCode::FAILURE;
        }
    };
    let log = log::Log::default();
    let options = match options::parse(std::env::args_os().skip(1)) {
        Ok(Command::Version) => {
            println!("Firecracker v{}\n", script.version);
            return log.exit(0);
        }
        Ok(Command::SnapshotVersion) => {
            println!("{}", script.snapshot_version);
            return log.exit(0);
        }
        Ok(Command::Pack(pack)) => {
            return match package::pack(&pack) {
                Ok(()) => ExitCode::SUCCESS,
                Err(why) => {
                    eprintln!("fake-firecracker: {why}");
                    ExitCode::FAILURE
                }
            };
        }
        Ok(Command::Serve(options)) => options,
        Err(refusal) => {
            log.line("main", &refusal.log);
            if refusal.code == PANIC {
                std::process::abort();
            }
            eprintln!("Error: {}", refusal.debug);
            return log.exit(refusal.code);
        }
    };
    signals::answer();
    log.name(&options.id);
    if let Some(path) = &options.log_path
        && let Err(error) = log.redirect(path)
    {
        log.line("main", &format!("Could not initialize logger: Failed to open target file: {error}"));
        eprintln!("Error: LoggerInitialization(LoggerUpdateError({error:?}))");
        return log.exit(1);
    }
    log.line("main", &format!("Running Firecracker v{}", script.version));
    script.act("listen", When::Before);
    let listener = match UnixListener::bind(&options.api_sock) {
        Ok(listener) => listener,
        Err(error) => {
            let path = options.api_sock.display();
            if error.kind() == std::io::ErrorKind::AddrInUse {
                let said = format!("Failed to open the API socket at: {path}. Check that it is not already used.");
                log.line("main", &format!("RunWithApiError error: {said}"));
                eprintln!("Error: RunWithApi(FailedToBindSocket({path:?}))", path = options.api_sock);
            } else {
                log.line("main", &format!("RunWithApiError error: Failed to bind and run the HTTP server: IO error: {error}"));
                eprintln!("Error: RunWithApi(FailedToBindAndRunHttpServer(IOError({error:?})))");
            }
            return log.exit(1);
        }
    };
    log.line("main", &format!("Listening on API socket ({:?}).", options.api_sock));
    let machine = Machine::new(options, Arc::new(script), log.clone(), package);
    log.line("fc_api", "API server started.");
    api::serve(&listener, &machine)
}
