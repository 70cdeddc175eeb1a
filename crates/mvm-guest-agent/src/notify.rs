//! The service manager, where the agent is a service: `sd_notify(3)` and `systemctl`.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::agent::Agent;
use crate::power;
use crate::reap::Exit;

/// Names the manager's socket; a leading `@` stands for the NUL of an abstract address.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Tells the manager that drives are mounted and the network is up, so that units ordered after the agent may start.
///
/// # Errors
/// When there is a manager and it cannot be told.
pub fn started() -> io::Result<()> {
    match std::env::var_os(SOCKET) {
        Some(socket) => tell(&socket, b"READY=1"),
        None => Ok(()),
    }
}

fn tell(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(Path::new(socket))?,
    };
    UnixDatagram::unbound()?.send_to_addr(message, &address).map(drop)
}

/// Whether systemd is PID 1 (`sd_booted(3)`).
pub fn systemd_runs() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Has systemd stop its units, unmount and power off.
///
/// # Errors
/// A sentence, when it did not take the request.
pub async fn power_off(agent: &Agent) -> Result<(), String> {
    let mut command = Command::new("systemctl");
    let verb = if power::ends_by_restart() { "reboot" } else { "poweroff" };
    command.args(["--no-block", verb]).stdin(Stdio::null()).stdout(Stdio::null());
    let started = agent.reaper.spawn(&mut command).map_err(|error| format!("systemctl: {error}"))?;
    match started.exit.await {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => Err(format!("systemctl {verb} ended with {exit}")),
        Err(_) => Err("the end of systemctl was not seen".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_is_told_by_path_and_by_abstract_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("mvm-guest-agent-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (manager, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), format!("@{name}").into()),
        ] {
            tell(&socket, b"READY=1").unwrap();
            let mut heard = [0; 16];
            let length = manager.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1");
        }
        assert!(tell(OsStr::new("/nowhere/notify"), b"READY=1").is_err());
    }
}
