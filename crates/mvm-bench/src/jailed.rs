//! What mvm adds to a start and a wake of Firecracker: against the same jailer, calls and guest without it.
//!
//! Firecracker is the stand-in, whose guest is ready at once, so that what is left is mvm's.
//!
//! ```text
//!  mvm:  the command from its start to its end
//!  bare: a jail that was filled before -> jailer -> API -> InstanceStart, or load and resume -> CONNECT is answered
//! ```

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use mvm_firecracker as fc;
use rustix::mount::{MountFlags, mount};
use serde_json::Value;

use crate::Selection;
use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::measure::{Pairs, timed};
use crate::{live, program};

/// The figures of this part.
const NAMES: [&str; 2] = ["firecracker/start-own", "firecracker/wake-own"];
/// How much of a start, and of a wake, may be mvm's own, in milliseconds.
const OWN_MS: [f64; 2] = [15.0, 10.0];

const MEM_MIB: u32 = 128;
const DATA_MIB: u64 = 64;
/// A user that no instance here has.
const UID: u32 = 0x7fff_0000;

const FLEET: &str = r#"
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

/// Measures what is wanted.
pub fn measure(dir: &Path, selection: &Selection) -> Result<Vec<Figure>, String> {
    if !NAMES.iter().any(|name| selection.wants(name)) {
        return Ok(Vec::new());
    }
    tell("a microVM in the stand-in for Firecracker");
    let host = Host::new(dir)?;
    let rounds = selection.rounds(40, 6);
    let mut figures = Vec::new();
    let mut add = |index: usize, what: &str, pairs: &Pairs, calls: &str| {
        figures.push(Figure {
            name: NAMES[index].to_owned(),
            measured: pairs.difference(),
            unit: Unit::Ms,
            limit: Some(Limit::AtMost(OWN_MS[index])),
            samples: rounds,
            detail: format!("mvm instance {what}: {}; {calls}", pairs.words()),
        });
    };
    if selection.wants(NAMES[0]) {
        tell(&format!("{rounds} starts, and as many bare ones"));
        let mut pairs = Pairs::default();
        for round in 0..rounds {
            let bare = host.jail(&format!("start-{round}"))?;
            pairs.round(|| host.start(), || bare.boot())?;
            host.instance(&["stop", "--force"])?;
        }
        add(0, "start", &pairs, &host.timeline("start")?);
        host.instance(&["stop", "--force"])?;
    }
    if selection.wants(NAMES[1]) {
        tell(&format!("{rounds} wakes, and as many bare ones"));
        host.instance(&["start"])?;
        host.instance(&["sleep"])?;
        let snapshot = host.snapshot()?;
        let mut pairs = Pairs::default();
        for round in 0..rounds {
            let bare = host.jail(&format!("wake-{round}"))?;
            bare.put(&snapshot)?;
            pairs.round(|| host.took("wake"), || bare.load())?;
            host.instance(&["sleep"])?;
        }
        add(1, "wake", &pairs, &host.timeline("wake")?);
    }
    program::printed(host.mvm(&["apply", "-f"]).arg(host.nothing()?))?;
    Ok(figures)
}

/// A fleet of one instance, and what bare machines are made of.
struct Host {
    dir: PathBuf,
    at: String,
    /// Files of the image that the instance was made from, beside the jails of bare machines.
    image: PathBuf,
}

impl Host {
    fn new(dir: &Path) -> Result<Host, String> {
        let failed = |error| format!("cannot make {}: {error}", dir.display());
        for name in ["state", "run", "firecracker", "bare"] {
            fs::create_dir_all(dir.join(name)).map_err(failed)?;
        }
        // As /run is, for both: what ext4 takes to make a file grows with the files that were removed within the last minutes.
        for name in ["run", "bare"] {
            let made = mount("mvm-bench", dir.join(name), "tmpfs", MountFlags::NOSUID, Some(c"mode=0755"));
            made.map_err(|error| failed(error.into()))?;
        }
        fs::write(dir.join("fleet.toml"), FLEET).map_err(failed)?;
        program::printed(Command::new("cp").arg("-a").arg(live::images()).arg(dir.join("state/images")))?;
        let beside = |name: &str| program::measured().with_file_name(name);
        let script = dir.join("script.json");
        fs::write(&script, r#"{"kernel": "any"}"#).map_err(failed)?;
        let firecracker = dir.join("firecracker/firecracker");
        let mut pack = Command::new(beside("fake-firecracker.static"));
        pack.arg("--pack").arg(&firecracker).arg("--agent").arg(beside("mvm-guest-agent.static")).arg("--script").arg(&script);
        program::printed(&mut pack)?;
        fs::copy(beside("fake-jailer"), dir.join("firecracker/jailer")).map_err(failed)?;
        let mut host = Host { dir: dir.to_owned(), at: String::new(), image: dir.join("bare/image") };
        program::printed(host.mvm(&["apply", "-f"]).arg(dir.join("fleet.toml")))?;
        let listed: Value = serde_json::from_str(&program::printed(&mut host.mvm(&["instance", "list", "--output", "json"]))?)
            .map_err(|error| error.to_string())?;
        host.at = listed[0]["instance"].as_str().ok_or("there is no instance")?.to_owned();
        host.instance(&["stop", "--force"])?;
        program::printed(Command::new("cp").arg("-a").arg(host.made_from()?).arg(&host.image))?;
        Ok(host)
    }

    fn mvm(&self, args: &[&str]) -> Command {
        let mut command = program::mvm(&self.dir.join("state"), &self.dir.join("run"), args);
        command.env("MVM_VMM", "firecracker").env("MVM_FIRECRACKER", self.dir.join("firecracker/firecracker"));
        command
    }

    fn instance(&self, verb: &[&str]) -> Result<(), String> {
        program::printed(&mut self.mvm(&[&["instance"], verb, &[self.at.as_str()]].concat())).map(drop)
    }

    fn took(&self, verb: &str) -> Result<Duration, String> {
        program::took(&mut self.mvm(&["instance", verb, &self.at]))
    }

    fn start(&self) -> Result<Duration, String> {
        self.took("start")
    }

    /// The calls of one more start or wake, in words; it ends as it began.
    fn timeline(&self, verb: &str) -> Result<String, String> {
        let text = program::printed(&mut self.mvm(&["instance", verb, &self.at, "--timings", "--output", "json"]))?;
        let calls: Value = serde_json::from_str(&text).map_err(|error| format!("{verb} --timings printed no JSON: {error}"))?;
        let ms = |value: &Value| value.as_f64().unwrap_or(f64::NAN) / 1000.0;
        let words = calls
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| format!("{} {:.1}+{:.1}", call["what"].as_str().unwrap_or("?"), ms(&call["began_us"]), ms(&call["took_us"])));
        Ok(format!("calls at ms+took: {}", words.collect::<Vec<_>>().join(", ")))
    }

    fn nothing(&self) -> Result<PathBuf, String> {
        let path = self.dir.join("nothing.toml");
        fs::write(&path, "schema_version = 1\nprune_unknown_tenants = true\n").map_err(|error| error.to_string())?;
        Ok(path)
    }

    /// The image that the instance was made from.
    fn made_from(&self) -> Result<PathBuf, String> {
        let images = fs::read_dir(self.dir.join("state/images")).map_err(|error| error.to_string())?;
        let made = images.flatten().map(|entry| entry.path()).filter(|path| path.join("manifest.json").exists());
        made.max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok()).ok_or_else(|| "there is no image".into())
    }

    /// A jail's directory with everything in it, before the jailer sees it.
    fn jail(&self, id: &str) -> Result<Jail, String> {
        let base = self.dir.join("bare");
        let root = base.join("firecracker").join(id).join("root");
        let failed = |error: std::io::Error| format!("cannot fill {}: {error}", root.display());
        for name in ["image", "drives", "host", "restore"] {
            fs::create_dir_all(root.join(name)).map_err(failed)?;
            chown(root.join(name), Some(UID), Some(UID)).map_err(failed)?;
        }
        for (from, to) in [("vmlinux", "image/kernel"), ("initrd", "image/initrd"), ("rootfs.ext4", "drives/root")] {
            fs::hard_link(self.image.join(from), root.join(to)).map_err(failed)?;
        }
        let data = fs::File::create(root.join("drives/data")).map_err(failed)?;
        data.set_len(DATA_MIB << 20).map_err(failed)?;
        chown(root.join("drives/data"), Some(UID), Some(UID)).map_err(failed)?;
        Ok(Jail { id: id.to_owned(), base, root, programs: self.dir.join("firecracker") })
    }

    /// A snapshot of a bare machine.
    fn snapshot(&self) -> Result<PathBuf, String> {
        let jail = self.jail("snapshot")?;
        let into = self.dir.join("bare/snapshot");
        fs::create_dir_all(&into).map_err(|error| error.to_string())?;
        let (mut child, api) = jail.started()?;
        let paused = api.boot(&boot()?).map_err(|failed| failed.error.to_string())?.pause().map_err(|failed| failed.error.to_string())?;
        let mut paused = paused;
        let create = fc::SnapshotCreate {
            mem_file_path: "/host/memory".into(),
            snapshot_path: "/host/state".into(),
            snapshot_type: fc::SnapshotType::Full,
        };
        paused.create_snapshot(&create).map_err(|error| error.to_string())?;
        for name in ["memory", "state"] {
            fs::copy(jail.root.join("host").join(name), into.join(name)).map_err(|error| error.to_string())?;
        }
        child.kill().and_then(|()| child.wait()).map_err(|error| error.to_string())?;
        Ok(into)
    }
}

/// A bare machine before its start.
struct Jail {
    id: String,
    base: PathBuf,
    root: PathBuf,
    programs: PathBuf,
}

impl Jail {
    fn put(&self, snapshot: &Path) -> Result<(), String> {
        for name in ["memory", "state"] {
            let to = self.root.join("restore").join(name);
            fs::hard_link(snapshot.join(name), &to).map_err(|error| error.to_string())?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o644)).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    fn started(&self) -> Result<(std::process::Child, fc::Api<fc::Fresh>), String> {
        let uid = UID.to_string();
        let mut command = Command::new(self.programs.join("jailer"));
        command.args(["--id", &self.id, "--uid", &uid, "--gid", &uid]).arg("--exec-file").arg(self.programs.join("firecracker"));
        command.arg("--chroot-base-dir").arg(&self.base).args(["--", "--api-sock", "/host/api.sock"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().map_err(|error| format!("cannot start {command:?}: {error}"))?;
        let api = fc::Api::connect(&self.root.join("host/api.sock"), fc::Deadlines::default()).map_err(|error| error.to_string())?;
        Ok((child, api))
    }

    /// Waits until the guest's agent takes a connection.
    fn answered(&self) -> Result<(), String> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let answer = || -> std::io::Result<bool> {
                let mut stream = UnixStream::connect(self.root.join("host/v.sock"))?;
                stream.write_all(b"CONNECT 5200\n")?;
                let mut line = [0; 3];
                Ok(stream.read(&mut line)? == 3 && &line == b"OK ")
            };
            if answer().unwrap_or(false) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err("the bare guest does not answer".into());
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    fn boot(&self) -> Result<Duration, String> {
        let (took, mut child) = timed(|| {
            let (child, api) = self.started()?;
            api.boot(&boot()?).map_err(|failed| failed.error.to_string())?;
            self.answered()?;
            Ok(child)
        })?;
        child.kill().and_then(|()| child.wait()).map_err(|error| error.to_string())?;
        Ok(took)
    }

    fn load(&self) -> Result<Duration, String> {
        let (took, mut child) = timed(|| {
            let (child, api) = self.started()?;
            let load = fc::SnapshotLoad {
                snapshot_path: "/restore/state".into(),
                mem_backend: fc::MemoryBackend { backend_type: fc::MemoryBackendType::File, backend_path: "/restore/memory".into() },
                track_dirty_pages: Some(true),
                network_overrides: Vec::new(),
                vsock_override: None,
                clock_realtime: Some(true),
                huge_pages: None,
            };
            api.load_and_resume(&fc::Outputs::default(), &load).map_err(|failed| failed.error.to_string())?;
            self.answered()?;
            Ok(child)
        })?;
        child.kill().and_then(|()| child.wait()).map_err(|error| error.to_string())?;
        Ok(took)
    }
}

fn boot() -> Result<fc::Boot, String> {
    let drive = |name: &str, is_root_device: bool| {
        Ok::<_, String>(fc::Drive {
            drive_id: fc::ResourceId::try_from(name).map_err(|error| error.to_string())?,
            path_on_host: format!("/drives/{name}"),
            is_root_device,
            is_read_only: is_root_device,
            partuuid: None,
            cache_type: None,
            io_engine: None,
            rate_limiter: None,
        })
    };
    Ok(fc::Boot {
        outputs: fc::Outputs::default(),
        machine_config: fc::MachineConfiguration {
            vcpu_count: fc::VcpuCount::try_from(1).map_err(|error| error.to_string())?,
            mem_size_mib: MEM_MIB,
            smt: None,
            track_dirty_pages: None,
            cpu_template: None,
            huge_pages: None,
        },
        boot_source: fc::BootSource {
            kernel_image_path: "/image/kernel".into(),
            initrd_path: Some("/image/initrd".into()),
            boot_args: Some("console=ttyS0".into()),
        },
        drives: vec![drive("root", true)?, drive("data", false)?],
        network_interfaces: Vec::new(),
        vsock: Some(fc::Vsock {
            guest_cid: fc::GuestCid::try_from(3).map_err(|error| error.to_string())?,
            uds_path: "/host/v.sock".into(),
        }),
        entropy: Some(fc::EntropyDevice::default()),
        balloon: None,
    })
}
