//! Signals that Firecracker answers with an exit code of its own. All others do what they do to any process.

/// Signal and code: a terminal that hangs up, a file beyond its limit, too much time on a processor.
const CODES: [(libc::c_int, libc::c_int); 3] = [(libc::SIGHUP, 156), (libc::SIGXFSZ, 151), (libc::SIGXCPU, 154)];

extern "C" fn end(signal: libc::c_int) {
    for (number, code) in CODES {
        if number == signal {
            // SAFETY: _exit may be called in a signal handler, and does not return.
            unsafe { libc::_exit(code) };
        }
    }
}

pub fn answer() {
    for (signal, _) in CODES {
        // SAFETY: the handler does nothing but what is allowed in one.
        unsafe { libc::signal(signal, end as extern "C" fn(libc::c_int) as libc::sighandler_t) };
    }
}

extern "C" fn leave(_: libc::c_int) {
    // SAFETY: exit(2) ends the calling thread alone and accesses no memory of the process.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Ends the first thread, as the last seconds of a large process look: a zombie of which threads still hold all that it has open.
pub fn end_first_thread() {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: the handler does nothing but what is allowed in one; the first thread's number is the process's.
    unsafe {
        libc::signal(libc::SIGUSR1, leave as extern "C" fn(libc::c_int) as libc::sighandler_t);
        libc::syscall(libc::SYS_tgkill, process, process, libc::SIGUSR1);
    }
}
