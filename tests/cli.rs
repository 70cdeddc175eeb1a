//! The command line from outside: `mvm --vmm simulated` in directories of its own, without root.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const FLEET: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
quotas = { max_running = 8 }
[[tenants.pools]]
pool_id = "gw"
role = "gateway"
desired_counts = { running = 1 }
[[tenants.pools]]
pool_id = "web"
desired_counts = { running = 2, warm = 1, sleeping = 1 }
runtime_policy = { min_running_seconds = 0, min_warm_seconds = 0 }
"#;

struct Node {
    dir: tempfile::TempDir,
}

struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Node {
    fn new() -> Node {
        Node { dir: tempfile::tempdir().unwrap() }
    }

    /// A node with the fleet on it.
    fn with_fleet() -> Node {
        let node = Node::new();
        node.ok(&["apply", "-f", &node.file("fleet.toml", FLEET)]);
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), content).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mvm"));
        command.args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("USER", "tester");
        command.env("MVM_STATE_DIR", self.path("state")).env("MVM_RUN_DIR", self.path("run")).env("MVM_VMM", "simulated");
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        ran(self.command(args).output().unwrap())
    }

    fn run_with(&self, args: &[&str], input: &[u8]) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // A command that refuses early does not read.
        let _ = child.stdin.take().unwrap().write_all(input);
        ran(child.wait_with_output().unwrap())
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let ran = self.run(args);
        assert_eq!(ran.code, 0, "mvm {args:?}\n{}{}", ran.out, ran.err);
        ran.out
    }

    /// Runs a command that has to end with this code and say this, on standard error and nowhere else.
    #[track_caller]
    fn fails(&self, code: i32, args: &[&str], says: &[&str]) {
        let ran = self.run(args);
        assert_eq!(ran.code, code, "mvm {args:?}\n{}{}", ran.out, ran.err);
        for part in says {
            assert!(ran.err.contains(part), "mvm {args:?} does not say {part:?}: {}", ran.err);
        }
        assert!(ran.err.len() < 2000, "mvm {args:?} says {} bytes", ran.err.len());
        assert_eq!(ran.out, "", "mvm {args:?} fails and writes to standard output");
    }

    /// JSON is the only thing on standard output.
    #[track_caller]
    fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--output", "json"]].concat();
        let ran = self.run(&args);
        assert_eq!(ran.code, 0, "mvm {args:?}\n{}{}", ran.out, ran.err);
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("mvm {args:?}: {error}: {}", ran.out))
    }

    fn addresses(&self, state: &str) -> Vec<String> {
        let all = self.json(&["instance", "list"]);
        let all = all.as_array().unwrap().iter().filter(|one| one["state"] == state && one["role"] == "worker");
        all.map(|one| one["instance"].as_str().unwrap().to_owned()).collect()
    }
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().expect("it ends by itself"),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[test]
fn every_verb_does_its_work() {
    let node = Node::new();
    node.ok(&["tenant", "create", "acme", "--net-id", "7", "--subnet", "10.240.7.0/24", "--max-running", "5"]);
    node.ok(&["tenant", "update", "acme", "--max-running", "6", "--max-vcpus", "40"]);
    node.ok(&["tenant", "update", "acme", "--unlimited", "max-vcpus"]);
    let info = node.json(&["tenant", "info", "acme"]);
    assert_eq!((&info["quotas"]["max_running"], &info["quotas"]["max_vcpus"]), (&Value::from(6), &Value::Null));
    assert!(node.ok(&["tenant", "list"]).contains("10.240.7.0/24"));
    node.ok(&["pool", "create", "acme/web", "--role", "worker", "--mem-mib", "128"]);
    node.ok(&["pool", "update", "acme/web", "--vcpus", "2", "--min-running-seconds", "0", "--min-warm-seconds", "0"]);
    node.ok(&["pool", "build", "acme/web"]);
    assert_eq!(node.json(&["pool", "list"]).as_array().unwrap().len(), 1);
    let made = node.ok(&["instance", "create", "acme/web", "--count", "2"]);
    let at = made.lines().next().unwrap();
    for (verb, state) in
        [("start", "Running"), ("warm", "Warm"), ("resume", "Running"), ("sleep", "Sleeping"), ("wake", "Running"), ("stop", "Stopped")]
    {
        node.ok(&["instance", verb, at]);
        assert_eq!(node.json(&["instance", "info", at])["state"], state);
    }
    node.ok(&["instance", "destroy", "--yes", at]);
    node.ok(&["pool", "scale", "acme/web", "--running", "3", "--sleeping", "1"]);
    let pool = node.json(&["pool", "info", "acme/web"]);
    assert!(pool.to_string().contains("3/3") && pool.to_string().contains("1/1"), "{pool}");
    for args in [
        &["status"][..],
        &["status", "acme"],
        &["status", "acme/web"],
        &["instance", "list", "acme"],
        &["instance", "stats"],
        &["tenant", "list"],
        &["tenant", "secrets", "list", "acme"],
        &["pool", "list"],
        &["node", "info"],
        &["node", "stats"],
        &["net", "verify"],
        &["events"],
        &["events", "acme", "--tail", "2"],
    ] {
        assert!(!node.ok(args).is_empty(), "{args:?}");
        node.ok(&[args, &["-o", "wide"]].concat());
        node.json(args);
    }
    node.ok(&["events", "verify"]);
    node.ok(&["pool", "destroy", "--yes", "acme/web"]);
    node.ok(&["tenant", "destroy", "--force", "acme"]);
    assert_eq!(node.json(&["tenant", "list"]), Value::Array(Vec::new()));
    // Of a tenant that is gone the record stays, and its network id is given to nobody else.
    assert!(node.ok(&["events", "acme"]).contains("destroy tenant"));
    node.fails(2, &["tenant", "create", "beta", "--net-id", "7", "--subnet", "10.240.7.0/24"], &["belonged to tenant acme"]);
    node.ok(&["tenant", "create", "acme", "--net-id", "7", "--subnet", "10.240.7.0/24"]);
}

#[test]
fn plans_are_shown_carried_out_and_then_empty() {
    let node = Node::new();
    let file = node.file("fleet.toml", FLEET);
    assert!(!node.path("state").exists());
    let plan = node.ok(&["plan", "-f", &file]);
    insta::assert_snapshot!("plan", plan);
    assert!(!node.path("state").exists(), "a plan writes nothing");
    assert_eq!(node.run(&["plan", "-f", &file, "--detailed-exitcode"]).code, 10);
    assert!(node.json(&["plan", "-f", &file])["steps"].as_array().unwrap().len() > 5);
    assert_eq!(node.json(&["apply", "-f", &file])["result"], "ready");
    assert_eq!(node.run(&["plan", "-f", &file, "--detailed-exitcode"]).code, 0);
    let desired = node.ok(&["agent", "desired"]);
    assert_eq!(node.run_with(&["plan", "-f", "-", "--detailed-exitcode"], desired.as_bytes()).code, 0);
    let desired = node.ok(&["agent", "desired", "--format", "json"]);
    assert_eq!(node.run_with(&["plan", "-f", "-", "--detailed-exitcode"], desired.as_bytes()).code, 0);
    assert_eq!(node.ok(&["agent", "reconcile", "--desired", &file]), "Nothing to do: everything is as declared.\n");
    node.json(&["agent", "reconcile", "--desired", &file]);
    // What is beyond the quota waits, and says why.
    let wider = node.file("wider.toml", FLEET.replace("running = 2,", "running = 9,"));
    let ran = node.run(&["apply", "-f", &wider]);
    assert_eq!(ran.code, 6, "{}", ran.err);
    assert!(ran.err.contains("max_running"), "{}", ran.err);
    assert_eq!(node.addresses("Running").len(), 7, "as many as there is room for stay");
    node.ok(&["apply", "-f", &file]);
    assert_eq!(node.addresses("Running").len(), 2);
}

#[test]
fn tables_are_as_they_were() {
    let node = Node::with_fleet();
    // Ids and ages differ from run to run, and with the ids the order of instances that were made at the same moment.
    let mask = |text: String| {
        let word = |word: &str| {
            let (head, id) = word.rsplit_once("/i-").unwrap_or((word, ""));
            let age = word.strip_suffix('s').is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()));
            if !id.is_empty() {
                format!("{head}/i-________")
            } else if age {
                "_s".to_owned()
            } else {
                word.to_owned()
            }
        };
        let mut lines: Vec<String> = text.lines().map(|line| line.split_whitespace().map(word).collect::<Vec<_>>().join("  ")).collect();
        let first = lines.iter().position(|line| line.starts_with("INSTANCE")).unwrap() + 1;
        lines[first..].sort();
        lines.join("\n")
    };
    insta::assert_snapshot!("status", mask(node.ok(&["status"])));
    insta::assert_snapshot!("tenant_list", node.ok(&["tenant", "list"]));
    insta::assert_snapshot!("net_verify", node.ok(&["net", "verify"]));
}

#[test]
fn bad_ids_and_addresses_are_refused_wherever_they_are_taken() {
    let node = Node::with_fleet();
    let long = "x".repeat(10_000);
    for bad in [
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "/etc",
        "a b",
        "a;reboot",
        "$(reboot)",
        "`reboot`",
        "-rf",
        "größe",
        "日本",
        "A",
        "a\n",
        "0a",
        &long,
    ] {
        let commands: [Vec<&str>; 5] = [
            vec!["tenant", "create", "--net-id", "9", "--subnet", "10.240.9.0/24", "--", bad],
            vec!["tenant", "info", "--", bad],
            vec!["pool", "create", "--", bad],
            vec!["status", "--", bad],
            vec!["instance", "info", "--", bad],
        ];
        for args in commands {
            let ran = node.run(&args);
            // An address of another level is well-formed where any level is.
            assert_eq!(ran.code, 2, "{args:?}: {}{}", ran.out, ran.err);
            assert!(!ran.err.is_empty() && ran.err.len() < 2000 && ran.out.is_empty(), "{args:?}: {}", ran.err);
        }
        for prefix in ["acme/", "acme/web/"] {
            let address = format!("{prefix}{bad}");
            if address == "acme/web/" {
                continue;
            }
            let ran = node.run(&["instance", "info", "--", &address]);
            assert!([2, 3].contains(&ran.code), "{address:?}: {} {}{}", ran.code, ran.out, ran.err);
            assert!(ran.err.len() < 2000, "{address:.50}: {} bytes", ran.err.len());
        }
        node.fails(2, &["tenant", "secrets", "set", "acme", "--", &format!("{bad}/")], &[]);
    }
    // Not UTF-8.
    let raw = std::ffi::OsStr::from_bytes(b"acme/\xff/i-1");
    let output = node.command(&["instance", "info"]).arg(raw).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(fs::read_dir(node.path("state/tenants")).unwrap().count(), 1);
}

#[test]
fn wrong_input_names_what_would_be_right() {
    let node = Node::with_fleet();
    node.fails(2, &["pool", "create", "acme/x", "--role", "wroker"], &["gateway", "builder", "worker", "capability-imessage"]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "4096", "--subnet", "10.240.9.0/24"], &["0 to 4095"]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "-1", "--subnet", "10.240.9.0/24"], &[]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "9", "--subnet", "10.240.7.128/25"], &["overlaps", "acme"]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "7", "--subnet", "10.240.9.0/24"], &["acme"]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "9", "--subnet", "192.168.0.0/24"], &["10.240.0.0/12"]);
    node.fails(2, &["tenant", "create", "x", "--net-id", "9", "--subnet", "10.240.9.1/24"], &[]);
    node.fails(4, &["tenant", "create", "acme", "--net-id", "9", "--subnet", "10.240.9.0/24"], &["already"]);
    node.fails(2, &["tenant", "update", "acme", "--unlimited", "max_cats"], &["max_vcpus"]);
    node.fails(2, &["pool", "update", "acme/web", "--mem-mib", "1"], &["mem_mib", "64"]);
    node.fails(2, &["pool", "update", "acme/web", "--running", "99999999999"], &[]);
    node.fails(3, &["status", "acne"], &["acme"]);
    node.fails(3, &["pool", "info", "acme/wep"], &["acme/web"]);
    node.fails(3, &["instance", "info", "acme/web/i-00000000"], &["acme/web/i-"]);
    node.fails(3, &["events", "nobody"], &["acme"]);
    node.fails(2, &["aply", "-f", "x"], &["apply"]);
    node.fails(2, &["apply"], &["--file"]);
    node.fails(2, &["apply", "-f", "x", "--timeout", "soon"], &["90s"]);
    node.fails(2, &["--vmm", "xen", "status"], &["qemu", "simulated"]);
    node.fails(4, &["--vmm", "qemu", "status"], &["simulated"]);
    node.fails(2, &["tenant", "secrets", "set", "acme", "token", "--from-file", "/dev/null"], &["empty"]);
    node.fails(3, &["tenant", "secrets", "rotate", "acme", "token", "--from-file", "/etc/hostname"], &["token", "acme"]);
}

#[test]
fn documents_that_are_wrong_name_the_place_and_change_nothing() {
    let node = Node::with_fleet();
    let before = node.json(&["instance", "list"]).as_array().unwrap().len();
    let wrong: [(&str, &str, &[&str]); 14] = [
        ("role = \"gateway\"", "role = \"gatevay\"", &["tenants[0].pools[0].role", "gateway", "capability-imessage"]),
        ("desired_counts = { running = 1 }", "desired_count = { running = 1 }", &["desired_count", "desired_counts"]),
        ("pool_id = \"web\"", "pool_id = \"gw\"", &["pools[1]", "gw"]),
        ("pool_id = \"web\"", "pool_id = \"../web\"", &["tenants[0].pools[1].pool_id", "'.'"]),
        ("pool_id = \"web\"", "pool_id = \"a\\u0000b\"", &["tenants[0].pools[1].pool_id"]),
        ("pool_id = \"web\"", "pool_id = \"\"", &["tenants[0].pools[1].pool_id"]),
        ("pool_id = \"web\"", "pool_id = 7", &["tenants[0].pools[1].pool_id"]),
        ("running = 2,", "running = 99999999999,", &["running"]),
        ("running = 2,", "running = -1,", &["running"]),
        ("10.240.7.0/24", "10.240.7.0/33", &["ipv4_subnet"]),
        ("tenant_net_id = 7", "tenant_net_id = 70000", &["tenant_net_id"]),
        ("tenant_net_id = 7", "tenant_net_id = 8", &["tenants[0].network", "fixed for its life"]),
        ("schema_version = 1", "schema_version = 2", &["schema_version"]),
        ("pool_id = \"web\"", "pool_id = \"web\"\ndepends_on = [\"web\"]", &["depends_on"]),
    ];
    for (from, to, says) in wrong {
        assert!(FLEET.contains(from), "{from}");
        let file = node.file("wrong.toml", FLEET.replacen(from, to, 1));
        for verb in ["apply", "plan"] {
            node.fails(2, &[verb, "-f", &file], says);
        }
    }
    let long = node.file("wrong.toml", FLEET.replacen("pool_id = \"web\"", &format!("pool_id = \"{}\"", "x".repeat(10_000)), 1));
    node.fails(2, &["apply", "-f", &long], &["tenants[0].pools[1].pool_id"]);
    for (name, content) in [("x.toml", &b"\xff\xfe"[..]), ("x.json", b"{\"schema_version\": 1"), ("x.json", b"[]"), ("x.toml", b"")] {
        node.fails(2, &["apply", "-f", &node.file(name, content)], &[name]);
    }
    node.fails(2, &["apply", "-f", "/no/such/file"], &["/no/such/file"]);
    node.fails(2, &["apply", "-f", "/"], &["directory"]);
    let other = node.file("other.toml", FLEET.replacen("schema_version = 1", "schema_version = 1\nnode_id = \"elsewhere\"", 1));
    node.fails(4, &["apply", "-f", &other], &["elsewhere"]);
    assert_eq!(node.json(&["instance", "list"]).as_array().unwrap().len(), before);
    assert_eq!(node.run(&["plan", "-f", &node.file("fleet.toml", FLEET), "--detailed-exitcode"]).code, 0);
    // Generations only go on.
    let with = |generation: u32, running: u32| {
        let text = FLEET.replacen("schema_version = 1", &format!("schema_version = 1\ngeneration = {generation}"), 1);
        node.file("generation.toml", text.replacen("running = 2,", &format!("running = {running},"), 1))
    };
    node.ok(&["apply", "-f", &with(5, 2)]);
    node.ok(&["apply", "-f", &with(5, 2)]);
    node.fails(4, &["apply", "-f", &with(5, 3)], &["5"]);
    node.fails(4, &["apply", "-f", &with(4, 2)], &["4", "5"]);
    node.ok(&["apply", "-f", &with(6, 3)]);
}

#[test]
fn an_address_may_be_short_and_must_be_clear() {
    let node = Node::with_fleet();
    let all = node.json(&["instance", "list", "acme/web"]);
    let all: Vec<&str> = all.as_array().unwrap().iter().map(|one| one["instance"].as_str().unwrap()).collect();
    let whole = all[0].rsplit_once("/i-").unwrap().1;
    let mut short = 1;
    while all.iter().filter(|other| other.rsplit_once("/i-").unwrap().1.starts_with(&whole[..short])).count() > 1 {
        short += 1;
    }
    for address in [format!("acme/web/{}", &whole[..short]), format!("acme/web/i-{}", &whole[..short])] {
        assert_eq!(node.json(&["instance", "info", &address])["instance"], all[0]);
    }
    node.fails(2, &["instance", "stop", "acme/web/i-"], &["can mean", whole, "write more"]);
}

#[test]
fn states_that_do_not_fit_are_refused_with_what_does() {
    let node = Node::with_fleet();
    let running = &node.addresses("Running")[0];
    let sleeping = &node.addresses("Sleeping")[0];
    node.fails(4, &["instance", "wake", running], &["Running", "Sleeping", "sleep"]);
    node.fails(4, &["instance", "sleep", sleeping], &["Sleeping", "wake"]);
    node.fails(4, &["exec", sleeping, "--", "true"], &["mvm instance wake"]);
    node.fails(4, &["cp", "/etc/hostname", &format!("{sleeping}:/x")], &["mvm instance wake"]);
    node.fails(2, &["cp", "/etc/hostname", "/tmp/x"], &["TENANT/POOL/INSTANCE:PATH"]);
    node.fails(2, &["cp", &format!("{running}:/a"), &format!("{running}:/b")], &["both"]);
    node.fails(3, &["cp", "/no/such/file", &format!("{running}:/x")], &["/no/such/file"]);
    node.fails(4, &["run", "--", "true"], &["simulated"]);
    node.fails(4, &["exec", running, "--", "true"], &["simulated"]);
    node.fails(2, &["exec", running], &["CMD"]);
}

#[test]
fn what_destroys_asks_and_without_a_terminal_wants_to_be_told() {
    let node = Node::with_fleet();
    let running = node.addresses("Running")[0].clone();
    for args in [&["instance", "destroy", &running][..], &["pool", "destroy", "acme/web"], &["tenant", "destroy", "acme"]] {
        node.fails(4, args, &["--yes", "Destroy"]);
        assert_eq!(node.run_with(args, b"y\n").code, 4, "a pipe is no terminal");
    }
    assert_eq!(node.json(&["instance", "list"]).as_array().unwrap().len(), 5);
    for args in
        [&["instance", "destroy", "--yes", &running][..], &["pool", "destroy", "--yes", "acme/web"], &["tenant", "destroy", "-y", "acme"]]
    {
        node.ok(args);
    }
    assert_eq!(node.json(&["instance", "list"]), Value::Array(Vec::new()));
}

#[test]
fn a_torn_document_is_put_aside_and_named_and_the_others_go_on() {
    let node = Node::with_fleet();
    let torn = node.addresses("Running")[0].clone();
    let id = torn.rsplit('/').next().unwrap();
    let document = node.path("state/tenants/acme/pools/web/instances").join(id).join("instance.json");
    let content = fs::read(&document).unwrap();
    fs::write(&document, &content[..content.len() / 2]).unwrap();
    let ran = node.run(&["status"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains(id) && ran.err.contains("warning"), "{}", ran.err);
    assert!(!ran.out.contains(id));
    assert!(!document.exists());
    let aside: Vec<_> =
        fs::read_dir(document.parent().unwrap()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert!(aside.iter().any(|name| name.contains("quarantined")), "{aside:?}");
    // The others go on, and none is made in its place: its address may still be in use.
    let fleet = node.file("fleet.toml", FLEET);
    let ran = node.run(&["apply", "-f", &fleet]);
    assert_eq!(ran.code, 6, "{}", ran.err);
    assert!(ran.err.contains(id) && ran.err.contains("put back"), "{}", ran.err);
    assert_eq!(node.addresses("Running").len(), 1);
    fs::write(&document, &content).unwrap();
    node.ok(&["apply", "-f", &fleet]);
    assert_eq!(node.addresses("Running").len(), 2);
}

/// Cuts a document off and returns what it was.
fn tear(document: &Path) -> Vec<u8> {
    let content = fs::read(document).unwrap();
    fs::write(document, &content[..40]).unwrap();
    content
}

#[test]
fn a_torn_tenant_keeps_its_network_and_its_machines() {
    let node = Node::with_fleet();
    let before = node.json(&["instance", "list"]);
    let problems = |node: &Node| node.run(&["net", "verify"]);
    node.ok(&["net", "verify"]);
    tear(&node.path("state/tenants/acme/tenant.json"));
    for _ in 0..2 {
        let ran = problems(&node);
        assert_eq!(ran.code, 1, "{}{}", ran.out, ran.err);
        assert!(ran.out.contains("what is there is known") && ran.out.contains("acme"), "{}", ran.out);
    }
    node.fails(2, &["tenant", "create", "evil", "--net-id", "7", "--subnet", "10.240.9.0/24"], &["7 belongs to tenant acme"]);
    let fleet = node.file("fleet.toml", FLEET);
    let plan = node.ok(&["plan", "-f", &fleet]);
    assert!(plan.contains("create tenant") && !plan.contains("start"), "{plan}");
    node.ok(&["apply", "-f", &fleet]);
    assert_eq!(pids(&node.json(&["instance", "list"])), pids(&before));
    node.ok(&["net", "verify"]);
}

fn pids(list: &Value) -> Vec<(String, Value)> {
    list.as_array().unwrap().iter().map(|one| (one["instance"].to_string(), one["pid"].clone())).collect()
}

#[test]
fn a_torn_or_lost_node_is_not_replaced() {
    let node = Node::with_fleet();
    let document = node.path("state/node.json");
    let whole = tear(&document);
    for _ in 0..2 {
        node.fails(1, &["status"], &["node.json cannot be read", "restore it from a backup", "without one, write"]);
        node.fails(1, &["pool", "build", "acme/web"], &["node.json cannot be read"]);
    }
    let doctor = node.run(&["doctor"]);
    assert!(doctor.out.contains("node.json"), "{}", doctor.out);
    assert_eq!(fs::read(&document).unwrap(), whole[..40]);
    fs::remove_file(&document).unwrap();
    node.fails(4, &["pool", "build", "acme/web"], &["cannot take a new node id", "node.json is gone, and there are tenants"]);
    let doctor = node.run(&["doctor"]);
    assert!(doctor.out.contains("node.json is gone"), "{}", doctor.out);
    // Without a backup, as the error says.
    let id = serde_json::from_slice::<Value>(&whole).unwrap()["node_id"].as_str().unwrap().to_owned();
    fs::write(&document, format!("{{\"version\": 1, \"node_id\": \"{id}\"}}")).unwrap();
    node.ok(&["apply", "-f", &node.file("fleet.toml", FLEET)]);
}

#[test]
fn what_a_killed_creation_left_is_no_instance() {
    let node = Node::with_fleet();
    let instances = node.path("state/tenants/acme/pools/web/instances");
    fs::create_dir(instances.join("i-0000aaaa")).unwrap();
    fs::create_dir(instances.join("i-0000bbbb")).unwrap();
    fs::write(instances.join("i-0000bbbb/.instance.json.tmp"), "{").unwrap();
    node.ok(&["pool", "destroy", "--yes", "acme/web"]);
    fs::create_dir_all(node.path("state/tenants/acme/pools/gw/instances/i-0000cccc")).unwrap();
    node.ok(&["tenant", "destroy", "--yes", "acme"]);
    assert_eq!(fs::read_dir(node.path("state/tenants")).unwrap().count(), 0);
}

#[test]
fn a_tap_that_is_gone_is_named() {
    let node = Node::with_fleet();
    let at = node.addresses("Running")[0].clone();
    let host = node.path("run/simulated-host.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&host).unwrap()).unwrap();
    let document = node.path("state/tenants/acme/pools/web/instances").join(at.rsplit('/').next().unwrap()).join("instance.json");
    let offset = serde_json::from_slice::<Value>(&fs::read(document).unwrap()).unwrap()["offset"].clone();
    let tap = format!("tn7i{offset}");
    state["taps"].as_array_mut().unwrap().retain(|name| *name != tap);
    fs::write(&host, state.to_string()).unwrap();
    let ran = node.run(&["net", "verify"]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.contains(&format!("TAP {tap} of {at}")) && ran.out.contains("missing; stop and start it"), "{}", ran.out);
    node.ok(&["apply", "-f", &node.file("fleet.toml", FLEET)]);
    node.ok(&["net", "verify"]);
}

#[test]
fn secrets_that_are_lost_are_missed() {
    let node = Node::with_fleet();
    assert_eq!(node.run_with(&["tenant", "secrets", "set", "acme", "token"], b"value").code, 0);
    let document = node.path("state/tenants/acme/secrets.json");
    tear(&document);
    node.fails(1, &["tenant", "secrets", "list", "acme"], &["secrets.json cannot be read", "set every secret again"]);
    assert!(node.run(&["doctor"]).out.contains("secrets.json cannot be read"));
    fs::remove_file(&document).unwrap();
    node.fails(4, &["tenant", "secrets", "list", "acme"], &["secrets.json is gone", "mvm tenant secrets set acme"]);
    let at = node.addresses("Running")[0].clone();
    node.ok(&["instance", "stop", &at]);
    node.fails(4, &["instance", "start", &at], &["secrets.json is gone"]);
    assert_eq!(node.run_with(&["tenant", "secrets", "set", "acme", "token"], b"value").code, 0);
    node.ok(&["instance", "start", &at]);
}

#[test]
fn a_record_that_was_changed_is_found() {
    let node = Node::with_fleet();
    node.ok(&["events", "verify"]);
    let log = node.path("state/audit/acme.log");
    let whole = fs::read_to_string(&log).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    let changed: Vec<String> = lines
        .iter()
        .enumerate()
        .map(|(n, line)| if n == 3 { line.replacen("tester", "somebody", 1) } else { (*line).to_owned() })
        .collect();
    let without: Vec<String> = lines.iter().enumerate().filter(|(n, _)| *n != 3).map(|(_, line)| (*line).to_owned()).collect();
    for text in [changed, without] {
        fs::write(&log, text.join("\n") + "\n").unwrap();
        let ran = node.run(&["events", "verify"]);
        assert_eq!(ran.code, 1, "{}{}", ran.out, ran.err);
        assert!(ran.err.contains("acme") && ran.err.contains('4'), "{}", ran.err);
    }
    fs::write(&log, whole).unwrap();
    node.ok(&["events", "verify"]);
}

#[test]
fn secrets_are_never_shown() {
    let node = Node::with_fleet();
    let set = node.run_with(&["tenant", "secrets", "set", "acme", "api-token"], b"hunter2hunter2");
    assert_eq!((set.code, set.out.as_str()), (0, ""), "{}", set.err);
    let rotated = node.run_with(&["tenant", "secrets", "rotate", "acme", "api-token"], b"hunter3hunter3");
    assert_eq!(rotated.code, 0, "{}", rotated.err);
    let list = node.json(&["tenant", "secrets", "list", "acme"]);
    assert_eq!((&list[0]["name"], &list[0]["epoch"]), (&Value::from("api-token"), &Value::from(2)));
    let mut dirs = vec![node.path("state"), node.path("run")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                dirs.push(entry.path());
            } else {
                let content = String::from_utf8_lossy(&fs::read(entry.path()).unwrap()).into_owned();
                assert!(!content.contains("hunter"), "{}", entry.path().display());
            }
        }
    }
    let big = vec![b'x'; 10 << 20];
    assert_eq!(node.run_with(&["tenant", "secrets", "set", "acme", "big"], &big).code, 2);
}

#[test]
fn a_rehearsal_can_fail_by_script() {
    let node = Node::new();
    let script = node.file("script.toml", "[[rules]]\nstep = \"boot\"\nfail = \"no luck\"\ntimes = 1\n");
    let ran = node.run(&["--simulation", &script, "apply", "-f", &node.file("fleet.toml", FLEET), "--timeout", "20s"]);
    assert!([0, 6].contains(&ran.code), "{}", ran.err);
    node.fails(2, &["--simulation", "/no/such/script", "status"], &["/no/such/script"]);
}

#[test]
fn a_pass_waits_until_what_failed_is_due_unless_told_otherwise() {
    let node = Node::new();
    let script = node.file("script.toml", "[[rules]]\nstep = \"boot\"\nfail = \"no luck\"\n");
    let file = node.file("fleet.toml", FLEET);
    let pass = |more: &[&str]| node.run(&[&["--simulation", &script, "agent", "reconcile", "--desired", &file], more].concat());
    let first = pass(&[]);
    assert!(first.out.contains("no luck"), "{}", first.out);
    let waits = pass(&[]);
    assert!(waits.out.contains("failed once: ") && !waits.out.contains("failed 2 times"), "{}{}", waits.out, waits.err);
    let again = pass(&["--now"]);
    let status = node.run(&["status", "-o", "json"]);
    assert!(status.out.contains("failed 2x: "), "{}{}{}", again.out, again.err, status.out);
}

#[test]
fn completions_cover_the_commands() {
    let node = Node::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = node.ok(&["completions", shell]);
        assert!(script.contains("mvm") && script.contains("reconcile") && script.contains("secrets"), "{shell}");
    }
    node.fails(2, &["completions", "cobol"], &["bash"]);
}

/// The generated documents are those of this build; `cargo xtask docs` writes them.
#[test]
fn the_generated_documents_are_current() {
    let node = Node::new();
    let documents = [("reference", "docs/cli.md"), ("schema", "docs/desired-state.schema.json")];
    for (command, path) in documents {
        let committed = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/").to_owned() + path).unwrap_or_default();
        assert!(node.ok(&[command]) == committed, "{path} is not what `mvm {command}` writes: run `cargo xtask docs`");
    }
}

#[test]
fn help_is_there_and_says_the_version() {
    let node = Node::new();
    assert!(node.ok(&["--help"]).contains("Exit codes"));
    assert_eq!(node.ok(&["--version"]), format!("mvm {}\n", env!("CARGO_PKG_VERSION")));
    assert!(node.run(&[]).code == 2);
    for (args, words) in [(&["exec", "--help"][..], "Examples"), (&["tenant", "secrets", "set", "--help"], "standard input")] {
        assert!(node.ok(args).contains(words), "{args:?}");
    }
}

#[test]
fn what_a_document_may_not_say_a_verb_may_not_either() {
    let node = Node::with_fleet();
    node.fails(2, &["pool", "create", "acme/api", "--depends-on", "nope"], &["depends_on[0]: there is no pool nope"]);
    node.fails(2, &["pool", "create", "acme/api", "--role", "gatway"], &["is not a role", "did you mean gateway?"]);
    node.ok(&["pool", "create", "acme/api", "--depends-on", "web", "--env", "A=1", "--env", "B=2", "--", "serve"]);
    node.fails(4, &["pool", "destroy", "acme/web", "--yes"], &["acme/api depends on it", "--no-depends-on"]);
    node.ok(&["pool", "update", "acme/api", "--unset-env", "A"]);
    assert_eq!(node.json(&["pool", "info", "acme/api"])["spec"]["workload"]["env"], serde_json::json!({ "B": "2" }));
    node.fails(3, &["pool", "update", "acme/api", "--unset-env", "C"], &["no variable \"C\""]);
    node.ok(&["pool", "update", "acme/api", "--no-depends-on", "--no-workload"]);
    let spec = node.json(&["pool", "info", "acme/api"])["spec"].clone();
    assert!(spec.get("depends_on").is_none() && spec.get("workload").is_none(), "{spec}");
    node.ok(&["pool", "destroy", "acme/web", "--yes"]);
}

#[test]
fn a_fleet_that_was_removed_can_be_brought_up_again() {
    let node = Node::new();
    let (fleet, nothing) =
        (concat!(env!("CARGO_MANIFEST_DIR"), "/examples/quickstart.toml"), concat!(env!("CARGO_MANIFEST_DIR"), "/examples/nothing.toml"));
    for file in [fleet, nothing, fleet, fleet] {
        node.ok(&["apply", "-f", file]);
    }
    assert_eq!(node.json(&["instance", "list"]).as_array().unwrap().len(), 3);
}

#[test]
fn some_names_are_taken() {
    let node = Node::new();
    for name in ["verify", "throwaway"] {
        node.fails(2, &["tenant", "create", name, "--net-id", "7", "--subnet", "10.240.7.0/24"], &["cannot name a tenant"]);
        node.fails(
            2,
            &["plan", "-f", &node.file("fleet.toml", FLEET.replace("\"acme\"", &format!("{name:?}")))],
            &["tenants[0].tenant_id: "],
        );
    }
}

#[test]
fn a_quota_of_pools_is_planned_and_pruned_pools_make_room() {
    let node = Node::new();
    let with = |pool: &str, prune: bool| {
        format!(
            "schema_version = 1\nprune_unknown_pools = {prune}\n[[tenants]]\ntenant_id = \"acme\"\n\
             network = {{ tenant_net_id = 7, ipv4_subnet = \"10.240.7.0/24\" }}\nquotas = {{ max_pools = 1 }}\n\
             [[tenants.pools]]\npool_id = \"{pool}\"\ndesired_counts = {{ running = 1 }}\n"
        )
    };
    node.ok(&["apply", "-f", &node.file("a.toml", with("a", false))]);
    let kept = node.file("b.toml", with("b", false));
    let plan = node.json(&["plan", "-f", &kept]);
    assert_eq!(plan["steps"], serde_json::json!([]));
    assert!(plan["deferred"][0]["why"].as_str().unwrap().contains("max_pools"), "{plan}");
    assert_eq!(node.run(&["apply", "-f", &kept]).code, 6);
    let pruned = node.file("c.toml", with("b", true));
    let report = node.run(&["agent", "reconcile", "--desired", &pruned]);
    assert_eq!(report.code, 0, "one pass does it: {}{}", report.out, report.err);
    assert_eq!(node.json(&["pool", "list"]).as_array().unwrap().len(), 1);
}

#[test]
fn much_that_is_wrong_is_said_shortly() {
    let node = Node::new();
    let tenants: Vec<_> = (0..2000)
        .map(|n| serde_json::json!({ "tenant_id": format!("t{n}"), "network": { "tenant_net_id": n, "ipv4_subnet": "10.240.7.0/24" } }))
        .collect();
    let same = node.file("same.json", serde_json::json!({ "schema_version": 1, "tenants": tenants }).to_string());
    let ran = node.run(&["plan", "-f", &same]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("tenants[1].network.ipv4_subnet: 10.240.7.0/24 overlaps 10.240.7.0/24 of tenants[0]"), "{}", ran.err);
    assert!(ran.err.contains("and 1979 more") && ran.err.len() < 6000, "{} bytes: {}", ran.err.len(), ran.err);
    let long = FLEET.replace("\"gateway\"", &format!("\"{}\"", "g".repeat(200_000)));
    node.fails(2, &["plan", "-f", &node.file("long.toml", long)], &["tenants[0].pools[0].role: "]);
    node.fails(2, &["plan", "-f", &node.file("line.toml", format!("{FLEET}\nx = {}", "y ".repeat(100_000)))], &["not TOML"]);
    node.fails(2, &["instance", "info", &"word ".repeat(2000)], &[]);
}

#[test]
fn a_flake_is_written_once_with_a_role_of_ones_own() {
    let node = Node::new();
    let dir = node.path("images").to_str().unwrap().to_owned();
    node.ok(&["init", &dir, "--role", "cache"]);
    assert!(node.path("images/roles/cache.nix").exists());
    // The role is as good as any other: a rehearsal knows what it means from the manifest.
    node.ok(&["tenant", "create", "acme", "--net-id", "7", "--subnet", "10.240.7.0/24"]);
    let flake = format!("path:{dir}");
    node.ok(&["pool", "create", "acme/cache", "--role", "cache", "--profile", "base", "--flake-ref", &flake]);
    assert_eq!(node.json(&["pool", "info", "acme/cache"])["role"], "cache");
    assert!(node.ok(&["pool", "list", "acme"]).contains("cache"));
    node.fails(
        2,
        &["pool", "create", "acme/other", "--role", "cahce", "--profile", "base", "--flake-ref", &flake],
        &["did you mean cache?"],
    );
    node.fails(4, &["init", &dir, "--role", "cache"], &["flake.nix is there already", "nothing was written"]);
    node.fails(2, &["init", "--role", "gateway"], &["one of mvm's own"]);
}

#[test]
fn only_the_built_in_image_has_parts_to_refresh() {
    let node = Node::with_fleet();
    node.ok(&["pool", "build", "acme/web", "--refresh"]);
    node.ok(&["init", node.path("images").to_str().unwrap(), "--role", "cache"]);
    let flake = format!("path:{}", node.path("images").display());
    node.ok(&["pool", "create", "acme/cache", "--role", "cache", "--profile", "base", "--flake-ref", &flake]);
    node.fails(2, &["pool", "build", "acme/cache", "--refresh"], &["--refresh is about the built-in image"]);
}

#[test]
fn a_new_node_gets_the_id_that_documents_are_for() {
    let node = Node::new();
    let file = node.file("fleet.toml", format!("node_id = \"rack3\"\n{FLEET}"));
    node.fails(4, &["plan", "-f", &file], &["has no id yet", "mvm node init --id rack3"]);
    node.ok(&["node", "init", "--id", "rack3"]);
    node.ok(&["node", "init", "--id", "rack3"]);
    node.ok(&["apply", "-f", &file]);
    node.fails(4, &["node", "init", "--id", "other"], &["this node is rack3 already"]);
    assert_eq!(node.json(&["node", "info"])["node"], "rack3");
}
