//! Commands whose arguments are described when they are needed: of some fifty commands a call uses one, and describing the others took
//! a third of the time in which a short one starts and ends.

use std::cell::Cell;
use std::ffi::OsString;

use clap::builder::Resettable;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Subcommand};

use super::{Cli, Top};

/// Arguments, or commands below a command, that are described when their command is the one that was given.
#[derive(Debug)]
pub struct Late<T>(pub T);

thread_local! {
    /// Whether commands wait with their descriptions. Help, completions and the reference want all of them.
    static WAIT: Cell<bool> = const { Cell::new(false) };
}

/// Describes them now or later.
fn describe(
    command: clap::Command,
    now: impl Fn(clap::Command) -> clap::Command,
    later: fn(clap::Command) -> clap::Command,
) -> clap::Command {
    if WAIT.get() { command.defer(later) } else { now(command) }
}

/// Describes them where the command was described before: what it was said to be about stays.
fn below(command: clap::Command, augment: impl Fn(clap::Command) -> clap::Command) -> clap::Command {
    let (about, long) = (command.get_about().cloned(), command.get_long_about().cloned());
    augment(command).about(Resettable::from(about)).long_about(Resettable::from(long))
}

impl<T: FromArgMatches> FromArgMatches for Late<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        T::from_arg_matches(matches).map(Self)
    }
    fn from_arg_matches_mut(matches: &mut ArgMatches) -> Result<Self, clap::Error> {
        T::from_arg_matches_mut(matches).map(Self)
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl<T: Args> Args for Late<T> {
    fn augment_args(command: clap::Command) -> clap::Command {
        describe(command, T::augment_args, |command| below(command, T::augment_args))
    }
    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        describe(command, T::augment_args_for_update, |command| below(command, T::augment_args_for_update))
    }
}

impl<T: Subcommand> Subcommand for Late<T> {
    fn augment_subcommands(command: clap::Command) -> clap::Command {
        describe(command, T::augment_subcommands, |command| below(command, T::augment_subcommands))
    }
    fn augment_subcommands_for_update(command: clap::Command) -> clap::Command {
        describe(command, T::augment_subcommands_for_update, |command| below(command, T::augment_subcommands_for_update))
    }
    fn has_subcommand(name: &str) -> bool {
        T::has_subcommand(name)
    }
}

/// No commands at all.
#[derive(Debug, Subcommand)]
enum Nothing {}

/// Reads a command line as [`clap::Parser::try_parse_from`] does, without the commands that it does not name.
///
/// # Errors
/// What is wrong with it, or the help that it asks for.
pub fn parse(words: Vec<OsString>) -> Result<Cli, clap::Error> {
    let mut command = chosen(words.get(1));
    let mut matches = command.try_get_matches_from_mut(words)?;
    let cli = Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut Cli::command()));
    // The process ends soon, and gives all of it back at once.
    std::mem::forget((command, matches));
    cli
}

/// The program with the command that the first word names only, or with all of them where it names none.
fn chosen(word: Option<&OsString>) -> clap::Command {
    WAIT.set(true);
    let mut waiting = Cli::command();
    WAIT.set(false);
    let one = waiting.get_subcommands_mut().find(|one| word.is_some_and(|word| word == one.get_name())).map(std::mem::take);
    match one {
        Some(one) => Top::<Nothing>::command().subcommand(one),
        None => Cli::command(),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    /// What a command line comes to, in words.
    fn read(parsed: Result<Cli, clap::Error>) -> String {
        parsed.map_or_else(|error| format!("{:?}\n{}", error.kind(), error.render()), |cli| format!("{cli:?}"))
    }

    #[test]
    fn a_line_is_read_as_with_all_commands() {
        for line in [
            "mvm",
            "mvm --help",
            "mvm -h",
            "mvm help",
            "mvm help instance wake",
            "mvm --version",
            "mvm status",
            "mvm status --help",
            "mvm -v status acme",
            "mvm statu",
            "mvm apply",
            "mvm apply -f",
            "mvm apply -f fleet.toml --timeout 3m -vv -o json",
            "mvm apply -f fleet.toml --nonsense",
            "mvm doctor extra",
            "mvm doctor",
            "mvm instance",
            "mvm instance wak acme/web/i-1",
            "mvm instance help wake",
            "mvm instance wake --help",
            "mvm instance wake -h",
            "mvm instance wake",
            "mvm instance wake acme/web/i-00000001 --timings --state-dir /somewhere",
            "mvm --state-dir /somewhere instance wake acme/web/i-00000001",
            "mvm instance wake nowhere",
            "mvm instance --version",
            "mvm instance wake --version",
            "mvm tenant secrets --help",
            "mvm tenant secrets",
            "mvm exec acme/web/1a2b -- ps -ef",
            "mvm run --help",
            "mvm events verify acme",
            "mvm completions fish",
            "mvm completions fisch",
        ] {
            let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
            assert_eq!(read(parse(words.clone())), read(Cli::try_parse_from(words)), "{line}");
        }
    }

    #[test]
    fn only_the_command_that_is_meant_is_described() {
        let names = |word: &str| chosen(Some(&word.into())).get_subcommands().map(|one| one.get_name().to_owned()).collect::<Vec<_>>();
        assert_eq!(names("status"), ["status"]);
        assert!(names("statu").len() > 10);
    }
}
