//! A virtio-serial port as an asynchronous byte stream.
//!
//! Such a device differs from a socket: while the host is not connected it reads as ended and polls as hung up, and
//! later it is alive again. The runtime remembers a hang-up for ever, so the port is watched through an epoll of its
//! own, edge-triggered, and the runtime watches that.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use mvm_guest_api::{PORT_COUNT, PORT_NAME_PREFIX};
use rustix::event::{Timespec, epoll};
use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// An open port.
pub struct Port {
    device: File,
    watch: AsyncFd<OwnedFd>,
}

/// What the end of the host's connection means to the reader of a port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum HangUp {
    /// Nothing: wait for the next connection.
    Wait,
    /// The end of the stream.
    Ends,
}

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When the kernel cannot watch it.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open descriptor for as long as it lives, and the runtime owns it.
    unsafe { AsyncFd::register(fd) }.map_err(|error| error.into_parts().1)
}

/// A reader and writer of a port.
pub struct PortStream {
    port: Arc<Port>,
    hang_up: HangUp,
}

impl Port {
    /// Opens a port by its device.
    ///
    /// # Errors
    /// When it cannot be opened (one process at a time may) or watched.
    pub fn open(device: &Path) -> io::Result<Arc<Port>> {
        let device = OpenOptions::new().read(true).write(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(device)?;
        let inner = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&inner, &device, epoll::EventData::new_u64(0), epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET)?;
        Ok(Arc::new(Port { device, watch: watch(inner)? }))
    }

    /// A reader and writer of this port.
    pub fn stream(self: &Arc<Port>, hang_up: HangUp) -> PortStream {
        PortStream { port: self.clone(), hang_up }
    }

    /// Waits for any change since the last look.
    fn poll_change(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut readiness = ready!(self.watch.poll_read_ready(cx))?;
            let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            let (changed, _) = epoll::wait(&self.watch, &mut events, Some(&at_once)).map(|n| (n > 0, ()))?;
            if changed {
                return Poll::Ready(Ok(()));
            }
            readiness.clear_ready();
        }
    }
}

impl AsyncRead for PortStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match rustix::io::read(&self.port.device, buf.initialize_unfilled()) {
                Ok(0) if self.hang_up == HangUp::Ends => return Poll::Ready(Ok(())),
                Ok(0) | Err(rustix::io::Errno::AGAIN) => ready!(self.port.poll_change(cx))?,
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match rustix::io::write(&self.port.device, bytes) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(rustix::io::Errno::AGAIN) => ready!(self.port.poll_change(cx))?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Waits for the agent's ports, whose names come some time after the driver was loaded, and returns their devices.
///
/// A guest that is reached through vsock has none, and is not kept waiting.
pub fn wait_for_devices() -> Vec<(u32, PathBuf)> {
    const LONGEST: Duration = Duration::from_secs(10);
    const PAUSE: Duration = Duration::from_millis(2);
    let deadline = Instant::now() + LONGEST;
    loop {
        let found = devices();
        let all = u32::try_from(found.len()).is_ok_and(|count| count == PORT_COUNT);
        if all || Path::new("/dev/vsock").exists() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The devices of the agent's ports, by number. The kernel's names are used, since a built-in image has no udev.
pub fn devices() -> Vec<(u32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir("/sys/class/virtio-ports") else {
        return Vec::new();
    };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = std::fs::read_to_string(entry.path().join("name")).ok()?;
            let number = name.trim().strip_prefix(PORT_NAME_PREFIX)?.parse().ok()?;
            (number < PORT_COUNT).then(|| (number, Path::new("/dev").join(entry.file_name())))
        })
        .collect();
    found.sort();
    found
}
