//! Flakes that are built in a microVM: what comes of them, and what is left of those that go wrong.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use mvm::guest::SerialChannel;
use mvm::host::LocalHost;
use mvm::image::nix::{BuildError, BuildWatch, FlakeBuilder, Job, Limits, Provenance};
use mvm::infra::clock::SystemClock;
use mvm::infra::paths::Paths;
use mvm::net::UidRange;
use mvm::store::{Documents, FileStore};
use mvm::vm::builder::{Egress, VmBuilder};
use mvm::vm::node::{Node, Seams, VmmUids};
use mvm::vm::pool::NodeImages;
use mvm::vm::tenant::NodeSealer;
use mvm::vmm::qemu::{AccelerationChoice, Qemu, QemuOptions};

use crate::isolation::Outside;
use crate::rig::{Driver, Rig, finish, on_a_host_of_with_builder, on_a_host_with_builder};
use crate::wire::run;

/// A flake without inputs: what lies beside it becomes an image; `@` stands for what its build does before.
const FLAKE: &str = r#"
{
  outputs = { self }: {
    packages.x86_64-linux.tenant-minimal = derivation {
      name = "tenant-minimal";
      system = "x86_64-linux";
      builder = "/bin/sh";
      PATH = "/bin:/usr/bin";
      args = [ "-c" ''
        set -e
        @
        mkdir $out
        cp ${self}/vmlinux ${self}/initrd ${self}/rootfs $out/
        printf '{"version":1,"root_format":"ext4","kernel_args":["quiet","cryptomgr.notests"]}' > $out/vmm.json
      '' ];
    };
    packages.x86_64-linux.other = derivation { name = "other"; system = "x86_64-linux"; builder = "/bin/sh"; };
  };
}
"#;

const ATTRIBUTE: &str = "packages.x86_64-linux.tenant-minimal";

/// Follows a build of a test.
#[derive(Default)]
struct Follow {
    lines: Mutex<Vec<String>>,
    over: AtomicBool,
}

impl BuildWatch for Follow {
    fn line(&self, line: &str) {
        eprintln!("{line}");
        let mut lines = self.lines.lock().unwrap();
        // A flood is not for keeping.
        if lines.len() < 1000 {
            lines.push(line.to_owned());
        }
    }

    fn cancelled(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }
}

impl Follow {
    fn said(&self, text: &str) -> bool {
        self.lines.lock().unwrap().iter().any(|line| line.contains(text))
    }
}

/// Puts the guest agent where this process finds it: beside its own program.
fn place_agent() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let agent = Path::new(env!("CARGO_BIN_EXE_mvm")).with_file_name("mvm-guest-agent.static");
        let place = std::env::current_exe().unwrap().with_file_name("mvm-guest-agent.static");
        let new = place.with_extension(format!("{}", std::process::id()));
        fs::copy(agent, &new).unwrap();
        fs::rename(new, place).unwrap();
    });
}

/// The node of a rig, in this process.
fn node(rig: &Rig) -> Node {
    place_agent();
    let paths = Paths::new(rig.state(), Some(rig.run_dir()));
    fs::create_dir_all(paths.run()).unwrap();
    let store = Arc::new(FileStore::new(paths.state().to_owned(), paths.run().join("locks")));
    let documents = Documents::new(store.clone());
    let clock = Arc::new(SystemClock::new());
    let random =
        |bytes: &mut [u8]| fs::File::open("/dev/urandom").and_then(|mut file| std::io::Read::read_exact(&mut file, bytes)).unwrap();
    let id = Node::ensure_doc(&documents, &random, None, UidRange::default()).unwrap().node_id;
    let qemu = QemuOptions {
        binary: mvm::cli::open::find_qemu(),
        facts_file: paths.run().join("qemu.json"),
        acceleration: AccelerationChoice::Auto,
    };
    let seams = Seams {
        documents,
        host: Arc::new(LocalHost::new(paths.clone(), &id)),
        vmm: Arc::new(Qemu::new(qemu)),
        guests: Arc::new(SerialChannel),
        images: Arc::new(NodeImages::new(paths.images())),
        clock: clock.clone(),
        random: Box::new(random),
        sealer: Arc::new(NodeSealer::new(paths.state().to_owned())),
        audit: mvm::audit::Audit::new(store, clock, "test".into()),
    };
    Node::open(paths, seams, VmmUids::PerInstance).unwrap()
}

/// What a build may use here: as little as will do.
fn limits() -> Limits {
    Limits {
        time: Duration::from_secs(170),
        silence: Duration::from_secs(60),
        log_bytes: 1 << 20,
        processes: 64,
        mem_mib: 384,
        disk_mib: 512,
    }
}

/// A flake whose build does this before it makes its image, which is that of the built-in one where `parts` says so.
fn flake(rig: &Rig, script: &str, parts: Option<&Path>) -> PathBuf {
    let tree = rig.path("flake");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("flake.nix"), FLAKE.replace('@', script)).unwrap();
    if let Some(parts) = parts {
        for (from, to) in [("vmlinux", "vmlinux"), ("initrd", "initrd"), ("rootfs.ext4", "rootfs")] {
            fs::hard_link(parts.join(from), tree.join(to)).unwrap();
        }
    }
    tree
}

/// Builds, and asserts that nothing is left of the machine.
fn build(
    rig: &Rig,
    node: &Node,
    tree: &Path,
    attribute: &str,
    limits: Limits,
    follow: &Follow,
) -> (Result<Provenance, BuildError>, PathBuf) {
    let into = rig.path("into");
    let _ = fs::remove_dir_all(&into);
    fs::create_dir(&into).unwrap();
    // As a build of a pool gives it: a copy has another name than the flake.
    let job = Job {
        flake_ref: "path:/work/tree".into(),
        shown: format!("path:{}", tree.display()),
        tree: tree.to_owned(),
        attribute: attribute.into(),
        limits,
    };
    let begun = Instant::now();
    let outcome = VmBuilder::new(node, Egress::None).build(&job, &into, follow);
    eprintln!("took {:?}: {outcome:?}", begun.elapsed());
    assert_eq!(rig.machines(), Vec::<i32>::new(), "processes");
    assert_eq!(fs::read_dir(rig.run_dir().join("builders")).unwrap().count(), 0, "run directories");
    (outcome, into)
}

#[test]
fn a_flake_is_built_in_a_microvm() {
    on_a_host_with_builder(2, |rig| {
        let node = node(rig);
        let revision = node.images().ensure_builtin(&|_| {}).unwrap();
        let parts = rig.state().join("images").join(revision.as_str());
        let tree = flake(rig, "echo hello from the build", Some(&parts));
        let follow = Follow::default();
        let (outcome, into) = build(rig, &node, &tree, ATTRIBUTE, limits(), &follow);
        let provenance = outcome.unwrap();
        assert!(provenance.store_path.starts_with("/nix/store/") && provenance.store_path.ends_with("-tenant-minimal"));
        assert_eq!(provenance.closure.iter().filter(|path| path.path == provenance.store_path).count(), 1);
        assert!(follow.said("hello from the build"));
        for (from, to) in [("vmlinux", "vmlinux"), ("initrd", "initrd"), ("rootfs.ext4", "rootfs")] {
            assert!(fs::read(parts.join(from)).unwrap() == fs::read(into.join(to)).unwrap(), "{to}");
        }
        rig.assert_nothing_left();
    });
}

/// What a build that goes wrong is called, and what it is told.
fn refused(rig: &Rig, node: &Node, script: &str, limits: Limits) -> BuildError {
    let tree = flake(rig, script, None);
    let (outcome, into) = build(rig, node, &tree, ATTRIBUTE, limits, &Follow::default());
    assert_eq!(fs::read_dir(into).unwrap().count(), 0, "half a result");
    outcome.unwrap_err()
}

#[test]
fn a_build_that_takes_more_than_it_may_is_ended() {
    on_a_host_with_builder(2, |rig| {
        let node = node(rig);
        let error = refused(rig, &node, "echo and now; sleep 1000", Limits { silence: Duration::from_secs(25), ..limits() });
        assert!(matches!(&error, BuildError::Silence { last, .. } if last == "and now"), "{error}");
        let error = refused(
            rig,
            &node,
            "while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done",
            Limits { log_bytes: 1 << 16, ..limits() },
        );
        assert!(matches!(error, BuildError::Flood { limit: 65_536, .. }), "{error}");
        let error = refused(rig, &node, "f() { f | f & }; f; while :; do sleep 1; done", Limits { processes: 32, ..limits() });
        assert!(matches!(error, BuildError::Processes { limit: 32, .. }), "{error}");
        let error = refused(rig, &node, "dd if=/dev/zero of=$TMPDIR/x bs=1M", Limits { disk_mib: 64, ..limits() });
        assert!(matches!(error, BuildError::Disk { limit_mib: 64, .. }), "{error}");
        let error = refused(rig, &node, "tail /dev/zero", Limits { mem_mib: 224, ..limits() });
        assert!(matches!(error, BuildError::Memory { limit_mib: 224, .. }), "{error}");
        let error = refused(rig, &node, "while :; do echo x; sleep 1; done", Limits { time: Duration::from_secs(12), ..limits() });
        assert!(matches!(error, BuildError::Time { .. }), "{error}");

        let follow = Arc::new(Follow::default());
        let tree = flake(rig, "echo it runs; sleep 1000", None);
        let seen = follow.clone();
        let ending = std::thread::spawn(move || {
            while !seen.said("it runs") {
                std::thread::sleep(Duration::from_millis(10));
            }
            seen.over.store(true, Ordering::SeqCst);
            Instant::now()
        });
        let (outcome, _) = build(rig, &node, &tree, ATTRIBUTE, limits(), &follow);
        assert!(matches!(outcome, Err(BuildError::Interrupted { .. })), "{outcome:?}");
        assert!(ending.join().unwrap().elapsed() < Duration::from_secs(2));
        rig.assert_nothing_left();
    });
}

#[test]
fn a_flake_that_yields_no_image_says_why() {
    on_a_host_with_builder(2, |rig| {
        let node = node(rig);
        let error = refused(rig, &node, "echo this is wrong >&2; exit 3", limits());
        assert!(
            matches!(&error, BuildError::Failed { said, .. } if said.contains("this is wrong") && said.contains("exit code 3")),
            "{error}"
        );
        let error = refused(rig, &node, "echo x > $out; exit 0", limits());
        assert!(error.to_string().contains("is a file, and should be a directory with vmlinux"), "{error}");
        let large = "mkdir $out; dd if=/dev/zero of=$out/rootfs bs=1M count=1 seek=100 2>/dev/null; exit 0";
        let error = refused(rig, &node, large, Limits { disk_mib: 64, ..limits() });
        assert!(error.to_string().contains("larger than the 64 MiB"), "{error}");

        let tree = flake(rig, "mkdir $out; exit 0", None);
        let (outcome, into) = build(rig, &node, &tree, ATTRIBUTE, limits(), &Follow::default());
        outcome.unwrap();
        assert_eq!(fs::read_dir(&into).unwrap().count(), 0, "whether that is an image is not the builder's to say");
        let (outcome, _) = build(rig, &node, &tree, "packages.x86_64-linux.tenant-python", limits(), &Follow::default());
        let said = outcome.unwrap_err().to_string();
        assert!(said.ends_with("has no packages.x86_64-linux.tenant-python; it has: other, tenant-minimal"), "{said}");
        fs::write(tree.join("flake.nix"), "{ outputs = { self }: { packages.x86_64-linux.tenant-minimal = throw \"not today\"; }; }")
            .unwrap();
        let (outcome, _) = build(rig, &node, &tree, ATTRIBUTE, limits(), &Follow::default());
        let said = outcome.unwrap_err().to_string();
        assert!(said.contains("cannot be evaluated") && said.contains("not today") && !said.contains("/run/job"), "{said}");
        rig.assert_nothing_left();
    });
}

/// A pool whose image a flake makes, and a command that builds in microVMs.
const POOL: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "web"
flake_ref = "path:@"
instance_resources = { vcpus = 1, mem_mib = 128 }
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0, min_warm_seconds = 0, drain_timeout_seconds = 5 }
"#;

#[test]
fn what_was_built_in_a_microvm_boots_and_a_killed_mvm_leaves_nothing_of_a_build() {
    on_a_host_with_builder(3, |rig| {
        let node = node(rig);
        let revision = node.images().ensure_builtin(&|_| {}).unwrap();
        let tree = flake(rig, "echo hello from the build", Some(&rig.state().join("images").join(revision.as_str())));
        let file = rig.file("fleet.toml", POOL.replace('@', tree.to_str().unwrap()));
        let vm = |args: &[&str]| {
            let mut command = rig.mvm(args);
            command.env("MVM_BUILDER", "vm");
            command
        };
        let ran = finish(vm(&["apply", "-f", &file]).spawn().unwrap(), "mvm apply");
        assert!(ran.status.success(), "{}{}", ran.text(), ran.err);
        eprintln!("mvm apply took {:?}", ran.took);
        let at = rig.only();
        assert_eq!(rig.sh(&at, "uname -s"), "Linux");
        let revisions = rig.json(&["pool", "revisions", "acme/web"]);
        assert!(revisions.to_string().contains("\"vm\""), "{revisions}");
        let log = fs::read_to_string(rig.state().join("tenants/acme/pools/web/build.log")).unwrap();
        assert!(log.contains("hello from the build"), "{log}");

        // Killed in the middle: the machine that built is gone, the pool is as it was.
        fs::write(tree.join("flake.nix"), FLAKE.replace('@', "echo it runs; sleep 1000")).unwrap();
        let mut child = vm(&["pool", "build", "acme/web"]).spawn().unwrap();
        let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("it runs") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0, "it ended: {:?}", child.wait());
        }
        assert_eq!(rig.machines().len(), 2);
        child.kill().unwrap();
        child.wait().unwrap();
        rig.eventually("the builder is gone", Duration::from_secs(2), || rig.machines().len() == 1);
        assert_eq!(fs::read_dir(rig.run_dir().join("builders")).unwrap().count(), 0);
        assert_eq!(rig.sh(&at, "uname -s"), "Linux");
        rig.prune();
    });
}

/// Notes who calls.
fn listen() -> (u16, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    (listener.local_addr().unwrap().port(), listener)
}

#[test]
fn a_commit_is_built_in_a_microvm_and_nothing_of_it_is_looked_at_on_the_host() {
    on_a_host_with_builder(2, |rig| {
        let tree = flake(rig, "echo hello from the build; mkdir $out; exit 0", None);
        let git = |args: &[&str]| {
            let dir = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-C", tree.to_str().unwrap()];
            run("git", &[&dir[..], args].concat())
        };
        let (port, listener) = listen();
        let whole = fs::read_to_string(tree.join("flake.nix")).unwrap();
        let input = format!("inputs.x = {{ url = \"http://127.0.0.1:{port}/x.tar.gz\"; flake = false; }};\n  outputs = {{ self, x }}:");
        fs::write(tree.join("flake.nix"), whole.replace("outputs = { self }:", &input)).unwrap();
        git(&["init", "-q", "-b", "main"]);
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "with an input"]);
        let reference = format!("git+file://{}?ref=main", tree.display());
        let file = rig.file("fleet.toml", POOL.replace("path:@", &reference).replace("running = 1", "running = 0"));
        rig.ok(&["apply", "-f", &file]);
        // With no more than a host with NixOS gives it.
        let build = || {
            let mut command = crate::nix::restricted(rig, &["pool", "build", "acme/web"]);
            finish(command.env("MVM_BUILDER", "vm").spawn().unwrap(), "mvm pool build")
        };
        let refused = build();
        assert!(refused.err.contains("build with `--builder-egress internet`"), "{}", refused.err);
        assert!(refused.err.contains(&format!("the flake {reference} has inputs, and the microVM")), "{}", refused.err);
        assert!(!refused.err.contains("/.builds/") && !refused.err.contains("/run/job"), "{}", refused.err);
        assert!(listener.accept().is_err(), "an input was fetched by the host");

        fs::write(tree.join("flake.nix"), whole).unwrap();
        git(&["commit", "-q", "-a", "-m", "without one"]);
        let built = build();
        // It was built; what it yields is no image.
        assert!(built.err.contains("hello from the build") && built.err.contains("yields no image: vmlinux is missing"), "{}", built.err);
        rig.prune();
    });
}

/// A tenant with an instance that listens, and another one.
const NEIGHBOURS: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "web"
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0 }
instance_resources = { vcpus = 1, mem_mib = 128 }
workload = { command = ["sh", "-c", "while :; do nc -l -p 9000 -e echo hello from a guest; done"] }
[[tenants]]
tenant_id = "other"
network = { tenant_net_id = 8, ipv4_subnet = "10.240.8.0/24" }
"#;

#[test]
fn a_build_reaches_what_is_outside_and_nothing_else() {
    on_a_host_with_builder(3, |rig| {
        let outside = Outside::new();
        rig.apply(NEIGHBOURS);
        let (node, at) = (node(rig), rig.only());
        let tree = flake(
            rig,
            "for to in 198.51.100.2:80 10.240.7.3:9000 10.240.7.1:7777 10.240.8.1:7777 198.51.100.1:7777 169.254.169.254:80; do \
             echo \"$to: $(nc -w 2 ''${to%:*} ''${to#*:} </dev/null 2>/dev/null)\"; done; \
             ping -c 1 -W 1 10.240.7.1 >/dev/null 2>&1 && echo pinged; \
             ip addr add 10.240.7.9/24 dev eth0 2>/dev/null && echo privileged; \
             ( exec </dev/null >/dev/null 2>&1; while :; do nc -l -p 9000 -e echo hello from the builder; done ) & \
             sleep 1; echo \"itself: $(nc -w 2 10.240.7.2 9000 </dev/null)\"; echo it listens; sleep 6; kill $!; mkdir $out; exit 0",
            None,
        );
        let services = ["10.240.7.1:7777", "10.240.8.1:7777", "198.51.100.1:7777"].map(|address| {
            let listener = TcpListener::bind(address).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        let follow = Arc::new(Follow::default());
        std::thread::scope(|scope| {
            let probe = scope.spawn(|| {
                let deadline = Instant::now() + Duration::from_secs(120);
                while !follow.said("it listens") {
                    assert!(Instant::now() < deadline);
                    std::thread::sleep(Duration::from_millis(10));
                }
                assert!(run("ip", &["link"]).contains("tn7b"));
                // Neither straight nor by way of the host, and not with a stolen address.
                let asked = rig.sh(&at, "nc -w 2 10.240.7.2 9000 </dev/null 2>/dev/null && echo reached || true");
                let routed = rig.sh(
                    &at,
                    "ip route add 10.240.7.2 via 10.240.7.1; nc -w 2 10.240.7.2 9000 </dev/null 2>/dev/null && echo reached || true",
                );
                (asked, routed)
            });
            let into = rig.path("into");
            fs::create_dir(&into).unwrap();
            let job = Job {
                flake_ref: "path:/f".into(),
                shown: "path:/f".into(),
                tree: tree.clone(),
                attribute: ATTRIBUTE.into(),
                limits: limits(),
            };
            VmBuilder::new(&node, Egress::Internet("acme".parse().unwrap())).build(&job, &into, &*follow).unwrap();
            assert_eq!(probe.join().unwrap(), (String::new(), String::new()));
        });
        assert!(follow.said("itself: hello from the builder"));
        assert_eq!(rig.sh(&at, "nc -w 2 127.0.0.1 9000 </dev/null"), "hello from a guest");
        assert!(follow.said("198.51.100.2:80: hello from outside"));
        assert_eq!(outside.came.recv_timeout(Duration::from_secs(5)).unwrap(), "198.51.100.1", "masqueraded");
        for closed in ["10.240.7.3:9000:", "10.240.7.1:7777:", "10.240.8.1:7777:", "198.51.100.1:7777:", "169.254.169.254:80:"] {
            assert!(follow.lines.lock().unwrap().iter().any(|line| line.trim_end() == closed), "{closed} {:?}", follow.lines);
        }
        for service in services {
            assert!(service.accept().is_err(), "a service of the host was reached");
        }
        assert!(!follow.said("pinged") && !follow.said("privileged"));
        assert!(!run("ip", &["link"]).contains("tn7b"), "its TAP is left");
        // What a tenant's instances may is as before.
        assert_eq!(rig.sh(&at, "nc -w 3 198.51.100.2 80 </dev/null"), "hello from outside");
        rig.ok(&["net", "verify"]);
        run("ip", &["link", "del", "outside0"]);
        rig.prune();
    });
}

#[test]
fn a_build_is_put_into_the_machine_of_whatever_driver_the_node_has() {
    for driver in [Driver::StandIn, Driver::FirecrackerApart] {
        on_a_host_of_with_builder(driver, 1, |rig| {
            if crate::firecracker::is_real() {
                return;
            }
            let tree = flake(rig, "exit 0", None);
            let document = POOL.replace("path:@", &format!("path:{}", tree.display())).replace("running = 1", "running = 0");
            let file = rig.file("fleet.toml", document);
            rig.ok(&["apply", "-f", &file]);
            for egress in ["none", "internet"] {
                let ran = rig.ran(&["pool", "build", "acme/web", "--builder", "vm", "--builder-egress", egress]);
                // All of it is there: the stand-in's guest, which is no Linux of its own, is told to begin.
                assert!(ran.code() == 1 && ran.err.contains("/usr/libexec/mvm-build: No such file"), "{egress}: {}{}", ran.text(), ran.err);
                assert_eq!(rig.machines(), Vec::<i32>::new());
                assert!(!run("ip", &["link"]).contains("tn7b"), "its TAP is left");
            }
            rig.prune();
        });
    }
}
