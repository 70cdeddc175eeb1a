//! From a fresh host to a running fleet.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::build::{Profile, all};
use crate::phase::phase;
use crate::setup;
use crate::workspace::{output, root, succeed};

/// What describes the parts of the built-in image, in the default state directory.
pub const PARTS: &str = "/var/lib/mvm/images/parts/parts.json";
/// What is brought up.
const FLEET: &str = "examples/quickstart.toml";

/// Installs, builds, brings the fleet up, shows it and what to try next.
///
/// # Errors
/// What failed, after it has said why itself.
pub fn run(state_dir: Option<&Path>) -> Result<(), String> {
    let parts = state_dir.map_or_else(|| PathBuf::from(PARTS), |dir| dir.join("images/parts/parts.json"));
    phase("install what is missing", || {
        setup::ensure(&setup::FLEETS, Some(&parts))?;
        setup::require_root(&[])
    })?;
    let mvm = phase("build", || all(Profile::Release))?;
    let mvm_with = |arguments: &[&str]| {
        let mut command = Command::new(&mvm);
        if let Some(dir) = state_dir {
            command.arg("--state-dir").arg(dir);
        }
        command.args(arguments).current_dir(root());
        command
    };
    phase(&format!("mvm apply -f {FLEET}"), || succeed(&mut mvm_with(&["apply", "-f", FLEET])))
        .map_err(|error| format!("{error}; mvm doctor says what this host lacks, and running quickstart again goes on where it stopped"))?;
    succeed(&mut mvm_with(&["status"]))?;
    let listed = output(&mut mvm_with(&["instance", "list", "--output", "json"]))?;
    print!("{}", next(&mvm.display().to_string(), state_dir, &workers(&listed)));
    Ok(())
}

/// The ids of the workers, of which the names are asked for below.
fn workers(listed: &str) -> Vec<&str> {
    let mut ids: Vec<&str> =
        listed.match_indices("demo/web/i-").filter_map(|(at, _)| listed.get(at..at + "demo/web/i-".len() + 8)).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// What a newcomer would try next.
fn next(mvm: &str, state_dir: Option<&Path>, workers: &[&str]) -> String {
    let mvm = match state_dir {
        Some(dir) => format!("{mvm} --state-dir {}", dir.display()),
        None => mvm.to_owned(),
    };
    let first = workers.first().copied().unwrap_or("demo/web/i-…");
    let last = workers.last().copied().unwrap_or(first);
    format!(
        "\nThe fleet is running. Try next:\n\
         \n  {mvm} status\
         \n  {mvm} exec {first} -- uname -a\
         \n  {mvm} instance sleep {last}\
         \n  {mvm} instance wake {last}\
         \n  {mvm} apply -f {FLEET}        # after you have edited it\
         \n\nAnd to remove everything:\n\
         \n  {mvm} apply -f examples/nothing.toml\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_name_instances_that_are_there() {
        let listed = r#"[{"address":"demo/gw/i-00000001"},{"address":"demo/web/i-0000000b"},{"address":"demo/web/i-0000000a"}]"#;
        let text = next("mvm", Some(Path::new("/s")), &workers(listed));
        assert!(text.contains("mvm --state-dir /s exec demo/web/i-0000000a -- uname -a"), "{text}");
        assert!(text.contains("instance wake demo/web/i-0000000b"), "{text}");
    }
}
