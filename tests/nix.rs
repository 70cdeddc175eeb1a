//! The Nix side with the real `nix`: every file is parsed, every role with every profile evaluated against the stub of
//! NixOS' options in `nix/tests/stub`, what must fail fails by name, and flakes that need no nixpkgs are built.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use clap::Parser;
use mvm::cli::Cli;
use mvm::image::nix::{Job, Limits};
use mvm::vm::builder::{job, result};
use serde_json::{Value, json};

const SYSTEMS: [&str; 2] = ["x86_64-linux", "aarch64-linux"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a program to its end; one that is not there fails the test, and the message names its package.
fn finish(command: &mut Command, package: &str) -> Output {
    let program = command.get_program().to_owned();
    command.output().unwrap_or_else(|error| panic!("cannot run {}: {error}; install the Debian package {package}", program.display()))
}

/// A Nix with a store of its own, which needs neither a daemon nor a network.
struct Nix {
    directory: tempfile::TempDir,
}

impl Nix {
    fn new() -> Nix {
        Nix { directory: tempfile::tempdir().unwrap() }
    }

    fn command(&self, program: &str) -> Command {
        let at = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(program);
        command
            .env("NIX_STORE_DIR", at("store"))
            .env("NIX_LOCALSTATE_DIR", at("var"))
            .env("NIX_STATE_DIR", at("var/nix"))
            .env("NIX_LOG_DIR", at("log"))
            .env("NIX_CONF_DIR", at("etc"))
            .env("HOME", at("home"))
            .env_remove("NIX_REMOTE")
            .env_remove("NIX_PATH");
        command
    }

    /// Evaluates a part of `nix/tests/eval.nix`.
    fn evaluate(&self, part: &str, arguments: &[&str]) -> Result<Value, String> {
        let mut command = self.command("nix-instantiate");
        command.args(["--eval", "--strict", "--json", "nix/tests/eval.nix", "-A", part]).args(arguments).current_dir(root());
        let output = finish(&mut command, "nix-bin");
        match output.status.success() {
            true => Ok(serde_json::from_slice(&output.stdout).unwrap()),
            false => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// Builds what `installable` names, and returns its path.
    fn build(&self, installable: &str) -> PathBuf {
        let mut command = self.command("nix");
        command.args(["--extra-experimental-features", "nix-command flakes"]);
        command.args(OFFLINE).args(["build", "--no-link", "--json", installable]);
        let output = finish(&mut command, "nix-bin");
        assert!(output.status.success(), "{installable}: {}", String::from_utf8_lossy(&output.stderr));
        let built: Value = serde_json::from_slice(&output.stdout).unwrap();
        built[0]["outputs"]["out"].as_str().unwrap().into()
    }
}

/// No cache, no users for builds, and the host's own programs.
const OFFLINE: [&str; 9] = ["--option", "substituters", "", "--option", "build-users-group", "", "--option", "sandbox", "false"];

/// Files below a directory with this ending.
fn files(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap_or_default().to_owned();
        if path.is_dir() && !path.is_symlink() && !name.starts_with('.') && name != "target" {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|found| found == ending) {
            found.push(path);
        }
    }
}

fn manifest(path: &str) -> toml::Table {
    fs::read_to_string(root().join(path)).unwrap().parse().unwrap()
}

/// The images of a manifest, by the names of their packages.
fn images(manifest: &toml::Table) -> BTreeSet<String> {
    let names = |kind: &str| manifest[kind].as_table().unwrap().keys().cloned().collect::<Vec<_>>();
    let mut images = BTreeSet::new();
    for profile in names("profiles") {
        images.insert(format!("tenant-{profile}"));
        images.extend(names("roles").iter().map(|role| format!("tenant-{role}-{profile}")));
    }
    images
}

fn keys(value: &Value) -> BTreeSet<String> {
    value.as_object().unwrap().keys().cloned().collect()
}

/// What a sample says of itself: lines `# key: value`.
fn said<'a>(sample: &'a str, key: &str) -> Vec<&'a str> {
    let start = format!("# {key}: ");
    sample.lines().filter_map(|line| line.strip_prefix(start.as_str())).collect()
}

#[test]
fn every_file_is_parsed() {
    let nix = Nix::new();
    let mut all = Vec::new();
    files(root(), "nix", &mut all);
    assert!(all.len() > 30, "only {} files were found", all.len());
    let output = finish(nix.command("nix-instantiate").arg("--parse").args(&all), "nix-bin");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn packages_are_those_of_the_manifest() {
    let packages = Nix::new().evaluate("packages", &[]).unwrap();
    for system in SYSTEMS {
        let mut expected = images(&manifest("nix/mvm-profiles.toml"));
        expected.extend(["mvm-guest-agent".into(), "everything".into()]);
        if system == "x86_64-linux" {
            expected.extend(["mvm".into(), "default".into()]);
        }
        assert_eq!(keys(&packages[system]), expected, "{system}");
        for name in expected.iter().filter(|name| name.starts_with("tenant-")) {
            let vmm = &packages[system][name];
            assert_eq!(vmm["version"], 1);
            assert!(vmm["min_mem_mib"].as_u64().unwrap() >= 256, "{name}");
            assert_eq!(vmm["root_format"], "squashfs");
            let args: Vec<_> = vmm["kernel_args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
            assert!(args.iter().any(|arg| arg.starts_with("init=/nix/store/")), "{args:?}");
            assert!(!args.iter().any(|arg| arg.starts_with("console=") || arg.contains(' ')), "{args:?}");
        }
    }
}

#[test]
fn checks_modules_and_shells_are_there_for_everything() {
    let nix = Nix::new();
    let checks = nix.evaluate("checks", &[]).unwrap();
    for system in SYSTEMS {
        let mut expected: BTreeSet<String> =
            images(&manifest("nix/mvm-profiles.toml")).iter().map(|name| format!("evaluates-{name}")).collect();
        expected.extend(manifest("nix/mvm-profiles.toml")["roles"].as_table().unwrap().keys().map(|role| format!("vm-{role}")));
        if system == "x86_64-linux" {
            expected.insert("evaluates-host".into());
        }
        assert_eq!(keys(&checks[system]), expected, "{system}");
    }
    let modules = nix.evaluate("modules", &[]).unwrap();
    for (name, path) in modules.as_object().unwrap() {
        assert!(Path::new(path.as_str().unwrap()).exists(), "{name}");
    }
    assert!(modules.get("role-gateway").is_some() && modules.get("mvm-host").is_some());
    assert_eq!(keys(&nix.evaluate("shells", &[]).unwrap()), SYSTEMS.map(str::to_owned).into());
}

#[test]
fn the_template_is_a_flake_with_a_role_of_its_own() {
    let template = Nix::new().evaluate("template", &[]).unwrap();
    assert_eq!(Path::new(template["path"].as_str().unwrap()), root().join("nix/template"));
    for system in SYSTEMS {
        let expected = images(&manifest("nix/template/mvm-profiles.toml"));
        assert_eq!(keys(&template["packages"][system]), expected);
        assert_eq!(keys(&template["checks"][system]), expected.iter().map(|name| format!("evaluates-{name}")).collect());
    }
}

#[test]
fn the_host_starts_commands_that_mvm_understands() {
    let commands = Nix::new().evaluate("commands", &[]).unwrap();
    let commands = commands.as_array().unwrap();
    assert_eq!(commands.len(), 2);
    for command in commands {
        let mut words = command.as_str().unwrap().split(' ');
        assert!(words.next().unwrap().ends_with("/bin/mvm"));
        if let Err(error) = Cli::try_parse_from(["mvm"].into_iter().chain(words)) {
            panic!("{command}: {error}");
        }
    }
}

/// What builds need of the host is tried by `tests/live/nix.rs` with just these capabilities.
#[test]
fn the_host_grants_what_a_build_needs() {
    let units = Nix::new().evaluate("restrictions", &[]).unwrap();
    assert_eq!(keys(&units), ["mvm-apply", "mvm-reconcile"].map(str::to_owned).into());
    for (name, unit) in units.as_object().unwrap() {
        let words = |key: &str| unit[key].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect::<Vec<_>>();
        assert!(words("CapabilityBoundingSet").contains(&"CAP_SYS_ADMIN".to_owned()), "{name}");
        // `clone` and `unshare` of nix's sandbox (its LocalDerivationGoal::startBuilder) and of mvm itself.
        assert_eq!(words("RestrictNamespaces"), ["ipc", "mnt", "net", "pid", "user", "uts"], "{name}");
        assert_eq!(words("ReadWritePaths"), ["/nix"], "{name}");
        assert_eq!(words("path"), ["nix", "gitMinimal", "util-linux"], "{name}");
        // The sandbox sets a hostname, by a call that this would refuse.
        assert!(unit.get("ProtectHostname").is_none() && unit.get("SystemCallFilter").is_none(), "{name}");
        assert_eq!(unit["ProtectSystem"], "strict", "{name}");
    }
}

#[test]
fn declarations_come_to_units_drives_and_an_image() {
    let guest = Nix::new().evaluate("guest", &[]).unwrap();
    assert_eq!(guest["agent"], "notify");
    assert_eq!(guest["secrets"], json!(["/run/secrets/token"]));
    assert_eq!(guest["started"], json!(["sync.service"]));
    assert_eq!(guest["targets"], json!(["mvm-drain", "mvm-post-wake", "mvm-pre-sleep"]));
    let hooks = ["drain", "post-wake", "pre-sleep"].map(|moment| format!("mvm/hooks/{moment}.d/50-systemd"));
    assert_eq!(guest["hooks"], json!(hooks));
    let moments = json!({
        "mvm-drain-worker": ["mvm-drain.target"],
        "mvm-post-wake-services": ["mvm-post-wake.target"],
        "mvm-post-wake-worker": ["mvm-post-wake.target"],
        "mvm-pre-sleep-flush": ["mvm-pre-sleep.target"],
    });
    assert_eq!(guest["moments"], moments);
    assert!(guest["drain"].as_str().unwrap().contains("systemctl stop -- 'sync.service'"), "{guest}");
    let drive = &guest["drive"];
    assert_eq!((&drive["what"], &drive["where"]), (&json!("/dev/disk/by-label/mvm-models"), &json!("/models")));
    assert_eq!((&drive["type"], &drive["options"]), (&json!("erofs"), &json!("nosuid,nodev,ro")));
    // By its device, and by nothing else.
    assert_eq!(drive["wantedBy"], json!([r"dev-disk-by\x2dlabel-mvm\x2dmodels.device"]));
    assert_eq!(drive["requiredBy"], json!([]));
    assert_eq!((&guest["root"]["fsType"], &guest["root"]["device"]), (&json!("erofs"), &json!("/dev/vda")));
    assert_eq!((&guest["vmm"]["root_format"], &guest["vmm"]["min_mem_mib"]), (&json!("erofs"), &json!(356)));
}

/// The stub finds what it is there for; each sample says what its message must hold.
#[test]
fn what_is_wrong_in_a_module_is_named() {
    let nix = Nix::new();
    let mut samples = Vec::new();
    files(&root().join("nix/tests/bad"), "nix", &mut samples);
    assert!(samples.len() >= 15);
    for path in samples {
        let sample = fs::read_to_string(&path).unwrap();
        let (role, expected) = (said(&sample, "role"), said(&sample, "expect"));
        assert!(role.len() == 1 && !expected.is_empty(), "{}", path.display());
        let shown = path.display().to_string();
        let error = nix.evaluate("bad", &["--argstr", "role", role[0], "--arg", "module", &shown]).expect_err(&shown);
        for text in expected {
            assert!(error.contains(text), "{shown}: {text}: {error}");
        }
    }
}

#[test]
fn what_is_wrong_in_a_manifest_is_named() {
    let nix = Nix::new();
    let mut seen = 0;
    for entry in fs::read_dir(root().join("nix/tests/bad/manifests")).unwrap() {
        let directory = entry.unwrap().path();
        let sample: String = fs::read_dir(&directory).unwrap().map(|file| fs::read_to_string(file.unwrap().path()).unwrap()).collect();
        let shown = directory.display().to_string();
        let error = nix.evaluate("badManifest", &["--arg", "directory", &shown]).expect_err(&shown);
        for text in said(&sample, "expect") {
            seen += 1;
            assert!(error.contains(text), "{shown}: {text}: {error}");
        }
    }
    assert!(seen >= 10);
}

/// Runs a rules program as the image does.
fn rules(role: &str, config: &Value, gateway: &Value, may: &Value) -> Result<String, String> {
    let mut command = Command::new("jq");
    command.args(["--null-input", "--raw-output"]);
    for (name, value) in [("config", json!([config])), ("gateway", json!([gateway])), ("may", may.clone())] {
        command.args(["--argjson", name, &value.to_string()]);
    }
    command.arg("--from-file").arg(root().join(format!("nix/roles/{role}/rules.jq")));
    let output = finish(&mut command, "jq");
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn guest_config() -> Value {
    json!({ "network": { "address": "10.240.1.3/24" } })
}

#[test]
fn a_gateway_lets_in_its_tenant_and_what_is_exposed() {
    let gateway = json!({ "version": 1, "allow": [{ "protocol": "tcp", "port": 443 }, { "protocol": "udp", "port": 51820 }] });
    let expected = "table inet mvm_gateway
delete table inet mvm_gateway
table inet mvm_gateway {
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    iifname \"lo\" accept
    ip protocol icmp accept
    ip saddr 10.240.1.3/24 accept
    tcp dport 443 accept
    udp dport 51820 accept
  }
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ip saddr 10.240.1.3/24 accept
  }
}
";
    assert_eq!(rules("gateway", &guest_config(), &gateway, &Value::Null).unwrap(), expected);
    let without = expected.replace("    tcp dport 443 accept\n    udp dport 51820 accept\n", "");
    assert_eq!(rules("gateway", &guest_config(), &Value::Null, &Value::Null).unwrap(), without);
    assert_eq!(rules("gateway", &guest_config(), &json!({ "version": 1 }), &json!([])).unwrap(), without);
    let closed = without.replace("    ip saddr 10.240.1.3/24 accept\n", "");
    assert_eq!(rules("gateway", &Value::Null, &Value::Null, &Value::Null).unwrap(), closed);
}

#[test]
fn a_gateway_refuses_a_document_that_it_does_not_understand() {
    let allow = |entry: Value| json!({ "version": 1, "allow": [entry] });
    let any = Value::Null;
    let only_https = json!([{ "protocol": "tcp", "port": 443 }]);
    for (document, may, expected) in [
        (json!({ "version": 2 }), &any, "gateway.json: version is 2, and only 1 is known"),
        (json!([]), &any, "gateway.json: not an object"),
        (json!({ "version": 1, "allow": {} }), &any, "gateway.json: allow is not a list"),
        (allow(json!("443")), &any, "gateway.json: \"443\" is not { protocol, port }"),
        (allow(json!({ "protocol": "sctp", "port": 1 })), &any, "gateway.json: protocol \"sctp\" is neither tcp nor udp"),
        (allow(json!({ "protocol": "tcp; accept", "port": 1 })), &any, "is neither tcp nor udp"),
        (allow(json!({ "protocol": "tcp", "port": "1; accept" })), &any, "gateway.json: port \"1; accept\" is not from 1 to 65535"),
        (allow(json!({ "protocol": "tcp", "port": 0 })), &any, "gateway.json: port 0 is not from 1 to 65535"),
        (allow(json!({ "protocol": "tcp", "port": 70000 })), &any, "gateway.json: port 70000 is not from 1 to 65535"),
        (allow(json!({ "protocol": "tcp", "port": 22 })), &only_https, "gateway.json: the role may not expose tcp port 22"),
        (allow(json!({ "protocol": "udp", "port": 443 })), &only_https, "gateway.json: the role may not expose udp port 443"),
    ] {
        let error = rules("gateway", &guest_config(), &document, may).unwrap_err();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let hostile = json!({ "network": { "address": "10.240.1.3/24; accept" } });
    for role in ["gateway", "capability-imessage"] {
        let error = rules(role, &hostile, &Value::Null, &Value::Null).unwrap_err();
        assert!(error.contains("config.json: network.address is not an address with a prefix"), "{error}");
    }
}

#[test]
fn a_capability_reaches_its_tenant_only() {
    let text = rules("capability-imessage", &guest_config(), &Value::Null, &Value::Null).unwrap();
    let accepted: Vec<&str> = text.lines().map(str::trim).filter(|line| line.ends_with("accept")).collect();
    assert_eq!(
        accepted,
        ["iifname \"lo\" accept", "ip saddr 10.240.1.3/24 accept", "oifname \"lo\" accept", "ip daddr 10.240.1.3/24 accept"]
    );
    assert_eq!(text.matches("policy drop").count(), 2);
}

/// A copy of the example with parts that are no system, but are files.
fn example() -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let from = root().join("examples/flake-without-inputs");
    fs::create_dir(copy.path().join("parts")).unwrap();
    for file in ["flake.nix", "image.nix", "plain.nix", "mvm-profiles.toml", "parts/vmm.json"] {
        fs::copy(from.join(file), copy.path().join(file)).unwrap();
    }
    for file in ["vmlinux", "rootfs"] {
        fs::write(copy.path().join("parts").join(file), file).unwrap();
    }
    copy
}

#[test]
fn a_flake_without_inputs_is_built() {
    let (nix, flake) = (Nix::new(), example());
    let path = flake.path().display();
    for role in ["probe", "worker"] {
        let image = nix.build(&format!("path:{path}#packages.x86_64-linux.tenant-{role}-plain"));
        assert_eq!(fs::read_to_string(image.join("vmlinux")).unwrap(), "vmlinux");
        assert!(!image.join("initrd").exists());
        let vmm: Value = serde_json::from_slice(&fs::read(image.join("vmm.json")).unwrap()).unwrap();
        assert_eq!(vmm["version"], 1);
    }
    fs::remove_file(flake.path().join("parts/rootfs")).unwrap();
    let mut command = nix.command("nix");
    command.args(["--extra-experimental-features", "nix-command flakes"]).args(OFFLINE);
    let output = finish(command.args(["build", "--no-link", &format!("path:{path}#tenant-probe-plain")]), "nix-bin");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("role probe, profile plain: parts/ lacks rootfs"), "{error}");
}

/// Runs the script of the builder's unit; returns whether it built and what it said.
fn build_job(nix: &Nix, job: &Path, result: &Path) -> (bool, String) {
    let mut command = nix.command("bash");
    command.arg(root().join("nix/roles/builder/build-job.sh")).args([job, result]).args(OFFLINE);
    let output = finish(command.stdin(Stdio::null()), "bash");
    (output.status.success(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_builder_of_nixos_reads_the_job_drive_of_mvm_and_writes_what_mvm_reads() {
    let (nix, drive) = (Nix::new(), tempfile::tempdir().unwrap());
    fs::rename(example().keep(), drive.path().join(job::TREE)).unwrap();
    let what = |attribute: &str| Job {
        flake_ref: "path:/f".into(),
        shown: "path:/f".into(),
        tree: drive.path().join(job::TREE),
        attribute: attribute.into(),
        limits: Limits::default(),
    };
    let say = |text: &str| fs::write(drive.path().join(job::DOCUMENT), text).unwrap();
    let good = what("packages.x86_64-linux.tenant-probe-plain");
    say(&job::describe(&good));
    let result = tempfile::NamedTempFile::new().unwrap();
    let (built, said) = build_job(&nix, drive.path(), result.path());
    assert!(built, "{said}");
    let into = tempfile::tempdir().unwrap();
    result::take(fs::File::open(result.path()).unwrap().into(), into.path(), &good).unwrap();
    let mut names: Vec<_> = fs::read_dir(into.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["rootfs", "vmlinux", "vmm.json"]);
    assert_eq!(fs::read_to_string(into.path().join("rootfs")).unwrap(), "rootfs");

    for (text, why) in [
        (job::describe(&what("packages.x86_64-linux.nothing")), "the build of packages.x86_64-linux.nothing failed"),
        (json!({ "version": 2, "attribute": "x" }).to_string(), "job.json: version is 2, and only 1 is known"),
        (json!({ "version": 1 }).to_string(), "job.json: attribute is missing"),
        (json!({ "version": 1, "attribute": "x --impure" }).to_string(), "job.json: attribute is not made of letters"),
        ("{".to_owned(), "job.json: not there, or not JSON"),
    ] {
        say(&text);
        let result = tempfile::NamedTempFile::new().unwrap();
        let (built, said) = build_job(&nix, drive.path(), result.path());
        assert!(!built && said.lines().last().unwrap().contains(why), "{text}: {said}");
        assert_eq!(fs::metadata(result.path()).unwrap().len(), 0, "{text}");
    }
}
