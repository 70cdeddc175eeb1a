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

/// Makes the TAP `name` for the user `owner`, attaches it to `bridge`, marks it with `alias` and brings it up.
///
/// It has no packet information header, but virtio-net's (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`). It is not persistent:
/// nothing can leave it behind.
///
/// Errors when a process still holds a TAP of that name.
pub fn create_tap(netlink: &Netlink, name: &str, bridge: &str, owner: Option<u32>, alias: &str) -> Result<OwnedFd, HostdError> {
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
    if let Some(owner) = owner {
        let owner = usize::try_from(owner).expect("a uid fits into a pointer");
        // SAFETY: `TUNSETOWNER` takes the uid as an integer argument and accesses no memory.
        unsafe { ioctl::ioctl(&tap, ioctl::IntegerSetter::<TUNSETOWNER>::new_usize(owner)) }.during(what)?;
    }
    // A port needs no addresses of its own, and without IPv6 it does not talk into the bridge by itself.
    crate::sysctl::set_port(name)?;
    netlink.attach(name, bridge, alias)?;
    Ok(tap)
}
