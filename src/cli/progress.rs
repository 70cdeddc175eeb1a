//! Progress of long work: live lines on a terminal, nothing elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::agent::execute::{End, Progress};

/// Draws what is being done.
pub struct ProgressLines {
    multi: Option<MultiProgress>,
    bars: Mutex<HashMap<usize, ProgressBar>>,
}

impl ProgressLines {
    /// Draws on standard error when that is a terminal.
    pub fn new() -> Self {
        let multi = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self { multi, bars: Mutex::default() }
    }

    /// Shows one event of an execution.
    pub fn show(&self, progress: Progress<'_>) {
        let Some(multi) = &self.multi else { return };
        let mut bars = self.bars.lock().unwrap_or_else(PoisonError::into_inner);
        match progress {
            Progress::Begun { step, object } => {
                let bar = multi.add(spinner());
                bar.set_message(format!("{} {object}", step.action.verb()));
                bars.insert(std::ptr::from_ref(step).addr(), bar);
            }
            Progress::Note { step, text } => {
                if let Some(bar) = bars.get(&std::ptr::from_ref(step).addr()) {
                    bar.set_message(format!("{} {}: {text}", step.action.verb(), step.action.object()));
                }
            }
            Progress::Over { step, outcome } => {
                let mark = match &outcome.end {
                    End::Done => "✓".to_owned(),
                    End::Failed { error, .. } => format!("✗ {error}"),
                    End::Held { by } => format!("- held back: {by} failed"),
                    End::Cancelled => "- interrupted".to_owned(),
                };
                let line = format!("  {:>6.2}s  {} {} {mark}", outcome.took.as_secs_f64(), step.action.verb(), outcome.object);
                if let Some(bar) = bars.remove(&std::ptr::from_ref(step).addr()) {
                    bar.finish_and_clear();
                }
                // A terminal that cannot be written to is no reason to stop the work.
                let _ = multi.println(line);
            }
        }
    }

    /// Shows one piece of work that is not a step of a plan.
    pub fn spin(&self, text: &str) -> Option<ProgressBar> {
        let bar = self.multi.as_ref()?.add(spinner());
        bar.set_message(text.to_owned());
        Some(bar)
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_style(ProgressStyle::with_template("  {elapsed:>6} {spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner()));
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Tells whether the caller wants the end of the terminal to be nothing to this process, as `nohup` does (proc(5): SigIgn).
fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|ignored| ignored & (1 << (signal_hook::consts::SIGHUP - 1)) != 0)
}

/// Returns a flag that an interrupt sets, or the end of the terminal; a second one ends the program at once.
pub fn interrupted() -> std::io::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let hangup = (!hangup_is_ignored()).then_some(signal_hook::consts::SIGHUP);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM].into_iter().chain(hangup) {
        signal_hook::flag::register_conditional_shutdown(signal, 130, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}
