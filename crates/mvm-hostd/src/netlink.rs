//! Bridges and links over route netlink.
//!
//! What is ours carries an alias, `mvm:<node id>`. A bridge is created and marked in two messages, since the kernel takes
//! no alias at creation; one that a killed process left between the two is known by its derived MAC.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::{AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::error::{During, HostdError};
use crate::sysctl;

/// The kernel's number for the other end of a cable, in its namespace. When both ends have the same one, the kernel takes up to a
/// second to notice that the cable is plugged in (`linkwatch_urgent_event` of net/core/link_watch.c).
const CABLE_INDEX: u32 = 1 << 30;

/// A network interface of this network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// The alias, where one is set: ours is `mvm:<node id>`.
    pub alias: Option<String>,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Its Ethernet address, empty for interfaces that have none.
    pub mac: Vec<u8>,
    /// Whether it is up.
    pub up: bool,
    /// The largest packet, in bytes.
    pub mtu: u32,
}

/// What a bridge should be like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec<'a> {
    /// Its name, at most 15 bytes.
    pub name: &'a str,
    /// Its Ethernet address, which also marks it as ours before it has its alias.
    pub mac: [u8; 6],
    /// Its one IPv4 address.
    pub address: Ipv4Addr,
    /// The prefix length of its subnet.
    pub prefix: u8,
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// The alias that marks it as ours.
    pub alias: &'a str,
}

/// A connection to the kernel's route netlink, in the network namespace of the thread that opened it.
pub struct Netlink {
    runtime: tokio::runtime::Runtime,
    handle: Handle,
}

impl Netlink {
    /// Opens a connection; it uses no thread of its own.
    pub fn open() -> Result<Self, HostdError> {
        let what = || "cannot open a route netlink socket".to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().during(what)?;
        let guard = runtime.enter();
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().during(what)?;
        drop(guard);
        runtime.spawn(connection);
        Ok(Self { runtime, handle })
    }

    /// Lists all interfaces, in one request.
    pub fn list_links(&self) -> Result<Vec<Link>, HostdError> {
        let links = self.runtime.block_on(self.handle.link().get().execute().try_collect::<Vec<_>>());
        Ok(links.map_err(|error| netlink_error("cannot list the network interfaces", error))?.into_iter().map(Link::from).collect())
    }

    /// Looks up one interface by name.
    pub fn link(&self, name: &str) -> Result<Option<Link>, HostdError> {
        let mut request = self.handle.link().get();
        request = request.match_name(name.to_owned());
        match self.runtime.block_on(request.execute().try_next()) {
            Ok(message) => Ok(message.map(Link::from)),
            Err(error) if errno(&error) == libc::ENODEV => Ok(None),
            Err(error) => Err(netlink_error(&format!("cannot look up interface {name}"), error)),
        }
    }

    /// Lists the IPv4 addresses of an interface.
    pub fn addresses(&self, index: u32) -> Result<Vec<(Ipv4Addr, u8)>, HostdError> {
        let mut request = self.handle.address().get();
        // With strict checking the kernel itself filters by these.
        request.message_mut().header.index = index;
        request.message_mut().header.family = AddressFamily::Inet;
        let messages = self.runtime.block_on(request.execute().try_collect::<Vec<_>>());
        let messages = messages.map_err(|error| netlink_error(&format!("cannot list the addresses of interface {index}"), error))?;
        let own = messages.into_iter().filter(|message| message.header.index == index);
        Ok(own
            .filter_map(|message| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(IpAddr::V4(address)) => Some((*address, message.header.prefix_len)),
                    _ => None,
                })
            })
            .collect())
    }

    /// Makes the bridge, or mends one that is there, and brings it up with just its address. Returns its index.
    ///
    /// The host neither takes part in IPv6 on it nor answers there for addresses of its other interfaces.
    ///
    /// Errors when an interface of that name is not ours.
    pub fn ensure_bridge(&self, spec: &BridgeSpec<'_>) -> Result<u32, HostdError> {
        let what = format!("cannot make bridge {}", spec.name);
        let found = match self.link(spec.name)? {
            Some(link) => link,
            None => {
                let create =
                    LinkMessageBuilder::<LinkBridge>::new(spec.name).address(spec.mac.to_vec()).mtu(spec.mtu).mcast_snooping(false).build();
                match self.runtime.block_on(self.handle.link().add(create).execute()) {
                    Ok(()) => {}
                    // Another process of ours was quicker.
                    Err(error) if errno(&error) == libc::EEXIST => {}
                    Err(error) => return Err(netlink_error(&what, error)),
                }
                let made = self.link(spec.name)?;
                made.ok_or_else(|| HostdError::refused(what.clone(), "it was gone again as soon as it was made"))?
            }
        };
        refuse_foreign(&what, &found, spec.alias, spec.mac)?;
        sysctl::set_bridge(spec.name)?;
        let right = found.up && found.mtu == spec.mtu && found.mac == spec.mac && found.alias.as_deref() == Some(spec.alias);
        if !right {
            let message = LinkUnspec::new_with_index(found.index).mtu(spec.mtu).address(spec.mac.to_vec()).alias(spec.alias).up().build();
            let set = self.runtime.block_on(self.handle.link().set(message).execute());
            set.map_err(|error| netlink_error(&what, error))?;
        }
        let mut present = false;
        for (address, prefix) in self.addresses(found.index)? {
            if (address, prefix) == (spec.address, spec.prefix) {
                present = true;
                continue;
            }
            let message = AddressMessageBuilder::<Ipv4Addr>::new().index(found.index).address(address, prefix).build();
            let removed = self.runtime.block_on(self.handle.address().del(message).execute());
            removed.map_err(|error| netlink_error(&format!("cannot take {address}/{prefix} off bridge {}", spec.name), error))?;
        }
        if !present {
            let request = self.handle.address().add(found.index, spec.address.into(), spec.prefix);
            match self.runtime.block_on(request.execute()) {
                Err(error) if errno(&error) != libc::EEXIST => {
                    return Err(netlink_error(&format!("cannot give {}/{} to bridge {}", spec.address, spec.prefix, spec.name), error));
                }
                _ => {}
            }
        }
        Ok(found.index)
    }

    /// Removes a bridge of ours; one that is not there is removed already.
    ///
    /// Errors when an interface of that name is not ours.
    pub fn remove_bridge(&self, name: &str, alias: &str, mac: [u8; 6]) -> Result<(), HostdError> {
        let what = format!("cannot remove bridge {name}");
        let Some(link) = self.link(name)? else { return Ok(()) };
        refuse_foreign(&what, &link, alias, mac)?;
        self.remove_link(link.index, &what)
    }

    pub(crate) fn remove_link(&self, index: u32, what: &str) -> Result<(), HostdError> {
        match self.runtime.block_on(self.handle.link().del(index).execute()) {
            Err(error) if errno(&error) != libc::ENODEV => Err(netlink_error(what, error)),
            _ => Ok(()),
        }
    }

    /// Removes the other links that carry the alias, whose names are such and not in `keep`; returns their names.
    pub fn sweep_ports(&self, alias: &str, is_port: impl Fn(&str) -> bool, keep: impl Fn(&str) -> bool) -> Result<Vec<String>, HostdError> {
        let mut removed = Vec::new();
        for link in self.list_links()?.into_iter().filter(|link| !link.is_bridge && link.alias.as_deref() == Some(alias)) {
            if is_port(&link.name) && !keep(&link.name) {
                self.remove_link(link.index, &format!("cannot remove interface {}", link.name))?;
                removed.push(link.name);
            }
        }
        Ok(removed)
    }

    /// Removes the bridges that carry the alias and are not in `keep`; returns their names.
    ///
    /// A bridge whose name begins with `prefix` and that has no alias, but a MAC that begins with `mac`, was left by a
    /// process that was killed while it made it, and goes as well.
    pub fn sweep_bridges(&self, alias: &str, prefix: &str, mac: [u8; 2], keep: impl Fn(&str) -> bool) -> Result<Vec<String>, HostdError> {
        let mut removed = Vec::new();
        for link in self.list_links()?.into_iter().filter(|link| link.is_bridge && !keep(&link.name)) {
            let marked = link.alias.as_deref() == Some(alias);
            let half_made = link.alias.is_none() && link.name.starts_with(prefix) && link.mac.starts_with(&mac);
            if marked || half_made {
                self.remove_link(link.index, &format!("cannot remove bridge {}", link.name))?;
                removed.push(link.name);
            }
        }
        Ok(removed)
    }

    /// Attaches a link to a bridge, marks it and brings it up.
    ///
    /// The bridge does not learn from the port: it is told the one MAC that is behind it. Frames to some groups (LLDP's
    /// 01:80:c2:00:00:0e) would otherwise teach it another's MAC past every hook of the packet filter.
    pub fn attach(&self, name: &str, bridge: &str, mac: [u8; 6], alias: &str) -> Result<(), HostdError> {
        let what = format!("cannot attach {name} to bridge {bridge}");
        let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).during(|| what.clone())?;
        let master = rustix::net::netdevice::name_to_index(&socket, bridge).during(|| format!("{what}: no such bridge"))?;
        let index = rustix::net::netdevice::name_to_index(&socket, name).during(|| what.clone())?;
        self.attach_port(&what, index, master, mac, alias)
    }

    /// As [`Netlink::attach`], by the kernel's numbers for the link and for the bridge.
    pub(crate) fn attach_port(&self, what: &str, index: u32, master: u32, mac: [u8; 6], alias: &str) -> Result<(), HostdError> {
        let attached = LinkUnspec::new_with_index(index).alias(alias).controller(master).build();
        let told =
            self.handle.neighbours().add_bridge(index, &mac).state(NeighbourState::Noarp).flags(NeighbourFlags::Controller).replace();
        let up = LinkBridgePort::new(index).learning(false).up().build();
        let done = self.runtime.block_on(async {
            self.handle.link().set(attached).execute().await?;
            told.execute().await?;
            self.handle.link().change(up).execute().await
        });
        done.map_err(|error| netlink_error(what, error))
    }

    /// Moves a link into another network namespace, where it keeps its name and its alias, is down and a port of nothing.
    pub(crate) fn move_link(&self, index: u32, namespace: BorrowedFd<'_>, name: &str) -> Result<(), HostdError> {
        let message = LinkUnspec::new_with_index(index).setns_by_fd(namespace.as_raw_fd()).build();
        let moved = self.runtime.block_on(self.handle.link().set(message).execute());
        moved.map_err(|error| netlink_error(&format!("cannot move interface {name} into another network namespace"), error))
    }

    /// Makes a pair of virtual Ethernet interfaces, of which the other is in another network namespace.
    ///
    /// Errors when this kernel has none, or there are interfaces of these names.
    pub(crate) fn add_cable(&self, name: &str, other: &str, namespace: BorrowedFd<'_>) -> Result<(), HostdError> {
        let there = LinkUnspec::new_with_name(other).index(CABLE_INDEX).setns_by_fd(namespace.as_raw_fd()).build();
        let message = LinkVeth::new(name, other).set_info_data(InfoData::Veth(InfoVeth::Peer(there))).build();
        let what = format!("cannot make interface {name}, a pair of virtual Ethernet interfaces");
        match self.runtime.block_on(self.handle.link().add(message).execute()) {
            Err(error) if errno(&error) == libc::EOPNOTSUPP => {
                Err(HostdError::refused(what, "this kernel does not know them; load the kernel module veth (modprobe veth)"))
            }
            done => done.map_err(|error| netlink_error(&what, error)),
        }
    }

    /// Makes a bridge that joins links of this namespace to each other, and brings all of them up. It learns nothing: what comes in at
    /// one goes out at all others.
    pub(crate) fn join(&self, bridge: &str, links: &[&str]) -> Result<(), HostdError> {
        let what = || format!("cannot join {} by a bridge", links.join(" and "));
        let create = LinkMessageBuilder::<LinkBridge>::new(bridge).mcast_snooping(false).up().build();
        let made = self.runtime.block_on(self.handle.link().add(create).execute());
        made.map_err(|error| netlink_error(&what(), error))?;
        let index = |name: &str| {
            let link = self.link(name)?;
            Ok(link.ok_or_else(|| HostdError::refused(what(), format!("there is no {name}")))?.index)
        };
        let master = index(bridge)?;
        for name in links {
            let index = index(name)?;
            let port = LinkUnspec::new_with_index(index).controller(master).build();
            let up = LinkBridgePort::new(index).learning(false).up().build();
            let done = self.runtime.block_on(async {
                self.handle.link().set(port).execute().await?;
                self.handle.link().change(up).execute().await
            });
            done.map_err(|error| netlink_error(&what(), error))?;
        }
        Ok(())
    }
}

fn refuse_foreign(what: &str, link: &Link, alias: &str, mac: [u8; 6]) -> Result<(), HostdError> {
    let ours = match link.alias.as_deref() {
        Some(other) => other == alias,
        None => link.mac == mac,
    };
    if link.is_bridge && ours {
        return Ok(());
    }
    let owner = link.alias.as_deref().unwrap_or("nobody that mvm knows");
    Err(HostdError::refused(
        what,
        format!("interface {} is there already and belongs to {owner:?}, not to {alias:?}; remove or rename it", link.name),
    ))
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            is_bridge: false,
            alias: None,
            master: None,
            mac: Vec::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            mtu: 0,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => {
                    link.is_bridge = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge)));
                }
                _ => {}
            }
        }
        link
    }
}

fn errno(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code().abs(),
        _ => 0,
    }
}

fn netlink_error(what: &str, error: rtnetlink::Error) -> HostdError {
    match errno(&error) {
        0 => HostdError::refused(what, error.to_string()),
        errno => HostdError::Io { what: what.to_owned(), source: std::io::Error::from_raw_os_error(errno) },
    }
}
