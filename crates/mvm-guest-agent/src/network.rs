//! The guest's interface, from the configuration, by netlink.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use mvm_guest_api::config::Network;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Where `/etc/resolv.conf` of the built-in image leads.
const RESOLV_CONF: &str = "/run/resolv.conf";

/// Sets up the loopback interface.
///
/// # Errors
/// A sentence.
pub fn loopback() -> Result<(), String> {
    let netlink = Netlink::open()?;
    let index = index_of("lo").ok_or("there is no interface lo")?;
    netlink.ask("lo up", RouteNetlinkMessage::SetLink(up(index)), 0)
}

/// Gives the interface its addresses and routes, replacing others that an earlier configuration gave it.
///
/// Setting the hardware address, also to what it is, makes the kernel announce the address (`arp_notify`), so that
/// bridges and neighbours learn where a woken guest is.
///
/// # Errors
/// A sentence: which step failed, and what the kernel said.
pub fn configure(wanted: &Network, before: Option<&Network>) -> Result<(), String> {
    let netlink = Netlink::open()?;
    let name = interface(wanted).ok_or("there is no network device")?;
    let index = index_of(&name).ok_or_else(|| format!("{name} went away"))?;
    // The guest's network is IPv4 only; autoconfiguration would just be noise on the tenant's bridge.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let _ = fs::write(format!("/proc/sys/net/ipv4/conf/{name}/arp_notify"), "1");
    if let Some(old) = before.filter(|old| old.address != wanted.address) {
        let gone = RouteNetlinkMessage::DelAddress(address(index, old));
        // An address that is not there needs no removing.
        let _ = netlink.ask("old address", gone, 0);
    }
    let replace = NLM_F_CREATE | NLM_F_REPLACE;
    netlink.ask("address", RouteNetlinkMessage::NewAddress(address(index, wanted)), replace)?;
    let mut link = up(index);
    link.attributes.push(LinkAttribute::Address(wanted.mac.0.to_vec()));
    if wanted.mtu != 0 {
        link.attributes.push(LinkAttribute::Mtu(wanted.mtu));
    }
    netlink.ask("link", RouteNetlinkMessage::SetLink(link), 0)?;
    netlink.ask("default route", RouteNetlinkMessage::NewRoute(default_route(index, wanted.gateway)), replace)?;
    let servers: String = wanted.dns.iter().map(|server| format!("nameserver {server}\n")).collect();
    fs::write(RESOLV_CONF, servers).map_err(|error| format!("{RESOLV_CONF}: {error}"))
}

/// Lets the guest forward for its tenant, or not.
///
/// # Errors
/// A sentence.
pub fn set_forward(forward: bool) -> Result<(), String> {
    let path = "/proc/sys/net/ipv4/ip_forward";
    fs::write(path, if forward { "1" } else { "0" }).map_err(|error| format!("{path}: {error}"))
}

/// The device with the wanted address, or else the first Ethernet device.
fn interface(wanted: &Network) -> Option<String> {
    let mac = String::from(wanted.mac);
    let mut names: Vec<String> = fs::read_dir("/sys/class/net")
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        // A device of its own, not the loopback or a tunnel.
        .filter(|name| fs::exists(format!("/sys/class/net/{name}/device")).unwrap_or(false))
        .collect();
    names.sort();
    let has_it = |name: &&String| fs::read_to_string(format!("/sys/class/net/{name}/address")).is_ok_and(|address| address.trim() == mac);
    names.iter().find(has_it).or(names.first()).cloned()
}

fn index_of(name: &str) -> Option<u32> {
    fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?.trim().parse().ok()
}

fn up(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

fn address(index: u32, network: &Network) -> AddressMessage {
    let own = network.address.address;
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = index;
    message.header.prefix_len = network.address.prefix;
    message.attributes = vec![AddressAttribute::Local(IpAddr::V4(own)), AddressAttribute::Address(IpAddr::V4(own))];
    if network.address.prefix < 31 {
        let hosts = u32::MAX >> network.address.prefix;
        let broadcast = Ipv4Addr::from(u32::from(own) | hosts);
        message.attributes.push(AddressAttribute::Broadcast(broadcast));
    }
    message
}

fn default_route(index: u32, gateway: Ipv4Addr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Gateway(RouteAddress::Inet(gateway)), RouteAttribute::Oif(index)];
    message
}

struct Netlink(Socket);

impl Netlink {
    fn open() -> Result<Netlink, String> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        open().map(Netlink).map_err(|error| format!("netlink: {error}"))
    }

    /// Sends one request and waits for the kernel's acknowledgement.
    fn ask(&self, what: &str, message: RouteNetlinkMessage, flags: u16) -> Result<(), String> {
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        request.header.sequence_number = 1;
        request.finalize();
        let mut bytes = vec![0; request.header.length as usize];
        request.serialize(&mut bytes);
        let failed = |error: io::Error| format!("{what}: {error}");
        self.0.send(&bytes, 0).map_err(failed)?;
        let (reply, _) = self.0.recv_from_full().map_err(failed)?;
        let reply = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&reply).map_err(|error| format!("{what}: {error}"))?;
        match reply.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(failed(error.to_io())),
            _ => Ok(()),
        }
    }
}
