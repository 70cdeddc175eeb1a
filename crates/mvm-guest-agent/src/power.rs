//! The end of the guest.

use rustix::system::RebootCommand;

/// What a kernel's argument tells of a machine that only halts when it is powered off, and ends when it restarts: Firecracker.
const ENDS_BY_RESTART: &str = "mvm.off=reset";

/// Ends the machine: powers off, or restarts where that is its end. The other one is tried when the first does nothing.
pub fn off() -> ! {
    rustix::fs::sync();
    let mut commands = [RebootCommand::PowerOff, RebootCommand::Restart];
    if ends_by_restart() {
        commands.reverse();
    }
    for command in commands {
        let _ = rustix::system::reboot(command);
    }
    std::process::exit(1)
}

/// Tells whether a restart is the end of this machine.
pub fn ends_by_restart() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|text| says_so(&text))
}

fn says_so(command_line: &str) -> bool {
    command_line.split_ascii_whitespace().any(|argument| argument == ENDS_BY_RESTART)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_how_its_machine_ends() {
        assert!(says_so("console=ttyS0 reboot=k mvm.off=reset quiet\n"));
        assert!(!says_so("console=ttyS0 panic=-1"));
        assert!(!says_so("mvm.off=resetting"));
    }
}
