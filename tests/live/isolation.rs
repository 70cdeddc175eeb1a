//! Who reaches whom, between real guests, the host, and what lies outside.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::time::Duration;

use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

use crate::rig::{Rig, on_a_host};
use crate::wire::run;

const FLEET: &str = r#"
schema_version = 1
[[tenants]]
tenant_id = "acme"
network = { tenant_net_id = 7, ipv4_subnet = "10.240.7.0/24" }
[[tenants.pools]]
pool_id = "web"
desired_counts = { running = 2 }
runtime_policy = { min_running_seconds = 0 }
instance_resources = { vcpus = 1, mem_mib = 128 }
workload = { command = ["sh", "-c", "while :; do nc -l -p 9000 -e echo hello from a guest; done"] }
[[tenants]]
tenant_id = "evil"
network = { tenant_net_id = 8, ipv4_subnet = "10.240.8.0/24" }
[[tenants.pools]]
pool_id = "web"
desired_counts = { running = 1 }
runtime_policy = { min_running_seconds = 0 }
instance_resources = { vcpus = 1, mem_mib = 128 }
"#;

/// A network outside of the host, with a listener that tells who came.
pub struct Outside {
    pub came: mpsc::Receiver<String>,
    ask: mpsc::Sender<String>,
    answers: mpsc::Receiver<Option<String>>,
}

impl Outside {
    pub fn new() -> Outside {
        let (tid_sender, tid) = mpsc::channel();
        let (go, wait) = mpsc::channel::<()>();
        let (sender, came) = mpsc::channel();
        let (ask, asked) = mpsc::channel::<String>();
        let (answer, answers) = mpsc::channel();
        let (up, is_up) = mpsc::channel();
        std::thread::spawn(move || {
            // SAFETY: only the network namespace of this one thread changes.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            tid_sender.send(gettid().as_raw_nonzero().get()).unwrap();
            wait.recv().unwrap();
            run("ip", &["addr", "add", "198.51.100.2/24", "dev", "outside1"]);
            run("ip", &["link", "set", "outside1", "up"]);
            run("ip", &["route", "add", "default", "via", "198.51.100.1"]);
            let listener = TcpListener::bind("198.51.100.2:80").unwrap();
            up.send(()).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let peer = stream.peer_addr().unwrap().ip().to_string();
                    // A guest that asks and does not listen is still one that came.
                    let _ = stream.write_all(b"hello from outside\n");
                    if sender.send(peer).is_err() {
                        return;
                    }
                }
            });
            for address in asked {
                let said = TcpStream::connect_timeout(&address.parse().unwrap(), Duration::from_secs(2)).ok().map(|mut stream| {
                    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                    let mut said = String::new();
                    // Whoever says nothing was reached all the same.
                    let _ = stream.read_to_string(&mut said);
                    said
                });
                if answer.send(said).is_err() {
                    return;
                }
            }
        });
        let tid = tid.recv().unwrap().to_string();
        run("ip", &["link", "add", "outside0", "type", "veth", "peer", "name", "outside1", "netns", &tid]);
        run("ip", &["addr", "add", "198.51.100.1/24", "dev", "outside0"]);
        run("ip", &["link", "set", "outside0", "up"]);
        go.send(()).unwrap();
        is_up.recv().unwrap();
        Outside { came, ask, answers }
    }

    pub fn reaches(&self, address: &str) -> bool {
        self.asks(address).is_some()
    }

    /// Connects from outside and returns what the other side says; `None` when there is no other side.
    pub fn asks(&self, address: &str) -> Option<String> {
        self.ask.send(address.to_owned()).unwrap();
        self.answers.recv().unwrap()
    }
}

/// Connects from a guest and returns what the other side says.
fn ask(rig: &Rig, from: &str, address: &str, port: &str) -> String {
    rig.sh(from, &format!("nc -w 3 {address} {port} </dev/null 2>/dev/null || true"))
}

fn pings(rig: &Rig, from: &str, address: &str) -> bool {
    rig.ran(&["exec", from, "--", "ping", "-q", "-c", "2", "-W", "2", address]).code() == 0
}

#[test]
fn tenants_are_apart_and_the_outside_is_reached() {
    on_a_host(3, |rig| {
        let outside = Outside::new();
        rig.apply(FLEET);
        let all = rig.instances();
        let of = |tenant: &str| -> Vec<(String, String)> {
            let ours = all.iter().filter(|one| one["instance"].as_str().unwrap().starts_with(tenant));
            ours.map(|one| (crate::rig::text(&one["instance"]), crate::rig::text(&one["address"]))).collect()
        };
        let (acme, evil) = (of("acme/"), of("evil/"));
        let ((a, a_address), (b, b_address), (e, e_address)) = (&acme[0], &acme[1], &evil[0]);

        // Within a tenant.
        assert!(pings(rig, a, b_address) && pings(rig, b, a_address));
        assert_eq!(ask(rig, a, b_address, "9000"), "hello from a guest");
        // Between tenants, whichever way: not even with a route by hand.
        assert!(!pings(rig, e, a_address) && !pings(rig, a, e_address));
        assert_eq!(ask(rig, e, a_address, "9000"), "");
        rig.sh(e, "ip route add 10.240.7.0/24 via 10.240.8.1");
        assert_eq!(ask(rig, e, a_address, "9000"), "");
        // With a stolen address.
        rig.sh(e, "ip addr add 10.240.7.77/24 dev eth0");
        assert_eq!(rig.sh(e, &format!("ping -q -c 2 -W 2 -I 10.240.7.77 {a_address} >/dev/null && echo reached || true")), "");
        rig.sh(e, "ip addr del 10.240.7.77/24 dev eth0");

        // The host's own services, on whatever address of it, are not for guests; that the host is there may be seen.
        let services = ["10.240.7.1:7777", "10.240.8.1:7777", "198.51.100.1:7777"].map(|address| TcpListener::bind(address).unwrap());
        for address in ["10.240.7.1", "10.240.8.1", "198.51.100.1"] {
            assert_eq!(rig.sh(a, &format!("nc -w 2 {address} 7777 </dev/null 2>/dev/null && echo reached || true")), "", "{address}");
        }
        drop(services);
        assert!(pings(rig, a, "10.240.7.1") && !pings(rig, a, "10.240.8.1"));

        // Outwards, as the host; from outside there is no way in.
        assert_eq!(ask(rig, a, "198.51.100.2", "80"), "hello from outside");
        assert_eq!(outside.came.recv_timeout(Duration::from_secs(5)).unwrap(), "198.51.100.1", "masqueraded");
        assert!(!outside.reaches(&format!("{a_address}:9000")));

        // `net verify` sees it so, and sees when it is not so.
        let table = rig.ok(&["net", "verify"]);
        assert!(table.contains("of another tenant") && table.contains("of its own tenant"), "{table}");
        let breaks: [(&str, &[&str]); 4] = [
            ("nft", &["flush", "ruleset"]),
            ("nft", &["delete", "table", "bridge", "mvm"]),
            ("ip", &["link", "del", "br-tenant-7"]),
            // Under the machine that holds it.
            ("ip", &["link", "del", "tn7i0"]),
        ];
        let file = rig.path("fleet.toml");
        for (program, arguments) in breaks {
            run(program, arguments);
            let red = rig.ran(&["net", "verify"]);
            assert_eq!(red.code(), 1, "{arguments:?}: {}", red.text());
            assert!(red.text().contains("WRONG") || red.text().contains("mvm apply"), "{}", red.text());
            rig.fails(10, &["plan", "-f", file.to_str().unwrap(), "--detailed-exitcode"]);
            rig.ok(&["apply", "-f", file.to_str().unwrap()]);
            let green = rig.ran(&["net", "verify"]);
            assert_eq!(green.code(), 0, "{arguments:?}: {}{}", green.text(), green.err);
            assert!(pings(rig, a, b_address));
        }
        run("ip", &["link", "del", "outside0"]);
        rig.prune();
    });
}
