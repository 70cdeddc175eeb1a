//! Holds what the pages show against what is there: command lines, links, exit codes, examples.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::ErrorKind;
use mvm::agent::desired::{Format, parse};
use mvm::cli::Cli;
use mvm::cli::exit::Exit;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The written pages; the reference of the command line is generated.
fn pages() -> Vec<(PathBuf, String)> {
    let mut pages = vec![root().join("README.md")];
    for dir in ["docs", "docs/adr", "specs"] {
        let entries = fs::read_dir(root().join(dir)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(entries.filter(|path| path.extension().is_some_and(|ending| ending == "md") && !path.ends_with("cli.md")));
    }
    assert!(pages.len() > 4, "the pages were not found");
    pages.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// What stands in code marks.
fn code(page: &str) -> impl Iterator<Item = &str> {
    page.split('`').skip(1).step_by(2)
}

#[test]
fn every_command_that_a_page_shows_is_understood() {
    let mut seen = 0;
    for (path, page) in pages() {
        let shown = code(&page).chain(page.lines().map(str::trim)).filter(|text| text.starts_with("mvm ") && !text.contains("──"));
        // Prose may begin a line with the name, too; commands there stand in code marks.
        for line in shown.filter(|text| code(&page).any(|code| code.contains(text))) {
            seen += 1;
            let words = line.split('#').next().unwrap_or(line).split_whitespace();
            if let Err(error) = Cli::try_parse_from(words) {
                // A page may name a command without what it is to be done to; what asks for the version ends there.
                let partly = matches!(
                    error.kind(),
                    ErrorKind::MissingRequiredArgument
                        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
                        | ErrorKind::MissingSubcommand
                        | ErrorKind::DisplayVersion
                );
                assert!(partly, "{}: {line}: {error}", path.display());
            }
        }
    }
    assert!(seen > 10, "only {seen} commands were found");
}

#[test]
fn every_link_leads_somewhere() {
    for (path, page) in pages() {
        for link in page.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = link.split('#').next().unwrap_or(link);
            if file.is_empty() || file.contains("://") {
                continue;
            }
            assert!(path.parent().unwrap().join(file).exists(), "{}: {link}", path.display());
        }
    }
}

#[test]
fn the_page_lists_the_exit_codes() {
    let page = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (_, section) = page.split_once("## Exit codes").unwrap();
    let listed: Vec<u8> = section
        .lines()
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.split('|').nth(1)?.trim().parse().ok())
        .collect();
    let exits = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::NotFound,
        Exit::Refused,
        Exit::TimedOut,
        Exit::Partly,
        Exit::Difference,
        Exit::Interrupted,
    ];
    assert_eq!(listed, exits.map(Exit::code));
}

#[test]
fn every_example_is_valid() {
    let mut seen = 0;
    for entry in fs::read_dir(root().join("examples")).unwrap() {
        let path = entry.unwrap().path();
        // Directories are flakes, which tests/nix.rs builds.
        if path.is_dir() {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        parse(&text, Format::of(&path, &text)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        seen += 1;
    }
    assert!(seen >= 2, "the examples were not found");
}

#[test]
fn every_box_of_the_sprint_has_its_test() {
    let page = fs::read_to_string(root().join("specs/SPRINT.md")).unwrap();
    let boxes: Vec<&str> = page.lines().filter(|line| line.starts_with("| [x] ")).collect();
    assert!(boxes.len() > 30, "only {} boxes were found", boxes.len());
    assert!(!page.contains("| [ ] "), "a box is open");
    for line in boxes {
        let cells: Vec<&str> = line.split(" | ").collect();
        let file = cells[1].trim_matches('`');
        assert!(root().join(file).is_file(), "{file} of {line}");
        let mut shown = code(cells[2]);
        let (file, test) = (shown.next().unwrap(), shown.next().unwrap());
        let text = fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(text.contains(&format!("fn {test}(")), "{file} has no test {test}");
    }
}
