//! TAP devices, by ioctl: the descriptor is the device, and the device is gone when its last descriptor is closed.

use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::ioctl;

use crate::error::{During, HostdError};
use crate::netlink::Netlink;

/// `IFNAMSIZ`: a name and its terminating zero.
const NAME_SIZE: usize = 16;

/// `_IOW('T', 202, int)` and `_IOW('T', 204, int)` of linux/if_tun.h.
const TUNSETIFF: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 202);
const TUNSETOWNER: ioctl::Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 204);

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
        return Err(HostdError::refused(what(), "another process still holds it; its VMM runs, or is just ending"));
    }
    made.during(what)?;
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
