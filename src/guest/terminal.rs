//! The operator's terminal while a command in a guest has it.

use std::io;

use mvm_guest_api::proto::TtySize;
use rustix::termios::{self, OptionalActions, Termios};

use super::exec::tty_size;

/// Raw mode; the terminal is as before when this is dropped.
pub(super) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts standard input into raw mode.
    pub fn enter() -> io::Result<RawMode> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(RawMode { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// The size of the terminal on standard input.
pub(super) fn size() -> io::Result<TtySize> {
    let size = termios::tcgetwinsize(io::stdin())?;
    Ok(tty_size(size.ws_row, size.ws_col))
}
