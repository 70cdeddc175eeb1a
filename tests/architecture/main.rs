//! Holds the source against the page that describes it: `docs/architecture.md`, "Who may use whom", and files marked PURE.

mod paths;
mod rules;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use paths::{Source, paths_of};
use rules::Rules;

/// Modules in which decisions are made; none of them may lose its mark.
const DECIDING: [&str; 6] = ["agent/plan.rs", "agent/order.rs", "vm/sleep_policy.rs", "vm/usage.rs", "vm/instance/state.rs", "net/mod.rs"];

/// What a pure module does not use: clocks, randomness, files, processes, sockets, threads, async code, and the effects of this program.
const IMPURE: [&str; 27] = [
    "std::env",
    "std::fs",
    "std::io",
    "std::net::TcpListener",
    "std::net::TcpStream",
    "std::net::ToSocketAddrs",
    "std::net::UdpSocket",
    "std::os::unix::net",
    "std::process",
    "std::random",
    "std::thread",
    "std::time::Instant::now",
    "std::time::SystemTime",
    "Instant::now",
    "SystemTime",
    "File",
    "Command",
    "jiff::Timestamp::now",
    "jiff::Zoned::now",
    "Timestamp::now",
    "getrandom",
    "rand",
    "rustix",
    "tempfile",
    "tokio",
    "mvm_hostd",
    "tonic",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    let mut waiting = vec![root().join("src")];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let name = path.strip_prefix(root().join("src")).unwrap().to_str().unwrap().to_owned();
                sources.push(Source { name, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    assert!(sources.len() > 50, "the sources were not found");
    sources.sort_by(|a, b| a.name.cmp(&b.name));
    sources
}

fn rules() -> Rules {
    let page = fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    Rules::read(&page).unwrap()
}

#[test]
fn nobody_uses_what_the_page_does_not_allow() {
    let rules = rules();
    let mut wrong = Vec::new();
    for source in sources() {
        let here = source.module();
        for path in paths_of(&source.text) {
            let Some(there) = path.resolve(&here) else { continue };
            if let Err(why) = rules.check(&here, &there) {
                wrong.push(format!("src/{}:{}: {why}", source.name, path.line));
            }
        }
    }
    assert!(wrong.is_empty(), "docs/architecture.md does not allow:\n{}", wrong.join("\n"));
}

#[test]
fn the_page_names_every_module() {
    let there: BTreeSet<String> = sources().iter().filter_map(|source| source.module().first().cloned()).collect();
    let described: BTreeSet<String> = rules().modules();
    let missing: Vec<&String> = there.difference(&described).collect();
    assert!(missing.is_empty(), "docs/architecture.md does not say whom these may use: {missing:?}");
}

#[test]
fn pure_modules_have_no_effects() {
    let sources = sources();
    let marked: Vec<&Source> = sources.iter().filter(|source| source.is_marked_pure()).collect();
    for name in DECIDING {
        assert!(marked.iter().any(|source| source.name == name), "src/{name} has to begin with `//! PURE`");
    }
    let mut wrong = Vec::new();
    for source in &sources {
        // What lies below a pure module is a part of it.
        if !marked.iter().any(|pure| source.module().starts_with(&pure.module())) {
            continue;
        }
        for path in paths_of(&source.text) {
            let text = path.segments.join("::");
            if let Some(what) = IMPURE.iter().find(|what| text == **what || text.starts_with(&format!("{what}::"))) {
                wrong.push(format!("src/{}:{}: {text} ({what})", source.name, path.line));
            }
        }
    }
    assert!(wrong.is_empty(), "a module marked PURE uses:\n{}", wrong.join("\n"));
}
