//! The guest: a guest agent as a child process, which dies with this one.
//!
//! Paused is SIGSTOP. A restored guest is a fresh agent: what a guest knew survives in nothing here. The agent listens on
//! sockets below `<API socket>.guest/`, beside its configuration.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::log::Log;
use crate::package::AgentProgram;

/// How many connections the agent takes on its vsock port.
pub const PLACES: usize = 16;
/// What the agent says when it would have powered off a guest of its own.
const POWERED_OFF: &str = "the system is not mine to power off";
/// How long a guest takes to end after whatever makes it end.
const ENDING: Duration = Duration::from_millis(100);
/// The first port of the host's end of a vsock connection.
const FIRST_PORT: u32 = 1 << 30;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vcpus {
    Off,
    Running,
    Paused,
}

/// The guest and its vsock connections.
#[derive(Debug)]
pub struct Guest {
    state: Mutex<State>,
    changed: Condvar,
    dir: PathBuf,
    log: Log,
}

#[derive(Debug)]
struct State {
    vcpus: Vcpus,
    agent: Option<Pid>,
    has_agent: bool,
    taken: [bool; PLACES],
    links: Vec<Arc<Link>>,
    next_port: u32,
}

/// The guest's end of a vsock connection.
#[derive(Debug)]
pub struct Link {
    pub agent: UnixStream,
    /// The guest forgot it, and the host has not noticed.
    pub is_forgotten: AtomicBool,
    place: usize,
}

impl Guest {
    pub fn new(dir: PathBuf, log: Log) -> Arc<Self> {
        // What a killed one left.
        let _ = fs::remove_dir_all(&dir);
        let state =
            State { vcpus: Vcpus::Off, agent: None, has_agent: false, taken: [false; PLACES], links: Vec::new(), next_port: FIRST_PORT };
        Arc::new(Self { state: Mutex::new(state), changed: Condvar::new(), dir, log })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until vCPUs run.
    pub fn wait_until_running(&self) {
        let mut state = self.lock();
        while state.vcpus != Vcpus::Running {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets vCPUs run, and the agent, which is started when it was not.
    pub fn run(self: &Arc<Self>, program: Option<AgentProgram>, config: Option<&[u8]>, console: &Console) {
        let mut state = self.lock();
        if let Some(agent) = state.agent {
            let _ = kill_process(agent, Signal::CONT);
        } else if let Some(program) = program {
            let result = self.prepare(config).and_then(|()| self.spawn(&program, console));
            match result {
                Ok(pid) => {
                    state.has_agent = true;
                    state.agent = Some(pid);
                }
                Err(error) => console.line(&format!("mvm-agent: cannot be started: {error}")),
            }
        }
        state.vcpus = Vcpus::Running;
        self.changed.notify_all();
    }

    pub fn pause(&self) {
        let mut state = self.lock();
        state.vcpus = Vcpus::Paused;
        if let Some(agent) = state.agent {
            let _ = kill_process(agent, Signal::STOP);
        }
    }

    pub fn is_started(&self) -> bool {
        self.lock().agent.is_some()
    }

    /// Gives the agent another configuration, as another drive does.
    pub fn configure(&self, config: &[u8]) -> std::io::Result<()> {
        if self.dir.exists() { fs::write(self.dir.join("config.json"), without_drives(config)) } else { Ok(()) }
    }

    fn prepare(&self, config: Option<&[u8]>) -> std::io::Result<()> {
        for dir in ["hooks/drain.d", "hooks/pre-sleep.d", "hooks/post-wake.d", "busy"] {
            fs::create_dir_all(self.dir.join(dir))?;
        }
        config.map_or(Ok(()), |config| fs::write(self.dir.join("config.json"), without_drives(config)))
    }

    /// The thread that starts the agent must outlive it: the kernel kills the agent when that thread ends.
    fn spawn(self: &Arc<Self>, program: &AgentProgram, console: &Console) -> std::io::Result<Pid> {
        let (told, tells) = std::sync::mpsc::channel();
        let mut command = self.command(program)?;
        let (output, input) = std::io::pipe()?;
        // A jail has no /dev/null; a pipe that nobody writes to is as empty.
        command.stdin(std::io::pipe()?.0).stdout(input.try_clone()?).stderr(input);
        let (guest, console) = (self.clone(), console.clone());
        std::thread::spawn(move || {
            let spawned = command.spawn();
            // The pipe ends when the agent does.
            drop(command);
            match spawned {
                Ok(child) => {
                    let _ = told.send(Ok(Pid::from_child(&child)));
                    guest.watch(child, BufReader::new(output), &console);
                }
                Err(error) => drop(told.send(Err(error))),
            }
        });
        tells.recv().map_err(std::io::Error::other)?
    }

    fn command(&self, program: &AgentProgram) -> std::io::Result<Command> {
        let mut arguments: Vec<String> = vec!["mvm-guest-agent".into(), "serve".into()];
        let at = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        for place in 0..PLACES {
            arguments.extend(["--listen".into(), at(&place.to_string())]);
        }
        for (option, name) in [("--config", "config.json"), ("--hooks", "hooks"), ("--busy", "busy"), ("--systemctl", "systemctl")] {
            arguments.extend([option.into(), at(name)]);
        }
        let memory = match program {
            AgentProgram::File(path) => {
                let mut command = Command::new(path);
                command.args(&arguments[1..]);
                die_with_parent(&mut command);
                return Ok(command);
            }
            AgentProgram::Memory(memory) => memory.as_raw_fd(),
        };
        let words: Vec<std::ffi::CString> = arguments.into_iter().map(std::ffi::CString::new).collect::<Result<_, _>>()?;
        let mut command = Command::new("mvm-guest-agent");
        die_with_parent(&mut command);
        // Pointers into `words`, which the closure owns, ended by a null.
        let run = move || {
            let mut pointers = [std::ptr::null(); 2 + 2 * PLACES + 8 + 1];
            for (pointer, word) in pointers.iter_mut().zip(&words) {
                *pointer = word.as_ptr();
            }
            let nothing: [*const libc::c_char; 1] = [std::ptr::null()];
            // SAFETY: the descriptor is open in the child as in the parent; both lists end with a null and point to
            // strings that end with one; execveat does not return unless it fails.
            unsafe { libc::syscall(libc::SYS_execveat, memory, c"".as_ptr(), pointers.as_ptr(), nothing.as_ptr(), libc::AT_EMPTY_PATH) };
            Err(std::io::Error::last_os_error())
        };
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(run) };
        Ok(command)
    }

    fn watch(&self, mut child: Child, output: impl BufRead, console: &Console) {
        for line in output.lines().map_while(Result::ok) {
            console.line(&line);
            if line.contains(POWERED_OFF) {
                // Its answer is still on the way to whoever asked for it.
                std::thread::sleep(ENDING);
                break;
            }
        }
        // Its children may have kept the pipe.
        let _ = child.kill();
        let _ = child.wait();
        self.end();
    }

    /// The guest ends by itself, a moment after whoever asked for it was answered.
    pub fn end_soon(self: &Arc<Self>, console: &Console, last_words: &str) {
        console.line(last_words);
        let guest = self.clone();
        std::thread::spawn(move || {
            std::thread::sleep(ENDING);
            guest.wait_until_running();
            guest.end();
        });
    }

    /// The guest has restarted, which is the end of Firecracker.
    fn end(&self) {
        self.log.line("main", "Vmm is stopping.");
        self.log.line("main", "Killing vCPU threads");
        self.tidy();
        self.log.line("main", "Firecracker exiting successfully. exit_code=0");
        std::process::exit(0);
    }

    /// Takes away what is not Firecracker's.
    pub fn tidy(&self) {
        if let Some(agent) = self.lock().agent {
            let _ = kill_process(agent, Signal::KILL);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }

    /// A port of the host's for one more connection.
    pub fn next_port(&self) -> u32 {
        let mut state = self.lock();
        state.next_port += 1;
        state.next_port - 1
    }

    pub fn has_agent(&self) -> bool {
        self.lock().has_agent
    }

    /// A place at the agent, and its socket.
    pub fn take_place(&self) -> Option<(usize, PathBuf)> {
        let mut state = self.lock();
        let place = state.taken.iter().position(|taken| !taken)?;
        state.taken[place] = true;
        Some((place, self.dir.join(place.to_string())))
    }

    pub fn give_back(&self, place: usize) {
        self.lock().taken[place] = false;
    }

    pub fn link(&self, place: usize, agent: UnixStream) -> Arc<Link> {
        let link = Arc::new(Link { agent, is_forgotten: AtomicBool::new(false), place });
        self.lock().links.push(link.clone());
        link
    }

    pub fn unlink(&self, link: &Arc<Link>) {
        let mut state = self.lock();
        let before = state.links.len();
        state.links.retain(|other| !Arc::ptr_eq(other, link));
        if state.links.len() < before {
            state.taken[link.place] = false;
        }
    }

    /// The guest forgets its connections, and the host's ends stay.
    pub fn reset_vsock(&self) {
        let mut state = self.lock();
        for link in std::mem::take(&mut state.links) {
            link.is_forgotten.store(true, Ordering::SeqCst);
            let _ = link.agent.shutdown(Shutdown::Both);
            state.taken[link.place] = false;
        }
    }
}

fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(|| rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)) };
}

/// The serial console.
#[derive(Clone, Debug, Default)]
pub struct Console(Option<Arc<File>>);

impl Console {
    pub fn to(file: File) -> Self {
        Self(Some(Arc::new(file)))
    }

    /// What cannot be written is lost.
    pub fn line(&self, line: &str) {
        let text = format!("{line}\r\n");
        let _ = match &self.0 {
            Some(file) => file.as_ref().write_all(text.as_bytes()),
            None => std::io::stdout().write_all(text.as_bytes()),
        };
    }
}

/// The configuration of a guest that has no drives to mount: the agent is a process, and its drives are the files of another one.
fn without_drives(config: &[u8]) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(config) else { return config.to_vec() };
    if let Some(requires) = value.get_mut("requires").and_then(serde_json::Value::as_object_mut) {
        requires.values_mut().for_each(|required| *required = false.into());
    }
    value.to_string().into_bytes()
}
