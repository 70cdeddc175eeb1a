//! The command line, which is Firecracker's; and `--pack`, which is not.

use std::ffi::OsString;
use std::path::PathBuf;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    Version,
    SnapshotVersion,
    Pack(Pack),
    Serve(Options),
}

/// How it serves.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    pub id: String,
    pub api_sock: PathBuf,
    pub log_path: Option<PathBuf>,
}

/// What a copy of this program takes along.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pack {
    pub to: PathBuf,
    pub agent: Option<PathBuf>,
    pub script: Option<PathBuf>,
    /// Where the guest has a file, and the file.
    pub files: Vec<(String, PathBuf)>,
}

/// A command line that Firecracker does not take, and how it says so.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    pub log: String,
    pub debug: String,
    pub code: u8,
}

/// Firecracker's options with a value, all but those that this one does not know how to honour.
const VALUES: [&str; 12] = [
    "api-sock",
    "id",
    "seccomp-filter",
    "log-path",
    "level",
    "module",
    "metrics-path",
    "start-time-us",
    "start-time-cpu-us",
    "parent-cpu-time-us",
    "http-api-max-payload-size",
    "mmds-size-limit",
];
const FLAGS: [&str; 5] = ["no-seccomp", "show-level", "show-log-origin", "boot-timer", "enable-pci"];

pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Command, Refusal> {
    let mut options = Options { id: "anonymous-instance".into(), api_sock: "/run/firecracker.socket".into(), log_path: None };
    let mut pack = Pack::default();
    let mut packs = false;
    let mut arguments = arguments.map(|argument| argument.to_string_lossy().into_owned());
    while let Some(argument) = arguments.next() {
        let unexpected = || {
            arguments_error(
                &format!(
                    "Found argument '{}' which wasn't expected, or isn't valid in this context. \\n\\nFor more information try --help.",
                    argument.trim_start_matches('-')
                ),
                &format!("UnexpectedArgument({:?})", argument.trim_start_matches('-')),
            )
        };
        let name = argument.strip_prefix("--").ok_or_else(unexpected)?;
        if FLAGS.contains(&name) {
            continue;
        }
        match name {
            "version" => return Ok(Command::Version),
            "snapshot-version" => return Ok(Command::SnapshotVersion),
            _ => {}
        }
        let ours = ["pack", "agent", "script", "file"].contains(&name);
        if !ours && !VALUES.contains(&name) {
            return Err(unexpected());
        }
        let value = arguments.next().ok_or_else(|| {
            arguments_error(
                &format!("The argument '{name}' requires a value, but none was supplied. \\n\\nFor more information try --help."),
                &format!("MissingValue({name:?})"),
            )
        })?;
        match name {
            "id" => options.id = value,
            "api-sock" => options.api_sock = value.into(),
            "log-path" => options.log_path = Some(value.into()),
            "level" if !is_level(&value) => {
                let log = format!(
                    "Invalid value for logger level: Failed to parse string to level filter: {value}.Possible values: [Error, Warning, Info, Debug]"
                );
                return Err(Refusal { log, debug: format!("InvalidLogLevel(LevelFilterFromStrError({value:?}))"), code: 152 });
            }
            "pack" => {
                packs = true;
                pack.to = value.into();
            }
            "agent" => pack.agent = Some(value.into()),
            "script" => pack.script = Some(value.into()),
            "file" => match value.split_once('=') {
                Some((name, path)) if name.starts_with('/') => pack.files.push((name.into(), path.into())),
                _ => return Err(arguments_error(&format!("--file is /PATH/IN/GUEST=FILE, not {value}"), "InvalidFile")),
            },
            _ => {}
        }
    }
    if packs {
        return Ok(Command::Pack(pack));
    }
    match options.id.char_indices().find(|(_, c)| !c.is_alphanumeric() && *c != '-') {
        None => Ok(Command::Serve(options)),
        // Firecracker panics.
        Some((at, c)) => Err(Refusal {
            log: format!("Firecracker panicked at src/firecracker/src/main.rs:309:48:\nInvalid instance ID: InvalidChar({c:?}, {at})"),
            debug: format!("InvalidInstanceId({c:?}, {at})"),
            code: 134,
        }),
    }
}

fn is_level(level: &str) -> bool {
    ["error", "warn", "warning", "info", "debug", "trace", "off"].contains(&level.to_lowercase().as_str())
}

fn arguments_error(text: &str, debug: &str) -> Refusal {
    Refusal { log: format!("Arguments parsing error: {text}"), debug: format!("ParseArguments({debug})"), code: 153 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(arguments: &[&str]) -> Result<Command, Refusal> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn what_a_jailer_passes_is_understood() {
        let arguments = [
            "--id",
            "i-0",
            "--start-time-us",
            "1",
            "--start-time-cpu-us",
            "2",
            "--parent-cpu-time-us",
            "3",
            "--no-seccomp",
            "--api-sock",
            "/a",
        ];
        let Ok(Command::Serve(options)) = of(&arguments) else { panic!("{:?}", of(&arguments)) };
        assert_eq!((options.id.as_str(), options.api_sock.to_str()), ("i-0", Some("/a")));
    }

    #[test]
    fn what_firecracker_refuses_is_refused() {
        for (arguments, code) in [
            (&["--config-file", "x"][..], 153),
            (&["--nope"], 153),
            (&["x"], 153),
            (&["--id"], 153),
            (&["--level", "nope"], 152),
            (&["--id", "a_b"], 134),
        ] {
            assert_eq!(of(arguments).unwrap_err().code, code, "{arguments:?}");
        }
        assert_eq!(of(&["--version", "--nope"]), Ok(Command::Version));
    }
}
