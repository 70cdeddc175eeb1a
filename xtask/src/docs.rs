//! The generated parts of the documentation.

use std::fs;
use std::process::Command;

use crate::build::{Profile, all};
use crate::workspace::{output, root};

/// Each file, and what mvm prints it for.
const FILES: [(&str, &[&str]); 2] = [("docs/cli.md", &["reference"]), ("docs/desired-state.schema.json", &["schema"])];

/// Writes them anew.
///
/// # Errors
/// When mvm does not compile or a file cannot be written.
pub fn generate() -> Result<(), String> {
    let mvm = all(Profile::Dev)?;
    for (file, arguments) in FILES {
        let text = output(Command::new(&mvm).args(arguments))?;
        let path = root().join(file);
        if fs::read_to_string(&path).is_ok_and(|there| there == text) {
            eprintln!("{file}: as it was");
            continue;
        }
        fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        eprintln!("{file}: written");
    }
    Ok(())
}
