//! Bridges, TAPs and rules of the real kernel: who reaches whom, and what is left behind.

use std::cell::RefCell;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mvm::host::{Host, HostExpectations, LocalHost};
use mvm::infra::paths::Paths;
use mvm::net::{InstanceNetwork, InstanceOffset, Mac, Ruleset, TenantNetwork, UidRange};
use mvm_hostd::apart::{take_apart, unplug};
use tempfile::TempDir;

use crate::wire::{Guest, PATIENCE, QUIET, arp, ethernet, in_own_namespace, ipv4, is_echo, run, set};

const EVERYONE: Mac = Mac([0xff; 6]);
/// The echo tag of frames that must not arrive.
const BAD: u16 = 0xbad;
/// The echo tag of frames that must.
const GOOD: u16 = 0x600d;

/// Where a guest's TAP is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On the host.
    Host,
    /// In a network namespace of its own.
    Apart,
}

struct Node {
    host: LocalHost,
    place: Place,
    /// Those of the guests that have one.
    namespaces: RefCell<Vec<OwnedFd>>,
    _directory: TempDir,
}

fn node() -> Node {
    node_with(Place::Host)
}

fn node_with(place: Place) -> Node {
    let directory = tempfile::tempdir().unwrap();
    let paths = Paths::new(directory.path().join("state"), Some(directory.path().join("run")));
    let host = LocalHost::new(paths, &"n1".parse().unwrap());
    Node { host, place, namespaces: RefCell::default(), _directory: directory }
}

fn tenant(net_id: u64) -> TenantNetwork {
    TenantNetwork { net_id: net_id.try_into().unwrap(), subnet: format!("10.240.{net_id}.0/24").parse().unwrap() }
}

fn instance(net_id: u64, offset: u16) -> InstanceNetwork {
    InstanceNetwork { tenant: tenant(net_id), offset: InstanceOffset(offset), forwards: false, mbit: None }
}

fn rules(instances: &[InstanceNetwork]) -> Ruleset {
    let mut tenants: Vec<(TenantNetwork, Vec<InstanceNetwork>)> = Vec::new();
    for instance in instances {
        match tenants.iter_mut().find(|(tenant, _)| *tenant == instance.tenant) {
            Some((_, own)) => own.push(*instance),
            None => tenants.push((instance.tenant, vec![*instance])),
        }
    }
    Ruleset { tenants, ..Ruleset::default() }
}

impl Node {
    /// Makes bridges and rules, and opens the instances' TAPs.
    fn guests<const N: usize>(&self, instances: [InstanceNetwork; N]) -> [Guest; N] {
        let rules = rules(&instances);
        self.host.apply_ruleset(&rules).unwrap();
        for (tenant, _) in &rules.tenants {
            self.host.ensure_tenant_network(tenant).unwrap();
        }
        instances.map(|instance| {
            let mut tap = self.tap(&instance);
            if self.place == Place::Apart {
                let open = tap.try_clone().unwrap();
                let cable = take_apart(std::mem::replace(&mut tap, open), &instance.tap(), instance.mac().0).unwrap();
                let namespace = cable.namespace().unwrap();
                cable.let_go();
                // What is sent before the bridges have noticed that the cable is plugged in is lost.
                let forwards = |line: &String| line.contains("state forwarding");
                let is_joined = || links_of(&namespace, &["-d"]).iter().filter(|line| forwards(line)).count() == 2;
                let is_port = || run("ip", &["-d", "-o", "link", "show", &instance.tap()]).contains("state forwarding");
                let begun = Instant::now();
                while !is_joined() || !is_port() {
                    assert!(begun.elapsed() < PATIENCE);
                }
                self.namespaces.borrow_mut().push(namespace);
            }
            Guest::new(tap, instance.mac(), instance.address().unwrap())
        })
    }

    fn tap(&self, instance: &InstanceNetwork) -> OwnedFd {
        self.host.create_tap(instance, Some(UidRange::default().instance(instance.tenant.net_id, instance.offset))).unwrap()
    }
}

/// Runs a test with bridged packets passing the IP rules as well, and without; with TAPs on the host, and in namespaces.
fn with_and_without_bridge_netfilter(test: impl Fn(Place) + Send + Clone + 'static) {
    for (value, place) in [("0", Place::Host), ("1", Place::Host), ("0", Place::Apart), ("1", Place::Apart)] {
        let test = test.clone();
        in_own_namespace(move || {
            set("net/bridge/bridge-nf-call-iptables", value);
            test(place);
        });
    }
}

/// Runs a test with TAPs on the host, and in namespaces.
fn in_both_places(test: impl Fn(Place) + Send + Clone + 'static) {
    for place in [Place::Host, Place::Apart] {
        let test = test.clone();
        in_own_namespace(move || test(place));
    }
}

#[test]
fn instances_of_one_tenant_reach_each_other() {
    with_and_without_bridge_netfilter(|place| {
        let node = node_with(place);
        let [a, b] = node.guests([instance(5, 0), instance(5, 1)]);
        a.send(&a.echo_to(b.mac, b.address, GOOD));
        b.receive(PATIENCE, |frame| is_echo(frame, 8, GOOD)).expect("the echo request arrives");
        // By name resolution as well: the question reaches b, and its answer reaches a.
        a.send(&arp(a.mac, EVERYONE, 1, (a.mac, a.address), b.address));
        b.receive(QUIET, |_| false);
        a.receive(PATIENCE, |frame| frame[12..14] == [8, 6] && frame[28..32] == b.address.octets()).expect("the ARP reply arrives");
        // And to all of them at once.
        a.send(&a.datagram_to(EVERYONE, a.address | Ipv4Addr::new(0, 0, 0, 255), 5353, b"all"));
        b.receive(PATIENCE, |frame| frame.windows(3).any(|window| window == b"all")).expect("the broadcast arrives");
    });
}

#[test]
fn what_a_guest_moves_is_bounded_at_its_port_in_both_directions() {
    with_and_without_bridge_netfilter(|place| {
        let node = node_with(place);
        // 1 Mbit a second is 125,000 bytes, of which a second comes at once, and 256 KiB besides.
        let slow = InstanceNetwork { mbit: Some(1), ..instance(5, 1) };
        let [a, slow, c] = node.guests([instance(5, 0), slow, instance(5, 2)]);
        const FRAMES: usize = 1000;
        let content = [7; 1400];
        let arrive = |from: &Guest, to: &Guest, patience: Duration| {
            let frame = from.datagram_to(to.mac, to.address, 9, &content);
            let mut arrived = 0;
            // As many at once as a TAP's queue holds.
            for batch in 1..=FRAMES / 100 {
                (0..100).for_each(|_| from.send(&frame));
                while arrived < batch * 100 && to.receive(patience, |frame| frame.len() > 1400).is_some() {
                    arrived += 1;
                }
            }
            arrived
        };
        let (free, bounded) = (arrive(&a, &c, PATIENCE), [arrive(&slow, &c, QUIET / 25), arrive(&a, &slow, QUIET / 25)]);
        assert_eq!(free, FRAMES, "nothing is lost between the others");
        for arrived in bounded {
            assert!((150..600).contains(&arrived), "{arrived} of {FRAMES}");
        }
        // What is beyond is lost, and the port goes on.
        slow.receive(4 * QUIET, |_| false);
        slow.send(&slow.echo_to(c.mac, c.address, GOOD));
        c.receive(PATIENCE, |frame| is_echo(frame, 8, GOOD)).expect("the echo request arrives");
    });
}

#[test]
fn a_guest_is_only_itself() {
    with_and_without_bridge_netfilter(|place| {
        let node = node_with(place);
        let [a, b, c] = node.guests([instance(5, 0), instance(5, 1), instance(5, 2)]);
        let gateway = tenant(5).subnet.gateway();
        let bridge = tenant(5).bridge_mac();
        let payload = |from: Ipv4Addr, to: Ipv4Addr| ipv4(from, to, 1, &[8, 0, 0xec, 0x51, 0x0b, 0xad, 0, 1]);
        let own = a.echo_to(b.mac, b.address, BAD);
        let tagged = [&own[..12], &[0x81, 0, 0, 0], &own[12..]].concat();
        let twice_tagged = [&own[..12], &[0x88, 0xa8, 0, 1, 0x81, 0, 0, 1], &own[12..]].concat();
        let bad = [
            ("another's address", ethernet(a.mac, b.mac, 0x0800, &payload(c.address, b.address))),
            ("the gateway's address", ethernet(a.mac, b.mac, 0x0800, &payload(gateway, b.address))),
            ("no address", ethernet(a.mac, b.mac, 0x0800, &payload(Ipv4Addr::UNSPECIFIED, b.address))),
            ("another's MAC", ethernet(c.mac, b.mac, 0x0800, &payload(a.address, b.address))),
            ("the bridge's MAC", ethernet(bridge, b.mac, 0x0800, &payload(a.address, b.address))),
            ("both of another", ethernet(c.mac, b.mac, 0x0800, &payload(c.address, b.address))),
            ("the metadata service, bridged", ethernet(a.mac, b.mac, 0x0800, &payload(a.address, Ipv4Addr::new(169, 254, 169, 254)))),
            ("claims the gateway", arp(a.mac, b.mac, 2, (a.mac, gateway), b.address)),
            ("claims another", arp(a.mac, EVERYONE, 1, (a.mac, c.address), b.address)),
            ("claims for another's MAC", arp(a.mac, b.mac, 2, (c.mac, a.address), b.address)),
            ("claims from another's MAC", arp(c.mac, b.mac, 2, (a.mac, a.address), b.address)),
            ("IPv6", ethernet(a.mac, b.mac, 0x86dd, &[0x60; 40])),
            ("a tagged frame", tagged),
            ("a twice tagged frame", twice_tagged),
            ("some other protocol", ethernet(a.mac, b.mac, 0x88b5, &[0; 46])),
        ];
        for (what, frame) in bad {
            a.send(&frame);
            // The bridge keeps the order: what came before this one would have arrived before it.
            a.send(&a.echo_to(b.mac, b.address, GOOD));
            let first = b.receive(PATIENCE, |frame| frame[6..12] == a.mac.0 || frame[6..12] != bridge.0).expect("a frame arrives");
            assert!(is_echo(&first, 8, GOOD), "{what}: {first:02x?}");
        }
    });
}

#[test]
fn a_guest_cannot_draw_anothers_frames_to_itself() {
    in_both_places(|place| {
        let node = node_with(place);
        let [a, b, c] = node.guests([instance(5, 0), instance(5, 1), instance(5, 2)]);
        c.send(&c.echo_to(b.mac, b.address, GOOD));
        b.receive(PATIENCE, |frame| is_echo(frame, 8, GOOD)).unwrap();
        // The bridge handles these groups itself, and would learn the sender from them past its prerouting hook.
        for last in 0..16 {
            a.send(&ethernet(c.mac, Mac([0x01, 0x80, 0xc2, 0, 0, last]), 0x88cc, &[0; 46]));
        }
        b.send(&b.echo_to(c.mac, c.address, GOOD));
        c.receive(PATIENCE, |frame| is_echo(frame, 8, GOOD)).expect("it goes where c is");
        assert!(a.receive(QUIET, |frame| is_echo(frame, 8, GOOD)).is_none(), "and not to a");
    });
}

#[test]
fn a_gateway_forwards_for_its_tenant_only() {
    in_both_places(|place| {
        let node = node_with(place);
        let [gateway, b] = node.guests([InstanceNetwork { forwards: true, ..instance(5, 0) }, instance(5, 1)]);
        let from = |address: [u8; 4]| {
            ethernet(gateway.mac, b.mac, 0x0800, &ipv4(address.into(), b.address, 1, &[8, 0, 0, 0, address[3], 0, 0, 1]))
        };
        gateway.send(&from([10, 240, 5, 77]));
        b.receive(PATIENCE, |frame| frame.len() > 38 && frame[26..30] == [10, 240, 5, 77]).expect("its tenant's packets pass");
        for address in [[10, 240, 5, 1], [10, 240, 5, 255], [10, 240, 6, 7], [8, 8, 8, 8]] {
            gateway.send(&from(address));
            gateway.send(&gateway.echo_to(b.mac, b.address, GOOD));
            let first = b.receive(PATIENCE, |frame| frame[6..12] == gateway.mac.0).unwrap();
            assert!(is_echo(&first, 8, GOOD), "{address:?}");
        }
    });
}

#[test]
fn tenants_do_not_reach_each_other_through_the_host() {
    with_and_without_bridge_netfilter(|place| {
        let node = node_with(place);
        let [a, b] = node.guests([instance(5, 0), instance(6, 0)]);
        let bridge = tenant(5).bridge_mac();
        let to_other_gateway = tenant(6).subnet.gateway();
        a.send(&a.echo_to(bridge, b.address, BAD));
        a.send(&a.echo_to(bridge, to_other_gateway, BAD));
        assert_eq!(b.receive(QUIET, |_| true), None, "b hears nothing, not even a question for its MAC");
        assert!(a.receive(QUIET, |frame| is_echo(frame, 0, BAD)).is_none(), "nor does the other tenant's gateway answer");
        // The same packet passes once the rules are gone: it is they that hold it back.
        node.host.remove_ruleset().unwrap();
        set("net/ipv4/ip_forward", "1");
        a.send(&a.echo_to(bridge, b.address, BAD));
        b.receive(PATIENCE, |frame| is_echo(frame, 8, BAD)).expect("without rules the host routes it");
    });
}

#[test]
fn a_port_that_no_rule_lists_passes_nothing() {
    in_both_places(|place| {
        let node = node_with(place);
        let [a, b] = node.guests([instance(5, 0), instance(5, 1)]);
        node.host.apply_ruleset(&rules(&[instance(5, 1)])).unwrap();
        a.send(&a.echo_to(b.mac, b.address, BAD));
        assert_eq!(b.receive(QUIET, |_| true), None);
        node.host.apply_ruleset(&rules(&[instance(5, 0), instance(5, 1)])).unwrap();
        a.send(&a.echo_to(b.mac, b.address, GOOD));
        b.receive(PATIENCE, |frame| is_echo(frame, 8, GOOD)).expect("listed again, it passes");
    });
}

/// Addresses that the outside has as well, and that no guest may reach there: other tenants', and link-local ones.
const ELSEWHERE: [Ipv4Addr; 4] =
    [Ipv4Addr::new(10, 240, 99, 3), Ipv4Addr::new(10, 255, 0, 3), Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(169, 254, 1, 1)];

/// A link to an outside that answers, and that knows the way to one tenant, 10.240.5.0/24.
struct Outside {
    /// A socket out there, on port 8080.
    socket: UdpSocket,
    stop: std::sync::mpsc::Sender<()>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Outside {
    fn new() -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            in_own_namespace(move || {
                tell.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                gone.recv().unwrap();
                run("ip", &["addr", "add", "198.51.100.2/24", "dev", "outside"]);
                run("ip", &["addr", "add", "192.168.77.2/24", "dev", "outside"]);
                run("ip", &["link", "set", "outside", "up"]);
                run("ip", &["route", "add", "10.240.5.0/24", "via", "198.51.100.1"]);
                for address in ELSEWHERE {
                    run("ip", &["addr", "add", &format!("{address}/32"), "dev", "outside"]);
                }
                let socket = UdpSocket::bind("0.0.0.0:8080").unwrap();
                socket.set_read_timeout(Some(QUIET)).unwrap();
                ready.send(socket.try_clone().unwrap()).unwrap();
                let _ = stopped.recv();
            });
        });
        let outside = told.recv().unwrap().to_string();
        run("ip", &["link", "add", "uplink", "type", "veth", "peer", "name", "outside", "netns", &outside]);
        run("ip", &["addr", "add", "198.51.100.1/24", "dev", "uplink"]);
        run("ip", &["addr", "add", "192.168.77.1/24", "dev", "uplink"]);
        run("ip", &["link", "set", "uplink", "up"]);
        go.send(()).unwrap();
        let socket = is_ready.recv().unwrap();
        Self { socket, stop, thread: Some(thread) }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

#[test]
fn guests_reach_the_outside_with_the_hosts_address() {
    in_both_places(|place| {
        let node = node_with(place);
        // The outside knows no way back to this tenant's addresses.
        let [a] = node.guests([instance(6, 0)]);
        let outside = Outside::new();
        let bridge = tenant(6).bridge_mac();
        for (address, tag) in [(Ipv4Addr::new(198, 51, 100, 2), 1), (Ipv4Addr::new(192, 168, 77, 2), 2)] {
            a.send(&a.echo_to(bridge, address, tag));
            let reply = a.receive(PATIENCE, |frame| is_echo(frame, 0, tag)).expect("the outside answers to the host's address");
            assert_eq!(reply[26..30], address.octets());
        }
        run("ip", &["route", "add", "default", "via", "198.51.100.2"]);
        let heard = || {
            let mut buffer = [0; 64];
            outside.socket.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec())
        };
        a.send(&a.datagram_to(bridge, Ipv4Addr::new(198, 51, 100, 2), 8080, b"allowed"));
        assert_eq!(heard().as_deref(), Some(&b"allowed"[..]));
        for address in ELSEWHERE {
            a.send(&a.datagram_to(bridge, address, 8080, address.to_string().as_bytes()));
        }
        assert_eq!(heard(), None);
        // They are there to be reached: the rules hold them back.
        node.host.remove_ruleset().unwrap();
        set("net/ipv4/ip_forward", "1");
        a.send(&a.datagram_to(bridge, ELSEWHERE[0], 8080, b"no rules"));
        assert_eq!(heard().as_deref(), Some(&b"no rules"[..]));
    });
}

#[test]
fn the_hosts_services_are_out_of_reach() {
    with_and_without_bridge_netfilter(|place| {
        let node = node_with(place);
        let [a, b] = node.guests([instance(5, 0), instance(6, 0)]);
        let outside = Outside::new();
        let bridge = tenant(5).bridge_mac();
        let service = UdpSocket::bind("0.0.0.0:8080").unwrap();
        service.set_read_timeout(Some(QUIET)).unwrap();
        // Another program publishes the outside's service on the host's address, as container engines do.
        run("nft", &["add table ip other; add chain ip other pre { type nat hook prerouting priority dstnat; }"]);
        run("nft", &["add rule ip other pre ip daddr 198.51.100.1 udp dport 9090 dnat to 198.51.100.2:8080"]);
        let own = [tenant(5).subnet.gateway(), tenant(6).subnet.gateway(), Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(192, 168, 77, 1)];
        for address in own {
            a.send(&a.datagram_to(bridge, address, 8080, b"hello"));
        }
        for broadcast in [Ipv4Addr::BROADCAST, tenant(5).subnet.broadcast(), Ipv4Addr::new(224, 0, 0, 1)] {
            a.send(&a.datagram_to(EVERYONE, broadcast, 8080, b"hello"));
        }
        assert!(service.recv(&mut [0; 16]).is_err(), "no datagram arrives");
        a.send(&a.datagram_to(bridge, [198, 51, 100, 1].into(), 9090, b"hello"));
        assert!(outside.socket.recv(&mut [0; 16]).is_err(), "a published service of the host is one of its services");
        // Only its own gateway answers an echo request, and only there does the host say that it is.
        for (address, answers) in [(own[0], true), (own[1], false), (own[2], false)] {
            a.send(&a.echo_to(bridge, address, GOOD));
            let patience = if answers { PATIENCE } else { QUIET };
            assert_eq!(a.receive(patience, |frame| is_echo(frame, 0, GOOD)).is_some(), answers, "{address}");
            a.send(&arp(a.mac, EVERYONE, 1, (a.mac, a.address), address));
            let reply = a.receive(patience, |frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
            assert_eq!(reply.is_some(), answers, "{address}");
        }
        // The host itself reaches its guests.
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.send_to(b"probe", (b.address, 7)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let probe = b.receive(PATIENCE, |frame| frame.windows(5).any(|window| window == b"probe")).expect("the host's probe arrives");
        let from_port = u16::from_be_bytes(probe[34..36].try_into().unwrap());
        b.send(&b.reply_to(tenant(6).bridge_mac(), tenant(6).subnet.gateway(), (7, from_port), b"answer"));
        let mut buffer = [0; 16];
        let length = socket.recv(&mut buffer).expect("and the guest's answer comes back");
        assert_eq!(&buffer[..length], b"answer");
    });
}

#[test]
fn nothing_outside_begins_a_conversation() {
    in_both_places(|place| {
        let node = node_with(place);
        let [a] = node.guests([instance(5, 0)]);
        let outside = Outside::new();
        outside.socket.send_to(b"hello", (a.address, 7)).unwrap();
        assert_eq!(a.receive(QUIET, |_| true), None, "nothing arrives, not even a question for its MAC");
        // The same datagram passes once the rules are gone.
        node.host.remove_ruleset().unwrap();
        set("net/ipv4/ip_forward", "1");
        outside.socket.send_to(b"hello", (a.address, 7)).unwrap();
        a.receive(PATIENCE, |frame| frame.windows(5).any(|window| window == b"hello")).expect("without rules the host routes it");
    });
}

#[test]
fn rules_are_loaded_once_and_again_when_someone_changed_any() {
    in_own_namespace(|| {
        let node = node();
        let rules = rules(&[instance(5, 0), instance(6, 0)]);
        assert_eq!(node.host.observe_network().unwrap().ruleset, None);
        assert!(node.host.create_tap(&instance(5, 0), None).unwrap_err().to_string().contains("no packet filter rules"));
        let loaded = || node.host.observe_network().unwrap().ruleset;
        let generation = || mvm_hostd::nft::generation().unwrap();
        node.host.apply_ruleset(&rules).unwrap();
        assert_eq!(loaded(), Some(rules.fingerprint().unwrap()));
        let before = generation();
        node.host.apply_ruleset(&rules).unwrap();
        assert_eq!(generation(), before, "nothing was loaded");
        for change in ["add table ip other", "delete table inet mvm", "flush ruleset"] {
            run("nft", &[change]);
            assert_eq!(loaded(), None, "{change}");
            node.host.apply_ruleset(&rules).unwrap();
            assert_eq!(loaded(), Some(rules.fingerprint().unwrap()), "{change}");
        }
        run("nft", &["add table ip other"]);
        node.host.remove_ruleset().unwrap();
        assert_eq!(run("nft", &["list", "tables"]), "table ip other\n");
        assert_eq!(loaded(), None);
        node.host.remove_ruleset().unwrap();
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "0");
    });
}

#[test]
fn a_bridge_is_made_mended_and_removed() {
    in_own_namespace(|| {
        let node = node();
        let tenant = tenant(5);
        set("net/ipv4/ip_forward", "0");
        for _ in 0..2 {
            node.host.ensure_tenant_network(&tenant).unwrap();
        }
        let shown = || run("ip", &["addr", "show", "br-tenant-5"]);
        assert!(
            shown().contains("inet 10.240.5.1/24") && run("ip", &["link", "show", "br-tenant-5"]).contains("alias mvm:n1"),
            "{}",
            shown()
        );
        assert!(run("ip", &["-6", "addr", "show", "br-tenant-5"]).is_empty());
        run("ip", &["addr", "add", "10.9.9.9/24", "dev", "br-tenant-5"]);
        run("ip", &["addr", "del", "10.240.5.1/24", "dev", "br-tenant-5"]);
        run("ip", &["link", "set", "br-tenant-5", "down", "address", "02:00:00:00:00:01"]);
        node.host.ensure_tenant_network(&tenant).unwrap();
        assert!(shown().contains("inet 10.240.5.1/24") && !shown().contains("10.9.9.9"), "{}", shown());
        assert!(run("ip", &["link", "show", "br-tenant-5"]).contains("02:62:00:05:00:00"));
        assert!(node.host.observe_network().unwrap().bridges.contains("br-tenant-5"));
        for _ in 0..2 {
            node.host.remove_tenant_network(&tenant).unwrap();
        }
        assert!(node.host.observe_network().unwrap().bridges.is_empty());
        node.host.remove_ruleset().unwrap();
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim(), "0", "as it was before mvm came");
    });
}

#[test]
fn taps_are_seen_for_as_long_as_they_are_there() {
    in_own_namespace(|| {
        let node = node();
        let guests = node.guests([instance(5, 0), instance(5, 1)]);
        let taps = || node.host.observe_network().unwrap().taps.into_iter().collect::<Vec<_>>();
        assert_eq!(taps(), ["tn5i0", "tn5i1"]);
        run("ip", &["link", "del", "tn5i1"]);
        assert_eq!(taps(), ["tn5i0"]);
        drop(guests);
        assert_eq!(taps(), Vec::<String>::new());
    });
}

#[test]
fn what_is_not_ours_stays() {
    in_own_namespace(|| {
        let node = node();
        run("ip", &["link", "add", "br-tenant-7", "type", "bridge"]);
        run("ip", &["link", "add", "br-tenant-8", "type", "bridge"]);
        run("ip", &["link", "set", "br-tenant-8", "alias", "mvm:n2"]);
        run("ip", &["link", "add", "br-tenant-9", "type", "veth", "peer", "name", "peer-9"]);
        // What a process left that was killed between making a bridge and marking it.
        run("ip", &["link", "add", "br-tenant-10", "address", "02:62:00:0a:00:00", "type", "bridge"]);
        for net_id in [7, 8, 9] {
            let error = node.host.ensure_tenant_network(&tenant(net_id)).unwrap_err().to_string();
            assert!(error.contains("remove or rename it"), "{error}");
            assert!(node.host.remove_tenant_network(&tenant(net_id)).is_err());
        }
        node.host.ensure_tenant_network(&tenant(5)).unwrap();
        node.host.ensure_tenant_network(&tenant(6)).unwrap();
        node.host.ensure_run_dir(&"i-00000001".parse().unwrap()).unwrap();
        node.host.ensure_run_dir(&"i-00000002".parse().unwrap()).unwrap();
        let expected = HostExpectations {
            bridges: ["br-tenant-5".to_owned()].into(),
            instances: ["i-00000001".parse().unwrap()].into(),
            taps: Some(std::collections::BTreeSet::new()),
        };
        let removed = node.host.sweep(&expected).unwrap();
        assert_eq!(removed.len(), 3, "{removed:?}");
        assert!(removed.iter().any(|what| what == "bridge br-tenant-6") && removed.iter().any(|what| what == "bridge br-tenant-10"));
        assert!(removed[2].ends_with("instances/i-00000002"));
        assert!(node.host.sweep(&expected).unwrap().is_empty());
        let left = run("ip", &["-o", "link"]);
        for name in ["br-tenant-5", "br-tenant-7", "br-tenant-8", "br-tenant-9"] {
            assert!(left.contains(name), "{left}");
        }
    });
}

#[test]
fn a_tap_lives_as_long_as_its_descriptor() {
    in_own_namespace(|| {
        let node = node();
        let [a] = node.guests([instance(5, 0)]);
        let shown = run("ip", &["-d", "link", "show", "tn5i0"]);
        for part in ["master br-tenant-5", "alias mvm:n1", "vnet_hdr on", "persist off", "user 1879375872"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let error = node.host.create_tap(&instance(5, 0), None).unwrap_err().to_string();
        assert!(error.contains("another process still holds it"), "{error}");
        drop(a);
        assert!(!run("ip", &["-o", "link"]).contains("tn5i0"));
        node.tap(&instance(5, 0));
        let error = node.host.create_tap(&instance(6, 0), None).unwrap_err().to_string();
        assert!(error.contains("no such bridge"), "{error}");
        assert!(!run("ip", &["-o", "link"]).contains("tn"), "a TAP that could not be attached is gone");
    });
}

#[test]
fn the_hosts_side_is_verified() {
    in_own_namespace(|| {
        let node = node();
        let [_a, _b] = node.guests([instance(5, 0), instance(6, 0)]);
        let rules = rules(&[instance(5, 0), instance(6, 0)]);
        let faults = || -> Vec<String> {
            let checks = node.host.verify_network(&rules).unwrap();
            assert_eq!(checks.len(), 8, "{checks:?}");
            checks.into_iter().filter_map(|check| Some(format!("{}: {}", check.what, check.fault?))).collect()
        };
        assert_eq!(faults(), Vec::<String>::new());
        run("nft", &["add table ip other"]);
        run("ip", &["link", "set", "tn5i0", "master", "br-tenant-6"]);
        run("ip", &["addr", "add", "10.9.9.9/24", "dev", "br-tenant-6"]);
        run("ip", &["link", "set", "br-tenant-5", "down"]);
        set("net/ipv4/ip_forward", "0");
        let found = faults().join("\n");
        for part in [
            "another program changed rules",
            "ip_forward is 0",
            "it is down",
            "it has 10.240.6.1/24, 10.9.9.9/24",
            "it is a port of br-tenant-6",
        ] {
            assert!(found.contains(part), "{part}: {found}");
        }
    });
}

/// The links of a network namespace, as `ip` shows them in one line each.
fn links_of(namespace: &OwnedFd, options: &[&str]) -> Vec<String> {
    let namespace = namespace.try_clone().unwrap();
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    let listing = std::thread::spawn(move || {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
        let addresses = run("ip", &["-o", "addr"]);
        assert!(!addresses.contains("inet"), "{addresses}");
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        run("ip", &[&["-o"], &options[..], &["link"]].concat())
    });
    listing.join().unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_tap_apart_is_alone_with_its_cable_and_nothing_of_it_stays() {
    in_own_namespace(|| {
        let node = node_with(Place::Apart);
        let [guest] = node.guests([instance(5, 0)]);
        let namespace = node.namespaces.borrow_mut().pop().unwrap();
        let mut names: Vec<String> =
            links_of(&namespace, &[]).iter().map(|line| line.split([':', '@']).nth(1).unwrap().trim().to_owned()).collect();
        names.sort();
        assert_eq!(names, ["cable", "joint", "lo", "tn5i0"]);
        let ours = run("ip", &["-o", "-d", "link", "show", "tn5i0"]);
        assert!(ours.contains("veth") && ours.contains("master br-tenant-5") && ours.contains("alias mvm:n1"), "{ours}");
        assert!(ours.contains("learning off"), "{ours}");
        let seen = node.host.observe_network().unwrap();
        assert!(seen.taps.contains("tn5i0") && seen.loose.is_empty(), "{seen:?}");
        // One whose VMM runs is held.
        let error = node.host.create_tap(&instance(5, 0), None).unwrap_err().to_string();
        assert!(error.contains("another process still holds it"), "{error}");
        // Taken off the host at once, although the namespace is there.
        unplug(namespace.as_fd()).unwrap();
        unplug(namespace.as_fd()).unwrap();
        assert!(!run("ip", &["-o", "link"]).contains("tn5i0"));
        assert_eq!(links_of(&namespace, &[]).len(), 3);
        // By the kernel, when nobody is in the namespace; whoever comes next waits for that.
        drop((guest, namespace));
        for _ in 0..5 {
            let [_guest] = node.guests([instance(5, 0)]);
            drop(node.namespaces.borrow_mut().pop().unwrap());
        }
        drop(node.tap(&instance(5, 0)));
        // Something of another's of that name is not taken for one of these.
        run("ip", &["link", "add", "tn5i1", "type", "bridge"]);
        run("ip", &["link", "set", "tn5i1", "alias", "of another"]);
        node.host.apply_ruleset(&rules(&[instance(5, 1)])).unwrap();
        assert!(node.host.create_tap(&instance(5, 1), None).is_err());
    });
}
