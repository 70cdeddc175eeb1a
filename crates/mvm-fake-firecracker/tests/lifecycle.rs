//! The fake through the real client: lifecycles, phases, files, snapshots, misbehaviour.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mvm_firecracker::*;
use tempfile::TempDir;

/// A fake and its directory.
struct Fake {
    process: Child,
    dir: TempDir,
    name: &'static str,
}

impl Fake {
    fn start(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in [("vmlinux", &b"\x7fELF"[..]), ("root", b"root"), ("data", b"data")] {
            fs::write(dir.path().join(name), content).unwrap();
        }
        Self::start_in(dir, "a", script)
    }

    fn start_in(dir: TempDir, name: &'static str, script: &str) -> Self {
        let process = command(script).arg("--api-sock").arg(dir.path().join(name)).arg("--id").arg(name).spawn().unwrap();
        Self { process, dir, name }
    }

    /// Another one in the same directory, after this one has ended.
    fn next(mut self, name: &'static str, script: &str) -> Self {
        self.kill();
        let mut dir = tempfile::tempdir().unwrap();
        std::mem::swap(&mut dir, &mut self.dir);
        Self::start_in(dir, name, script)
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn api(&self) -> Api<Fresh> {
        Api::connect(&self.dir.path().join(self.name), Deadlines::default()).unwrap()
    }

    fn boot(&self) -> Boot {
        let drive = |name: &str, root| Drive {
            drive_id: name.try_into().unwrap(),
            path_on_host: self.at(name),
            is_root_device: root,
            is_read_only: root,
            partuuid: None,
            cache_type: None,
            io_engine: None,
            rate_limiter: None,
        };
        Boot {
            outputs: self.outputs(),
            machine_config: MachineConfiguration {
                vcpu_count: 1.try_into().unwrap(),
                mem_size_mib: 16,
                smt: None,
                track_dirty_pages: Some(true),
                cpu_template: None,
                huge_pages: None,
            },
            boot_source: BootSource { kernel_image_path: self.at("vmlinux"), initrd_path: None, boot_args: Some("panic=1".into()) },
            drives: vec![drive("data", false), drive("root", true)],
            network_interfaces: Vec::new(),
            vsock: Some(Vsock { guest_cid: 3.try_into().unwrap(), uds_path: self.at("v") }),
            entropy: Some(EntropyDevice::default()),
            balloon: Some(Balloon {
                amount_mib: 0,
                deflate_on_oom: true,
                stats_polling_interval_s: Some(1),
                free_page_hinting: None,
                free_page_reporting: None,
            }),
        }
    }

    fn outputs(&self) -> Outputs {
        Outputs {
            logger: Some(Logger { log_path: Some(self.at("log")), ..Logger::default() }),
            metrics: Some(Metrics { metrics_path: self.at("metrics"), emit_id: None, properties: None }),
            serial: Some(SerialDevice { serial_out_path: Some(self.at("console")), rate_limiter: None }),
        }
    }

    fn running(&self) -> Api<Running> {
        self.api().boot(&self.boot()).unwrap()
    }

    fn create(&self, n: u32, snapshot_type: SnapshotType) -> SnapshotCreate {
        SnapshotCreate { mem_file_path: self.at(&format!("m{n}")), snapshot_path: self.at(&format!("s{n}")), snapshot_type }
    }

    fn load(&self, state: u32, memory: u32) -> SnapshotLoad {
        SnapshotLoad {
            snapshot_path: self.at(&format!("s{state}")),
            mem_backend: MemoryBackend { backend_type: MemoryBackendType::File, backend_path: self.at(&format!("m{memory}")) },
            track_dirty_pages: Some(true),
            network_overrides: Vec::new(),
            vsock_override: Some(VsockOverride { uds_path: self.at(&format!("v-{}", self.name)) }),
            clock_realtime: Some(true),
            huge_pages: None,
        }
    }

    fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it runs on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

fn command(script: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fake-firecracker"));
    command.env("FAKE_FIRECRACKER_SCRIPT", script).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_guest_lives_sleeps_and_wakes_in_another_process() {
    let fake = Fake::start("{}");
    let mut api = fake.api();
    assert_eq!(api.version().unwrap().firecracker_version, "1.17.0");
    let info = api.instance_info().unwrap();
    assert_eq!((info.id.as_str(), info.state), ("a", InstanceState::NotStarted));
    let mut running = api.boot(&fake.boot()).unwrap();
    let config = running.vm_config().unwrap();
    assert_eq!(config.drives.iter().map(|drive| drive.drive_id.as_str()).collect::<Vec<_>>(), ["root", "data"]);
    assert_eq!(config.balloon, running.get_balloon().ok());
    assert_eq!(running.balloon_statistics().unwrap().target_mib, 0);
    running.flush_metrics().unwrap();
    assert!(fake.read("console").contains("Command line: panic=1") && fake.read("metrics").ends_with("}\n"));

    // Full, then what changed into a file of its own, then in place.
    let mut paused = running.pause().unwrap();
    assert_eq!(paused.instance_info().unwrap().state, InstanceState::Paused);
    paused.create_snapshot(&fake.create(0, SnapshotType::Full)).unwrap();
    let size = |name: &str| fs::metadata(fake.at(name)).map(|meta| (meta.len(), meta.blocks())).unwrap();
    assert_eq!(size("m0").0, 16 << 20);
    let mut paused = paused.resume().unwrap().pause().unwrap();
    paused.create_snapshot(&fake.create(1, SnapshotType::Diff)).unwrap();
    assert!(size("m1").0 == 16 << 20 && size("m1").1 < size("m0").1, "{:?} {:?}", size("m0"), size("m1"));
    fs::copy(fake.at("m0"), fake.at("m2")).unwrap();
    let mut paused = paused.resume().unwrap().pause().unwrap();
    paused.create_snapshot(&fake.create(2, SnapshotType::Diff)).unwrap();

    let fake = fake.next("b", "{}");
    let mut paused = fake.api().load_snapshot(&fake.outputs(), &fake.load(2, 2)).unwrap();
    assert_eq!(paused.get_machine_config().unwrap().mem_size_mib, 16);
    assert_eq!(paused.vm_config().unwrap().vsock.unwrap().uds_path, fake.at("v-b"));
    let mut running = paused.resume().unwrap();
    assert_eq!(running.instance_info().unwrap().state, InstanceState::Running);

    // A guest that was not merged panics; one that was resumed lives.
    for (state, memory, lives) in [(1, 1, false), (0, 2, false), (0, 0, true)] {
        let mut other = Fake::start_in(tempfile::tempdir().unwrap(), "c", "{}");
        let mut load = fake.load(state, memory);
        load.vsock_override = Some(VsockOverride { uds_path: other.at("v") });
        let mut running = other.api().load_and_resume(&other.outputs(), &load).unwrap();
        if lives {
            running.version().unwrap();
        } else {
            assert_eq!(other.ended().code(), Some(0));
            assert!(other.read("console").contains("Kernel panic"));
        }
    }
}

#[test]
fn a_guest_that_shuts_down_ends_the_process() {
    let mut fake = Fake::start("{}");
    fake.running().send_ctrl_alt_del().unwrap();
    assert_eq!(fake.ended().code(), Some(0));
    assert!(fake.read("log").contains("exit_code=0") && fake.read("console").contains("Restarting"));
    // As there, sockets stay.
    assert!(fake.dir.path().join("a").exists() && fake.dir.path().join("v").exists());

    let mut fake = Fake::start(r#"{"keyboard":false}"#);
    let mut running = fake.running();
    running.send_ctrl_alt_del().unwrap();
    running.version().unwrap();
    assert!(fake.process.try_wait().unwrap().is_none());
}

#[test]
fn what_a_phase_does_not_allow_is_refused() {
    // The typed client cannot ask for these.
    let fake = Fake::start("{}");
    fake.api();
    let ask = |method: &str, path: &str, body: &str| raw(&fake, &request(method, path, body));
    let pre = "The requested operation is not supported before starting the microVM.";
    let post = "The requested operation is not supported after starting the microVM.";
    let says = |answer: String, words: &str| assert!(answer.starts_with("HTTP/1.1 400 \r\n") && answer.contains(words), "{answer}");
    says(ask("PATCH", "/vm", r#"{"state":"Paused"}"#), pre);
    says(ask("PUT", "/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#), pre);
    says(ask("PUT", "/actions", r#"{"action_type":"SendCtrlAltDel"}"#), pre);
    says(ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#), "Cannot start microvm without kernel configuration.");
    fake.running();
    let kernel = format!(r#"{{"kernel_image_path":"{}"}}"#, fake.at("vmlinux"));
    says(ask("PUT", "/boot-source", &kernel), post);
    says(ask("PUT", "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":16}"#), post);
    says(ask("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v"}"#), post);
    says(ask("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#), post);
    let load = r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"}}"#;
    says(ask("PUT", "/snapshot/load", load), post);
    says(ask("PUT", "/drives/x", r#"{"drive_id":"x","path_on_host":"x","is_root_device":false}"#), "PCI is not enabled");
    says(ask("PUT", "/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"m"}"#), "save/restore unavailable while running");
    assert!(ask("PATCH", "/vm", r#"{"state":"Resumed"}"#).starts_with("HTTP/1.1 204 \r\n"));
}

#[test]
fn framing_is_firecracker_s() {
    let fake = Fake::start("{}");
    fake.api();
    let head = "Server: Firecracker API\r\nConnection: keep-alive\r\n";
    let serial = raw(&fake, &request("PUT", "/serial", "{}"));
    assert_eq!(serial, format!("HTTP/1.1 204 \r\n{head}\r\n"));
    let version = raw(&fake, b"GET /version HTTP/1.1\r\n\r\n");
    let body = r#"{"firecracker_version":"1.17.0"}"#;
    assert_eq!(version, format!("HTTP/1.1 200 \r\n{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    for (bytes, words) in [
        (&b"hello\r\n\r\n"[..], "{ \"error\": \"Invalid request.\nAll previous unanswered requests will be dropped.\" }"),
        (b"POST / HTTP/1.1\r\n\r\n", "Unsupported HTTP method."),
        (b"GET /version?x=1 HTTP/1.1\r\n\r\n", "Invalid request method and/or path: GET version?x=1."),
        (b"PUT /vm HTTP/1.1\r\n\r\n", "Empty PUT request."),
        (b"PUT /vm HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", "larger than the limit of 51200 allowed by server."),
    ] {
        let answer = raw(&fake, bytes);
        assert!(answer.starts_with("HTTP/1.1 400 \r\n") && answer.contains(words), "{answer}");
    }
    let unknown = raw(&fake, &request("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 96, "x": 1}"#));
    assert!(unknown.contains("unknown field `x`, expected one of `vcpu_count`, `mem_size_mib`, `smt`, `cpu_template`, `track_dirty_pages`, `huge_pages` at line 1 column 41."), "{unknown}");
    let long = raw(&fake, format!("GET /version HTTP/1.1\r\nX: {}\r\n\r\n", "a".repeat(2000)).as_bytes());
    assert!(long.contains("Invalid header. Reason: Invalid content length. Header: X: aaa"), "{long}");
    let config = raw(&fake, b"GET /vm/config HTTP/1.1\r\n\r\n");
    let whole = r#"{"balloon":null,"drives":[],"boot-source":{"kernel_image_path":"","initrd_path":null,"boot_args":null},"cpu-config":null,"logger":null,"machine-config":{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"},"metrics":null,"mmds-config":null,"network-interfaces":[],"vsock":null,"entropy":null,"pmem":[],"memory-hotplug":null}"#;
    assert!(config.ends_with(whole), "{config}");
    // Ten at once, and no more.
    let open: Vec<UnixStream> = (0..10).map(|_| UnixStream::connect(fake.at("a")).unwrap()).collect();
    wait_for(|| raw(&fake, b"").starts_with("HTTP/1.1 503\r\n"));
    drop(open);
    wait_for(|| raw(&fake, b"GET /version HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
}

#[test]
fn files_are_opened_when_they_are_named() {
    let fake = Fake::start("{}");
    let mut api = fake.api().configure();
    let boot = fake.boot();
    let mut drive = boot.drives[0].clone();
    drive.path_on_host = "/nonexistent".into();
    let said = api.drive(&drive).unwrap_err();
    assert_eq!(
        said.fault(),
        Some(
            "Drive config error: Unable to create the virtio block device: Virtio backend error: Error manipulating the backing file: No such file or directory (os error 2) /nonexistent"
        )
    );
    drive.path_on_host = fake.dir.path().to_str().unwrap().into();
    assert!(api.drive(&drive).unwrap_err().fault().unwrap().contains("Is a directory (os error 21)"));
    api.drive(&boot.drives[1]).unwrap();
    drive.is_root_device = true;
    assert!(api.drive(&drive).unwrap_err().fault().unwrap().contains("A root block device already exists!"));
    let kernel = |path: &str| BootSource { kernel_image_path: path.into(), initrd_path: None, boot_args: None };
    assert!(api.boot_source(&kernel("/nonexistent")).unwrap_err().fault().unwrap().contains("The kernel file cannot be opened"));
    // One that is none is noticed at the start, after which it can be another.
    api.boot_source(&kernel(&fake.at("data"))).unwrap();
    let failed = api.start().unwrap_err();
    assert!(failed.error.fault().unwrap().contains("Invalid bzImage"), "{failed}");
    let mut api = failed.api;
    api.boot_source(&kernel(&fake.at("vmlinux"))).unwrap();
    // A socket that is there is in the way, and the device's own is replaced.
    let vsock = |name: &str| Vsock { guest_cid: 3.try_into().unwrap(), uds_path: fake.at(name) };
    api.vsock(&vsock("v1")).unwrap();
    api.vsock(&vsock("v1")).unwrap();
    api.vsock(&vsock("v2")).unwrap();
    assert!(!fake.dir.path().join("v1").exists());
    assert!(api.vsock(&vsock("data")).unwrap_err().fault().unwrap().contains("Address already in use (os error 98)"));
    assert!(!fake.dir.path().join("v2").exists());
    api.start().map(drop).unwrap();
}

#[test]
fn a_tap_device_is_real_unless_it_is_pretended() {
    let interface = NetworkInterface {
        iface_id: "eth0".try_into().unwrap(),
        host_dev_name: "a-name-that-is-too-long".into(),
        guest_mac: Some("06:00:0a:f0:00:03".into()),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    };
    let fake = Fake::start("{}");
    let said = fake.api().configure().network_interface(&interface).unwrap_err();
    assert_eq!(
        said.fault(),
        Some("Network config error: Could not create the network device: Open tap device failed: Invalid interface name")
    );
    let fake = Fake::start(r#"{"tap":"pretend"}"#);
    let mut api = fake.api().configure();
    api.network_interface(&interface).unwrap();
    let same = NetworkInterface { iface_id: "eth1".try_into().unwrap(), ..interface };
    assert!(api.network_interface(&same).unwrap_err().fault().unwrap().contains("The MAC address is already in use: 06:00:0a:f0:00:03"));
}

#[test]
fn a_guest_without_a_root_panics() {
    let mut fake = Fake::start("{}");
    let boot = Boot { drives: Vec::new(), ..fake.boot() };
    fake.api().boot(&boot).unwrap();
    assert_eq!(fake.ended().code(), Some(0));
    assert!(fake.read("console").contains("Unable to mount root fs"));
}

#[test]
fn a_snapshot_that_is_not_as_it_was_is_refused_and_ends_the_process() {
    let fake = Fake::start("{}");
    let mut paused = fake.running().pause().unwrap();
    paused.create_snapshot(&fake.create(0, SnapshotType::Full)).unwrap();
    let state = fs::read(fake.at("s0")).unwrap();
    // Where a flipped byte still makes a document.
    let flipped = |at: usize| {
        let mut state = state.clone();
        state[at] ^= 1;
        state
    };
    let digit = state.windows(16).position(|part| part == b"\"mem_size_mib\":1").unwrap() + 16;
    let version = state.windows(3).position(|part| part == b"v11").unwrap() + 2;
    let short = state[..state.len() - 9].to_vec();
    for (content, words) in [
        (flipped(digit), "CRC64 validation failed"),
        (flipped(state.len() - 1), "CRC64 validation failed"),
        (flipped(0), "bitcode error"),
        (flipped(version), "Invalid data version: 10.0.0"),
        (short, "bitcode error"),
        (b"1234567".to_vec(), "File too short to contain CRC"),
    ] {
        let mut other = Fake::start_in(tempfile::tempdir().unwrap(), "c", "{}");
        fs::write(other.at("s0"), content).unwrap();
        let load = SnapshotLoad { snapshot_path: other.at("s0"), ..fake.load(0, 0) };
        let failed = other.api().load_snapshot(&Outputs::default(), &load).unwrap_err();
        assert!(failed.error.fault().unwrap().contains(words), "{failed}");
        assert_eq!(other.ended().code(), Some(1));
    }
    type Change = Box<dyn Fn(&mut SnapshotLoad)>;
    let refusals: [(&str, Change); 5] = [
        ("Failed to open snapshot file: No such file", Box::new(|load| load.snapshot_path = "/nonexistent".into())),
        ("Failed to load guest memory: No such file", Box::new(|load| load.mem_backend.backend_path = "/nonexistent".into())),
        ("Total sum of memory regions exceeds", Box::new(|load| load.mem_backend.backend_path.clone_from(&load.snapshot_path))),
        ("Address already in use (os error 98)", Box::new(|load| load.vsock_override = None)),
        (
            "Unknown Network Device.",
            Box::new(|load| {
                load.network_overrides = vec![NetworkOverride { iface_id: "eth9".try_into().unwrap(), host_dev_name: "t".into() }];
            }),
        ),
    ];
    for (words, change) in refusals {
        let mut other = Fake::start_in(tempfile::tempdir().unwrap(), "c", "{}");
        let mut load = fake.load(0, 0);
        change(&mut load);
        let failed = other.api().load_snapshot(&Outputs::default(), &load).unwrap_err();
        assert!(failed.error.fault().unwrap().contains(words), "{failed}");
        assert_eq!(other.ended().code(), Some(1));
    }
    // A refusal that is none of these leaves it alive.
    let other = Fake::start_in(tempfile::tempdir().unwrap(), "c", "{}");
    let body = r#"{"snapshot_path":"s","mem_backend":{"backend_type":"File","backend_path":"m"}}"#;
    other.api();
    assert!(raw(&other, &request("PUT", "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":1}"#)).contains("number of vCPUs"));
    assert!(raw(&other, &request("PUT", "/snapshot/load", body)).contains("not allowed after configuring boot-specific resources."));
    other.api().version().unwrap();
}

#[test]
fn a_script_makes_any_call_go_wrong() {
    let soon = Deadlines { call: Duration::from_millis(200), ..Deadlines::default() };
    type Expected = fn(&ApiErrorKind) -> bool;
    let cases: [(&str, Expected); 7] = [
        ("hang", |kind| matches!(kind, ApiErrorKind::Timeout { .. })),
        ("close", |kind| matches!(kind, ApiErrorKind::Closed)),
        ("cut", |kind| matches!(kind, ApiErrorKind::Closed)),
        ("garbage", |kind| matches!(kind, ApiErrorKind::Garbage { .. })),
        ("flood", |kind| matches!(kind, ApiErrorKind::TooLarge { .. } | ApiErrorKind::Garbage { .. })),
        ("die", |kind| matches!(kind, ApiErrorKind::Closed)),
        ("fault:no", |kind| matches!(kind, ApiErrorKind::Fault { status: 400, .. })),
    ];
    for when in ["before", "after"] {
        for (word, expected) in cases {
            let fake = Fake::start(&format!(r#"{{"PATCH /vm":{{"do":"{word}","when":"{when}"}}}}"#));
            let mut running = fake.running();
            running.set_deadlines(soon);
            let failed = running.pause().unwrap_err();
            assert!(expected(&failed.error.kind), "{when} {word}: {failed}");
            if !["hang", "die", "flood"].contains(&word) {
                let found = failed.api.forget_phase().find_phase().unwrap();
                assert_eq!(matches!(found, Found::Paused(_)), when == "after", "{when} {word}: {found:?}");
            }
        }
    }
}

#[test]
fn a_death_in_the_middle_of_a_snapshot_leaves_half_of_one() {
    let mut fake = Fake::start(r#"{"PUT /snapshot/create":{"do":"die","when":"middle"}}"#);
    let error = fake.running().pause().unwrap().create_snapshot(&fake.create(0, SnapshotType::Full)).unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Closed), "{error}");
    assert_eq!(fake.ended().signal(), Some(9));
    // Nothing tells it from a whole one, but that its guest does not live.
    assert_eq!(fs::metadata(fake.at("m0")).unwrap().len(), 16 << 20);
    fs::remove_file(fake.at("v")).unwrap();
    let mut fake = fake.next("b", "{}");
    fake.api().load_and_resume(&fake.outputs(), &fake.load(0, 0)).unwrap();
    assert_eq!(fake.ended().code(), Some(0));
}

#[test]
fn it_ends_as_it_is_told() {
    let mut fake = Fake::start(r#"{"running":{"do":"exit:148","skip":1}}"#);
    fake.running().pause().unwrap().resume().unwrap();
    assert_eq!(fake.ended().code(), Some(148));
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("a");
    let mut process = command(r#"{"listen":{"do":"exit:3"}}"#).arg("--api-sock").arg(&socket).spawn().unwrap();
    let mut ended = None;
    let is_alive = || {
        ended = process.try_wait().unwrap();
        ended.is_none()
    };
    let error = Api::connect_while(&socket, Deadlines::default(), is_alive).unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Ended), "{error}");
    assert_eq!(ended.unwrap().code(), Some(3));
}

#[test]
fn signals_have_firecracker_s_codes() {
    for (signal, code) in [("HUP", Some(156)), ("TERM", None), ("KILL", None)] {
        let mut fake = Fake::start("{}");
        fake.running();
        let kill = Command::new("sh").args(["-c", "kill -$0 $1", signal]).arg(fake.process.id().to_string()).status();
        assert!(kill.unwrap().success());
        assert_eq!(fake.ended().code(), code, "{signal}");
    }
    // Memory does not fit below the limit, which is 4 MiB.
    let mut fake = Fake::start("{}");
    fake.kill();
    let limited = ["-c", "ulimit -f 8192; exec \"$0\" --api-sock \"$1\"", env!("CARGO_BIN_EXE_fake-firecracker")];
    let _ = fs::remove_file(fake.at("a"));
    fake.process = Command::new("sh").args(limited).arg(fake.at("a")).stdout(Stdio::null()).spawn().unwrap();
    let error = fake.running().pause().unwrap().create_snapshot(&fake.create(0, SnapshotType::Full)).unwrap_err();
    assert!(matches!(error.kind, ApiErrorKind::Closed), "{error}");
    assert_eq!(fake.ended().code(), Some(151));
}

#[test]
fn the_command_line_is_firecracker_s() {
    let run = |script: &str, arguments: &[&str]| {
        let output = command(script).args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap(), output.status)
    };
    let (out, _, status) = run(r#"{"version":"1.15.0"}"#, &["--version"]);
    assert!(out.starts_with("Firecracker v1.15.0\n\n2") && out.ends_with("Firecracker exiting successfully. exit_code=0\n"), "{out}");
    assert_eq!(status.code(), Some(0));
    assert!(run("{}", &["--snapshot-version"]).0.starts_with("v11.0.0\n"));
    assert_eq!(run("{}", &["--config-file", "x"]).2.code(), Some(153));
    assert_eq!(run("{}", &["--id", "a_b"]).2.signal(), Some(6));
    let fake = Fake::start("{}");
    fake.api();
    let (_, err, status) = run("{}", &["--api-sock", &fake.at("a")]);
    assert!(err.contains("FailedToBindSocket") && status.code() == Some(1), "{err}");
}

#[test]
fn half_a_connection_gets_no_answer() {
    let fake = Fake::start(r#"{"GET /version":{"do":"slow:50ms"}}"#);
    fake.api();
    let mut stream = UnixStream::connect(fake.at("a")).unwrap();
    stream.write_all(b"GET /version HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"");
}

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// One answer, whole, to bytes as they are.
fn raw(fake: &Fake, bytes: &[u8]) -> String {
    let mut stream = UnixStream::connect(fake.at(fake.name)).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(if bytes.is_empty() { 50 } else { 10_000 }))).unwrap();
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut chunk) {
        answer.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&answer);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.split("Content-Length: ").nth(1).map_or(0, |rest| rest.lines().next().unwrap().parse::<usize>().unwrap());
            if body.len() >= length {
                break;
            }
        }
    }
    String::from_utf8(answer).unwrap()
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}
