//! The QEMU driver with real microVMs: boot, pause, resume, snapshot, restore, kill, strays.
//!
//! Needs root, `qemu-system-x86_64`, and the guest agent named by `MVM_GUEST_AGENT`: kernel, modules and busybox are those of
//! the built-in image, in which the agent is replaced by a script. The test of the network makes a namespace of its own.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mvm::infra::process::ProcessIdentity;
use mvm::vmm::qemu::{AGENT_PORTS, AccelerationChoice, KvmVerdict, Qemu, QemuOptions, agent_socket};
use mvm::vmm::{Drive, DriveAccess, Liveness, Nic, Rates, SNAPSHOT_FILES, Sought, VmHandle, VmSpec, Vmm, VmmError};
use mvm_hostd::tap::{TapSpec, create_tap};
use mvm_types::{InstanceAddress, InstanceId, NodeId};

const UID: u32 = 0x7000_0000 + 7 * 65536 + 3;
const MEM_MIB: u32 = 128;

/// What the guest does: counts the lines it was sent, says how large its first two drives are, and answers each line.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for m in /modules/*; do [ -e $m ] && $b insmod $m; done
# Ports and their names appear some time after the driver.
while [ "$($b cat /sys/class/virtio-ports/*/name 2>/dev/null | $b wc -l)" != PORTS ]; do $b usleep 1000; done
for p in /sys/class/virtio-ports/*; do
  name=$($b cat $p/name); ports="$ports $name"
  [ $name = mvm.agent.0 ] && port=/dev/${p##*/}
done
echo "guest up, ports:$ports"
n=0
exec 3<>$port
while :; do
  while read -r line <&3; do
    n=$((n+1))
    case $line in
      drives*) for d in vda vdb; do said="$said $d=$($b cat /sys/block/$d/size),$($b cat /sys/block/$d/ro)"; done ;;
      cpus*) said=" $($b nproc)" ;;
      fill*) $b dd if=/dev/urandom of=/fill bs=1M count=8 2>/dev/null; said=" $($b sha256sum </fill)" ;;
      sum*) said=" $($b sha256sum </fill)" ;;
      write*) echo "$line" | $b dd of=/dev/vdb conv=fsync 2>/dev/null ;;
      panic*) echo c > /proc/sysrq-trigger ;;
      mac*) said=" $($b cat /sys/class/net/eth0/address)" ;;
      ping*) $b ip link set eth0 up; $b ip addr add 10.9.0.3/24 dev eth0 2>/dev/null
        $b ping -c 1 -W 5 10.9.0.1 >/dev/null && said=" answered" ;;
      end*) $b poweroff -f ;;
    esac
    echo "$n $line$said" >&3
    said=
  done
  $b usleep 10000
done
"#;

/// What the built-in image is made of, made when it is not there.
fn parts() -> PathBuf {
    let images = Path::new(env!("CARGO_TARGET_TMPDIR")).join("live-images");
    let named = std::env::var_os(mvm::image::AGENT_VARIABLE);
    let agent = mvm::image::find_agent(named.as_deref()).expect("cargo xtask test builds the guest agent");
    mvm::image::builtin::ensure(&images, &agent, &|_| {}).unwrap();
    images.join("parts")
}

/// A file tree in the `newc` format of cpio.
#[derive(Default)]
struct Cpio(Vec<u8>);

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        let fields = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0]
            .map(|field: usize| format!("{field:08X}"))
            .concat();
        self.0.extend_from_slice(b"070701");
        self.0.extend_from_slice(fields.as_bytes());
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self.pad();
        self.0.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn directory(&mut self, name: &str) {
        self.add(name, 0o040_755, &[]);
    }
}

fn initrd(parts: &Path) -> Vec<u8> {
    let mut cpio = Cpio::default();
    for name in ["bin", "proc", "sys", "dev", "modules"] {
        cpio.directory(name);
    }
    let read = |name: &str| fs::read(parts.join(name)).unwrap();
    cpio.add("bin/busybox", 0o100_755, &read("busybox"));
    cpio.add("init", 0o100_755, INIT.replace("PORTS", &AGENT_PORTS.to_string()).as_bytes());
    // Pairs of name and device, in the order in which they are loaded, which is also that of two digits.
    let list: serde_json::Value = serde_json::from_slice(&read("parts.json")).unwrap();
    for (index, module) in list["modules"].as_array().unwrap().iter().enumerate() {
        let name = module[0].as_str().unwrap();
        cpio.add(&format!("modules/{index:02}.ko"), 0o100_644, &read(&format!("{name}.ko")));
    }
    cpio.add("TRAILER!!!", 0, &[]);
    cpio.0
}

/// One machine's directory, and the end of everything in it.
struct Fixture {
    dir: tempfile::TempDir,
    qemu: Qemu,
    kernel: PathBuf,
    node: NodeId,
    at: InstanceAddress,
}

impl Fixture {
    fn new(instance: u32) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root: it gives machines a user of their own");
        let parts = parts();
        let kernel = parts.join("vmlinux");
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(dir.path().join("initrd"), initrd(&parts)).unwrap();
        fs::set_permissions(dir.path().join("initrd"), fs::Permissions::from_mode(0o644)).unwrap();
        for (name, mib) in [("root", 1), ("data", 2)] {
            File::create(dir.path().join(name)).unwrap().set_len(mib << 20).unwrap();
        }
        for name in ["run", "snapshot"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let options = QemuOptions { binary: None, facts_file: dir.path().join("facts.json"), acceleration: AccelerationChoice::Tcg };
        let at = InstanceAddress::new("acme".parse().unwrap(), "web".parse().unwrap(), InstanceId::from_bits(instance));
        // Another node for each run, so that two runs at once do not find each other's machines.
        let node = format!("test-{}", std::process::id()).parse().unwrap();
        Self { qemu: Qemu::new(options), dir, kernel, node, at }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self) -> VmSpec {
        let open = |name: &str, write: bool| OpenOptions::new().read(true).write(write).open(self.path(name)).unwrap().into();
        VmSpec {
            at: self.at.clone(),
            node: self.node.clone(),
            uid: Some(UID),
            limits: None,
            vcpus: 1,
            mem_mib: MEM_MIB,
            kernel: self.kernel.clone(),
            initrd: Some(self.path("initrd")),
            kernel_args: vec!["loglevel=4".into()],
            drives: vec![
                Drive { name: "root", file: open("root", false), access: DriveAccess::ReadOnly },
                Drive { name: "data", file: open("data", true), access: DriveAccess::ReadWrite },
            ],
            nic: None,
            rates: Rates::default(),
            reclaim_memory: false,
            run_dir: self.path("run"),
            scratch: None,
            console_log: self.path("console.log"),
            vmm_log: self.path("vmm.log"),
            lifetime: mvm::vmm::Lifetime::Detached,
        }
    }

    fn restore(&self, spec: VmSpec, snapshot: &Path) -> Result<VmHandle, VmmError> {
        self.qemu.restore(spec, snapshot, &self.qemu.stamp().unwrap())
    }

    fn stray(&self) -> Option<VmHandle> {
        self.qemu.find_stray(&self.sought()).unwrap()
    }

    fn sought(&self) -> Sought<'_> {
        Sought { node: &self.node, at: &self.at, uid: Some(UID), run_dir: self.path("run"), mem_mib: MEM_MIB }
    }

    /// Sends a line and returns the guest's answer.
    fn ask(&self, line: &str) -> String {
        let mut stream = UnixStream::connect(self.path("run").join(agent_socket(0))).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        writeln!(stream, "{line}").unwrap();
        let mut answer = String::new();
        let read = BufReader::new(&stream).read_line(&mut answer);
        if read.is_err() || answer.is_empty() {
            let show = |name| fs::read_to_string(self.path(name)).unwrap_or_default();
            panic!("no answer to {line:?}: {read:?}\nconsole:\n{}\nQEMU:\n{}", show("console.log"), show("vmm.log"));
        }
        answer.trim_end().to_owned()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        while let Ok(Some(vm)) = self.qemu.find_stray(&self.sought()) {
            if self.qemu.kill(&vm).is_err() {
                break;
            }
        }
    }
}

/// The fields of `/proc/<pid>/status` that tell what a process may do.
fn status_field(vm: &VmHandle, name: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.process.pid)).unwrap();
    let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap_or_else(|| panic!("no {name}"));
    line.split_ascii_whitespace().skip(1).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_machine_boots_confined_pauses_resumes_and_dies() {
    let t = Fixture::new(1);
    let start = Instant::now();
    let vm = t.qemu.boot(t.spec()).unwrap();
    let booted = start.elapsed();
    assert_eq!(t.ask("hello"), "1 hello");
    println!("QMP after {booted:?}, guest after {:?}", start.elapsed());
    assert_eq!(t.ask("drives"), "2 drives vda=2048,1 vdb=4096,0");
    let console = fs::read_to_string(t.path("console.log")).unwrap();
    let ports: Vec<String> = (0..AGENT_PORTS).map(|port| format!("mvm.agent.{port}")).collect();
    assert!(console.contains(&format!("ports: {}", ports.join(" "))), "{console}");

    let id = format!("{UID} {UID} {UID} {UID}");
    assert_eq!([status_field(&vm, "Uid"), status_field(&vm, "Gid")], [id.clone(), id]);
    assert_eq!(status_field(&vm, "Groups"), "");
    assert_eq!(status_field(&vm, "CapEff"), "0000000000000000");
    assert_eq!(status_field(&vm, "NoNewPrivs"), "1");
    assert_eq!(status_field(&vm, "Seccomp"), "2", "a filter");
    assert_eq!(status_field(&vm, "Umask"), "0077");

    // Another driver, as after a restart of mvm, works with the same handle.
    let options = QemuOptions { binary: None, facts_file: t.path("facts.json"), acceleration: AccelerationChoice::Tcg };
    let adopted = Qemu::new(options);
    adopted.pause(&vm).unwrap();
    adopted.pause(&vm).unwrap();
    let before = t.qemu.stats(&vm).unwrap();
    assert!(before.cpu_ms > 100 && before.rss_kib > 20_000, "{before:?}");
    adopted.resume(&vm).unwrap();
    adopted.resume(&vm).unwrap();
    assert_eq!(t.ask("again"), "3 again");

    assert_eq!(t.qemu.wait_exit(&vm, Duration::from_millis(10)).unwrap(), Liveness::Alive);
    let other = VmHandle { process: ProcessIdentity { start_ticks: vm.process.start_ticks + 1, ..vm.process.clone() }, ..vm.clone() };
    assert_eq!(t.qemu.liveness(&other), Liveness::Gone);
    t.qemu.kill(&other).unwrap();
    assert!(matches!(t.qemu.pause(&other), Err(VmmError::Gone { .. })));
    assert_eq!(t.qemu.liveness(&vm), Liveness::Alive, "another's identity must not end it");

    assert_eq!(t.stray().map(|stray| stray.process), Some(vm.process.clone()));
    adopted.kill(&vm).unwrap();
    t.qemu.kill(&vm).unwrap();
    assert_eq!(t.qemu.liveness(&vm), Liveness::Gone);
    assert_eq!(t.qemu.wait_exit(&vm, Duration::ZERO).unwrap(), Liveness::Gone);
    assert!(matches!(t.qemu.stats(&vm), Err(VmmError::Gone { .. })));
    assert!(matches!(t.qemu.resume(&vm), Err(VmmError::Gone { .. })));
    assert!(matches!(t.qemu.snapshot(&vm, &t.path("snapshot")), Err(VmmError::Gone { .. })));
    assert_eq!(t.stray(), None);
}

#[test]
fn a_machine_sleeps_and_wakes_three_times() {
    let t = Fixture::new(2);
    let snapshot = t.path("snapshot");
    let [state, memory] = SNAPSHOT_FILES.map(|name| snapshot.join(name));
    let mut vm = t.qemu.boot(t.spec()).unwrap();
    assert_eq!(t.ask("hello"), "1 hello");
    let sum = t.ask("fill").split_once(' ').unwrap().1.replace("fill ", "");
    assert!(matches!(t.qemu.snapshot(&vm, &snapshot), Err(VmmError::Failed { .. })), "it is not paused");
    let mut count = 2;
    let mut inode = None;
    for cycle in 0..3 {
        let mut times = Vec::new();
        let mut clock = Instant::now();
        let mut lap = |what: &str| {
            times.push(format!("{what} {:.1} ms", clock.elapsed().as_secs_f64() * 1e3));
            clock = Instant::now();
        };
        t.qemu.pause(&vm).unwrap();
        lap("pause");
        t.qemu.snapshot(&vm, &snapshot).unwrap();
        lap("snapshot");
        if cycle == 1 {
            // Aborted and repeated, as by a process that took over: the machine did not notice.
            t.qemu.resume(&vm).unwrap();
            count += 1;
            assert_eq!(t.ask("aborted"), format!("{count} aborted"));
            t.qemu.pause(&vm).unwrap();
            t.qemu.snapshot(&vm, &snapshot).unwrap();
            lap("aborted sleep");
        }
        t.qemu.kill(&vm).unwrap();
        lap("kill");
        assert_eq!(fs::read_dir(&snapshot).unwrap().count(), 2, "nothing besides the two files");
        assert_eq!(fs::metadata(&memory).unwrap().len(), u64::from(MEM_MIB) << 20);
        assert!(fs::metadata(&memory).unwrap().blocks() * 512 < 100 << 20, "it is sparse");
        let now = fs::metadata(&memory).unwrap().ino();
        assert_eq!(*inode.get_or_insert(now), now, "brought up to date in place");

        let asleep = blake3_of(&memory);
        clock = Instant::now();
        let mut lap = |what: &str| times.push(format!("{what} {:.1} ms", clock.elapsed().as_secs_f64() * 1e3));
        vm = t.restore(t.spec(), &snapshot).unwrap();
        lap("restored");
        t.qemu.resume(&vm).unwrap();
        lap("resumed");
        count += 1;
        assert_eq!(t.ask("woken"), format!("{count} woken"));
        lap("answered");
        count += 1;
        assert_eq!(t.ask("sum"), format!("{count} sum {sum}"));
        assert_eq!(blake3_of(&memory), asleep, "a running machine does not write to its snapshot");
        assert_eq!(t.stray().map(|stray| stray.process), Some(vm.process.clone()));
        println!("cycle {cycle}: {}; device state {} bytes", times.join(", "), fs::metadata(&state).unwrap().len());
    }
    // Into another directory: a whole new file, restored as well as the one in place.
    let elsewhere = t.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    t.qemu.pause(&vm).unwrap();
    t.qemu.snapshot(&vm, &elsewhere).unwrap();
    t.qemu.kill(&vm).unwrap();
    // Put back to sleep without having run.
    let vm = t.restore(t.spec(), &elsewhere).unwrap();
    t.qemu.snapshot(&vm, &elsewhere).unwrap();
    t.qemu.kill(&vm).unwrap();
    let vm = t.restore(t.spec(), &elsewhere).unwrap();
    t.qemu.resume(&vm).unwrap();
    assert_eq!(t.ask("sum"), format!("{} sum {sum}", count + 1));
}

fn blake3_of(path: &Path) -> blake3::Hash {
    blake3::hash(&fs::read(path).unwrap())
}

#[test]
fn a_bad_snapshot_is_refused_and_leaves_no_process() {
    let t = Fixture::new(3);
    let snapshot = t.path("snapshot");
    let [state, memory] = SNAPSHOT_FILES.map(|name| snapshot.join(name));
    assert!(matches!(t.restore(t.spec(), &snapshot), Err(VmmError::Io { .. })));
    fs::write(&state, "").unwrap();
    fs::write(&memory, "short").unwrap();
    let error = t.restore(t.spec(), &snapshot).unwrap_err().to_string();
    assert!(error.ends_with("its memory has 5 bytes and the machine 134217728"), "{error}");
    File::create(&memory).unwrap().set_len(u64::from(MEM_MIB) << 20).unwrap();
    for garbage in [&b""[..], b"QEVM", b"QEVM\0\0\0\x03\x01garbage and more garbage", b"no state at all"] {
        fs::write(&state, garbage).unwrap();
        let error = t.restore(t.spec(), &snapshot).unwrap_err();
        assert!(!matches!(error, VmmError::Timeout { .. }), "{error}");
        assert_eq!(t.stray(), None, "{error}");
    }
}

#[test]
fn a_boot_that_fails_says_why_and_leaves_no_process() {
    let mut t = Fixture::new(4);
    let secret = t.path("secret");
    fs::write(&secret, "x").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let mut spec = t.spec();
    spec.initrd = Some(secret.clone());
    let error = t.qemu.boot(spec).unwrap_err().to_string();
    assert!(error.contains("has mode 600") && error.contains("chmod o+r"), "{error}");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    t.kernel = secret;
    let error = t.qemu.boot(t.spec()).unwrap_err().to_string();
    assert!(error.starts_with("cannot start QEMU: qemu"), "{error}");
    assert_eq!(t.stray(), None);
    let mut spec = t.spec();
    spec.run_dir = t.path("nowhere");
    assert!(matches!(t.qemu.boot(spec), Err(VmmError::Io { .. })));
}

#[test]
fn a_guest_that_ends_or_panics_is_noticed() {
    let t = Fixture::new(5);
    for last in ["end", "panic"] {
        let vm = t.qemu.boot(t.spec()).unwrap();
        assert_eq!(t.ask("hello"), "1 hello");
        let mut stream = UnixStream::connect(t.path("run").join(agent_socket(0))).unwrap();
        writeln!(stream, "{last}").unwrap();
        assert_eq!(t.qemu.wait_exit(&vm, Duration::from_secs(30)).unwrap(), Liveness::Gone, "{last}");
        assert_eq!(t.qemu.liveness(&vm), Liveness::Gone);
    }
}

/// A small file system in memory, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf, mib: u32) -> Self {
        use rustix::mount::{MountFlags, mount};
        fs::create_dir(&at).unwrap();
        let options = std::ffi::CString::new(format!("size={mib}M")).unwrap();
        mount("tmpfs", &at, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(options.as_c_str())).unwrap();
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_fails_the_snapshot_and_nothing_else() {
    let t = Fixture::new(9);
    let vm = t.qemu.boot(t.spec()).unwrap();
    assert_eq!(t.ask("hello"), "1 hello");
    let full = SmallDisk::mount(t.path("full"), 8);
    t.qemu.pause(&vm).unwrap();
    let error = t.qemu.snapshot(&vm, &full.0).unwrap_err();
    assert!(matches!(&error, VmmError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull), "{error:?}");
    assert!(!full.0.join("memory.new").exists() && !full.0.join("memory").exists());
    // It is there still, and can be put to sleep elsewhere.
    t.qemu.resume(&vm).unwrap();
    assert_eq!(t.ask("still there"), "2 still there");
    t.qemu.pause(&vm).unwrap();
    t.qemu.snapshot(&vm, &t.path("snapshot")).unwrap();
    t.qemu.kill(&vm).unwrap();
    let vm = t.restore(t.spec(), &t.path("snapshot")).unwrap();
    t.qemu.resume(&vm).unwrap();
    assert_eq!(t.ask("woken"), "3 woken");
}

#[test]
fn two_cpus_boot_sleep_and_wake() {
    let t = Fixture::new(6);
    let two = || VmSpec { vcpus: 2, ..t.spec() };
    let vm = t.qemu.boot(two()).unwrap();
    assert_eq!(t.ask("cpus"), "1 cpus 2");
    t.qemu.pause(&vm).unwrap();
    t.qemu.snapshot(&vm, &t.path("snapshot")).unwrap();
    t.qemu.kill(&vm).unwrap();
    let vm = t.restore(two(), &t.path("snapshot")).unwrap();
    t.qemu.resume(&vm).unwrap();
    assert_eq!(t.ask("cpus"), "2 cpus 2");
}

#[test]
fn the_network_is_there_after_a_wake_through_a_new_tap() {
    // A thread of its own for the network namespace, which ends with it and the machine.
    std::thread::spawn(|| {
        // SAFETY: only this thread's network namespace changes; descriptors and memory stay shared as Rust expects.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let netlink = mvm_hostd::netlink::Netlink::open().unwrap();
        let bridge = mvm_hostd::netlink::BridgeSpec {
            name: "br-test",
            mac: [2, 0, 0, 0, 0, 1],
            address: "10.9.0.1".parse().unwrap(),
            prefix: 24,
            mtu: 1500,
            alias: "mvm:test",
        };
        netlink.ensure_bridge(&bridge).unwrap();
        let t = Fixture::new(8);
        let spec = || {
            let guest_mac = [2, 0, 10, 9, 0, 3];
            let tap = TapSpec { name: "tn9i3", bridge: bridge.name, guest_mac, owner: Some(UID), alias: bridge.alias };
            let tap = create_tap(&netlink, &tap).unwrap();
            VmSpec { nic: Some(Nic { tap, tap_name: "tn9i3".into(), mac: guest_mac }), ..t.spec() }
        };
        let vm = t.qemu.boot(spec()).unwrap();
        assert_eq!(t.ask("mac"), "1 mac 02:00:0a:09:00:03");
        assert_eq!(t.ask("ping"), "2 ping answered");
        t.qemu.pause(&vm).unwrap();
        t.qemu.snapshot(&vm, &t.path("snapshot")).unwrap();
        t.qemu.kill(&vm).unwrap();
        assert!(netlink.link("tn9i3").unwrap().is_none(), "the TAP vanishes with QEMU");
        let vm = t.restore(spec(), &t.path("snapshot")).unwrap();
        t.qemu.resume(&vm).unwrap();
        assert_eq!(t.ask("ping"), "3 ping answered");
    })
    .join()
    .unwrap();
}

#[test]
fn the_verdict_on_kvm_comes_from_a_boot_and_is_remembered() {
    let t = Fixture::new(7);
    let options = QemuOptions { binary: None, facts_file: t.path("facts.json"), acceleration: AccelerationChoice::Auto };
    let first = Qemu::new(options.clone()).host_facts(Some(&t.kernel)).unwrap();
    println!("{first:?}");
    assert_ne!(first.kvm, KvmVerdict::Untried);
    let start = Instant::now();
    let again = Qemu::new(options);
    assert_eq!(again.host_facts(None).unwrap(), first);
    assert!(start.elapsed() < Duration::from_millis(20), "it was found out a second time");
    let stamp = again.stamp().unwrap();
    assert!(stamp.build.starts_with("QEMU emulator version ") && stamp.build.contains(" blake3 "), "{}", stamp.build);
}
