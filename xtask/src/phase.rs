//! Says what is being done and how long it took.

use std::time::Instant;

/// Runs one phase, named before and timed after.
///
/// # Errors
/// Those of the phase.
pub fn phase<T>(name: &str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    eprintln!("== {name}");
    let begun = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "done" } else { "failed" };
    eprintln!("== {name}: {verdict} in {:.1} s", begun.elapsed().as_secs_f64());
    result
}
