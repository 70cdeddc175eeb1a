//! A host of a test's own for the real `mvm`: directories, a network namespace and a mount namespace, of which nothing is left.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mvm_hostd::cgroup::Hierarchy;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;

use crate::firecracker;
use crate::wire::run;

/// How long any command may take; a machine that boots guests in software takes seconds.
const PATIENCE: Duration = Duration::from_secs(180);
/// How many guests may run at the same time on the machine, over all tests.
const SLOTS: usize = 4;

/// A tenant with one pool of one instance; `{...}` stands for the rest of the pool.
pub const ONE: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "web"
instance_resources = { vcpus = 1, mem_mib = 128, data_disk_mib = 64 }
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0, min_warm_seconds = 0, drain_timeout_seconds = 5 }
"#;

/// A document that takes everything away.
pub const NOTHING: &str = "schema_version = 1\nprune_unknown_tenants = true\n";

/// Which virtual machine monitor a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// Machines that are only written down.
    Simulated,
    /// QEMU in software.
    Qemu,
    /// Firecracker in its jail: the one that `MVM_TEST_FIRECRACKER` names, or else a stand-in that speaks its protocol.
    Firecracker,
    /// As `Firecracker`, each in a network namespace of its own.
    FirecrackerApart,
    /// The stand-in, whatever the environment names: for what a real Firecracker cannot be told to do.
    StandIn,
}

/// A host for one test.
pub struct Rig {
    dir: tempfile::TempDir,
    driver: Driver,
    mounts: Vec<String>,
    _slots: Vec<File>,
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub out: Vec<u8>,
    pub err: String,
    pub took: Duration,
}

/// Runs a test on a host of its own that may run so many guests at once.
pub fn on_a_host(guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    let images = images();
    on_a_host_with(images, guests, test);
}

/// As [`on_a_host`], with another virtual machine monitor.
pub fn on_a_host_of(driver: Driver, guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    let images = images();
    on_a_host_as(driver, images, guests, test);
}

/// As [`on_a_host`], for builds in microVMs.
pub fn on_a_host_with_builder(guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    on_a_host_of_with_builder(Driver::Qemu, guests, test);
}

/// As [`on_a_host_with_builder`], with another virtual machine monitor.
pub fn on_a_host_of_with_builder(driver: Driver, guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    let images = images();
    mvm::image::builder::ensure(&images, &|what| eprintln!("image: {what}")).unwrap();
    on_a_host_as(driver, images, guests, test);
}

fn on_a_host_with(images: PathBuf, guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    on_a_host_as(Driver::Qemu, images, guests, test);
}

fn on_a_host_as(driver: Driver, images: PathBuf, guests: usize, test: impl FnOnce(&Rig) + Send + 'static) {
    let slots = take_slots(guests);
    let thread = std::thread::spawn(move || {
        // SAFETY: only namespaces of this one thread change; no file descriptor table or address space is shared anew.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.expect("live tests need root");
        run("mount", &["--make-rprivate", "/"]);
        run("ip", &["link", "set", "lo", "up"]);
        let dir = tempfile::Builder::new().prefix("mvm-live-").tempdir().unwrap();
        let mut rig = Rig { dir, driver, mounts: Vec::new(), _slots: slots };
        rig.mounts = mounts();
        fs::create_dir(rig.state()).unwrap();
        run("cp", &["-al", images.to_str().unwrap(), rig.state().join("images").to_str().unwrap()]);
        match driver {
            Driver::Firecracker | Driver::FirecrackerApart => firecracker::prepare(&rig),
            Driver::StandIn => firecracker::stand_in(&rig, &firecracker::healthy()),
            Driver::Simulated | Driver::Qemu => {}
        }
        test(&rig);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Waits for a share of the machine, which other test processes use too.
fn take_slots(guests: usize) -> Vec<File> {
    let deadline = Instant::now() + Duration::from_secs(900);
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    // One at a time collects its slots, so that two do not wait for each other's.
    let turn = File::create(dir.join("slots.turn")).unwrap();
    turn.lock().unwrap();
    let mut taken = Vec::new();
    while taken.len() < guests.min(SLOTS) {
        assert!(Instant::now() < deadline, "other live tests did not end");
        for number in 0..SLOTS {
            let slot = File::create(dir.join(format!("slot.{number}"))).unwrap();
            if taken.len() < guests.min(SLOTS) && slot.try_lock().is_ok() {
                taken.push(slot);
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    taken
}

/// The built-in image, made once for all tests: where they run is no network to fetch it from.
fn images() -> PathBuf {
    let images = Path::new(env!("CARGO_TARGET_TMPDIR")).join("live-images");
    let agent = Path::new(env!("CARGO_BIN_EXE_mvm")).with_file_name("mvm-guest-agent.static");
    assert!(agent.exists(), "the guest agent is built before the live tests run: {}", agent.display());
    mvm::image::builtin::ensure(&images, &agent, &|what| eprintln!("image: {what}")).unwrap();
    images
}

fn mounts() -> Vec<String> {
    let info = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    info.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect()
}

impl Rig {
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file of the test's and returns its path.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A command on this host.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(args).env("MVM_STATE_DIR", self.state()).env("MVM_RUN_DIR", self.run_dir());
        command.env_remove("MVM_VMM").env_remove("MVM_ACCEL").env_remove(mvm::image::AGENT_VARIABLE);
        match self.driver {
            Driver::Simulated => drop(command.env("MVM_VMM", "simulated")),
            Driver::Qemu => drop(command.env("MVM_VMM", "qemu")),
            Driver::Firecracker => firecracker::choose(self, &mut command),
            Driver::FirecrackerApart => {
                firecracker::choose(self, &mut command);
                command.env("MVM_JAIL_NETNS", "true");
            }
            Driver::StandIn => firecracker::choose_stand_in(self, &mut command),
        }
        // There is no binary cache here, and no build users; nix's own sandbox wants more namespaces than test machines give.
        command.env("NIX_CONFIG", "substituters =\nbuild-users-group =\nsandbox = false\n").env("MVM_BUILDER", "host");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn mvm(&self, args: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_mvm"), args)
    }

    /// Runs `mvm` to its end.
    pub fn ran(&self, args: &[&str]) -> Ran {
        finish(self.mvm(args).spawn().unwrap(), &format!("mvm {args:?}"))
    }

    /// Runs `mvm` with something on its standard input.
    pub fn ran_with(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.mvm(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let ran = finish(child, &format!("mvm {args:?}"));
        // A command that ends early closes its end; what it ends with is what counts.
        let _ = writer.join().unwrap();
        ran
    }

    /// Runs `mvm`, which has to succeed, and returns its output.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        let ran = self.ran(args);
        assert!(ran.status.success(), "mvm {args:?} ended with {}\n{}{}", ran.status, ran.text(), ran.err);
        ran.text()
    }

    /// Runs `mvm`, which has to end with this code, and returns what it says on standard error.
    #[track_caller]
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let ran = self.ran(args);
        assert_eq!(ran.code(), code, "mvm {args:?}\n{}{}", ran.text(), ran.err);
        ran.err
    }

    /// Applies a document.
    #[track_caller]
    pub fn apply(&self, document: &str) -> String {
        let file = self.file("fleet.toml", document);
        self.ok(&["apply", "-f", &file])
    }

    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--output", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Lists the instances as `mvm instance list` shows them.
    pub fn instances(&self) -> Vec<Value> {
        self.json(&["instance", "list"]).as_array().unwrap().clone()
    }

    /// The addresses of the instances.
    pub fn addresses(&self) -> Vec<String> {
        self.instances().iter().map(|one| text(&one["instance"])).collect()
    }

    /// The only instance.
    #[track_caller]
    pub fn only(&self) -> String {
        let all = self.addresses();
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    #[track_caller]
    pub fn state_of(&self, at: &str) -> String {
        text(&self.json(&["instance", "info", at])["state"])
    }

    #[track_caller]
    pub fn pid_of(&self, at: &str) -> i32 {
        let pid = self.json(&["instance", "info", at])["pid"].as_i64().unwrap_or_else(|| panic!("{at} has no process"));
        i32::try_from(pid).unwrap()
    }

    /// Runs a script in a guest and returns its output without the last newline.
    #[track_caller]
    pub fn sh(&self, at: &str, script: &str) -> String {
        self.ok(&["exec", at, "--", "sh", "-c", script]).trim_end().to_owned()
    }

    /// The node's id, once it has one.
    fn node(&self) -> Option<String> {
        let node: Value = serde_json::from_slice(&fs::read(self.state().join("node.json")).ok()?).ok()?;
        node["node_id"].as_str().map(str::to_owned)
    }

    /// The processes of this host's virtual machines.
    pub fn machines(&self) -> Vec<i32> {
        let Some(node) = self.node() else { return Vec::new() };
        let marker = format!("guest=mvm:{node}/");
        // A jail's name tells nothing to people, but what is mounted in it is of this host's directory.
        let here = self.dir.path().file_name().unwrap().to_str().unwrap();
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let jailed = line.starts_with(b"/firecracker\0")
                && fs::read_to_string(format!("/proc/{pid}/mountinfo")).is_ok_and(|all| all.contains(here));
            jailed || line.split(|byte| *byte == 0).any(|arg| arg.starts_with(marker.as_bytes()))
        };
        pids.filter(ours).collect()
    }

    /// Ends the virtual machine of an instance behind mvm's back.
    pub fn crash(&self, at: &str) {
        if self.driver != Driver::Simulated {
            let pid = self.pid_of(at);
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            // The kernel takes its time over a machine's memory.
            self.eventually("it is dead", Duration::from_secs(10), || mvm::infra::process::ProcessIdentity::of(pid).is_none());
            return;
        }
        let path = self.run_dir().join("simulated-vmm.json");
        let mut world: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let machines = world["machines"].as_object_mut().expect("a simulation has machines");
        machines.retain(|_, machine| machine["at"].as_str() != Some(at));
        fs::write(&path, world.to_string()).unwrap();
    }

    /// The directory of an instance.
    pub fn instance_dir(&self, at: &str) -> PathBuf {
        let parts: Vec<&str> = at.split('/').collect();
        self.state().join(format!("tenants/{}/pools/{}/instances/{}", parts[0], parts[1], parts[2]))
    }

    /// Makes the snapshot of an instance one of another instance.
    pub fn swap_snapshot(&self, at: &str) {
        let path = self.instance_dir(at).join("snapshot/manifest.json");
        let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        manifest["instance"] = "acme/web/i-ffffffff".into();
        fs::write(&path, manifest.to_string()).unwrap();
    }

    /// Waits for something that has to become true.
    #[track_caller]
    pub fn eventually(&self, what: &str, within: Duration, mut is: impl FnMut() -> bool) {
        let deadline = Instant::now() + within;
        while !is() {
            assert!(Instant::now() < deadline, "not within {within:?}: {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Writes down how things are when a test fails.
    fn tell(&self) {
        for args in [&["status"][..], &["events", "--tail", "30"]] {
            let output = self.mvm(args).output().unwrap();
            eprintln!("mvm {args:?}\n{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        }
        let mut dirs = vec![self.state().join("tenants")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(entry.path());
                } else if entry.path().extension().is_some_and(|extension| extension == "log") {
                    let text = fs::read(entry.path()).unwrap_or_default();
                    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
                    eprintln!("{}\n{tail}", entry.path().display());
                }
            }
        }
    }

    /// Takes everything away and asserts that nothing of any instance is left on the host.
    #[track_caller]
    pub fn prune(&self) {
        self.apply(NOTHING);
        self.assert_nothing_left();
    }

    #[track_caller]
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.machines(), Vec::<i32>::new(), "processes");
        let links = run("ip", &["-o", "link"]);
        let left: Vec<&str> = links.lines().filter(|line| line.contains(": tn") || line.contains(": br-tenant")).collect();
        assert_eq!(left, Vec::<&str>::new(), "interfaces");
        let rules = run("nft", &["list", "ruleset"]);
        assert!(!rules.contains("mvm") && !rules.contains("tenant"), "rules: {rules}");
        assert_eq!(mounts(), self.mounts, "mounts");
        let mut left: Vec<String> =
            fs::read_dir(self.state()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.retain(|name| !["node.json", ".node.json.tmp", "images", "audit", "secrets.key", "simulated"].contains(&name.as_str()));
        left.retain(|name| name != "tenants" || fs::read_dir(self.state().join("tenants")).unwrap().next().is_some());
        assert_eq!(left, Vec::<String>::new(), "state");
        for part in ["instances", "throwaway", "builders", "jails"] {
            let left: Vec<_> = fs::read_dir(self.run_dir().join(part)).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
            assert_eq!(left, Vec::<PathBuf>::new(), "run directories");
        }
        let node = self.node().unwrap_or_default();
        let groups = Hierarchy::find().ok().and_then(|found| fs::read_dir(found.root().join("mvm")).ok()).into_iter().flatten();
        let left: Vec<_> = groups
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.split('.').next() == Some(&node))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "cgroups");
        let locks = fs::read_dir(self.run_dir().join("locks")).into_iter().flatten();
        let left: Vec<_> =
            locks.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name.contains("tenants")).collect();
        assert_eq!(left, Vec::<String>::new(), "locks");
    }

    /// Finds files below the state directory that hold these bytes.
    pub fn files_with(&self, needle: &[u8]) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut dirs = vec![self.state(), self.run_dir()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                let entry = entry.unwrap();
                let kind = entry.file_type().unwrap();
                if kind.is_dir() {
                    dirs.push(entry.path());
                } else if kind.is_file() && entry.metadata().unwrap().blocks() > 0 && contains(&fs::read(entry.path()).unwrap(), needle) {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.tell();
        }
        for pid in self.machines() {
            signal(pid, Signal::KILL);
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.machines().is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Ran {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    #[track_caller]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }
}

pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    let first = needle[0];
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| *byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

pub fn signal(pid: i32, signal: Signal) {
    // One that ended meanwhile is as wanted.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

/// Waits for a child that was spawned with pipes.
#[track_caller]
pub fn finish(mut child: Child, what: &str) -> Ran {
    let begun = Instant::now();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let err = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        err.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{what} did not end within {PATIENCE:?}: {}{}", String::from_utf8_lossy(&out.join().unwrap()), err.join().unwrap());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let took = begun.elapsed();
    Ran { status, out: out.join().unwrap(), err: err.join().unwrap(), took }
}

/// Small random numbers from a seed that is printed, so that a run can be repeated (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new() -> Random {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = std::env::var("MVM_TEST_SEED").map_or(now, |seed| seed.parse().unwrap());
        eprintln!("MVM_TEST_SEED={seed}");
        Random(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit.max(1)
    }
}
