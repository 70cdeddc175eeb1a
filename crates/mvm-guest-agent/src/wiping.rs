//! Memory that is given back is wiped first.
//!
//! What the agent frees goes into a snapshot as it is, and among it are copies of secrets that nobody here can reach: those of the
//! ext4 reader, and what commands print through the agent.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, wiping what is freed.
pub struct Wiping;

// SAFETY: everything is the system allocator's; a block is written to before it is freed, within its layout's size, while it is still
// ours. `realloc` is the trait's own, which goes through `alloc` and `dealloc`.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps this function's contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block has this layout and is nobody else's any more.
        unsafe { wipe(block, layout.size()) };
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Overwrites the stack below the caller, where functions that have returned left their copies.
#[inline(never)]
pub fn wipe_stack() {
    const DEPTH: usize = 64 << 10;
    let mut below = [0_u8; DEPTH];
    // SAFETY: it is a local array of that size.
    unsafe { wipe(below.as_mut_ptr(), DEPTH) };
}

/// # Safety
/// `length` bytes from `start` on must be writable.
unsafe fn wipe(start: *mut u8, length: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::write_bytes(start, 0, length) };
    // Without anybody who might read them the compiler leaves writes before a `free` away.
    // SAFETY: no instruction.
    unsafe { std::arch::asm!("/* {0} */", in(reg) start, options(nostack, preserves_flags)) };
}
