//! The sockets that a QEMU listens on.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::Mode;

use super::spawn::Inherited;
use super::{AGENT_PORTS, agent_socket};
use crate::vmm::VmmError;

/// The QMP socket in the run directory.
pub(super) const QMP_SOCKET: &str = "qmp.sock";

/// The numbers of the listening sockets.
pub(super) struct Sockets {
    pub(super) qmp: RawFd,
    pub(super) agents: [RawFd; AGENT_PORTS],
}

/// Makes the listening sockets of a run directory anew.
pub(super) fn listen_all(run_dir: &Path, inherit: &mut Inherited) -> Result<Sockets, VmmError> {
    let mut listen = |name: &str| {
        let path = run_dir.join(name);
        let mut made = || {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            rustix::fs::chmod(&path, Mode::RUSR | Mode::WUSR)?;
            Ok(inherit.hand(listener))
        };
        made().map_err(|source| VmmError::Io { what: format!("cannot listen on {}", path.display()), source })
    };
    let qmp = listen(QMP_SOCKET)?;
    let mut agents = [-1; AGENT_PORTS];
    for (port, agent) in agents.iter_mut().enumerate() {
        *agent = listen(&agent_socket(port))?;
    }
    Ok(Sockets { qmp, agents })
}
