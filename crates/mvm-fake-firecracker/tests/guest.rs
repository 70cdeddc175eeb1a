//! A guest agent behind hybrid vsock. `MVM_GUEST_AGENT` says where it is, as `cargo xtask test` does.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use mvm_firecracker::*;
use mvm_guest_api::proto::guest_agent_client::GuestAgentClient;
use mvm_guest_api::proto::{ExecInput, ExecStart, ShutdownRequest, StatusReply, StatusRequest, exec_input, exec_output, exited};
use mvm_hostd::drive::{ImageFile, build_image};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};

/// How HTTP/2 begins: the preface and empty settings; the other side says its own.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn agent() -> PathBuf {
    let named = std::env::var_os("MVM_GUEST_AGENT").map(PathBuf::from);
    let beside = || std::env::current_exe().ok()?.parent()?.parent().map(|dir| dir.join("mvm-guest-agent.static"));
    let path = named.or_else(beside).expect("a place for the agent");
    assert!(path.is_file(), "{}: there is no guest agent; build it with cargo xtask build, or set MVM_GUEST_AGENT", path.display());
    path
}

/// A fake that has the agent with it, and neither an environment nor anything beside it.
struct Fake {
    process: Child,
    dir: PathBuf,
}

impl Fake {
    fn start(dir: &Path, script: &str) -> Self {
        let at = |name: &str| dir.join(name);
        let packed = at("firecracker");
        if !packed.exists() {
            fs::write(at("script"), script).unwrap();
            let mut pack = Command::new(env!("CARGO_BIN_EXE_fake-firecracker"));
            pack.arg("--pack").arg(&packed).arg("--agent").arg(agent()).arg("--script").arg(at("script"));
            assert!(pack.status().unwrap().success());
            fs::write(at("vmlinux"), b"\x7fELF").unwrap();
            fs::write(at("root"), b"root").unwrap();
            config(dir, 7);
        }
        for socket in ["api", "v"] {
            let _ = fs::remove_file(at(socket));
        }
        let mut command = Command::new(packed);
        command.env_clear().current_dir("/").process_group(0).arg("--api-sock").arg(at("api"));
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self { process, dir: dir.into() }
    }

    fn at(&self, name: &str) -> String {
        self.dir.join(name).to_str().unwrap().to_owned()
    }

    fn api(&self) -> Api<Fresh> {
        Api::connect(&self.dir.join("api"), Deadlines::default()).unwrap()
    }

    fn running(&self) -> Api<Running> {
        let drive = |name: &str, root| Drive {
            drive_id: name.try_into().unwrap(),
            path_on_host: self.at(name),
            is_root_device: root,
            is_read_only: true,
            partuuid: None,
            cache_type: None,
            io_engine: None,
            rate_limiter: None,
        };
        let machine_config = MachineConfiguration {
            vcpu_count: 1.try_into().unwrap(),
            mem_size_mib: 16,
            smt: None,
            track_dirty_pages: None,
            cpu_template: None,
            huge_pages: None,
        };
        let boot = Boot {
            outputs: Outputs::default(),
            machine_config,
            boot_source: BootSource { kernel_image_path: self.at("vmlinux"), initrd_path: None, boot_args: None },
            drives: vec![drive("root", true), drive("config", false)],
            network_interfaces: Vec::new(),
            vsock: Some(Vsock { guest_cid: 3.try_into().unwrap(), uds_path: self.at("v") }),
            entropy: None,
            balloon: None,
        };
        self.api().boot(&boot).unwrap()
    }

    /// A connection to a port of the guest, and what is said to the line.
    fn connect(&self, line: &str) -> (UnixStream, String) {
        let mut stream = UnixStream::connect(self.at("v")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let said = said(&mut stream);
        (stream, said)
    }

    fn agents(&self) -> usize {
        let mine = |entry: fs::DirEntry| {
            fs::read(entry.path().join("cmdline")).is_ok_and(|line| {
                let line = String::from_utf8_lossy(&line).into_owned();
                line.starts_with("mvm-guest-agent\0") && line.contains(&self.at("api.guest"))
            })
        };
        fs::read_dir("/proc").unwrap().flatten().map(mine).filter(|mine| *mine).count()
    }

    fn ended(&mut self) -> Option<i32> {
        let mut status = None;
        wait_for(|| {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The config drive as mvm makes it.
fn config(dir: &Path, version: u32) {
    let document = format!(
        r#"{{"version":1,"identity":{{"tenant":"t","pool":"p","instance":"i-00000001","node":"n"}},"role":"worker",
        "profile":"minimal","hostname":"h","config_version":{version},"secrets_epoch":9}}"#
    );
    let file = ImageFile { name: "config.json", content: document.as_bytes(), mode: 0o600 };
    fs::write(dir.join("config"), &*build_image("mvm-config", &[file], 0).unwrap()).unwrap();
}

/// One line, or what there is of one at the end.
fn said(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\n") && stream.read(&mut byte).unwrap() == 1 {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Speaks HTTP/2 as far as its first frame, which is one of settings.
fn greets(stream: &mut UnixStream) -> bool {
    let mut frame = [0; 9];
    stream.write_all(HELLO).is_ok() && stream.read_exact(&mut frame).is_ok() && frame[3] == 4
}

async fn client(uds: String) -> GuestAgentClient<Channel> {
    let connector = tower::service_fn(move |_| {
        let uds = uds.clone();
        async move {
            let stream = tokio::task::spawn_blocking(move || {
                let mut stream = UnixStream::connect(uds)?;
                stream.write_all(b"CONNECT 5200\n")?;
                assert!(said(&mut stream).starts_with("OK "));
                stream.set_nonblocking(true).map(|()| stream)
            });
            tokio::net::UnixStream::from_std(stream.await??).map(TokioIo::new)
        }
    });
    GuestAgentClient::new(Endpoint::from_static("http://guest").connect_with_connector(connector).await.unwrap())
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
}

fn status(fake: &Fake) -> StatusReply {
    block_on(async { client(fake.at("v")).await.status(StatusRequest {}).await.unwrap().into_inner() })
}

#[test]
fn a_guest_is_reached_runs_commands_and_shuts_down() {
    let dir = TempDir::new().unwrap();
    let mut fake = Fake::start(dir.path(), "{}");
    fake.running();
    let status = status(&fake);
    assert!(status.ready && status.config_version == 7, "{status:?}");
    let output = block_on(async {
        let start = ExecStart { argv: vec!["/bin/echo".into(), "hello".into()], ..ExecStart::default() };
        let input = tokio_stream::once(ExecInput { kind: Some(exec_input::Kind::Start(start)) });
        let mut stream = client(fake.at("v")).await.exec(input).await.unwrap().into_inner();
        let (mut text, mut code) = (Vec::new(), None);
        while let Some(output) = stream.message().await.unwrap() {
            match output.kind {
                Some(exec_output::Kind::Stdout(bytes)) => text.extend_from_slice(&bytes),
                Some(exec_output::Kind::Exited(ended)) => code = ended.how,
                _ => {}
            }
        }
        (text, code)
    });
    assert_eq!(output, (b"hello\n".to_vec(), Some(exited::How::Code(0))));
    block_on(async { client(fake.at("v")).await.shutdown(ShutdownRequest::default()).await.unwrap() });
    assert_eq!(fake.ended(), Some(0));
    wait_for(|| fake.agents() == 0);
    assert!(!fake.dir.join("api.guest").exists());
}

#[test]
fn a_guest_lives_on_in_another_process_with_another_configuration() {
    let dir = TempDir::new().unwrap();
    let fake = Fake::start(dir.path(), "{}");
    let mut paused = fake.running().pause().unwrap();
    let files = SnapshotCreate { mem_file_path: fake.at("m"), snapshot_path: fake.at("s"), snapshot_type: SnapshotType::Full };
    paused.create_snapshot(&files).unwrap();
    drop(fake);
    config(dir.path(), 8);
    let fake = Fake::start(dir.path(), "{}");
    let load = SnapshotLoad {
        snapshot_path: fake.at("s"),
        mem_backend: MemoryBackend { backend_type: MemoryBackendType::File, backend_path: fake.at("m") },
        track_dirty_pages: None,
        network_overrides: Vec::new(),
        vsock_override: None,
        clock_realtime: None,
        huge_pages: None,
    };
    let paused = fake.api().load_snapshot(&Outputs::default(), &load).unwrap();
    assert_eq!(fake.agents(), 0);
    paused.resume().unwrap();
    assert_eq!(status(&fake).config_version, 8);
}

#[test]
fn vsock_is_hybrid_as_firecracker_s_is() {
    let dir = TempDir::new().unwrap();
    let fake = Fake::start(dir.path(), "{}");
    let running = fake.running();
    // Numbers count up, from 2^30.
    let (mut first, ok) = fake.connect("CONNECT 5200\n");
    assert_eq!(ok, "OK 1073741824\n");
    assert!(greets(&mut first));
    assert_eq!(fake.connect("CONNECT 5201\n").1, "");
    assert_eq!(fake.connect("connect 5200\r\n").1, "OK 1073741826\n");
    for wrong in ["CONNECT\n", "CONNECT x5200\n", "CONNECT 99999999999\n", "HELLO 5200\n", "CONN", "CONNECT 5200"] {
        assert_eq!(fake.connect(wrong).1, "", "{wrong:?}");
    }
    // What comes with the line reaches the guest, and there is room for 16.
    let mut held: Vec<UnixStream> = Vec::new();
    wait_for(|| {
        let (mut stream, ok) = fake.connect("CONNECT 5200\n");
        assert!(ok.starts_with("OK "));
        let greets = greets(&mut stream);
        held.push(stream);
        !greets
    });
    assert_eq!(held.len(), 16, "with the first there are 16, and one more got nothing");
    held.clear();

    // Nothing is answered as long as vCPUs stand still.
    let paused = running.pause().unwrap();
    let mut waiting = UnixStream::connect(fake.at("v")).unwrap();
    waiting.write_all(b"CONNECT 5200\n").unwrap();
    waiting.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(waiting.read(&mut [0]).is_err());
    let running = paused.resume().unwrap();
    waiting.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert!(said(&mut waiting).starts_with("OK "));

    // A snapshot makes the guest forget its connections, and nobody tells the host before it says something.
    let mut paused = running.pause().unwrap();
    let files = SnapshotCreate { mem_file_path: fake.at("m"), snapshot_path: fake.at("s"), snapshot_type: SnapshotType::Full };
    paused.create_snapshot(&files).unwrap();
    let _running = paused.resume().unwrap();
    first.set_nonblocking(true).unwrap();
    let mut rest = Vec::new();
    let _ = first.read_to_end(&mut rest);
    assert!(first.read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
    first.set_nonblocking(false).unwrap();
    first.write_all(b"x").unwrap();
    assert_eq!(first.read(&mut [0]).unwrap_or(0), 0);
    let (mut new, ok) = fake.connect("CONNECT 5200\n");
    assert!(ok.starts_with("OK ") && greets(&mut new));
}

#[test]
fn the_agent_dies_with_its_process() {
    let dir = TempDir::new().unwrap();
    let mut fake = Fake::start(dir.path(), "{}");
    let running = fake.running();
    wait_for(|| fake.agents() == 1);
    // Also one that stands still.
    running.pause().unwrap();
    fake.process.kill().unwrap();
    fake.process.wait().unwrap();
    wait_for(|| fake.agents() == 0);
}

#[test]
fn connections_go_wrong_as_the_script_says() {
    let dir = TempDir::new().unwrap();
    let fake = Fake::start(dir.path(), r#"{"CONNECT 5200":{"do":"close","times":1},"CONNECT 1":{"do":"garbage"}}"#);
    let _running = fake.running();
    assert_eq!(fake.connect("CONNECT 5200\n").1, "");
    assert!(fake.connect("CONNECT 5200\n").1.starts_with("OK "));
    assert_eq!(fake.connect("CONNECT 00001\n").1, "\0\u{1}\u{2}\n");
}
