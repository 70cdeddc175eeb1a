//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use pico_args::Arguments;

use crate::build::Profile;

/// What `cargo xtask help` prints.
pub const HELP: &str = "\
cargo xtask <task>

  quickstart [--state-dir DIR]   install what is missing, build, and bring up the fleet in examples/quickstart.toml
  test [--no-live] [FILTER…]     install what is missing and run every test; with filters, only tests whose names contain one
  test --live [FILTER…]          only the tests with real microVMs and the real network
  bench [--quick] [--output json] [FILTER…]
                                 measure mvm against its limits and against bare QEMU; fails when one is missed
  setup                          install the packages that running a fleet needs
  build [--release]              build mvm and, beside it, the static guest agent
  fuzz [--seconds N]             run every fuzz target for N seconds (30)
  docs                           write docs/cli.md and docs/desired-state.schema.json anew
";

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Task {
    /// Print [`HELP`].
    Help,
    /// Install packages.
    Setup,
    /// Build the programs.
    Build {
        /// How.
        profile: Profile,
    },
    /// Bring up the example.
    Quickstart {
        /// Instead of the default state directory.
        state_dir: Option<PathBuf>,
    },
    /// Run tests.
    Test(Selection),
    /// Measure.
    Bench(Measure),
    /// Run the fuzz targets.
    Fuzz {
        /// How long each.
        seconds: u32,
    },
    /// Generate documentation.
    Docs,
}

/// What is measured, and how.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Measure {
    /// Whether there are fewer repetitions than for the record.
    pub quick: bool,
    /// How the figures are written, when not as a table.
    pub output: Option<String>,
    /// Parts of names; none is every figure.
    pub filters: Vec<String>,
}

/// Which tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Whether those with real microVMs and the real network are among them.
    pub live: Live,
    /// Parts of names; none is every test, and the checks that are not tests.
    pub filters: Vec<String>,
}

/// What is done about tests with real microVMs and the real network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Live {
    /// They run with the others.
    #[default]
    Too,
    /// They alone run.
    Only,
    /// They do not run.
    Not,
}

/// Reads the arguments after `cargo xtask`.
///
/// # Errors
/// What is not understood, and how to see what would be.
pub fn parse(arguments: Vec<OsString>) -> Result<Task, String> {
    let mut arguments = Arguments::from_vec(arguments);
    let wrong = |error: pico_args::Error| format!("{error}; see cargo xtask help");
    if arguments.contains(["-h", "--help"]) {
        return Ok(Task::Help);
    }
    let task = match arguments.subcommand().map_err(wrong)?.as_deref() {
        None | Some("help") => Task::Help,
        Some("setup") => Task::Setup,
        Some("build") => Task::Build { profile: if arguments.contains("--release") { Profile::Release } else { Profile::Dev } },
        Some("quickstart") => {
            let state_dir = arguments.opt_value_from_os_str("--state-dir", |dir| Ok::<_, String>(PathBuf::from(dir)));
            Task::Quickstart { state_dir: state_dir.map_err(wrong)? }
        }
        Some("test") => {
            let live = match (arguments.contains("--live"), arguments.contains("--no-live")) {
                (true, true) => return Err("--live and --no-live exclude each other".into()),
                (true, false) => Live::Only,
                (false, true) => Live::Not,
                (false, false) => Live::Too,
            };
            Task::Test(Selection { live, filters: filters(&mut arguments)? })
        }
        Some("bench") => {
            let quick = arguments.contains("--quick");
            let output: Option<String> = arguments.opt_value_from_str("--output").map_err(wrong)?;
            if let Some(format) = output.as_ref().filter(|format| !["table", "json"].contains(&format.as_str())) {
                return Err(format!("--output is table or json, not {format}"));
            }
            Task::Bench(Measure { quick, output, filters: filters(&mut arguments)? })
        }
        Some("fuzz") => Task::Fuzz { seconds: arguments.opt_value_from_str("--seconds").map_err(wrong)?.unwrap_or(30) },
        Some("docs") => Task::Docs,
        Some(other) => return Err(format!("unknown task {other:?}; see cargo xtask help")),
    };
    match arguments.finish().first() {
        None => Ok(task),
        Some(extra) => Err(format!("unknown argument {}; see cargo xtask help", extra.display())),
    }
}

fn filters(arguments: &mut Arguments) -> Result<Vec<String>, String> {
    let mut filters = Vec::new();
    while let Some(filter) = arguments.opt_free_from_str::<String>().map_err(|error| format!("{error}; see cargo xtask help"))? {
        if filter.starts_with('-') {
            return Err(format!("unknown option {filter}; see cargo xtask help"));
        }
        filters.push(filter);
    }
    Ok(filters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Task, String> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn tasks_are_read_with_their_options() {
        assert_eq!(read(""), Ok(Task::Help));
        assert_eq!(read("build --release"), Ok(Task::Build { profile: Profile::Release }));
        assert_eq!(read("quickstart --state-dir /x"), Ok(Task::Quickstart { state_dir: Some("/x".into()) }));
        assert_eq!(read("test"), Ok(Task::Test(Selection::default())));
        assert_eq!(read("test --live wakes"), Ok(Task::Test(Selection { live: Live::Only, filters: vec!["wakes".into()] })));
        assert_eq!(read("bench"), Ok(Task::Bench(Measure::default())));
        let measure = Measure { quick: true, output: Some("json".into()), filters: vec!["wake".into(), "start".into()] };
        assert_eq!(read("bench --quick --output json wake start"), Ok(Task::Bench(measure)));
        assert_eq!(read("fuzz --seconds 5"), Ok(Task::Fuzz { seconds: 5 }));
    }

    #[test]
    fn what_is_unknown_is_refused() {
        for line in [
            "nonsense",
            "build --relase",
            "test --live --no-live",
            "test --lve",
            "setup now",
            "quickstart --state-dir",
            "bench --quik",
            "bench --output xml",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }
}
