//! The built-in image and its agent in a real QEMU, without acceleration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mvm::guest::{ExecEnd, ExecRequest, GuestClient, GuestControl, Purpose, WakeFixup};
use mvm::image::{self, Image};

const CONFIG: &str = r#"{"version":1,"identity":{"tenant":"acme","pool":"web","instance":"i-1a2b3c4d","node":"n"},
"role":"gateway","profile":"minimal","hostname":"web-1a2b3c4d","config_version":3,"secrets_epoch":2,
"network":{"mac":"02:fc:00:00:00:03","address":"10.240.0.3/24","gateway":"10.240.0.1","dns":["10.240.0.1"],"mtu":1400},
"forward":true,"workload":{"command":["sh","-c","i=0; while :; do echo tick $i; i=$((i+1)); sleep 1; done"]},
"requires":{"data":true,"config":true,"secrets":true}}"#;

/// A virtual machine with all its drives; gone with them afterwards.
struct Guest {
    qemu: Child,
    dir: tempfile::TempDir,
}

fn image() -> Image {
    let images = Path::new(env!("CARGO_TARGET_TMPDIR")).join("live-images");
    let named = std::env::var_os(image::AGENT_VARIABLE);
    let agent = image::find_agent(named.as_deref()).expect("the guest agent is built before the live tests run");
    image::builtin::ensure(&images, &agent, &|what| eprintln!("image: {what}")).unwrap()
}

fn make_drive(dir: &Path, label: &str, files: &[(&str, &str)], size: &str) -> PathBuf {
    let tree = dir.join(format!("{label}.tree"));
    fs::create_dir(&tree).unwrap();
    for (name, content) in files {
        fs::write(tree.join(name), content).unwrap();
    }
    let drive = dir.join(format!("{label}.img"));
    let mut make = Command::new("mke2fs");
    make.args(["-q", "-F", "-t", "ext4", "-L", label, "-d"]).args([&tree, &drive]).arg(size);
    assert!(make.status().unwrap().success());
    drive
}

impl Guest {
    fn boot() -> Guest {
        let image = image();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let data = make_drive(dir.path(), "mvm-data", &[], "16M");
        // Larger than its file system: the agent grows it.
        fs::File::options().write(true).open(&data).unwrap().set_len(64 << 20).unwrap();
        let config = make_drive(dir.path(), "mvm-config", &[("config.json", CONFIG)], "1M");
        let secrets = make_drive(dir.path(), "mvm-secrets", &[("token", "hunter2")], "1M");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-M", "microvm,acpi=on,rtc=on", "-accel", "tcg", "-cpu", "max", "-m", "128", "-nodefaults", "-no-user-config"]);
        qemu.args(["-display", "none", "-no-reboot", "-serial", &format!("file:{}", at("console"))]);
        qemu.arg("-kernel").arg(image.vmlinux()).arg("-initrd").arg(image.initrd());
        // Without the rate the kernel measures it, and under load it may not succeed.
        qemu.args([
            "-append",
            &format!("console=ttyS0 panic=-1 tsc_early_khz={} tsc=reliable {}", tsc_khz(), image::builtin::KERNEL_ARGS.join(" ")),
        ]);
        for (index, (file, read_only)) in [(image.rootfs(), "on"), (data, "off"), (config, "on"), (secrets, "on")].into_iter().enumerate() {
            qemu.args(["-drive", &format!("if=none,id=d{index},format=raw,readonly={read_only},file={}", file.display())]);
            qemu.args(["-device", &format!("virtio-blk-device,drive=d{index}")]);
        }
        // A network of its own that leads nowhere.
        qemu.args(["-netdev", "hubport,id=n0,hubid=0", "-device", "virtio-net-device,netdev=n0,mac=02:fc:00:00:00:09"]);
        qemu.args(["-device", "virtio-rng-device", "-device", "virtio-serial-device"]);
        for number in 0..2 {
            let socket = at(&format!("agent.{number}.sock"));
            qemu.args(["-chardev", &format!("socket,id=a{number},path={socket},server=on,wait=off")]);
            qemu.args(["-device", &format!("virtserialport,chardev=a{number},name=mvm.agent.{number}")]);
        }
        let qemu = qemu.stdin(Stdio::null()).spawn().expect("qemu-system-x86_64 is installed");
        Guest { qemu, dir }
    }

    fn client(&self, purpose: Purpose) -> GuestClient {
        let deadline = Instant::now() + Duration::from_secs(90);
        GuestClient::connect(self.dir.path(), purpose, deadline).unwrap_or_else(|error| panic!("{error}\n{}", self.console()))
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn tsc_khz() -> u64 {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap();
    let mhz = info.lines().find(|line| line.starts_with("cpu MHz")).and_then(|line| line.split(':').nth(1)).unwrap();
    (mhz.trim().parse::<f64>().unwrap() * 1000.0) as u64
}

fn sh(client: &mut GuestClient, script: &str) -> String {
    let argv = ["sh", "-c", script].map(|arg| arg.as_bytes().to_vec()).to_vec();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let request = ExecRequest { argv, ..ExecRequest::default() };
    let end = client.exec(request, None::<std::io::Empty>, &mut out, &mut err).unwrap();
    assert_eq!(end, ExecEnd::Code(0), "{script}: {}", String::from_utf8_lossy(&err));
    String::from_utf8(out).unwrap()
}

#[test]
fn a_guest_boots_works_sleeps_wakes_and_ends() {
    let mut guest = Guest::boot();
    let began = Instant::now();
    let soon = || Instant::now() + Duration::from_secs(60);
    let mut control = guest.client(Purpose::Lifecycle);
    let ready = control.wait_ready(soon()).unwrap_or_else(|error| panic!("{error}\n{}", guest.console()));
    let status = control.status(Duration::from_secs(10)).unwrap();
    eprintln!("ready after {:?}; guest time {} ms", began.elapsed(), status.ready_at_uptime_ms);
    assert_eq!(status.drives.len(), 3);

    let mut client = guest.client(Purpose::Interactive);
    assert_eq!(sh(&mut client, "uname -r").trim(), status.kernel_release);
    assert_eq!(sh(&mut client, "cat /proc/1/comm; hostname; cat /run/secrets/token"), "init\nweb-1a2b3c4d\nhunter2");
    assert_eq!(sh(&mut client, "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu"), "02:fc:00:00:00:03\n1400\n");
    assert!(sh(&mut client, "ip addr show eth0").contains("inet 10.240.0.3/24 brd 10.240.0.255"));
    assert!(sh(&mut client, "ip route").contains("default via 10.240.0.1 dev eth0"));
    assert_eq!(sh(&mut client, "cat /proc/sys/net/ipv4/ip_forward /etc/resolv.conf"), "1\nnameserver 10.240.0.1\n");
    let size: u64 = sh(&mut client, "df -k /data | tail -1 | awk '{print $2}'").trim().parse().unwrap();
    assert!(size > 50_000, "the data drive was grown: {size} KiB");
    assert_eq!(
        sh(&mut client, "stat -c %a /run/secrets/token; touch /run/secrets/x 2>&1; echo kept > /data/file; true").lines().next(),
        Some("400")
    );
    sh(&mut client, "touch /etc/x 2>/dev/null && exit 1; exit 0");

    control.prepare_sleep(soon()).unwrap();
    assert!(!control.status(Duration::from_secs(10)).unwrap().ready);
    let woken = control.wake(&WakeFixup { entropy: [9; 64] }, soon()).unwrap();
    assert_eq!(woken.boot_id, ready.boot_id);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i128;
    assert!((now - woken.clock_ns).abs() < 500_000_000, "{} ns off", now - woken.clock_ns);
    assert_eq!(sh(&mut client, "cat /run/secrets/token; cat /data/file"), "hunter2kept\n");

    let ended = Instant::now();
    control.shutdown(Duration::from_secs(2)).unwrap();
    while guest.qemu.try_wait().unwrap().is_none() {
        assert!(ended.elapsed() < Duration::from_secs(30), "QEMU still runs\n{}", guest.console());
        std::thread::sleep(Duration::from_millis(10));
    }
    eprintln!("ended after {:?}", ended.elapsed());
}
