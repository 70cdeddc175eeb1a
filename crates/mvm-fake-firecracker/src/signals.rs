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
