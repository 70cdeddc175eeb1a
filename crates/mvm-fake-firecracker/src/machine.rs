//! One microVM: what was configured, its phase, and what each request does.

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::de::DeserializeOwned;
use serde_json::json;

use crate::bodies::{
    Action, ActionType, Balloon, BalloonStatsUpdate, BalloonUpdate, BootSource, CpuTemplate, Drive, DriveUpdate, Entropy, FullConfig,
    HugePages, IoEngine, Logger, MachineConfig, MachineConfigUpdate, MemoryBackendType, Metrics, NetworkInterface, NetworkInterfaceUpdate,
    Serial, SnapshotCreate, SnapshotLoad, SnapshotType, Vm, VmState, Vsock,
};
use crate::faults;
use crate::guest::{Console, Guest};
use crate::http::Request;
use crate::log::{Log, open_output};
use crate::options::Options;
use crate::package::Package;
use crate::script::{Deed, Script};
use crate::snapshot::{Memory, State, read_state, write_state};
use crate::vsock::Device;
use crate::{config_drive, tap};

/// What a request came to.
#[derive(Debug)]
pub enum Outcome {
    Done {
        deprecated: bool,
    },
    Document(String),
    Fault(String),
    /// It is answered, and then the process ends.
    Fatal(String),
}

const DONE: Outcome = Outcome::Done { deprecated: false };

type Answer = Result<Outcome, String>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    NotStarted,
    Running,
    Paused,
}

/// A microVM that clients share.
#[derive(Debug)]
pub struct Machine {
    inner: Mutex<Inner>,
    pub log: Log,
    pub script: Arc<Script>,
    guest: Arc<Guest>,
    package: Package,
    id: String,
}

/// What one request at a time looks at and changes.
#[derive(Debug)]
pub struct Inner {
    phase: Phase,
    /// Whether something was configured after which nothing can be loaded.
    is_configured: bool,
    machine: MachineConfig,
    boot_source: BootSource,
    drives: Vec<Drive>,
    network_interfaces: Vec<(NetworkInterface, Option<File>)>,
    vsock: Option<(Vsock, Device)>,
    entropy: Option<Entropy>,
    balloon: Option<Balloon>,
    serial: Serial,
    metrics: Option<File>,
    memory: Memory,
    console: Console,
}

impl Machine {
    pub fn new(options: Options, script: Arc<Script>, log: Log, package: Package) -> Arc<Self> {
        let mut name = options.api_sock.file_name().unwrap_or_default().to_owned();
        name.push(".guest");
        let dir = options.api_sock.parent().unwrap_or(Path::new(".")).join(name);
        let inner = Inner {
            phase: Phase::NotStarted,
            is_configured: false,
            machine: MachineConfig::default(),
            boot_source: BootSource::default(),
            drives: Vec::new(),
            network_interfaces: Vec::new(),
            vsock: None,
            entropy: None,
            balloon: None,
            serial: Serial::default(),
            metrics: None,
            memory: Memory::of_a_new_guest(),
            console: Console::default(),
        };
        let guest = Guest::new(dir, log.clone());
        Arc::new(Self { inner: Mutex::new(inner), log, script, guest, package, id: options.id })
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The end after a load that failed.
    pub fn fail(&self) -> ! {
        self.log.line("main", "RunWithApiError error: Failed to build MicroVM: Loading snapshot failed..");
        eprintln!("Error: RunWithApi(BuildMicroVmError(Restore))");
        self.log.line("main", "Firecracker exiting with error. exit_code=1");
        self.guest.tidy();
        std::process::exit(1)
    }

    /// Does what is asked; `middle` is called where a call can be half done.
    pub fn handle(&self, inner: &mut Inner, request: &Request, middle: &mut dyn FnMut()) -> Outcome {
        self.route(inner, request, middle).unwrap_or_else(Outcome::Fault)
    }

    fn route(&self, inner: &mut Inner, request: &Request, middle: &mut dyn FnMut()) -> Answer {
        let method = request.method.as_str();
        let path = request.path.trim_matches('/');
        let parts: Vec<&str> = path.split('/').collect();
        match (method, &request.body) {
            ("GET", Some(_)) => return Err("GET request cannot have a body.".into()),
            ("PUT", None) => return Err("Empty PUT request.".into()),
            ("PATCH", None) if !path.starts_with("balloon/hinting") => return Err("Empty PATCH request.".into()),
            _ => {}
        }
        let body = request.body.as_deref().unwrap_or_default();
        let nowhere = || format!("Invalid request method and/or path: {method} {}.", parts[0]);
        match (method, &parts[..]) {
            ("GET", [""]) => Ok(self.info(inner)),
            ("GET", ["version"]) => Ok(Outcome::Document(json!({ "firecracker_version": self.script.version }).to_string())),
            ("GET", ["machine-config"]) => document(&inner.machine),
            ("GET", ["vm", "config"]) => document(&inner.config()),
            ("GET", ["balloon"]) => inner.balloon.as_ref().map_or(Err("Balloon config error: No balloon device found.".into()), document),
            ("GET", ["balloon", "statistics"]) => inner.booted().and_then(Inner::balloon_statistics),
            ("PUT", ["machine-config"]) => self.machine_config(inner, parse(body)?),
            ("PATCH", ["machine-config"]) => self.patch_machine_config(inner, parse(body)?),
            ("PUT", ["boot-source"]) => inner.boot_source(parse(body)?),
            ("PUT", ["cpu-config"]) => inner.before_boot().map(|_| DONE),
            ("PUT", ["drives", ..]) => inner.drive(id_of(&parts)?, parse(body)?),
            ("PATCH", ["drives", ..]) => self.patch_drive(inner, id_of(&parts)?, parse(body)?),
            ("PUT", ["network-interfaces", ..]) => self.network_interface(inner, id_of(&parts)?, parse(body)?),
            ("PATCH", ["network-interfaces", ..]) => inner.patch_network_interface(id_of(&parts)?, parse(body)?),
            ("DELETE", ["drives" | "network-interfaces" | "pmem", ..]) => inner.booted().and_then(|_| Err(faults::NO_PCI.into())),
            ("PUT", ["vsock"]) => self.vsock(inner, parse(body)?),
            ("PUT", ["entropy"]) => inner.entropy(parse(body)?),
            ("PUT", ["balloon"]) => inner.set_balloon(parse(body)?),
            ("PATCH", ["balloon"]) => inner.patch_balloon(&parse(body)?),
            ("PATCH", ["balloon", "statistics"]) => inner.patch_balloon_statistics(&parse(body)?),
            ("PUT", ["serial"]) => inner.set_serial(parse(body)?),
            ("PUT", ["logger"]) => self.logger(inner, &parse(body)?),
            ("PUT", ["metrics"]) => inner.set_metrics(&parse(body)?),
            ("PUT", ["actions"]) => self.action(inner, &parse(body)?),
            ("PATCH", ["vm"]) => self.set_state(inner, &parse(body)?),
            ("PUT", ["snapshot", "create"]) => self.create(inner, &parse(body)?, middle),
            ("PUT", ["snapshot", "load"]) => self.load(inner, parse(body)?),
            ("PUT", ["snapshot"]) => Err("Missing snapshot operation type.".into()),
            ("PUT", ["snapshot", ..]) => Err(format!("Invalid request method and/or path: PUT /{path}.")),
            _ => Err(nowhere()),
        }
    }

    fn info(&self, inner: &Inner) -> Outcome {
        let state = match inner.phase {
            Phase::NotStarted => "Not started",
            Phase::Running => "Running",
            Phase::Paused => "Paused",
        };
        let version = &self.script.version;
        let id = json!(self.id);
        Outcome::Document(format!(r#"{{"id":{id},"state":"{state}","vmm_version":"{version}","app_name":"Firecracker"}}"#))
    }

    fn machine_config(&self, inner: &mut Inner, config: MachineConfig) -> Answer {
        inner.configure()?;
        check_machine(&config, inner.balloon.as_ref())?;
        let deprecated = config.cpu_template.is_some();
        let is_none = config.cpu_template == Some(CpuTemplate::None);
        inner.machine = MachineConfig { cpu_template: config.cpu_template.filter(|_| !is_none), ..config };
        Ok(Outcome::Done { deprecated })
    }

    fn patch_machine_config(&self, inner: &mut Inner, update: MachineConfigUpdate) -> Answer {
        let now = inner.machine.clone();
        let any = update.vcpu_count.is_some()
            || update.mem_size_mib.is_some()
            || update.smt.is_some()
            || update.cpu_template.is_some()
            || update.track_dirty_pages.is_some()
            || update.huge_pages.is_some();
        if !any {
            return Err("Empty PATCH request.".into());
        }
        let config = MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(now.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(now.mem_size_mib),
            smt: update.smt.unwrap_or(now.smt),
            cpu_template: update.cpu_template.or(now.cpu_template),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(now.track_dirty_pages),
            huge_pages: update.huge_pages.unwrap_or(now.huge_pages),
        };
        self.machine_config(inner, config)
    }

    fn patch_drive(&self, inner: &mut Inner, id: &str, update: DriveUpdate) -> Answer {
        same_id(id, &update.drive_id)?;
        inner.booted()?;
        let unable =
            |why: &str| format!("Drive config error: Unable to patch the block device: {why} Please verify the request arguments.");
        let drive = inner.drives.iter_mut().find(|drive| drive.drive_id == id);
        let drive = drive.ok_or_else(|| unable("Failed perform action on device: Device not found"))?;
        if let Some(path) = update.path_on_host {
            open_drive(&path, drive.is_read_only).map_err(|why| unable(&format!("Block: {why}")))?;
            if let Some(config) = config_drive::read(Path::new(&path)) {
                self.guest.configure(&config).map_err(|error| unable(&error.to_string()))?;
            }
            drive.path_on_host = Some(path);
        }
        drive.rate_limiter = update.rate_limiter.or(drive.rate_limiter.take());
        Ok(DONE)
    }

    fn network_interface(&self, inner: &mut Inner, id: &str, interface: NetworkInterface) -> Answer {
        if id != interface.iface_id {
            return Err(format!("The id from the path [{id}] does not match the id from the body [{}]!", interface.iface_id));
        }
        inner.insert()?;
        let others = || inner.network_interfaces.iter().filter(|(other, _)| other.iface_id != id);
        if let Some(mac) = &interface.guest_mac
            && others().any(|(other, _)| other.guest_mac.as_ref() == Some(mac))
        {
            return Err(format!("{}The MAC address is already in use: {}", faults::NETWORK, String::from(mac.clone())));
        }
        // The old one goes first, whatever comes of the new one.
        inner.network_interfaces.retain(|(other, _)| other.iface_id != id);
        let tap =
            self.tap(&interface.host_dev_name).map_err(|why| format!("{}Could not create the network device: {why}", faults::NETWORK))?;
        inner.network_interfaces.push((interface, tap));
        Ok(DONE)
    }

    fn tap(&self, name: &str) -> Result<Option<File>, String> {
        if self.script.pretend_tap { Ok(None) } else { tap::open(name).map(Some) }
    }

    fn vsock(&self, inner: &mut Inner, vsock: Vsock) -> Answer {
        inner.configure()?;
        // The old one goes first, whatever comes of the new one.
        if let Some((_, device)) = inner.vsock.take() {
            device.replace();
        }
        let device = Device::bind(&vsock.uds_path, &self.guest, &self.script).map_err(|error| format!("{}{error}", faults::VSOCK))?;
        let deprecated = vsock.vsock_id.is_some();
        inner.vsock = Some((vsock, device));
        Ok(Outcome::Done { deprecated })
    }

    fn logger(&self, inner: &Inner, logger: &Logger) -> Answer {
        inner.before_boot()?;
        if let Some(path) = &logger.log_path {
            self.log.redirect(Path::new(path)).map_err(|error| format!("Logger error: Failed to open target file: {error}"))?;
        }
        Ok(DONE)
    }

    fn action(&self, inner: &mut Inner, action: &Action) -> Answer {
        match action.action_type {
            ActionType::InstanceStart => self.start(inner),
            ActionType::FlushMetrics => {
                inner.booted()?;
                inner.flush_metrics();
                Ok(DONE)
            }
            ActionType::SendCtrlAltDel => {
                inner.booted()?;
                if self.script.keyboard {
                    self.guest.end_soon(&inner.console, "reboot: Restarting system");
                }
                Ok(DONE)
            }
        }
    }

    fn start(&self, inner: &mut Inner) -> Answer {
        inner.before_boot()?;
        if inner.boot_source.kernel_image_path.is_empty() {
            return Err(faults::NO_KERNEL.into());
        }
        if !self.script.any_kernel && !is_kernel(&inner.boot_source.kernel_image_path) {
            return Err(faults::BAD_KERNEL.into());
        }
        inner.open_console().map_err(|why| format!("Start microvm error: {why}"))?;
        inner.console.line("[    0.000000] Linux version 6.1.0-fake");
        let arguments = inner.boot_source.boot_args.clone().unwrap_or_default();
        inner.console.line(&format!("[    0.000000] Command line: {arguments}"));
        inner.is_configured = true;
        let has_root = inner.boot_source.initrd_path.is_some() || inner.drives.iter().any(|drive| drive.is_root_device);
        inner.memory.is_whole = has_root;
        self.run(inner, "[    1.000000] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)");
        Ok(DONE)
    }

    /// Lets the guest run; one that cannot live says why and ends.
    fn run(&self, inner: &mut Inner, last_words: &str) {
        inner.phase = Phase::Running;
        inner.memory.run();
        if inner.memory.is_whole {
            let needs_agent = !self.guest.is_started();
            let program = if needs_agent { self.package.furnish().and_then(|()| self.package.agent()) } else { Ok(None) };
            let program = program.unwrap_or_else(|error| {
                inner.console.line(&format!("mvm-agent: cannot be started: {error}"));
                None
            });
            let drives = inner.drives.iter().filter_map(|drive| drive.path_on_host.as_ref());
            let config = drives.map(PathBuf::from).find_map(|path| config_drive::read(&path));
            self.guest.run(program, config.as_deref(), &inner.console);
        } else {
            self.guest.run(None, None, &inner.console);
            self.guest.end_soon(&inner.console, last_words);
        }
        let script = self.script.clone();
        if let Some((_, deeds)) = script.deeds("running") {
            std::thread::spawn(move || deeds.iter().for_each(Deed::alone));
        }
    }

    fn set_state(&self, inner: &mut Inner, vm: &Vm) -> Answer {
        inner.booted()?;
        match (&vm.state, inner.phase) {
            (VmState::Paused, Phase::Running) => {
                self.guest.pause();
                inner.phase = Phase::Paused;
            }
            (VmState::Resumed, Phase::Paused) => self.run(inner, PANIC),
            _ => {}
        }
        Ok(DONE)
    }

    fn create(&self, inner: &mut Inner, body: &SnapshotCreate, middle: &mut dyn FnMut()) -> Answer {
        inner.booted()?;
        // Also when it is refused.
        self.guest.reset_vsock();
        if inner.phase == Phase::Running {
            return Err(faults::NOT_PAUSED.into());
        }
        let open = |path: &str, what: &str| {
            let opened = File::options().write(true).create(true).truncate(false).open(path);
            opened.map_err(|error| format!("Create snapshot error: Cannot perform open on the {what} backing file: {error}"))
        };
        let written = |error: std::io::Error| format!("Create snapshot error: Cannot write the snapshot: {error}");
        let mut state = open(&body.snapshot_path, "snapshot")?;
        write_state(&mut state, &inner.state(), &self.script.snapshot_version).map_err(written)?;
        let mut memory = open(&body.mem_file_path, "memory")?;
        let all = body.snapshot_type == SnapshotType::Full || !inner.machine.track_dirty_pages;
        let size = (inner.machine.mem_size_mib as u64) << 20;
        inner.memory.write(&mut memory, size, all, middle).map_err(written)?;
        Ok(DONE)
    }

    fn load(&self, inner: &mut Inner, body: SnapshotLoad) -> Answer {
        let deprecated = body.mem_file_path.is_some() || body.enable_diff_snapshots;
        let memory = match (&body.mem_backend, &body.mem_file_path) {
            (Some(_), Some(_)) => {
                return Err(faults::json(&"too many fields: either `mem_backend` or `mem_file_path` exclusively is required"));
            }
            (None, None) => return Err(faults::json(&"missing field: either `mem_backend` or `mem_file_path` is required")),
            (Some(backend), None) => (&backend.backend_type, &backend.backend_path),
            (None, Some(path)) => (&MemoryBackendType::File, path),
        };
        inner.before_boot()?;
        if inner.is_configured {
            return Err(faults::LOAD_TOO_LATE.into());
        }
        match self.restore(inner, &body, memory) {
            Ok(()) => {}
            Err(why) => return Ok(Outcome::Fatal(format!("{}{why}", faults::RESTORE))),
        }
        inner.phase = Phase::Paused;
        if body.resume_vm {
            self.run(inner, PANIC);
        }
        Ok(Outcome::Done { deprecated })
    }

    fn restore(&self, inner: &mut Inner, body: &SnapshotLoad, memory: (&MemoryBackendType, &String)) -> Result<(), String> {
        let mut state =
            read_state(&body.snapshot_path, &self.script.snapshot_version).map_err(|why| format!("{}{why}", faults::RESTORE_STATE))?;
        for change in &body.network_overrides {
            let interface = state.network_interfaces.iter_mut().find(|interface| interface.iface_id == change.iface_id);
            interface
                .ok_or_else(|| format!("{}Unknown Network Device.", faults::RESTORE_STATE))?
                .host_dev_name
                .clone_from(&change.host_dev_name);
        }
        if let Some(change) = &body.vsock_override {
            let vsock = state.vsock.as_mut().ok_or_else(|| format!("{}Unknown Vsock Device.", faults::RESTORE_STATE))?;
            vsock.uds_path.clone_from(&change.uds_path);
        }
        if *memory.0 == MemoryBackendType::Uffd {
            let connected = std::os::unix::net::UnixStream::connect(memory.1);
            let why = connected.map_or_else(|error| error.to_string(), |_| "it gives no memory".into());
            return Err(format!(
                "Failed to load guest memory: Error creating guest memory from uffd: Failed to connect to UDS Unix stream: {why}"
            ));
        }
        inner.memory = Memory::read(memory.1, &state)?;
        let devices = |why: String| format!("{}{why}", faults::RESTORE_DEVICES);
        for drive in &state.drives {
            let path = drive.path_on_host.as_deref().unwrap_or_default();
            open_drive(path, drive.is_read_only).map_err(|why| devices(format!("Block: {why}")))?;
        }
        for interface in state.network_interfaces {
            let tap = self.tap(&interface.host_dev_name).map_err(|why| devices(format!("Net: {why}")))?;
            inner.network_interfaces.push((interface, tap));
        }
        if let Some(vsock) = state.vsock {
            let device = Device::bind(&vsock.uds_path, &self.guest, &self.script)
                .map_err(|error| devices(format!("VsockUnixBackend: Error binding to the host-side Unix socket: {error}")))?;
            inner.vsock = Some((vsock, device));
        }
        inner.open_console().map_err(|why| format!("Failed to build microVM from snapshot: {why}"))?;
        (inner.drives, inner.boot_source) = (state.drives, state.boot_source);
        (inner.entropy, inner.balloon) = (state.entropy, state.balloon);
        inner.machine = MachineConfig { track_dirty_pages: body.track_dirty_pages || body.enable_diff_snapshots, ..state.machine };
        Ok(())
    }
}

const PANIC: &str = "Kernel panic - not syncing: memory is not what the guest left";

impl Inner {
    fn before_boot(&self) -> Result<(), String> {
        if self.phase == Phase::NotStarted { Ok(()) } else { Err(faults::POSTBOOT.into()) }
    }

    fn booted(&self) -> Result<&Self, String> {
        if self.phase == Phase::NotStarted { Err(faults::PREBOOT.into()) } else { Ok(self) }
    }

    /// Before something after which nothing can be loaded, also when it is refused.
    fn configure(&mut self) -> Result<(), String> {
        self.before_boot()?;
        self.is_configured = true;
        Ok(())
    }

    /// The same for devices, which Firecracker could add later if there were PCI.
    fn insert(&mut self) -> Result<(), String> {
        self.configure().map_err(|_| faults::NO_PCI.into())
    }

    fn boot_source(&mut self, source: BootSource) -> Answer {
        self.configure()?;
        File::open(&source.kernel_image_path).map_err(|error| format!("Boot source error: The kernel file cannot be opened: {error}"))?;
        if let Some(initrd) = &source.initrd_path {
            File::open(initrd).map_err(|error| {
                format!("Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. {error}")
            })?;
        }
        if source.boot_args.as_ref().is_some_and(|arguments| arguments.len() > 2047) {
            return Err("Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.".into());
        }
        self.boot_source = source;
        Ok(DONE)
    }

    fn drive(&mut self, id: &str, mut drive: Drive) -> Answer {
        same_id(id, &drive.drive_id)?;
        self.insert()?;
        let is_other_root = |other: &Drive| other.is_root_device && other.drive_id != id;
        if drive.is_root_device && self.drives.iter().any(is_other_root) {
            return Err("Drive config error: A root block device already exists!".into());
        }
        let (Some(path), None) = (&drive.path_on_host, &drive.socket) else {
            return Err(format!("{}Invalid block config.", faults::DRIVE));
        };
        open_drive(path, drive.is_read_only).map_err(|why| format!("{}{why}", faults::DRIVE))?;
        drive.is_read_only = Some(drive.is_read_only.unwrap_or(false));
        drive.io_engine = Some(drive.io_engine.unwrap_or(IoEngine::Sync));
        match self.drives.iter().position(|other| other.drive_id == id) {
            Some(at) => self.drives[at] = drive,
            None => self.drives.push(drive),
        }
        // The root device is first.
        self.drives.sort_by_key(|drive| !drive.is_root_device);
        Ok(DONE)
    }

    fn patch_network_interface(&mut self, id: &str, update: NetworkInterfaceUpdate) -> Answer {
        if id != update.iface_id {
            return Err(format!("The id from the path [{id}] does not match the id from the body [{}]!", update.iface_id));
        }
        self.booted()?;
        let found = self.network_interfaces.iter_mut().find(|(interface, _)| interface.iface_id == id);
        let (interface, _) = found.ok_or("Internal VMM error: Failed perform action on device: Device not found")?;
        interface.rx_rate_limiter = update.rx_rate_limiter.or(interface.rx_rate_limiter.take());
        interface.tx_rate_limiter = update.tx_rate_limiter.or(interface.tx_rate_limiter.take());
        Ok(DONE)
    }

    fn entropy(&mut self, entropy: Entropy) -> Answer {
        self.configure()?;
        self.entropy = Some(entropy);
        Ok(DONE)
    }

    fn set_balloon(&mut self, balloon: Balloon) -> Answer {
        self.configure()?;
        if balloon.amount_mib as usize > self.machine.mem_size_mib {
            return Err("Balloon config error: Amount of pages requested is too large.".into());
        }
        self.balloon = Some(balloon);
        Ok(DONE)
    }

    fn patch_balloon(&mut self, update: &BalloonUpdate) -> Answer {
        self.booted()?;
        let most = self.machine.mem_size_mib;
        let balloon = self.balloon.as_mut().ok_or("Balloon update error: Failed perform action on device: Device not found")?;
        if update.amount_mib as usize > most {
            return Err(format!("Balloon update error: Balloon: Requested memory should be less than {}MiB", update.amount_mib));
        }
        balloon.amount_mib = update.amount_mib;
        Ok(DONE)
    }

    fn patch_balloon_statistics(&mut self, update: &BalloonStatsUpdate) -> Answer {
        self.booted()?;
        let balloon = self.balloon.as_mut().ok_or("Balloon update error: Failed perform action on device: Device not found")?;
        if (balloon.stats_polling_interval_s == 0) != (update.stats_polling_interval_s == 0) {
            return Err("Balloon update error: Balloon: Statistics cannot be enabled/disabled after activation.".into());
        }
        balloon.stats_polling_interval_s = update.stats_polling_interval_s;
        Ok(DONE)
    }

    fn balloon_statistics(&self) -> Answer {
        let balloon = self.balloon.as_ref().ok_or("Balloon config error: No balloon device found.")?;
        if balloon.stats_polling_interval_s == 0 {
            return Err("Internal VMM error: Balloon: Received stats query when stats are disabled.".into());
        }
        let (mib, pages) = (balloon.amount_mib, u64::from(balloon.amount_mib) * 256);
        document(&json!({ "target_pages": pages, "actual_pages": pages, "target_mib": mib, "actual_mib": mib }))
    }

    fn set_serial(&mut self, serial: Serial) -> Answer {
        self.before_boot()?;
        self.serial = serial;
        Ok(DONE)
    }

    fn set_metrics(&mut self, metrics: &Metrics) -> Answer {
        self.before_boot()?;
        if self.metrics.is_some() {
            let why = "Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed.";
            return Err(format!("Metrics error: {why}"));
        }
        let file = open_output(Path::new(&metrics.metrics_path));
        self.metrics =
            Some(file.map_err(|error| format!("Metrics error: Cannot initialize the metrics system due to bad user input: {error}"))?);
        Ok(DONE)
    }

    fn flush_metrics(&self) {
        if let Some(mut file) = self.metrics.as_ref() {
            let counts = json!({ "drive_count": self.drives.len(), "drive_fails": 0 });
            // The time comes first, and what cannot be written is lost.
            let line = format!("{{\"utc_timestamp_ms\":0,\"put_api_requests\":{counts},\"seccomp\":{{\"num_faults\":0}}}}\n");
            let _ = std::io::Write::write_all(&mut file, line.as_bytes());
        }
    }

    fn open_console(&mut self) -> Result<(), String> {
        if let Some(path) = &self.serial.serial_out_path {
            let file = open_output(Path::new(path));
            self.console = Console::to(file.map_err(|error| format!("Failed to create device manager: Error with EventFd: {error}"))?);
        }
        Ok(())
    }

    fn state(&self) -> State {
        State {
            machine: self.machine.clone(),
            boot_source: self.boot_source.clone(),
            drives: self.drives.clone(),
            network_interfaces: self.network_interfaces.iter().map(|(interface, _)| interface.clone()).collect(),
            vsock: self.vsock.as_ref().map(|(vsock, _)| vsock.clone()),
            entropy: self.entropy.clone(),
            balloon: self.balloon.clone(),
            guest: self.memory.guest,
            runs: self.memory.runs,
        }
    }

    fn config(&self) -> FullConfig<'_> {
        FullConfig {
            balloon: self.balloon.as_ref(),
            drives: &self.drives,
            boot_source: &self.boot_source,
            cpu_config: (),
            logger: (),
            machine_config: &self.machine,
            metrics: (),
            mmds_config: (),
            network_interfaces: self.network_interfaces.iter().map(|(interface, _)| interface).collect(),
            vsock: self.vsock.as_ref().map(|(vsock, _)| vsock),
            entropy: self.entropy.as_ref(),
            pmem: [],
            memory_hotplug: (),
        }
    }
}

fn check_machine(config: &MachineConfig, balloon: Option<&Balloon>) -> Result<(), String> {
    if !(1..=32).contains(&config.vcpu_count) || config.smt && config.vcpu_count > 1 && config.vcpu_count % 2 == 1 {
        return Err(faults::VCPUS.into());
    }
    if config.mem_size_mib == 0 || config.huge_pages == HugePages::TwoMib && config.mem_size_mib % 2 == 1 {
        return Err(faults::MEMORY.into());
    }
    if balloon.is_some_and(|balloon| balloon.amount_mib as usize > config.mem_size_mib) {
        return Err(faults::MEMORY_BELOW_BALLOON.into());
    }
    Ok(())
}

/// A file or block device of the host, as a drive opens it.
fn open_drive(path: &str, is_read_only: Option<bool>) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}{error} {path}", faults::BACKING_FILE);
    let file = File::options().read(true).write(!is_read_only.unwrap_or(false)).open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let code = if kind.is_dir() { libc::EISDIR } else { libc::EINVAL };
    Err(failed(std::io::Error::from_raw_os_error(code)))
}

/// Whether a file begins as a kernel does: an ELF, or a bzImage.
fn is_kernel(path: &str) -> bool {
    let mut head = Vec::new();
    let read = File::open(path).and_then(|file| std::io::Read::read_to_end(&mut std::io::Read::take(file, 0x206), &mut head));
    read.is_ok() && (head.starts_with(b"\x7fELF") || head.get(0x202..0x206) == Some(b"HdrS"))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| faults::json(&error))
}

fn document(value: &impl serde::Serialize) -> Answer {
    serde_json::to_string(value).map(Outcome::Document).map_err(|error| error.to_string())
}

fn id_of<'a>(parts: &[&'a str]) -> Result<&'a str, String> {
    let id = parts.get(1).copied().unwrap_or_default();
    if id.is_empty() {
        return Err("The ID cannot be empty.".into());
    }
    let right = id.chars().all(|c| c.is_alphanumeric() || c == '_');
    if right { Ok(id) } else { Err("API Resource IDs can only contain alphanumeric characters and underscores.".into()) }
}

fn same_id(path: &str, body: &str) -> Result<(), String> {
    if path == body { Ok(()) } else { Err("The id from the path does not match the id from the body!".into()) }
}
