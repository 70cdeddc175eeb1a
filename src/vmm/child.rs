//! Child processes that outlive no more than they should: in a PID namespace of their own, and where it is wanted ended with their caller.
//!
//! ```text
//!  Detached      mvm --clone3--> program, process 1 of its namespace
//!
//!  WithCaller    mvm --clone3--> keeper, process 1 of the namespace; ends with the thread that made it
//!                 |
//!                 +--setns, clone3--> program, in that namespace: the kernel ends it with the keeper
//! ```
//!
//! The program is a child of mvm in both cases, so that mvm learns how it ended. A process that becomes another user loses its wish to
//! end with its parent, and the first process of a namespace ends all others in it: hence the keeper, which stays the user that it is.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, set_parent_process_death_signal, setsid, waitpid};
use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

use super::Lifetime;

/// `CLONE_CLEAR_SIGHAND` of linux/sched.h: handlers are none in the child, what is ignored stays so.
const CLEAR_HANDLERS: u64 = 0x1_0000_0000;
/// `CLONE_NEWPID` of linux/sched.h.
const NEW_PID_NAMESPACE: u64 = 0x2000_0000;

/// What a child says when it does not become the program; nobody looks at it.
const NOT_BECOME: libc::c_int = 127;

/// A process that this one started, and that nobody else waits for.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    ended: Option<ExitStatus>,
    /// Ends with this value, and the child with it.
    keeper: Option<Keeper>,
}

impl Child {
    /// Its pid, as this process sees it.
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// How it ended, if it has.
    pub(super) fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.wait_with(WaitOptions::NOHANG)
    }

    /// Waits until it ends.
    pub(super) fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.wait_with(WaitOptions::empty())? {
                return Ok(status);
            }
        }
    }

    fn wait_with(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = end_of(self.pid, options)?;
        }
        Ok(self.ended)
    }
}

impl From<std::process::Child> for Child {
    fn from(child: std::process::Child) -> Self {
        Self { pid: Pid::from_child(&child), ended: None, keeper: None }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let Some(keeper) = self.keeper.take() else { return };
        // It is a child of ours, and as long as nobody has waited for it the pid is its own.
        let _ = kill_process(keeper.pid, Signal::KILL);
        // A namespace's first process is gone when all others are, and ours is when it was waited for.
        let _ = self.wait();
        let _ = end_of(keeper.pid, WaitOptions::empty());
    }
}

fn end_of(pid: Pid, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
    loop {
        match waitpid(Some(pid), options) {
            Ok(ended) => return Ok(ended.map(|(_, status)| ExitStatus::from_raw(status.as_raw()))),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The first process of a PID namespace, which does nothing but end with the thread that made it, and with this process.
#[derive(Debug)]
struct Keeper {
    pid: Pid,
    /// The keeper ends when nobody has this any more.
    _life: OwnedFd,
}

impl Keeper {
    fn start() -> io::Result<Self> {
        let (waits, life) = pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: the child makes system calls only, and does not return.
        match unsafe { clone(NEW_PID_NAMESPACE) }? {
            Some(pid) => Ok(Self { pid, _life: life }),
            None => keep(&waits),
        }
    }

    /// Has the children of the calling thread begin in the keeper's namespace.
    fn enter(&self) -> io::Result<()> {
        let pidfd = pidfd_open(self.pid, PidfdFlags::empty())?;
        Ok(move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::PROCESS_ID)?)
    }
}

/// What a keeper does. System calls only: it is the child of a process with threads.
fn keep(waits: &OwnedFd) -> ! {
    let _ = set_parent_process_death_signal(Some(Signal::KILL));
    let _ = setsid();
    let _ = rustix::process::chdir(c"/");
    let _ = rustix::thread::set_name(c"mvm-keeper");
    // SAFETY: the standard streams of this process are its own; nothing uses them or any other descriptor after this.
    unsafe {
        libc::dup2(waits.as_raw_fd(), 0);
        libc::syscall(libc::SYS_close_range, 1_u32, u32::MAX, 0_u32);
    }
    // SAFETY: it was put there, and stays open.
    let life = unsafe { BorrowedFd::borrow_raw(0) };
    // Nobody writes: this ends when the other end is closed, also where the parent had ended before its death became a signal.
    while rustix::io::read(life, &mut [0_u8]) == Err(Errno::INTR) {}
    // SAFETY: it does not return, and runs nothing of this process that is registered for its end.
    unsafe { libc::_exit(0) }
}

/// As fork(2), with flags of clone(2), and signals as a new program expects them; `None` in the child.
///
/// # Safety
/// The child of a process with threads may make system calls only: no memory is taken or given back, nothing is locked. It must not
/// return to code that does.
unsafe fn clone(flags: u64) -> io::Result<Option<Pid>> {
    // SAFETY: all of its fields are numbers, for which zero means that they are not used.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | CLEAR_HANDLERS;
    arguments.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    // SAFETY: the kernel reads a `clone_args` of the size that it is told. Without `CLONE_VM` and a stack the child goes on here with
    // a copy of the memory.
    match unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(i32::try_from(pid).ok().and_then(Pid::from_raw)),
    }
}

/// A program that a child is to become.
pub(super) struct Program<'a, P> {
    /// The file.
    pub path: &'a Path,
    /// Its arguments, after its name.
    pub arguments: &'a [String],
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
    /// What the child does before.
    pub prepare: P,
}

/// Starts a program in a PID namespace of its own, without environment, in `/`, with an empty standard input.
///
/// A detached one is killed with the calling thread until it becomes another user.
///
/// # Errors
/// What went wrong before the program ran, in the child or here; nothing is left of it then.
///
/// # Safety
/// `prepare` runs in the child of a process with threads: it may make system calls only, and neither allocate, lock nor panic.
pub(super) unsafe fn spawn<P>(program: &Program<'_, P>, lifetime: Lifetime) -> io::Result<Child>
where
    P: Fn() -> io::Result<()> + Sync,
{
    match lifetime {
        // SAFETY: as the caller promises.
        Lifetime::Detached => unsafe { clone_into(program, NEW_PID_NAMESPACE, Parent::Needed) },
        Lifetime::WithCaller => {
            let keeper = Keeper::start()?;
            let child = std::thread::scope(|scope| {
                let starting = std::thread::Builder::new().spawn_scoped(scope, || {
                    keeper.enter()?;
                    // This thread ends at once: it is the keeper that the child ends with.
                    // SAFETY: as the caller promises.
                    unsafe { clone_into(program, 0, Parent::Irrelevant) }
                })?;
                starting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            match child {
                Ok(mut child) => {
                    child.keeper = Some(keeper);
                    Ok(child)
                }
                Err(error) => {
                    let _ = kill_process(keeper.pid, Signal::KILL);
                    let _ = end_of(keeper.pid, WaitOptions::empty());
                    Err(error)
                }
            }
        }
    }
}

/// Whether a child has to have its parent until it is what it is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parent {
    Needed,
    Irrelevant,
}

/// # Safety
/// As of [`spawn`].
unsafe fn clone_into<P>(program: &Program<'_, P>, flags: u64, parent: Parent) -> io::Result<Child>
where
    P: Fn() -> io::Result<()>,
{
    let path = CString::new(program.path.as_os_str().as_bytes())?;
    let words: Vec<CString> = program.arguments.iter().map(|word| CString::new(word.as_bytes())).collect::<Result<_, _>>()?;
    let mut pointers: Vec<*const libc::c_char> = vec![path.as_ptr()];
    pointers.extend(words.iter().map(|word| word.as_ptr()));
    pointers.push(std::ptr::null());
    let environment = [std::ptr::null::<libc::c_char>()];
    let nothing = File::options().read(true).open("/dev/null")?;
    let (told, tells) = pipe_with(PipeFlags::CLOEXEC)?;
    let become_it = || -> io::Result<()> {
        if parent == Parent::Needed {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // One that has ended before that sends no signal any more; it alone reads what the child says.
            let mut reader = [PollFd::new(&tells, PollFlags::empty())];
            if poll(&mut reader, Some(&Timespec::default()))? != 0 {
                return Err(Errno::SRCH.into());
            }
        }
        for (from, to) in [(nothing.as_fd(), 0), (program.stdout.as_fd(), 1), (program.stderr.as_fd(), 2)] {
            // SAFETY: the standard streams are the child's own, and what is put there is open.
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        (program.prepare)()?;
        rustix::process::chdir(c"/")?;
        // SAFETY: the handler is the kernel's own, the set of signals is one that is written here, and the program's path, words and
        // environment end with a null, as the lists of them do; they outlive the call.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::execve(path.as_ptr(), pointers.as_ptr(), environment.as_ptr());
        }
        Err(io::Error::last_os_error())
    };
    // SAFETY: all that takes memory is there; the child makes system calls, and ends or becomes the program.
    let Some(pid) = (unsafe { clone(flags) })? else {
        drop(told);
        let number = match become_it() {
            Ok(()) => libc::EIO,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        let _ = rustix::io::write(&tells, &number.to_ne_bytes());
        // SAFETY: it does not return, and runs nothing of this process that is registered for its end.
        unsafe { libc::_exit(NOT_BECOME) }
    };
    let mut child = Child { pid, ended: None, keeper: None };
    drop(tells);
    let mut number = [0; size_of::<i32>()];
    // Nothing is said by one that became the program, or was killed before.
    match File::from(told).read_exact(&mut number) {
        Err(_) => Ok(child),
        Ok(()) => {
            child.wait()?;
            Err(io::Error::from_raw_os_error(i32::from_ne_bytes(number)))
        }
    }
}

/// The VMMs that this process started itself and that stay zombies until it takes note of their end.
#[derive(Debug, Default)]
pub(super) struct Children {
    running: Mutex<Vec<Child>>,
    ended: Mutex<Vec<(i32, ExitStatus)>>,
}

/// How many ends are remembered until somebody asks.
const MOST_ENDS: usize = 256;

impl Children {
    pub(super) fn add(&self, child: impl Into<Child>) {
        lock(&self.running).push(child.into());
    }

    /// Takes note of those that ended; what is left of their namespaces ends.
    pub(super) fn reap(&self) {
        let mut ends = lock(&self.ended);
        lock(&self.running).retain_mut(|child| match child.try_wait() {
            Ok(None) => true,
            Ok(Some(status)) => {
                // A number that was used again is the later one's.
                ends.retain(|(other, _)| *other != child.pid());
                ends.push((child.pid(), status));
                false
            }
            Err(_) => false,
        });
        let most = ends.len().saturating_sub(MOST_ENDS);
        ends.drain(..most);
    }

    /// How one of them ended, if it has.
    pub(super) fn end_of(&self, pid: i32) -> Option<ExitStatus> {
        self.reap();
        lock(&self.ended).iter().find(|(other, _)| *other == pid).map(|(_, status)| *status)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::super::Liveness;
    use super::super::process::{kill, open, stats, wait};
    use super::*;
    use crate::infra::process::ProcessIdentity;

    #[test]
    fn a_death_is_seen_and_reaped() {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let children = Children::default();
        children.add(child);
        let pidfd = open(&process).unwrap().unwrap();
        assert_eq!(wait(&pidfd, Duration::from_millis(1)).unwrap(), Liveness::Alive);
        children.reap();
        assert_eq!(lock(&children.running).len(), 1);
        kill(&process).unwrap();
        assert_eq!(wait(&pidfd, Duration::ZERO).unwrap(), Liveness::Gone);
        children.reap();
        assert!(lock(&children.running).is_empty());
        assert!(stats(&process).is_none());
        for _ in 0..2 {
            assert_eq!(children.end_of(process.pid).and_then(|status| status.signal()), Some(libc::SIGKILL));
        }
        assert_eq!(children.end_of(1), None);
    }

    /// Runs a shell; returns it with what it says on both streams.
    fn shell(script: &str, lifetime: Lifetime) -> (Child, File) {
        let (said, says) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let arguments = ["-c".to_owned(), script.to_owned()];
        let (stdout, stderr) = (says.try_clone().unwrap(), says);
        let program = Program { path: Path::new("/bin/sh"), arguments: &arguments, stdout, stderr, prepare: || Ok(()) };
        // SAFETY: the closure does nothing.
        let child = unsafe { spawn(&program, lifetime) }.expect("namespaces need root");
        (child, said.into())
    }

    fn text(mut said: File) -> String {
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn all_in_a_namespace_end_with_the_child_and_a_kept_one_with_the_thread_that_began_it() {
        for lifetime in [Lifetime::Detached, Lifetime::WithCaller] {
            // What the child has started holds its end of the pipe open.
            let (mut child, said) = shell("sleep 60 & exit 3", lifetime);
            assert_eq!(child.wait().unwrap().code(), Some(3));
            drop(child);
            assert_eq!(text(said), "", "{lifetime:?}");
        }
        let beginning = std::thread::spawn(|| {
            let (child, said) = shell("exec sleep 60", Lifetime::WithCaller);
            let (pid, keeper) = (child.pid, child.keeper.as_ref().unwrap().pid);
            // Nobody ends them or waits for them: the keeper's pipe stays open, and it is the thread's end that counts.
            std::mem::forget(child);
            (pid, keeper, said)
        });
        let (pid, keeper, said) = beginning.join().unwrap();
        assert_eq!(text(said), "");
        for process in [pid, keeper] {
            assert_eq!(end_of(process, WaitOptions::empty()).unwrap().unwrap().signal(), Some(libc::SIGKILL));
        }
    }
}
