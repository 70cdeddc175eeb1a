//! The end of the guest.

use rustix::system::RebootCommand;

/// Powers off; if the machine cannot, restarts it, which a VMM started without reboot takes as the end.
pub fn off() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1)
}
