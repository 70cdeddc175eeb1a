//! What a role makes of a machine: its drives, its exposure, what is enabled in it.

use serde_json::Value;

use crate::isolation::Outside;
use crate::rig::{on_a_host, text};
use crate::wire::run;

const FLEET: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "gw"
role = "gateway"
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0 }
expose = [{ port = 80, host_port = 8080 }]
workload = { command = ["sh", "-c", "while :; do nc -l -p 80 -e echo the gateway; done"] }
[[tenants.pools]]
pool_id = "bld"
role = "builder"
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0 }
[[tenants.pools]]
pool_id = "web"
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0 }
workload = { command = ["sh", "-c", "while :; do cat /run/secrets/token; sleep 1; done"], secrets = ["token"] }
"#;

#[test]
fn a_role_changes_drives_exposure_and_what_is_enabled() {
    on_a_host(3, |rig| {
        let outside = Outside::new();
        rig.apply(FLEET);
        let of = |role: &str| -> String {
            let all = rig.instances();
            text(&all.iter().find(|one| one["role"] == role).unwrap_or_else(|| panic!("no {role} in {all:?}"))["instance"])
        };
        let (gateway, builder, worker) = (of("gateway"), of("builder"), of("worker"));
        // Up in the order of the roles, each when the one before it was ready.
        let starts: Vec<String> = rig
            .json(&["events"])
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event["action"] == "start")
            .map(|event| text(&event["role"]))
            .collect();
        assert_eq!(starts, ["gateway", "builder", "worker"]);

        // The configuration drive says what it is; a gateway's says what it lets in.
        let config: Value = serde_json::from_str(&rig.sh(&gateway, "cat /etc/mvm-config/config.json")).unwrap();
        assert_eq!((&config["role"], &config["profile"]), (&Value::from("gateway"), &Value::from("minimal")));
        assert_eq!((&config["config_version"], &config["secrets_epoch"]), (&Value::from(1), &Value::from(0)));
        let rules: Value = serde_json::from_str(&rig.sh(&gateway, "cat /etc/mvm-config/gateway.json")).unwrap();
        assert_eq!(rules, serde_json::json!({ "version": 1, "allow": [{ "protocol": "tcp", "port": 80 }] }));
        assert_eq!(rig.sh(&worker, "ls /etc/mvm-config"), "config.json");

        // Who has to do with secrets has the drive.
        let drives = |at: &str| rig.sh(at, "ls -d /sys/block/vd* | wc -l");
        assert_eq!((drives(&gateway), drives(&worker), drives(&builder)), ("3".into(), "3".into(), "2".into()));

        // What needs a secret that is not there is not enabled, and says so; once it is there, a start enables it.
        let problem = "workload is not enabled: the tenant has no secret token";
        assert!(rig.ok(&["status"]).contains(problem), "{}", rig.ok(&["status"]));
        assert!(rig.ok(&["logs", &worker, "--source", "agent"]).contains(problem));
        assert_eq!(rig.sh(&worker, "ps | grep -c [s]leep || true"), "0");
        assert_eq!(rig.ran_with(&["tenant", "secrets", "set", "acme", "token"], b"open sesame\n").code(), 0);
        rig.ok(&["instance", "stop", &worker]);
        rig.ok(&["instance", "start", &worker]);
        assert!(!rig.ok(&["status"]).contains(problem));
        rig.eventually("the workload has its secret", std::time::Duration::from_secs(20), || {
            rig.ok(&["logs", &worker]).contains("open sesame")
        });

        // The gateway alone is reached from outside, and through the host only, while it runs.
        assert_eq!(outside.asks("198.51.100.1:8080").as_deref(), Some("the gateway\n"));
        let address = text(&rig.json(&["instance", "info", &gateway])["address"]);
        assert!(!outside.reaches(&format!("{address}:80")));
        rig.ok(&["instance", "sleep", &gateway]);
        assert!(!outside.reaches("198.51.100.1:8080"));
        rig.ok(&["instance", "wake", &gateway]);
        assert_eq!(outside.asks("198.51.100.1:8080").as_deref(), Some("the gateway\n"));
        let file = rig.path("fleet.toml");
        rig.ok(&["plan", "-f", file.to_str().unwrap(), "--detailed-exitcode"]);
        rig.ok(&["net", "verify"]);
        // A worker exposes nothing, whatever it asks for.
        let said = rig.fails(2, &["pool", "update", "acme/web", "--expose", "8081:80"]);
        assert!(said.contains("role worker may expose nothing"), "{said}");
        rig.prune();
        run("ip", &["link", "del", "outside0"]);
    });
}
