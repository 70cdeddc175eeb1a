//! What a QEMU is handed: listening sockets, logs, files that it opens again as its own user.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};

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

/// Opens a log for appending, as QEMU's console needs it: for writing only, and readable for root only.
pub(super) fn append_to(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    fchmod(&file, Mode::RUSR | Mode::WUSR)?;
    Ok(file)
}

/// Opens a log, naming it when that fails.
pub(super) fn open_log(path: &Path) -> Result<File, VmmError> {
    append_to(path).map_err(|source| VmmError::Io { what: format!("cannot open {}", path.display()), source })
}

/// Opens a file that QEMU opens again through `/proc/self/fd`, for which its own user must be allowed to read it.
pub(super) fn open_for_vmm(path: &Path, uid: Option<u32>) -> Result<File, VmmError> {
    let failed = |source| VmmError::Io { what: format!("cannot open {}", path.display()), source };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    if uid.is_some() && mode & 0o004 == 0 {
        return Err(VmmError::Failed {
            what: "cannot start QEMU",
            why: format!("{} has mode {:o}, and the machine's own user has to read it: chmod o+r", path.display(), mode & 0o777),
        });
    }
    Ok(file)
}

/// Finds an executable in `PATH`.
pub(super) fn find_in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join(program))
        .find(|path| path.is_absolute() && fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.mode() & 0o111 != 0))
}
