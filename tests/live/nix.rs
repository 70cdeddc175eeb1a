//! Flakes built by the real nix, and what they can do wrong.
//!
//! They have no inputs, so that nothing is fetched. What they build with is this machine's shell.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mvm::image::nix::{self, BuildWatch, BuilderKind, Limits, Reference};
use rustix::process::Signal;
use serde_json::Value;

use crate::rig::{Ran, Rig, finish, on_a_host, signal, text};

/// A pool that is built, and has no instances yet.
fn pool(flake: &str, counts: &str) -> String {
    format!(
        r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = {{ tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }}
[[tenants.pools]]
pool_id = "web"
flake_ref = "{flake}"
instance_resources = {{ vcpus = 1, mem_mib = 128, data_disk_mib = 16 }}
desired_counts = {{ {counts} }}
runtime_policy = {{ min_running_seconds = 0, min_warm_seconds = 0, drain_timeout_seconds = 5 }}
"#
    )
}

/// A flake in a directory of the test's.
struct Flake {
    dir: PathBuf,
}

/// Copies the image's files from the flake to the result.
const COPY: &str =
    "mkdir $out; for f in vmlinux initrd rootfs vmm.json; do if [ -e ${./image}/$f ]; then cp ${./image}/$f $out/$f; fi; done";

impl Flake {
    /// A flake with a small image, which passes for one and boots nothing.
    fn small(rig: &Rig, name: &str) -> Flake {
        let flake = Flake { dir: rig.path(name) };
        fs::create_dir_all(flake.dir.join("image")).unwrap();
        let mut kernel = vec![0; 4096];
        kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
        kernel[0x12] = 62;
        flake.file("image/vmlinux", &kernel);
        flake.file("image/rootfs", b"hsqs, as far as anybody looks");
        flake.file("image/vmm.json", br#"{"version":1,"root_format":"squashfs"}"#);
        flake.builds("tenant-minimal", COPY);
        flake
    }

    /// A flake with the kernel, initramfs and root file system of the built-in image.
    fn bootable(rig: &Rig, name: &str) -> Flake {
        let flake = Flake::small(rig, name);
        let images = fs::read_dir(rig.state().join("images")).unwrap().map(|entry| entry.unwrap().path());
        let builtin =
            images.filter(|path| path.join("manifest.json").exists()).max_by_key(|path| fs::metadata(path).unwrap().modified().unwrap());
        let builtin = builtin.expect("the rig has the built-in image");
        for (from, to) in [("vmlinux", "vmlinux"), ("initrd", "initrd"), ("rootfs.ext4", "rootfs")] {
            fs::copy(builtin.join(from), flake.dir.join("image").join(to)).unwrap();
        }
        flake.config("quiet");
        flake
    }

    fn config(&self, marker: &str) {
        let args = format!(r#"["quiet","cryptomgr.notests","{marker}"]"#);
        let config = format!(r#"{{"version":1,"root_format":"ext4","kernel_args":{args},"min_mem_mib":96}}"#);
        self.file("image/vmm.json", config.as_bytes());
    }

    fn file(&self, name: &str, content: &[u8]) {
        fs::write(self.dir.join(name), content).unwrap();
    }

    /// Makes it a flake whose attribute is built by a shell script.
    fn builds(&self, attribute: &str, script: &str) {
        self.outputs(&format!("{attribute} = sh \"{attribute}\" ''export PATH=/usr/bin:/bin; {script}'';"));
    }

    fn outputs(&self, packages: &str) {
        let nix = format!(
            "{{ outputs = {{ self }}: let sh = name: script: derivation {{ inherit name; system = \"x86_64-linux\"; builder = \"/bin/sh\"; args = [ \"-c\" script ]; }}; in {{ packages.x86_64-linux = {{ {packages} }}; }}; }}"
        );
        self.file("flake.nix", nix.as_bytes());
    }

    fn manifest(&self) {
        fs::create_dir_all(self.dir.join("nix")).unwrap();
        self.file("nix/any.nix", b"{ }");
        let toml = "[meta]\nversion = 1\n[profiles.minimal]\nmodule = \"nix/any.nix\"\n[roles.worker]\nmodule = \"nix/any.nix\"\n";
        self.file("mvm-profiles.toml", toml.as_bytes());
    }

    fn reference(&self) -> String {
        format!("path:{}", self.dir.display())
    }
}

fn revision(rig: &Rig) -> Option<String> {
    rig.json(&["pool", "info", "acme/web"])["revision"].as_str().map(str::to_owned)
}

fn build(rig: &Rig) -> Value {
    rig.json(&["pool", "build", "acme/web"])
}

/// The processes whose command line has a word.
fn processes(word: &str) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let has = |pid: &i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes()))
    };
    pids.filter(has).collect()
}

fn leftovers(rig: &Rig) -> Vec<PathBuf> {
    let builds = fs::read_dir(rig.state().join("images/.builds")).into_iter().flatten();
    builds.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect()
}

#[test]
fn a_flake_becomes_an_image_that_boots_is_replaced_and_comes_back() {
    on_a_host(1, |rig| {
        let flake = Flake::bootable(rig, "flake");
        flake.config("mvm.first");
        rig.apply(&pool(&flake.reference(), "running = 0"));
        let built = build(rig);
        assert_eq!(text(&built["attribute"]), "packages.x86_64-linux.tenant-minimal");
        assert_eq!(text(&built["builder"]), "host");
        assert!(text(&built["store_path"]).starts_with("/nix/store/"));
        assert!(text(&built["locked"]).contains("narHash=sha256-"));
        assert_eq!(built["closure"].as_array().unwrap().len(), 1);
        let first = text(&built["revision"]);

        let fleet = pool(&flake.reference(), "running = 1");
        rig.apply(&fleet);
        let at = rig.only();
        assert!(rig.sh(&at, "cat /proc/cmdline").contains("mvm.first"));
        let image = rig.state().join("images").join(&first);
        assert!(image.join("vmm.json").exists() && !image.join("rootfs.ext4").exists());

        // The flake gets a manifest and another image: a pass builds it, and replaces the instance.
        flake.manifest();
        flake.config("mvm.second");
        flake.builds("tenant-worker-minimal", COPY);
        assert!(rig.ok(&["plan", "-f", rig.path("fleet.toml").to_str().unwrap()]).contains("the flake has changed"));
        rig.apply(&fleet);
        assert_eq!(rig.only(), at);
        assert!(rig.sh(&at, "cat /proc/cmdline").contains("mvm.second"));
        let second = revision(rig).unwrap();
        assert_ne!(first, second);
        let revisions = rig.json(&["pool", "revisions", "acme/web"]);
        assert_eq!(text(&revisions[0]["attribute"]), "packages.x86_64-linux.tenant-worker-minimal");
        assert_eq!((&revisions[0]["current"], &revisions[1]["current"]), (&Value::Bool(true), &Value::Bool(false)));
        let differences = rig.json(&["pool", "diff", "acme/web"]);
        let what: Vec<String> = differences.as_array().unwrap().iter().map(|one| text(&one["what"])).collect();
        assert!(what.contains(&"vmm.json".to_owned()) && what.contains(&"attribute".to_owned()), "{what:?}");
        assert!(!what.contains(&"vmlinux".to_owned()), "{what:?}");

        // A rollback replaces the instance, and no pass undoes it.
        rig.ok(&["pool", "rollback", "acme/web"]);
        assert!(rig.sh(&at, "cat /proc/cmdline").contains("mvm.first"));
        let pid = rig.pid_of(&at);
        rig.apply(&fleet);
        assert_eq!((revision(rig).unwrap(), rig.pid_of(&at)), (first.clone(), pid));

        // A build that fails leaves the machine and its image in service.
        flake.builds("tenant-worker-minimal", "echo no such luck; exit 3");
        let said = rig.fails(6, &["apply", "-f", rig.path("fleet.toml").to_str().unwrap()]);
        assert!(
            said.contains("the build of packages.x86_64-linux.tenant-worker-minimal failed") && said.contains("no such luck"),
            "{said}"
        );
        assert_eq!((revision(rig).unwrap(), rig.pid_of(&at)), (first.clone(), pid));
        assert!(text(&rig.json(&["pool", "list"])[0]["problem"]).contains("no such luck"));

        // What is in use stays; what is not goes.
        let removed = rig.json(&["pool", "gc", "acme/web", "--keep", "0", "--dry-run"]);
        assert_eq!(removed.as_array().unwrap().len(), 2, "{removed}");
        rig.ok(&["pool", "gc", "acme/web", "--keep", "0"]);
        assert!(image.exists() && !rig.state().join("images").join(&second).exists());
        assert_eq!(rig.json(&["pool", "revisions", "acme/web"]).as_array().unwrap().len(), 1);
        rig.ok(&["node", "gc", "--older-than", "0"]);
        assert!(image.exists());

        // Asleep, a snapshot needs it too.
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["node", "gc", "--older-than", "0"]);
        rig.ok(&["instance", "wake", &at]);
        rig.prune();
        rig.ok(&["node", "gc", "--older-than", "0"]);
        assert!(!image.exists());
    });
}

#[test]
fn a_pool_with_too_little_memory_for_its_image_is_refused_by_name() {
    on_a_host(1, |rig| {
        let flake = Flake::small(rig, "flake");
        flake.file("image/vmm.json", br#"{"version":1,"root_format":"squashfs","min_mem_mib":512}"#);
        let file = rig.file("fleet.toml", pool(&flake.reference(), "running = 1"));
        let said = rig.fails(6, &["apply", "-f", &file]);
        assert!(
            said.contains("needs at least 512 MiB of memory, and it has 128; `mvm pool update acme/web --mem-mib 512` gives it that"),
            "{said}"
        );
        assert_eq!(rig.machines(), Vec::<i32>::new());
    });
}

#[test]
fn an_unchanged_flake_is_not_looked_at_again_and_pools_share_a_build() {
    on_a_host(0, |rig| {
        let flake = Flake::small(rig, "flake");
        let mut two = pool(&flake.reference(), "running = 0");
        two.push_str(&format!("[[tenants.pools]]\npool_id = \"db\"\nflake_ref = \"{}\"\n", flake.reference()));
        rig.apply(&two);
        let built = build(rig);
        // From here on there is a nix that only fails.
        fs::create_dir(rig.path("bin")).unwrap();
        for program in ["nix", "nix-store"] {
            let file = rig.file(&format!("bin/{program}"), "#!/bin/sh\necho called >&2\nexit 1\n");
            fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:{}", rig.path("bin").display(), std::env::var("PATH").unwrap());
        let without_nix = |args: &[&str]| -> Ran { finish(rig.mvm(args).env("PATH", &path).spawn().unwrap(), &format!("{args:?}")) };
        for at in ["acme/web", "acme/db"] {
            let ran = without_nix(&["pool", "build", at]);
            assert!(ran.status.success() && !ran.err.contains("called"), "{ran:?}");
            assert_eq!(ran.text().trim(), text(&built["revision"]));
            eprintln!("an unchanged flake: {:?}", ran.took);
        }
        // Touched is not changed.
        fs::write(flake.dir.join("flake.nix"), fs::read(flake.dir.join("flake.nix")).unwrap()).unwrap();
        assert!(without_nix(&["pool", "build", "acme/web"]).status.success());
        fs::write(flake.dir.join("another"), "file").unwrap();
        let ran = without_nix(&["pool", "build", "acme/web"]);
        assert!(ran.code() == 1 && ran.err.contains("called"), "{ran:?}");
        // The same contents are the same image, whatever the sources are called.
        assert_eq!(build(rig)["revision"], built["revision"]);
    });
}

#[test]
fn a_repository_and_a_directory_in_it_are_flakes() {
    on_a_host(0, |rig| {
        let flake = Flake::small(rig, "repository");
        let git = |args: &[&str]| {
            let all = [
                &["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "safe.directory=*", "-C", flake.dir.to_str().unwrap()],
                args,
            ]
            .concat();
            crate::wire::run("git", &all)
        };
        git(&["init", "-q", "-b", "main"]);
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "first"]);
        let commit = git(&["rev-parse", "HEAD"]).trim().to_owned();
        for reference in [
            format!("git+file://{}", flake.dir.display()),
            flake.dir.to_str().unwrap().to_owned(),
            format!("git+file://{}?ref=main", flake.dir.display()),
        ] {
            rig.apply(&pool(&reference, "running = 0"));
            let built = build(rig);
            assert!(text(&built["locked"]).contains(&commit), "{built}");
        }
        // What git does not know of is not part of the flake.
        flake.file("mvm-profiles.toml", b"not toml");
        rig.apply(&pool(flake.dir.to_str().unwrap(), "running = 0"));
        build(rig);
        git(&["add", "."]);
        assert!(rig.fails(1, &["pool", "build", "acme/web"]).contains("mvm-profiles.toml:1:"));
    });
}

/// A command with the capabilities that the NixOS module gives to its units, and no more.
pub fn restricted(rig: &Rig, args: &[&str]) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let evaluated = Command::new("nix-instantiate")
        .args(["--eval", "--strict", "--json", "nix/tests/eval.nix", "-A", "restrictions.mvm-apply.CapabilityBoundingSet"])
        .current_dir(root)
        .env("NIX_STATE_DIR", rig.path("nix-state"))
        .output()
        .expect("nix-instantiate runs; install the Debian package nix-bin");
    assert!(evaluated.status.success(), "{}", String::from_utf8_lossy(&evaluated.stderr));
    let capabilities: Vec<String> = serde_json::from_slice(&evaluated.stdout).unwrap();
    let bounds = capabilities.iter().map(|name| format!(",+{}", name.trim_start_matches("CAP_").to_lowercase())).collect::<String>();
    let mvm = rig.mvm(args);
    let mut command = rig.command("setpriv", &["--no-new-privs", &format!("--bounding-set=-all{bounds}")]);
    command.arg(mvm.get_program()).args(mvm.get_args());
    command
}

#[test]
fn a_host_with_nixos_may_do_what_a_build_in_the_sandbox_needs() {
    on_a_host(0, |rig| {
        // Users for builds, as NixOS has them.
        for (name, line) in [("passwd", "nixbld1:x:30001:30000::/var/empty:/bin/false\n"), ("group", "nixbld:x:30000:nixbld1\n")] {
            let (place, whole) = (format!("/etc/{name}"), fs::read_to_string(format!("/etc/{name}")).unwrap());
            let own = rig.file(name, format!("{}\n{line}", whole.trim_end()));
            crate::wire::run("mount", &["--bind", &own, &place]);
        }
        let flake = Flake::small(rig, "flake");
        flake.builds("tenant-minimal", &format!("id -u; [ $$ -lt 10 ] && [ ! -e {} ] && {COPY}", flake.dir.display()));
        rig.apply(&pool(&flake.reference(), "running = 0"));
        let mut command = restricted(rig, &["pool", "build", "acme/web"]);
        command
            .env("NIX_CONFIG", "substituters =\nbuild-users-group = nixbld\nsandbox = true\nextra-sandbox-paths = /bin /usr /lib /lib64\n");
        let ran = finish(command.spawn().unwrap(), "mvm pool build");
        assert!(ran.status.success(), "{}", ran.err);
        assert!(revision(rig).is_some());
    });
}

/// Serves one file, and notes the first line of everything that it is asked.
fn serve(file: PathBuf) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, asked) = (listener.local_addr().unwrap().port(), Arc::new(Mutex::new(Vec::new())));
    let heard = asked.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut first = String::new();
            reader.read_line(&mut first).unwrap();
            let mut line = first.clone();
            while line.trim() != "" {
                line.clear();
                reader.read_line(&mut line).unwrap();
            }
            let body = if first.contains("/flake.tar.gz") { fs::read(&file).unwrap() } else { b"secret".to_vec() };
            heard.lock().unwrap().push(first);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            // Who asked may have enough.
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    (port, asked)
}

/// Follows nothing.
struct Quiet;

impl BuildWatch for Quiet {
    fn line(&self, line: &str) {
        eprintln!("{line}");
    }

    fn cancelled(&self) -> bool {
        false
    }
}

#[test]
fn sources_for_a_microvm_are_fetched_without_looking_into_them() {
    on_a_host(0, |rig| {
        let archive = rig.path("flake.tar.gz");
        let (port, asked) = serve(archive.clone());
        let secret = rig.path("secret");
        fs::create_dir(&secret).unwrap();
        let marker = format!("mvm-secret-{}", std::process::id());
        fs::write(secret.join(&marker), "key").unwrap();
        let stolen = || fs::read_dir("/nix/store").into_iter().flatten().any(|path| path.unwrap().path().join(&marker).exists());
        let flake = Flake::small(rig, "flake");
        let inputs = format!(
            "{{ inputs.a.url = \"http://127.0.0.1:{port}/steal.tar.gz\"; inputs.b.url = \"path:{}\"; outputs = _: {{ }}; }}",
            secret.display()
        );
        flake.file("flake.nix", inputs.as_bytes());
        flake.file(&format!("own-{marker}"), b"mine");
        let fetch = |reference: &str, name: &str, limits: Limits| {
            let work = rig.path(name);
            fs::create_dir(&work).unwrap();
            let reference = Reference::locate(reference).unwrap();
            nix::fetch(&reference, "the flake's sources", BuilderKind::Vm, &work, &limits, &Quiet).map_err(|error| error.to_string())
        };
        let whole = |tree: &Path| fs::read(tree.join("flake.nix")).unwrap() == inputs.as_bytes() && tree.join("image/vmlinux").is_file();

        let plain = fetch(&flake.reference(), "plain", Limits::default()).unwrap();
        assert!(whole(&plain.tree) && plain.locked == flake.reference());

        // A commit, of a repository that would have git run commands, and that is not root's.
        let git = |args: &[&str]| {
            let dir = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-C", flake.dir.to_str().unwrap()];
            crate::wire::run("git", &[&dir[..], args].concat())
        };
        let ran = rig.path("ran");
        git(&["init", "-q", "-b", "main"]);
        flake.file(".gitattributes", b"* filter=evil\nflake.nix export-subst\nimage export-ignore\n");
        flake.file("program", b"#!/bin/sh\n");
        fs::set_permissions(flake.dir.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", flake.dir.join("link")).unwrap();
        git(&["add", "."]);
        git(&["commit", "-q", "-m", "first"]);
        let commit = git(&["rev-parse", "HEAD"]).trim().to_owned();
        let touch = format!("touch {}", ran.display());
        for key in ["filter.evil.smudge", "core.fsmonitor", "core.sshCommand", "core.alternateRefsCommand"] {
            git(&["config", key, &touch]);
        }
        flake.file("flake.nix", b"changed, and not committed");
        fs::set_permissions(rig.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        crate::wire::run("chown", &["-R", "12345:12345", flake.dir.to_str().unwrap()]);
        for (name, query) in [("branch", "ref=main".to_owned()), ("rev", format!("rev={commit}"))] {
            let fetched = fetch(&format!("git+file://{}?{query}", flake.dir.display()), name, Limits::default()).unwrap();
            assert!(whole(&fetched.tree) && fetched.locked.contains(&format!("rev={commit}")), "{fetched:?}");
            assert_eq!(fs::read_link(fetched.tree.join("link")).unwrap(), Path::new("/etc/shadow"));
            assert_eq!(fs::metadata(fetched.tree.join("program")).unwrap().permissions().mode() & 0o777, 0o755);
            assert!(!fetched.tree.join(".git").exists());
        }
        assert!(!ran.exists(), "git ran what the repository names");
        let other = fetch(&format!("git+file://{}?rev={}", flake.dir.display(), "0".repeat(40)), "none", Limits::default());
        assert!(other.unwrap_err().contains("git cannot read"));
        // Somebody else's work tree that says it belongs to this repository, which is for its owner's eyes only.
        let objects = flake.dir.join(".git/objects");
        fs::set_permissions(&objects, fs::Permissions::from_mode(0o700)).unwrap();
        fetch(&format!("git+file://{}?rev={commit}", flake.dir.display()), "private", Limits::default()).unwrap();
        let thief = rig.path("thief");
        fs::create_dir(&thief).unwrap();
        fs::write(thief.join(".git"), format!("gitdir: {}", flake.dir.join(".git").display())).unwrap();
        crate::wire::run("chown", &["-R", "12346:12346", thief.to_str().unwrap()]);
        let stolen_commit = fetch(&format!("git+file://{}?rev={commit}", thief.display()), "stolen", Limits::default());
        assert!(stolen_commit.unwrap_err().contains("git cannot read"));
        // The host's nix would have git read it, which git refuses.
        rig.apply(&pool(&format!("git+file://{}?ref=main", flake.dir.display()), "running = 0"));
        let mut build = rig.mvm(&["pool", "build", "acme/web"]);
        let refused = finish(build.env("HOME", rig.path("")).spawn().unwrap(), "mvm pool build");
        assert!(refused.err.contains("belongs to user 12345, and git refuses it to user 0"), "{}", refused.err);

        // What only nix can fetch: it asks for that and for nothing else.
        flake.file("flake.nix", inputs.as_bytes());
        crate::wire::run("tar", &["-czf", archive.to_str().unwrap(), "-C", flake.dir.parent().unwrap().to_str().unwrap(), "flake"]);
        assert_eq!(*asked.lock().unwrap(), Vec::<String>::new());
        let url = format!("http://127.0.0.1:{port}/flake.tar.gz");
        let fetched = fetch(&url, "other", Limits::default()).unwrap();
        assert!(whole(&fetched.tree) && fetched.locked.starts_with(&format!("{url}?narHash=sha256-")), "{fetched:?}");
        assert!(asked.lock().unwrap().iter().all(|line| line.contains("/flake.tar.gz")), "{asked:?}");
        assert!(fetched.tree.starts_with(rig.path("other")));
        assert!(!stolen(), "an input is in the store");
        assert!(!fs::read_dir("/nix/store").into_iter().flatten().any(|path| path.unwrap().path().join(format!("own-{marker}")).exists()));
        fs::File::create(flake.dir.join("large")).unwrap().set_len(64 << 20).unwrap();
        crate::wire::run("sh", &["-c", &format!("head -c 64M /dev/urandom > {}", flake.dir.join("large").display())]);
        crate::wire::run("tar", &["-czf", archive.to_str().unwrap(), "-C", flake.dir.parent().unwrap().to_str().unwrap(), "flake"]);
        let small = Limits { disk_mib: 8, ..Limits::default() };
        let said = fetch(&url, "large", small.clone()).unwrap_err();
        assert!(said.contains("filled its disk of 8 MiB"), "{said}");
        assert!(fetch(&flake.reference(), "large-here", small).unwrap_err().ends_with("it has more than 8 MiB"));
    });
}

#[test]
fn what_is_wrong_with_a_flake_is_said_and_the_last_good_image_stays() {
    on_a_host(0, |rig| {
        let flake = Flake::small(rig, "flake");
        rig.apply(&pool(&flake.reference(), "running = 0"));
        let good = text(&build(rig)["revision"]);
        let refused = |expected: &str| {
            let said = rig.fails(1, &["pool", "build", "acme/web"]);
            assert!(said.contains(expected), "{said}\nand not: {expected}");
            assert_eq!(revision(rig).as_deref(), Some(good.as_str()), "{expected}");
            assert_eq!(leftovers(rig), Vec::<PathBuf>::new());
        };
        flake.outputs("default = sh \"d\" \"\"; tenant-python = sh \"p\" \"\";");
        refused("has no packages.x86_64-linux.tenant-minimal; it has: default, tenant-python");
        flake.file("flake.nix", b"{ outputs = { self }: { }; }");
        refused("it has no packages for this system");
        flake.outputs("tenant-minimal = throw \"not today\";");
        refused(&format!("the flake {} cannot be evaluated: error: not today", flake.reference()));
        flake.outputs("tenant-minimal = { }.missing;");
        refused(&format!("at {}/flake.nix:1:", flake.reference()));
        flake.outputs("tenant-minimal = \"text\";");
        refused("packages.x86_64-linux.tenant-minimal of the flake");
        flake.outputs("tenant-minimal = { drvPath = 1; };");
        refused("is no derivation; an image is what `derivation`");
        flake.file("flake.nix", b"{ outputs = { self }: { packages.x86_64-linux = let x = ; in x; }; }");
        refused("syntax error");
        fs::remove_file(flake.dir.join("flake.nix")).unwrap();
        refused("it has no flake.nix");
        for (script, expected) in [
            ("echo working; echo broken >&2; exit 1", "failed: "),
            ("echo x > $out", "yields no image: its result is a file"),
            ("mkdir $out; cp ${./image}/rootfs ${./image}/vmm.json $out", "yields no image: vmlinux is missing"),
            ("mkdir $out; echo '#!/bin/sh' > $out/vmlinux", "vmlinux is not an ELF file"),
            ("mkdir $out; cp ${./image}/* $out; ln -sf /etc/passwd $out/rootfs", "rootfs leads out of the Nix store, to /etc/passwd"),
            ("mkdir $out; cp ${./image}/* $out; echo '{}' > $out/x; mv $out/x $out/vmm.json -f", "vmm.json missing field `version`"),
        ] {
            flake.builds("tenant-minimal", script);
            refused(expected);
        }
        flake.builds("tenant-minimal", COPY);
        flake.manifest();
        refused("has no packages.x86_64-linux.tenant-worker-minimal; it has: tenant-minimal");
        let manifest = |content: &[u8], expected: &str| {
            flake.file("mvm-profiles.toml", content);
            refused(expected);
        };
        let whole = fs::read_to_string(flake.dir.join("mvm-profiles.toml")).unwrap();
        manifest(b"", "it has no version");
        manifest(&[b'#'; 300_000], "it has more than 262144 bytes");
        manifest(&whole.as_bytes()[..whole.len() - 3], "mvm-profiles.toml:6:");
        manifest(whole.replace("version = 1", "version = 2").as_bytes(), "it has version 2, and this mvm reads version 1");
        manifest(format!("{whole}colour = \"red\"\n").as_bytes(), "unknown field `colour`");
        manifest(whole.replace("nix/any.nix", "/etc/passwd").as_bytes(), "module \"/etc/passwd\" is not a path inside the flake");
        manifest(whole.replace("nix/any.nix", "../any.nix").as_bytes(), "module \"../any.nix\" is not a path inside the flake");
        manifest(whole.replace("roles.worker", "roles.gateway").as_bytes(), "role \"worker\" is not in mvm-profiles.toml; it has: gateway");
        manifest(
            whole.replace("profiles.minimal", "profiles.python").as_bytes(),
            "profile \"minimal\" is not in mvm-profiles.toml; it has: python",
        );
        flake.file("mvm-profiles.toml", whole.as_bytes());
        fs::remove_file(flake.dir.join("nix/any.nix")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", flake.dir.join("nix/any.nix")).unwrap();
        refused("mvm-profiles.toml:4:10: profiles.minimal.module: nix/any.nix: a link leads out of the directory");
        // The log of the last build is there to be read.
        let log = fs::read_to_string(rig.state().join("tenants/acme/pools/web/build.log")).unwrap();
        assert!(log.contains("mvm: "), "{log}");
        fs::remove_dir_all(&flake.dir).unwrap();
        refused("is not a directory");
        for (reference, expected) in
            [("./flake", "is no flake reference"), ("path:/a/../b", "without `..`"), ("github:a/b#c", "names an attribute")]
        {
            let file = rig.file("bad.toml", pool(reference, "running = 0"));
            let said = rig.fails(2, &["apply", "-f", &file]);
            assert!(said.contains(expected), "{said}");
        }
    });
}

#[test]
fn a_build_that_takes_too_much_is_ended_with_everything_it_started() {
    on_a_host(0, |rig| {
        let flake = Flake::small(rig, "flake");
        rig.apply(&pool(&flake.reference(), "running = 0"));
        let good = text(&build(rig)["revision"]);
        let ended = |script: &str, word: &str, args: &[&str], code: i32, expected: &str| {
            flake.builds("tenant-minimal", script);
            let begun = Instant::now();
            let said = rig.fails(code, &[&["pool", "build", "acme/web"], args].concat());
            assert!(said.contains(expected), "{said}\nand not: {expected}");
            assert_eq!(processes(word), Vec::<i32>::new(), "{expected}");
            assert_eq!(revision(rig).as_deref(), Some(good.as_str()));
            assert_eq!(leftovers(rig), Vec::<PathBuf>::new());
            eprintln!("{expected}: {:?}", begun.elapsed());
        };
        ended(
            "echo begun; setsid sleep 77701 & setsid sleep 77701",
            "77701",
            &["--silence-timeout", "2s"],
            5,
            "allows more; its last words: \"begun\"",
        );
        ended("setsid sleep 77702 & while :; do echo on; sleep 0.1; done", "77702", &["--timeout", "3s"], 5, "was ended after 3 s");
        ended(
            "setsid sleep 77703 & while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done",
            "77703",
            &[],
            1,
            "its log is larger than 16777216 bytes",
        );
        // Nix itself waits for the end of a line that never ends, up to the same limit.
        ended("setsid sleep 77704 & tr '\\0' x < /dev/zero", "77704", &[], 1, "its log is larger than 16777216 bytes");
        ended("setsid sleep 77707 & sleep 77707", "77707", &["--silence-timeout", "2s"], 5, "it said nothing for 2 s");
        ended("while :; do setsid sleep 77705 & done", "77705", &["--max-processes", "150"], 1, "it had more than 150 processes at a time");
        ended("setsid sleep 77706 & tail /dev/zero", "77706", &["--max-mem-mib", "300"], 1, "it used more than 300 MiB of memory");
        flake.builds("tenant-minimal", "mkdir $out; cp ${./image}/* $out; truncate -s 3M $out/initrd");
        assert!(rig.fails(1, &["pool", "build", "acme/web", "--max-image-mib", "2"]).contains("larger than the 2 MiB that it may have"));
        assert_eq!(revision(rig).as_deref(), Some(good.as_str()));
    });
}

#[test]
fn an_interrupted_and_a_killed_build_leave_nothing_and_the_next_goes_on() {
    on_a_host(0, |rig| {
        let flake = Flake::small(rig, "flake");
        rig.apply(&pool(&flake.reference(), "running = 0"));
        let good = text(&build(rig)["revision"]);
        let tmp = rig.path("tmp");
        fs::create_dir(&tmp).unwrap();
        let temporary = || fs::read_dir(&tmp).unwrap().count();
        for (how, word) in [(Signal::INT, "77711"), (Signal::HUP, "77713"), (Signal::KILL, "77712")] {
            flake.builds("tenant-minimal", &format!("setsid sleep {word} & sleep {word}"));
            let child = rig.mvm(&["pool", "build", "acme/web"]).env("TMPDIR", &tmp).spawn().unwrap();
            rig.eventually("the build goes on", Duration::from_secs(60), || processes(word).len() == 2);
            signal(i32::try_from(child.id()).unwrap(), how);
            let ran = finish(child, "mvm pool build");
            rig.eventually("everything is gone", Duration::from_secs(10), || processes(word).is_empty());
            if how != Signal::KILL {
                assert_eq!(ran.code(), 130, "{ran:?}");
                assert!(ran.err.contains("was interrupted"), "{ran:?}");
            }
            assert_eq!(revision(rig).as_deref(), Some(good.as_str()));
            let left = usize::from(how == Signal::KILL);
            assert_eq!((leftovers(rig).len(), temporary()), (left, left));
        }
        let swept = finish(rig.mvm(&["node", "gc"]).env("TMPDIR", &tmp).spawn().unwrap(), "mvm node gc");
        assert!(swept.text().contains("an unfinished build"), "{swept:?}");
        assert_eq!((leftovers(rig), temporary()), (Vec::<PathBuf>::new(), 0));
        flake.file("image/initrd", b"another");
        flake.builds("tenant-minimal", COPY);
        assert_ne!(text(&build(rig)["revision"]), good);
    });
}

#[test]
fn a_flake_from_init_is_built_and_its_own_role_boots() {
    on_a_host(1, |rig| {
        let flake = rig.path("images").to_str().unwrap().to_owned();
        rig.ok(&["init", &flake, "--kind", "plain", "--role", "cache"]);
        let fleet = pool(&format!("path:{flake}"), "running = 1");
        rig.apply(&fleet.replace("pool_id = \"web\"", "pool_id = \"web\"\nrole = \"cache\"\nprofile = \"plain\""));
        let at = rig.only();
        assert_eq!(text(&rig.json(&["instance", "info", &at])["role"]), "cache");
        let config: Value = serde_json::from_str(&rig.sh(&at, "cat /etc/mvm-config/config.json")).unwrap();
        assert_eq!((text(&config["role"]), text(&config["profile"])), ("cache".to_owned(), "plain".to_owned()));
        // It requires no secrets, and has none.
        assert_eq!(rig.sh(&at, "ls /run/secrets"), "");
        assert_eq!(text(&rig.json(&["pool", "revisions", "acme/web"])[0]["attribute"]), "packages.x86_64-linux.tenant-cache-plain");
        rig.prune();
    });
}
