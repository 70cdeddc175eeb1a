//! A TAP device, opened as Firecracker opens it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `TUNSETIFF`, `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// `struct ifreq` with flags.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Opens or, where this may, makes the device; it is held as long as the file is open.
pub fn open(name: &str) -> Result<File, String> {
    if name.len() > 15 {
        return Err("Open tap device failed: Invalid interface name".into());
    }
    let device = File::options().read(true).write(true).open("/dev/net/tun");
    let device = device.map_err(|error| format!("Open tap device failed: Couldn't open /dev/net/tun: {error}"))?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut interface = Interface { name: [0; 16], flags: flags as i16, rest: [0; 22] };
    interface.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open, and the kernel reads and writes a struct ifreq, which is 40 bytes and this is.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut interface) };
    if result == 0 {
        return Ok(device);
    }
    let error = io::Error::last_os_error();
    Err(format!(
        "Open tap device failed: Error while creating ifreq structure: {error}. Invalid TUN/TAP Backend provided by {name}. Check our \
         documentation on setting up the network devices."
    ))
}
