//! Messages on standard error.

use std::io::IsTerminal;

use tracing_subscriber::filter::EnvFilter;

/// Starts writing messages; `verbose` counts the `-v`s. `MVM_LOG` overrides what is written (`tracing` directives).
pub fn init(verbose: u8, json: bool) {
    let level = match verbose {
        0 => "warn",
        1 => "mvm=info,warn",
        _ => "mvm=trace,debug",
    };
    // Neither is needed by most commands, and both take their time.
    let filter = std::env::var("MVM_LOG").ok().and_then(|text| EnvFilter::try_new(text).ok()).unwrap_or_else(|| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    if json {
        builder.json().init();
    } else {
        builder.with_target(false).init();
    }
}
