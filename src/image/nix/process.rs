//! Runs nix so that nothing of it outlives its end, whatever it started.
//!
//! ```text
//!  mvm -> setpriv --pdeathsig KILL -> unshare --pid --kill-child -> nix (process 1 of its own PID namespace) -> builders, daemons, ...
//! ```
//!
//! The kernel kills `unshare` when mvm ends, nix when `unshare` ends, and everything else in the namespace when nix ends. What the
//! processes may use is watched from outside, through the namespace's own `/proc`.

use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::log::{Lines, Record};
use super::{BuildError, BuildWatch, Limits};

/// How often limits are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How often a directory is measured that programs fill.
const MEASURE: Duration = Duration::from_millis(500);
/// What a program may write on its standard output, in bytes.
const ANSWER: usize = 16 << 20;

/// One build: what it may use is for all of its programs together.
pub struct Run<'a> {
    attribute: String,
    limits: &'a Limits,
    begun: Instant,
    watch: &'a dyn BuildWatch,
    log: RefCell<Record>,
    said: Cell<u64>,
    /// Temporary files of nix.
    tmp: &'a Path,
    /// What lines call something, and what it is called for people.
    names: Vec<(String, String)>,
    /// A directory that programs fill, and when it was measured last.
    filled: Option<(&'a Path, Cell<Instant>)>,
}

/// Whom a program runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The only group.
    pub gid: u32,
}

/// A program that reads what somebody else wrote: it reaches no network, and has of this host what its user has.
pub struct Reader<'p> {
    /// Its name.
    pub program: &'static str,
    /// The package that has it.
    pub package: &'static str,
    /// Its arguments.
    pub args: &'p [&'p OsStr],
    /// All of its environment but where programs are.
    pub env: &'p [(&'static str, &'p OsStr)],
    /// What it reads on its standard input.
    pub input: Option<File>,
    /// Whom it runs as, if not as mvm.
    pub user: Option<User>,
}

/// Takes what a program writes on its standard output.
type Sink<'s> = dyn FnMut(&[u8]) -> Result<(), BuildError> + 's;

/// What a program that ended by itself left.
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub answer: Vec<u8>,
    /// The last of what it said.
    pub said: String,
}

/// What comes from the program's two streams.
enum Heard {
    /// A line, and how many bytes were read for it.
    Line(String, u64),
    /// More of the answer.
    Answer(Vec<u8>),
}

impl<'a> Run<'a> {
    /// Begins a build.
    pub fn new(attribute: &str, limits: &'a Limits, tmp: &'a Path, watch: &'a dyn BuildWatch) -> Self {
        let attribute = attribute.to_owned();
        let log = RefCell::default();
        Self { attribute, limits, begun: Instant::now(), watch, log, said: Cell::new(0), tmp, names: Vec::new(), filled: None }
    }

    /// Has lines call something by the name that people know.
    pub fn naming(mut self, own: &str, shown: &str) -> Self {
        self.names.push((own.to_owned(), shown.to_owned()));
        self
    }

    /// Has programs end when a directory holds more than a build's disk may.
    pub fn filling(mut self, dir: &'a Path) -> Self {
        self.filled = Some((dir, Cell::new(Instant::now())));
        self
    }

    fn named(&self, line: String) -> String {
        self.names.iter().fold(line, |line, (own, shown)| line.replace(own, shown))
    }

    /// Runs one of nix's programs to its end.
    ///
    /// # Errors
    /// When it was ended because it took too much, or somebody wanted it to end.
    pub fn nix(&self, program: &'static str, args: &[&OsStr]) -> Result<Ended, BuildError> {
        self.nix_with(program, args, &[])
    }

    /// The same with something in its environment.
    pub fn nix_with(&self, program: &'static str, args: &[&OsStr], env: &[(&str, &OsStr)]) -> Result<Ended, BuildError> {
        let nix = find(program, "nix-bin")?;
        let mut command = contained(&[])?;
        command.arg(nix).args(["--extra-experimental-features", "nix-command flakes"]);
        // A line without an end is held in nix's memory until then.
        command.args(["--option", "max-build-log-size", &self.limits.log_bytes.to_string()]).args(args);
        // With a daemon the builders would be the daemon's children, out of reach.
        command.env_remove("NIX_REMOTE").env("TMPDIR", self.tmp).env("LC_ALL", "C.UTF-8").env("NO_COLOR", "1").envs(env.iter().copied());
        let mut answer = Vec::new();
        let (status, said) = self.run(command, None, &mut |bytes| {
            answer.extend_from_slice(bytes);
            if answer.len() > ANSWER {
                return Err(BuildError::Flood { attribute: self.attribute.clone(), limit: ANSWER as u64 });
            }
            Ok(())
        })?;
        Ok(Ended { status, answer, said })
    }

    /// Runs a program that reads something to its end, and hands on what it writes; returns how it ended and what it said last.
    ///
    /// # Errors
    /// Those of the one who takes it, and as for nix.
    pub fn reader(&self, reader: Reader<'_>, sink: &mut Sink<'_>) -> Result<(ExitStatus, String), BuildError> {
        let program = find(reader.program, reader.package)?;
        let mut command = contained(&["--net"])?;
        if let Some(User { uid, gid }) = reader.user {
            command.arg(find("setpriv", "util-linux")?).args(["--reuid", &uid.to_string(), "--regid", &gid.to_string()]);
            command.args(["--clear-groups", "--inh-caps=-all", "--no-new-privs"]);
        }
        command.arg(program).args(reader.args).env_clear().envs(reader.env.iter().copied());
        command.env("LC_ALL", "C.UTF-8").env("PATH", std::env::var_os("PATH").unwrap_or_default());
        self.run(command, reader.input, sink)
    }

    fn run(&self, mut command: Command, input: Option<File>, sink: &mut Sink<'_>) -> Result<(ExitStatus, String), BuildError> {
        command.stdin(input.map_or_else(Stdio::null, Stdio::from)).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A terminal's interrupt is for mvm, which ends the build.
        command.process_group(0);
        let child = command.spawn().map_err(|source| BuildError::NoProgram { program: "setpriv", package: "util-linux", source })?;
        let mut running = Running { child, init: None };
        let (send, heard) = sync_channel(256);
        let (stdout, stderr) = (running.child.stdout.take(), running.child.stderr.take());
        let outcome = std::thread::scope(|scope| {
            let lines = send.clone();
            scope.spawn(move || hear_lines(stderr.expect("it is piped"), &lines));
            scope.spawn(move || hear_answer(stdout.expect("it is piped"), &send));
            let outcome = self.follow(&mut running, &heard, sink);
            running.end();
            // What waits to be heard is over: the threads end with their streams.
            drop(heard);
            outcome
        });
        // The words of one program are not taken for those of the next.
        let said = self.log.take().last(2000);
        Ok((outcome?, said))
    }

    fn follow(&self, running: &mut Running, heard: &Receiver<Heard>, sink: &mut Sink<'_>) -> Result<ExitStatus, BuildError> {
        let attribute = || self.attribute.clone();
        let mut last_word = Instant::now();
        let mut looked = Instant::now();
        loop {
            match heard.recv_timeout(TICK) {
                Ok(Heard::Line(line, bytes)) => {
                    last_word = Instant::now();
                    self.said.set(self.said.get() + bytes);
                    if self.said.get() > self.limits.log_bytes {
                        return Err(BuildError::Flood { attribute: attribute(), limit: self.limits.log_bytes });
                    }
                    self.take_line(line);
                }
                Ok(Heard::Answer(bytes)) => {
                    last_word = Instant::now();
                    sink(&bytes)?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Both streams are over; so is everything that could write to them.
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(2)),
            }
            if self.watch.cancelled() {
                return Err(BuildError::Interrupted { attribute: attribute() });
            }
            if self.begun.elapsed() >= self.limits.time {
                let last = self.log.borrow().last_line();
                return Err(BuildError::Time { attribute: attribute(), after: self.limits.time, last });
            }
            if last_word.elapsed() >= self.limits.silence {
                let last = self.log.borrow().last_line();
                return Err(BuildError::Silence { attribute: attribute(), after: self.limits.silence, last });
            }
            if looked.elapsed() >= TICK {
                self.look(running)?;
                looked = Instant::now();
            }
            let ended = running.child.try_wait().map_err(BuildError::at(Path::new("unshare")))?;
            if let Some(status) = ended {
                // What it wrote before its end is still on its way.
                while let Ok(heard) = heard.recv_timeout(Duration::from_secs(2)) {
                    match heard {
                        Heard::Line(line, _) => self.take_line(line),
                        Heard::Answer(bytes) => sink(&bytes)?,
                    }
                }
                return Ok(status);
            }
        }
    }

    fn take_line(&self, line: String) {
        if line.is_empty() {
            return;
        }
        let line = self.named(line);
        self.watch.line(&line);
        self.log.borrow_mut().push(&line);
    }

    /// Looks at what the processes of the build use.
    fn look(&self, running: &mut Running) -> Result<(), BuildError> {
        if let Some((dir, measured)) = &self.filled
            && measured.get().elapsed() >= MEASURE
        {
            if taken(dir) > self.limits.disk_mib << 20 {
                return Err(BuildError::Disk { attribute: self.attribute.clone(), limit_mib: self.limits.disk_mib });
            }
            measured.set(Instant::now());
        }
        let Some(proc) = running.proc() else { return Ok(()) };
        let most = u64::from(self.limits.processes);
        let mut count: u64 = 0;
        let mut pages: u64 = 0;
        // A process that ends meanwhile counts no more; the namespace's end is seen elsewhere.
        for entry in fs::read_dir(&proc).into_iter().flatten().filter_map(Result::ok) {
            let name = entry.file_name();
            if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            count += 1;
            if count > most {
                return Err(BuildError::Processes { attribute: self.attribute.clone(), limit: self.limits.processes });
            }
            // proc(5): statm has the resident pages second.
            let statm = fs::read_to_string(entry.path().join("statm")).unwrap_or_default();
            pages += statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
        }
        let mib = (pages * rustix::param::page_size() as u64) >> 20;
        if mib > u64::from(self.limits.mem_mib) {
            return Err(BuildError::Memory { attribute: self.attribute.clone(), limit_mib: self.limits.mem_mib });
        }
        Ok(())
    }
}

/// The beginning of a command that is in a PID namespace of its own and in others that are asked for, and does not outlive mvm.
fn contained(namespaces: &[&str]) -> Result<Command, BuildError> {
    let (setpriv, unshare) = (find("setpriv", "util-linux")?, find("unshare", "util-linux")?);
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL"]).arg(unshare).args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc"]);
    command.args(namespaces).arg("--");
    Ok(command)
}

/// What the files below a directory take on the disk, in bytes; what goes away meanwhile counts no more.
fn taken(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => taken(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// Finds a program in `PATH`, and where Debian keeps those of root.
fn find(program: &'static str, package: &'static str) -> Result<PathBuf, BuildError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/run/current-system/sw/bin", "/nix/var/nix/profiles/default/bin"];
    std::env::split_paths(&path)
        .chain(more.map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
        .ok_or_else(|| BuildError::NoProgram { program, package, source: std::io::ErrorKind::NotFound.into() })
}

/// Where nix is, if this host has it.
pub fn find_nix() -> Option<PathBuf> {
    find("nix", "nix-bin").ok()
}

/// A program that runs; dropping it ends it with everything that it started.
struct Running {
    child: Child,
    /// Process 1 of the namespace, as this host knows it.
    init: Option<(u32, OwnedFd)>,
}

impl Running {
    /// The namespace's own `/proc`, once it is there.
    fn proc(&mut self) -> Option<PathBuf> {
        let (init, _) = self.init()?;
        let proc = PathBuf::from(format!("/proc/{init}/root/proc"));
        // Before unshare has mounted it, this is the host's.
        let own = fs::read_link(proc.join("self/ns/pid"));
        (own.is_err() && proc.join("1/statm").exists()).then_some(proc)
    }

    /// Process 1 of the namespace, once it is there.
    fn init(&mut self) -> Option<&(u32, OwnedFd)> {
        if self.init.is_none() {
            let pid = self.child.id();
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
            let init: i32 = children.split_ascii_whitespace().next()?.parse().ok()?;
            let fd = pidfd_open(Pid::from_raw(init)?, PidfdFlags::empty()).ok()?;
            self.init = Some((init.unsigned_abs(), fd));
        }
        self.init.as_ref()
    }

    /// Ends it, and returns when nothing of it is left.
    fn end(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(10);
        // One that ended already is as wanted.
        if let Some((_, init)) = self.init() {
            let _ = pidfd_send_signal(init, Signal::KILL);
            // The kernel lets process 1 end last of its namespace, and unshare after it.
            let deadline = Instant::now() + PATIENCE;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn hear_lines(mut stream: impl Read, heard: &SyncSender<Heard>) {
    let mut lines = Lines::default();
    let mut buffer = [0; 16 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                let mut bytes = read as u64;
                let mut over = false;
                lines.take(&buffer[..read], |line| over |= heard.send(Heard::Line(line, std::mem::take(&mut bytes))).is_err());
                // Also a line that never ends is heard.
                over |= bytes > 0 && heard.send(Heard::Line(String::new(), bytes)).is_err();
                if over {
                    return;
                }
            }
        }
    }
    lines.end(&mut |line| {
        // Nobody listens any more when the build was ended.
        let _ = heard.send(Heard::Line(line, 0));
    });
}

fn hear_answer(mut stream: impl Read, heard: &SyncSender<Heard>) {
    let mut buffer = [0; 16 << 10];
    while let Ok(read) = stream.read(&mut buffer) {
        if read == 0 || heard.send(Heard::Answer(buffer[..read].to_vec())).is_err() {
            return;
        }
    }
}
