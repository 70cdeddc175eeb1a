//! TAP devices, by ioctl: the descriptor is the device, and the device is gone when its last descriptor is closed.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::ioctl;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::{During, HostdError};
use crate::netlink::Netlink;

/// `IFNAMSIZ`: a name and its terminating zero.
const NAME_SIZE: usize = 16;

/// `_IOW('T', 202, int)` to `_IOW('T', 204, int)` of linux/if_tun.h.
const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 202);
const TUNSETPERSIST: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 203);
const TUNSETOWNER: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 204);

/// How long the kernel may take to remove what is in a TAP's place, once nobody is in the namespace that it leads to.
const CABLE_PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// `struct ifreq` of `linux/if.h` as `TUNSETIFF` reads it: the name, then the flags in a union of 24 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; NAME_SIZE],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// What a TAP should be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec<'a> {
    /// Its name, at most 15 letters and digits.
    pub name: &'a str,
    /// The bridge that it becomes a port of.
    pub bridge: &'a str,
    /// The MAC of the guest behind it, the only one the bridge sends it frames for.
    pub guest_mac: [u8; 6],
    /// The user who may open it besides root.
    pub owner: Option<u32>,
    /// The alias that marks it as ours.
    pub alias: &'a str,
}

/// Makes a TAP, attaches it to its bridge and brings it up.
///
/// It has no packet information header, but virtio-net's (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`). It is not persistent:
/// nothing can leave it behind.
///
/// Errors when a process still holds a TAP of that name.
pub fn create_tap(netlink: &Netlink, spec: &TapSpec<'_>) -> Result<OwnedFd, HostdError> {
    let name = spec.name;
    let what = || format!("cannot make TAP {name}");
    if name.is_empty() || name.len() >= NAME_SIZE || name.bytes().any(|byte| !byte.is_ascii_alphanumeric()) {
        return Err(HostdError::refused(what(), "an interface name is 1 to 15 letters and digits here"));
    }
    let tap = make(netlink, spec, what)?;
    if let Some(owner) = spec.owner {
        let owner = usize::try_from(owner).expect("a uid fits into a pointer");
        // SAFETY: `TUNSETOWNER` takes the uid as an integer argument and accesses no memory.
        unsafe { ioctl::ioctl(&tap, ioctl::IntegerSetter::<TUNSETOWNER>::new_usize(owner)) }.during(what)?;
    }
    // A port needs no addresses of its own, and without IPv6 it does not talk into the bridge by itself.
    crate::sysctl::set_port(name)?;
    netlink.attach(name, spec.bridge, spec.guest_mac, spec.alias)?;
    Ok(tap)
}

/// Makes the TAP, when what was in its place for an earlier VMM ([`crate::apart`]) is gone.
fn make(netlink: &Netlink, spec: &TapSpec<'_>, what: impl Fn() -> String) -> Result<OwnedFd, HostdError> {
    let deadline = Instant::now() + CABLE_PATIENCE;
    loop {
        let refused = match attach(spec.name, &what) {
            // That is no TAP.
            Err(error @ HostdError::Io { .. }) if error.is_invalid() => error,
            done => return done,
        };
        match netlink.link(spec.name)? {
            Some(link) if link.alias.as_deref() != Some(spec.alias) && link.alias.is_some() => return Err(refused),
            Some(_) if Instant::now() >= deadline => return Err(held(what())),
            // Gone by now, or never there and refused for another reason.
            None if Instant::now() >= deadline => return Err(refused),
            _ => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

fn held(what: String) -> HostdError {
    HostdError::refused(what, "another process still holds it; its VMM runs, or is just ending")
}

/// Opens the TAP of this name, and makes it when there is none.
fn attach(name: &str, what: impl Fn() -> String) -> Result<OwnedFd, HostdError> {
    let tap = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
        .during(|| format!("{}: /dev/net/tun does not open; load the kernel module tun (modprobe tun), as root", what()))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut request = InterfaceRequest {
        name: [0; NAME_SIZE],
        flags: libc::c_short::try_from(flags).expect("the flags of a TAP are 16 bits wide (linux/if_tun.h)"),
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: `TUNSETIFF` reads and writes one `struct ifreq` (linux/if_tun.h), of which `InterfaceRequest` has size and layout.
    let made = unsafe { ioctl::ioctl(&tap, ioctl::Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request)) };
    if made == Err(rustix::io::Errno::BUSY) {
        return Err(held(what()));
    }
    made.during(what)?;
    Ok(tap)
}

/// A TAP that stays although nobody has it open, until another process does; dropped before that, it is gone.
///
/// A TAP has one descriptor at a time and is gone with its last: a process that opens it by its name can do so only in between.
#[derive(Debug)]
pub struct KeptTap {
    name: Option<String>,
}

impl KeptTap {
    /// Keeps a TAP, and closes it.
    pub fn keep(tap: OwnedFd, name: &str) -> Result<Self, HostdError> {
        persist(&tap, 1).during(|| format!("cannot keep TAP {name}"))?;
        Ok(Self { name: Some(name.to_owned()) })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// Lets it end with the process that has it open by now; returns whether the process has.
    ///
    /// When it has not, or cannot be asked, the TAP is kept as before: drop it when the process has ended, as one that is just ending
    /// may still hold it.
    pub fn let_go(&mut self, process: Pid) -> Result<bool, HostdError> {
        let name = self.name().to_owned();
        let what = || format!("cannot have TAP {name} end with its VMM");
        let pidfd = pidfd_open(process, PidfdFlags::empty()).during(what)?;
        let wanted = format!("iff:\t{name}");
        for entry in std::fs::read_dir(format!("/proc/{}/fdinfo", process.as_raw_nonzero())).during(what)? {
            let entry = entry.during(what)?;
            let Some(number) = entry.file_name().to_str().and_then(|text| text.parse().ok()) else { continue };
            let Ok(info) = std::fs::read_to_string(entry.path()) else { continue };
            if info.lines().any(|line| line == wanted) {
                let tap = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).during(what)?;
                persist(&tap, 0).during(what)?;
                self.name = None;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Drop for KeptTap {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else { return };
        let released = attach(&name, || format!("cannot remove TAP {name}"))
            .and_then(|tap| persist(&tap, 0).during(|| format!("cannot remove TAP {name}")));
        if let Err(error) = released {
            // The next sweep finds it.
            tracing::warn!(tap = name, %error, "a TAP stays behind");
        }
    }
}

pub(crate) fn persist(tap: &OwnedFd, on: usize) -> rustix::io::Result<()> {
    // SAFETY: `TUNSETPERSIST` takes an integer argument and accesses no memory.
    unsafe { ioctl::ioctl(tap, ioctl::IntegerSetter::<TUNSETPERSIST>::new_usize(on)) }
}
