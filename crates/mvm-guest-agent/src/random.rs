//! The kernel's random pool.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{NoArg, Opcode, Setter, opcode};
use zeroize::Zeroize;

/// `struct rand_pool_info` of linux/random.h with 64 bytes.
#[repr(C)]
struct PoolInfo {
    entropy_bits: i32,
    size: i32,
    bytes: [u8; 64],
}

/// `RNDADDENTROPY`: `_IOW('R', 0x03, int[2])`.
const ADD_ENTROPY: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
/// `RNDRESEEDCRNG`: `_IO('R', 0x07)`.
const RESEED: Opcode = opcode::none(b'R', 0x07);

/// Mixes in and credits 64 bytes, and makes the generator start anew from the pool.
///
/// Without it, two guests woken from one snapshot give the same "random" numbers.
///
/// # Errors
/// What the kernel said.
pub fn reseed(entropy: &[u8]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/random")?;
    let mut info = PoolInfo {
        entropy_bits: 512,
        size: 64,
        bytes: entropy.try_into().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "entropy is not 64 bytes"))?,
    };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose `size` says how many bytes follow; all 64 are there.
    let added = unsafe { rustix::ioctl::ioctl(device.as_fd(), Setter::<ADD_ENTROPY, PoolInfo>::new(PoolInfo { ..info })) };
    info.bytes.zeroize();
    added?;
    // SAFETY: RNDRESEEDCRNG takes no argument.
    unsafe { rustix::ioctl::ioctl(device.as_fd(), NoArg::<RESEED>::new())? };
    Ok(())
}
