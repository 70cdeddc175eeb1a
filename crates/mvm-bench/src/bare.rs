//! The bare thing: QEMU started by nobody but this program, with the arguments that it has under mvm.
//!
//! They are read from a machine that runs (`/proc/<pid>/cmdline`), so that they are the same by making: same kernel, devices and
//! drives. Only the descriptors in them are others: a TAP, sockets and memory made beforehand, copies of what the guest writes to, and
//! for all else what the machine had open.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mvm::guest::{GuestClient, GuestControl, Purpose, WakeFixup};
use mvm_hostd::netlink::Netlink;
use mvm_hostd::tap::{TapSpec, create_tap};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::FdFlags;

use crate::live::BRIDGE;

/// How long a bare guest may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a guest is asked again whether it is ready: as often as mvm does, since each answer costs the guest time.
const ASK_AGAIN: Duration = Duration::from_millis(10);

/// What a descriptor in the arguments is for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Role {
    /// The guest's memory.
    Memory,
    /// A listening socket, by its name in the run directory.
    Socket(String),
    /// The network interface.
    Tap,
    /// Where the console goes.
    Console,
    /// The drive that the guest writes to.
    Data,
    /// What is read once, when a snapshot is restored.
    DeviceState,
    /// A drive that is only read, by its name.
    Drive(String),
    /// Kernel or initial RAM disk.
    Image,
}

/// An argument, taken apart at the descriptor in it.
#[derive(Debug)]
struct Argument {
    before: String,
    descriptor: Option<(Role, RawFd)>,
    after: String,
}

/// How a machine is started.
pub struct Machine {
    program: PathBuf,
    arguments: Vec<Argument>,
    mac: [u8; 6],
    mem_bytes: u64,
    /// What the machine had open that is only read.
    shared: Vec<(RawFd, File)>,
}

/// A snapshot of a machine with the data disk that belongs to it, in a directory of its own.
pub struct Snapshot {
    dir: PathBuf,
}

/// A machine with all that it needs made beforehand.
pub struct Prepared {
    command: Command,
    run: PathBuf,
    // Held open until the machine has them.
    _descriptors: Vec<OwnedFd>,
}

/// A machine that runs; dropping it ends it.
pub struct Running(Child);

impl Machine {
    /// Learns from a process.
    pub fn of(pid: i64) -> Result<Machine, String> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let failed = |error: io::Error| format!("cannot look at process {pid}: {error}");
        let line = fs::read(proc.join("cmdline")).map_err(failed)?;
        let words: Vec<String> =
            line.split(|byte| *byte == 0).filter(|word| !word.is_empty()).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let value = |option: &str, prefix: &str| {
            let values = words.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str());
            values.filter_map(|value| value.strip_prefix(prefix)).next().map(str::to_owned).ok_or(format!("QEMU has no {option} {prefix}"))
        };
        let mac = value("-device", "virtio-net-device,")?;
        let mac = mac.rsplit_once("mac=").map_or("", |(_, mac)| mac);
        let mac: Vec<u8> = mac.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
        let mib: u64 = value("-m", "")?.trim_end_matches('M').parse().map_err(|error| format!("-m: {error}"))?;
        let mut arguments = Vec::new();
        let mut shared = Vec::new();
        let mut option = "";
        for word in words.iter().skip(1) {
            let argument = match option {
                // Its own name, so that mvm does not take it for its own.
                "-name" => Argument { before: "guest=bare".into(), descriptor: None, after: String::new() },
                // A text for the kernel, in which nothing is a descriptor.
                "-append" => Argument { before: word.clone(), descriptor: None, after: String::new() },
                _ => take_apart(word)?,
            };
            let open = |fd: &str| File::open(proc.join("fd").join(fd)).map_err(failed);
            match &argument.descriptor {
                Some((Role::Image, fd)) => shared.push((*fd, open(&fd.to_string())?)),
                // QEMU moved it into a set of its own; its old number is another's.
                Some((Role::Drive(name), fd)) => shared.push((*fd, open(&find(&proc, name).map_err(failed)?)?)),
                _ => {}
            }
            arguments.push(argument);
            option = word;
        }
        Ok(Machine {
            program: fs::read_link(proc.join("exe")).map_err(failed)?,
            arguments,
            mac: mac.try_into().map_err(|_| "the guest's MAC address cannot be read".to_owned())?,
            mem_bytes: mib << 20,
            shared,
        })
    }

    /// Makes what it boots with: in `dir`, which has the data disk as `data.img`.
    pub fn prepare_boot(&self, dir: &Path) -> Result<Prepared, String> {
        let failed = |error: io::Error| format!("cannot make memory: {error}");
        let memory = memfd_create("bare", MemfdFlags::CLOEXEC).map(File::from).map_err(|error| failed(error.into()))?;
        memory.set_len(self.mem_bytes).map_err(failed)?;
        self.prepare(dir, memory, None)
    }

    /// Makes what it is restored with: the snapshot's memory is mapped as it is, its data disk copied.
    pub fn prepare_restore(&self, snapshot: &Snapshot, dir: &Path) -> Result<Prepared, String> {
        let failed = |error: io::Error| format!("cannot use the snapshot in {}: {error}", snapshot.dir.display());
        copy(&snapshot.dir.join("data.img"), &dir.join("data.img"))?;
        // QEMU opens what it maps for writing, also when it maps it privately.
        let memory = OpenOptions::new().read(true).write(true).open(snapshot.dir.join("memory")).map_err(failed)?;
        let state = File::open(snapshot.dir.join("device.state")).map_err(failed)?;
        self.prepare(dir, memory, Some(state))
    }

    fn prepare(&self, dir: &Path, memory: File, mut state: Option<File>) -> Result<Prepared, String> {
        let failed = |error: io::Error| format!("cannot prepare a bare machine in {}: {error}", dir.display());
        let mut memory = Some(memory);
        let mut descriptors = Vec::new();
        let mut command = Command::new(&self.program);
        for Argument { before, descriptor, after } in &self.arguments {
            let Some((role, theirs)) = descriptor else {
                command.arg(before);
                continue;
            };
            let open: OwnedFd = match role {
                Role::Memory => memory.take().ok_or("QEMU has two memories")?.into(),
                Role::DeviceState => state.take().ok_or("a machine that boots has no device state")?.into(),
                Role::Socket(name) => {
                    let path = dir.join(name);
                    match fs::remove_file(&path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                        _ => {}
                    }
                    UnixListener::bind(&path).map_err(failed)?.into()
                }
                Role::Tap => self.tap()?,
                Role::Console => OpenOptions::new().append(true).create(true).open(dir.join("console.log")).map_err(failed)?.into(),
                Role::Data => OpenOptions::new().read(true).write(true).open(dir.join("data.img")).map_err(failed)?.into(),
                Role::Drive(_) | Role::Image => {
                    let kept = self.shared.iter().find(|(fd, _)| fd == theirs).ok_or("a descriptor was not kept")?;
                    kept.1.try_clone().map_err(failed)?.into()
                }
            };
            command.arg(format!("{before}{}{after}", open.as_raw_fd()));
            descriptors.push(open);
        }
        let log = File::create(dir.join("vmm.log")).map_err(failed)?;
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let inherit = move || {
            for number in &numbers {
                // SAFETY: the descriptors are open in `Prepared` until after the child was started.
                let fd = unsafe { BorrowedFd::borrow_raw(*number) };
                rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks.
        unsafe { command.pre_exec(inherit) };
        Ok(Prepared { command, run: dir.to_owned(), _descriptors: descriptors })
    }

    fn tap(&self) -> Result<OwnedFd, String> {
        let spec = TapSpec { name: "bare0", bridge: BRIDGE, guest_mac: self.mac, owner: None, alias: "bench" };
        let made = Netlink::open().and_then(|netlink| create_tap(&netlink, &spec));
        made.map_err(|error| mvm::vm::error::with_causes(&error))
    }
}

impl Snapshot {
    /// Copies the snapshot and the data disk of a sleeping instance.
    pub fn copy(instance: &Path, dir: &Path) -> Result<Snapshot, String> {
        for name in mvm::vmm::SNAPSHOT_FILES {
            copy(&instance.join("snapshot").join(name), &dir.join(name))?;
        }
        copy(&instance.join("volumes/data.img"), &dir.join("data.img"))?;
        Ok(Snapshot { dir: dir.to_owned() })
    }
}

impl Prepared {
    /// Boots it and waits until the guest's agent says that it is ready; tells how long that took.
    pub fn boot(self) -> Result<(Duration, Running), String> {
        let run = self.run.clone();
        let (begun, running) = self.launch()?;
        let mut client = connect(&run)?;
        while !client.status(PATIENCE).map_err(|error| error.to_string())?.ready {
            if begun.elapsed() > PATIENCE {
                return Err("a bare guest does not become ready".into());
            }
            std::thread::sleep(ASK_AGAIN);
        }
        Ok((begun.elapsed(), running))
    }

    /// Restores it, lets it run, and has its agent set it right; tells how long the agent's first answer took, and how long it took
    /// until the guest was ready.
    pub fn restore(self) -> Result<(Duration, Duration, Running), String> {
        let run = self.run.clone();
        let (begun, running) = self.launch()?;
        // QEMU goes on by itself once the state is read, when it was told so before.
        let mut monitor = UnixStream::connect(run.join("qmp.sock")).map_err(|error| format!("cannot reach a bare QEMU: {error}"))?;
        monitor
            .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"cont\"}\n")
            .map_err(|error| format!("a bare QEMU takes no commands: {error}"))?;
        let mut client = connect(&run)?;
        let answered = begun.elapsed();
        client.wake(&WakeFixup { entropy: [7; 64] }, Instant::now() + PATIENCE).map_err(|error| error.to_string())?;
        Ok((answered, begun.elapsed(), running))
    }

    fn launch(mut self) -> Result<(Instant, Running), String> {
        let begun = Instant::now();
        let child = self.command.spawn().map_err(|error| format!("cannot start a bare QEMU: {error}"))?;
        Ok((begun, Running(child)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // One that ended by itself is as wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(run: &Path) -> Result<GuestClient, String> {
    let connected = GuestClient::connect(run, Purpose::Lifecycle, Instant::now() + PATIENCE);
    connected.map_err(|error| {
        let log = fs::read_to_string(run.join("vmm.log")).unwrap_or_default();
        format!("a bare guest does not answer: {error}\n{log}")
    })
}

/// Copies a file with its holes.
pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    crate::program::printed(Command::new("cp").arg("--sparse=always").args([from, to])).map(drop)
}

/// Finds the descriptor of a drive by what it is open on: `/memfd:mvm-config (deleted)`, `/var/lib/mvm/images/…/rootfs.ext4`.
fn find(proc: &Path, drive: &str) -> io::Result<String> {
    for entry in fs::read_dir(proc.join("fd"))? {
        let entry = entry?;
        let target = fs::read_link(entry.path())?.to_string_lossy().into_owned();
        let name = target.rsplit(['/', ':']).next().unwrap_or_default();
        if name.trim_start_matches("mvm-").starts_with(drive) {
            return Ok(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("it has no drive {drive}")))
}

/// Finds the descriptor in an argument, and what it is for.
fn take_apart(word: &str) -> Result<Argument, String> {
    let found = ["/proc/self/fd/", "fd=", "fd:"].iter().find_map(|mark| word.find(mark).map(|at| at + mark.len()));
    let Some(begin) = found else { return Ok(Argument { before: word.to_owned(), descriptor: None, after: String::new() }) };
    let end = word[begin..].find(|c: char| !c.is_ascii_digit()).map_or(word.len(), |len| begin + len);
    let number: RawFd = word[begin..end].parse().map_err(|_| format!("{word} names no descriptor"))?;
    let socket = |id: &str| match id.strip_prefix("agent") {
        Some(port) => format!("agent.{port}.sock"),
        None => format!("{id}.sock"),
    };
    let role = if word.starts_with("memory-backend-file,") {
        Role::Memory
    } else if let Some(rest) = word.strip_prefix("socket,id=") {
        Role::Socket(socket(rest.split(',').next().unwrap_or_default()))
    } else if word.starts_with("tap,") {
        Role::Tap
    } else if word.starts_with("fd:") {
        Role::DeviceState
    } else {
        match word.rsplit_once("opaque=").map(|(_, name)| name) {
            Some("console") => Role::Console,
            Some("data") => Role::Data,
            Some(name) => Role::Drive(name.to_owned()),
            None => Role::Image,
        }
    };
    Ok(Argument { before: word[..begin].to_owned(), descriptor: Some((role, number)), after: word[end..].to_owned() })
}
