//! The `mvm` command: parse, dispatch, error to exit code.

use std::io::IsTerminal;
use std::process::ExitCode;

use mvm::cli::exit::Exit;
use mvm::cli::late::parse;
use mvm::cli::run;

fn main() -> ExitCode {
    // A caller that ignores the ends of its children leaves that to what it starts, which could wait for none of its own then.
    // SAFETY: the handler is the kernel's own.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let cli = match parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            let text = error.render();
            let text = if std::io::stderr().is_terminal() { text.ansi().to_string() } else { text.to_string() };
            eprint!("{}", mvm::cli::exit::shorten_words(&text));
            return Exit::Usage.into();
        }
    };
    mvm::infra::logging::init(cli.globals.verbose, cli.globals.log_format == mvm::cli::open::LogFormat::Json);
    match run(cli) {
        Ok(exit) => exit.into(),
        Err(error) => {
            if !error.text.is_empty() {
                eprintln!("mvm: {}", mvm::cli::exit::shorten_words(&error.text));
            }
            error.exit.into()
        }
    }
}
