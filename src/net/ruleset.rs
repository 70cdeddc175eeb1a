//! The whole nftables ruleset of a node, rendered from state to one text.
//!
//! ```text
//!              TAP ── table bridge mvm ── bridge ── table inet mvm ── routed elsewhere
//!                     only its own MAC              own host services: no
//!                     and address                   another tenant: no
//! ```
//!
//! What a tenant's instance may reach, and what not:
//!
//! | to | |
//! |---|---|
//! | instances of the same tenant | yes |
//! | anything else in 10.240.0.0/12, on this node or another | no, also when routed through the host |
//! | any address of the host, whatever interface holds it | no; ICMP echo to its own gateway address only |
//! | 169.254.0.0/16, in it the metadata service 169.254.169.254 | no, neither bridged nor routed |
//! | anything else, other private ranges included | yes, masqueraded |
//!
//! The microVM that builds for a tenant has the subnet's second address and a port of its own (`tn<net id>b`), listed whether a
//! build runs or not. It reaches what the last line of the table says and nothing else: no instance of its own tenant, neither
//! bridged nor routed, and nothing of the host; and no instance reaches it.
//!
//! Other private ranges are reachable because on a plain host they hold the resolver, the package mirror and the data
//! base that the workload is there for, and egress that works for 1.1.1.1 and not for the resolver beside the host surprises.
//! Nothing from outside reaches an instance but replies to what it, or the host, began, and what comes to a port of the host that a
//! pool exposes: of several instances that take it, each has its turn.
//!
//! What an instance may move in a second is bounded at its port where its pool says so; what is beyond is dropped.
//!
//! Everything is keyed by interface *names*, so that a TAP may come and go without the ruleset changing, and by sets, so
//! that a frame's cost does not grow with the number of instances. Names that begin with `br-tenant-`, or with `tn` and a
//! digit, are mvm's on the whole host: an interface of such a name that no rule lists passes nothing (`meta ibrname`,
//! which could tell a port by its bridge, is missing in some kernels).
//!
//! IPv6 is dropped altogether for now: no tenant has an IPv6 address.

use std::collections::BTreeSet;
use std::fmt::{Display, Write};
use std::net::Ipv4Addr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    InstanceOffset, Mac, NetError, Subnet, TenantNetId, bridge_mac, bridge_name, builder_mac, builder_tap_name, instance_mac, tap_name,
};

/// The network of one tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantNetwork {
    /// Given by whoever coordinates the cluster, never used again for another tenant.
    pub net_id: TenantNetId,
    /// Its subnet; the first address is the gateway's (the bridge's), the second the builder's, instances have the third and those
    /// after it.
    pub subnet: Subnet,
}

impl TenantNetwork {
    /// Names its bridge.
    pub fn bridge(&self) -> String {
        bridge_name(self.net_id)
    }

    /// Derives its bridge's MAC.
    pub fn bridge_mac(&self) -> Mac {
        bridge_mac(self.net_id)
    }

    /// The network identity of the microVM that builds for the tenant.
    pub fn builder(&self) -> BuilderNetwork {
        BuilderNetwork { tenant: *self }
    }
}

/// The network identity of the microVM that builds for a tenant, of which there is one at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BuilderNetwork {
    /// Its tenant's network.
    pub tenant: TenantNetwork,
}

impl BuilderNetwork {
    /// Returns its address.
    pub fn address(&self) -> Ipv4Addr {
        self.tenant.subnet.builder()
    }

    /// Names its TAP.
    pub fn tap(&self) -> String {
        builder_tap_name(self.tenant.net_id)
    }

    /// Derives its MAC.
    pub fn mac(&self) -> Mac {
        builder_mac(self.tenant.net_id)
    }
}

/// The network identity of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InstanceNetwork {
    /// Its tenant's network.
    pub tenant: TenantNetwork,
    /// Its place in the subnet.
    pub offset: InstanceOffset,
    /// Whether it may send packets from the addresses of its tenant's other instances, which it forwards: a gateway.
    pub forwards: bool,
    /// What it may send and receive in a second, in Mbit (10^6 bits) each.
    pub mbit: Option<u32>,
}

impl InstanceNetwork {
    /// Returns the instance's address.
    ///
    /// Errors when its tenant's subnet is too small for its offset.
    pub fn address(&self) -> Result<Ipv4Addr, NetError> {
        self.tenant.subnet.instance(self.offset)
    }

    /// Names its TAP.
    pub fn tap(&self) -> String {
        tap_name(self.tenant.net_id, self.offset)
    }

    /// Derives its MAC.
    pub fn mac(&self) -> Mac {
        instance_mac(self.tenant.net_id, self.offset)
    }
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Returns the name used in documents and rules.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

/// A port of the host that leads to instances of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Exposed {
    /// The protocol.
    pub protocol: Protocol,
    /// The port on the host's own addresses.
    pub host_port: u16,
    /// The port in the guests.
    pub port: u16,
    /// The tenant's bridge.
    pub bridge: String,
    /// The addresses that take it in turns; at least one.
    pub targets: Vec<Ipv4Addr>,
}

/// Where an instance is, as its own document says: what is known of its tenant's network when the tenant's document is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its tenant's net id.
    pub net_id: TenantNetId,
    /// Its place in the tenant's subnet.
    pub offset: InstanceOffset,
    /// Its address.
    pub address: Ipv4Addr,
}

/// Every tenant with every instance, running or not (a TAP that is absent costs nothing): what the rules are rendered from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Ruleset {
    /// The tenants with their instances, in any order.
    pub tenants: Vec<(TenantNetwork, Vec<InstanceNetwork>)>,
    /// The ports that lead in from outside, in any order.
    pub exposed: Vec<Exposed>,
}

impl Ruleset {
    /// Renders the text for `nft -f -`: one transaction that replaces both of mvm's tables and touches no other.
    ///
    /// The same state gives the same text in whatever order it is listed.
    ///
    /// Errors when an instance has no address in its tenant's subnet.
    pub fn render(&self) -> Result<String, NetError> {
        let mut tenants: Vec<_> = self.tenants.iter().collect();
        tenants.sort_by_key(|(tenant, _)| tenant.net_id);
        let mut ports = Vec::new();
        let mut forwarders = Vec::new();
        let mut limited = Vec::new();
        for (tenant, instances) in &tenants {
            let builder = tenant.builder();
            ports.push(format!("\"{}\" . {} . {}", builder.tap(), builder.mac(), builder.address()));
            let mut instances: Vec<_> = instances.iter().collect();
            instances.sort_by_key(|instance| instance.offset);
            for instance in instances {
                let (tap, mac) = (tap_name(tenant.net_id, instance.offset), instance_mac(tenant.net_id, instance.offset));
                ports.push(format!("\"{tap}\" . {mac} . {}", tenant.subnet.instance(instance.offset)?));
                limited.extend(instance.mbit.map(|mbit| (tap.clone(), mbit)));
                if instance.forwards {
                    let first = tenant.subnet.instance(InstanceOffset(0))?;
                    let last = Ipv4Addr::from_bits(tenant.subnet.broadcast().to_bits() - 1);
                    forwarders.push(format!("\"{tap}\" . {mac} . {first}-{last}"));
                }
            }
        }
        let per_tenant = |line: &dyn Fn(&str, Subnet) -> String| -> Vec<String> {
            tenants.iter().map(|(tenant, _)| line(&tenant.bridge(), tenant.subnet)).collect()
        };
        let mut text = String::from(HEAD);
        text.push_str("table inet mvm {\n");
        set(&mut text, "same_tenant", "ifname . ifname", "", per_tenant(&|bridge, _| format!("\"{bridge}\" . \"{bridge}\"")));
        set(
            &mut text,
            "own_gateway",
            "ifname . ipv4_addr",
            "",
            per_tenant(&|bridge, subnet| format!("\"{bridge}\" . {}", subnet.gateway())),
        );
        set(&mut text, "own_subnet", "ifname . ipv4_addr", "interval", per_tenant(&|bridge, subnet| format!("\"{bridge}\" . {subnet}")));
        set(&mut text, "tenant_subnet", "ipv4_addr", "interval", tenants.iter().map(|(tenant, _)| tenant.subnet));
        let mut exposed: Vec<&Exposed> = self.exposed.iter().collect();
        exposed.sort();
        let entries: BTreeSet<String> = exposed
            .iter()
            .flat_map(|one| one.targets.iter().map(|to| format!("\"{}\" . {to} . {} . {}", one.bridge, one.protocol.as_str(), one.port)))
            .collect();
        set(&mut text, "exposed", "ifname . ipv4_addr . inet_proto . inet_service", "", entries);
        set(&mut text, "builder_address", "ipv4_addr", "", tenants.iter().map(|(tenant, _)| tenant.builder().address()));
        text.push_str(INET_CHAINS);
        text.push_str("\n\tchain exposed_ports {\n");
        for one in exposed {
            let to = match one.targets.as_slice() {
                [target] => format!("{target}:{}", one.port),
                targets => {
                    let turns: Vec<String> =
                        targets.iter().enumerate().map(|(turn, target)| format!("{turn} : {target} . {}", one.port)).collect();
                    format!("numgen inc mod {} map {{ {} }}", targets.len(), turns.join(", "))
                }
            };
            let _ = writeln!(text, "\t\t{} dport {} dnat ip to {to}", one.protocol.as_str(), one.host_port);
        }
        text.push_str("\t}\n");
        text.push_str("}\n\ntable bridge mvm {\n");
        set(&mut text, "ours", "ifname", "interval", (0..10).map(|digit| format!("\"tn{digit}*\"")));
        set(&mut text, "port", "ifname . ether_addr . ipv4_addr", "", ports);
        set(&mut text, "builder", "ifname", "", tenants.iter().map(|(tenant, _)| format!("\"{}\"", tenant.builder().tap())));
        set(&mut text, "forwarder", "ifname . ether_addr . ipv4_addr", "interval", forwarders);
        for (direction, limits) in [("from", &limited), ("to", &limited)] {
            limit(&mut text, direction, limits);
        }
        text.push_str(BRIDGE_CHAINS);
        text.push_str("}\n");
        Ok(text)
    }

    /// Names the ruleset by its content: 32 hex digits, the same for the same text only.
    ///
    /// Errors as [`Ruleset::render`] does.
    pub fn fingerprint(&self) -> Result<String, NetError> {
        Ok(Self::name_of(&self.render()?))
    }

    /// The fingerprint of a text that was rendered already.
    pub fn name_of(text: &str) -> String {
        blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
    }
}

/// What ports may move in one direction: a chain for each, and a map that leads there.
fn limit(text: &mut String, direction: &str, limits: &[(String, u32)]) {
    // The kernel's bucket holds what a second may carry and this besides; packets of guests have up to 64 KiB. What a VMM has shaped to
    // the same rate passes whole. Beyond 138 Gbit a second the kernel cannot count it any more.
    const BURST: u64 = 1 << 18;
    for (tap, mbit) in limits {
        let rate = u64::from(*mbit) * 125_000;
        let _ = writeln!(text, "\tchain {direction}_{tap} {{\n\t\tlimit rate over {rate} bytes/second burst {BURST} bytes drop\n\t}}");
    }
    let _ = writeln!(text, "\tmap limited_{direction} {{\n\t\ttype ifname : verdict");
    if !limits.is_empty() {
        let elements: Vec<String> = limits.iter().map(|(tap, _)| format!("\t\t\t\"{tap}\" : jump {direction}_{tap}")).collect();
        let _ = writeln!(text, "\t\telements = {{\n{}\n\t\t}}", elements.join(",\n"));
    }
    text.push_str("\t}\n");
}

fn set(text: &mut String, name: &str, kind: &str, flags: &str, elements: impl IntoIterator<Item = impl Display>) {
    // Writing to a `String` cannot fail.
    let _ = writeln!(text, "\tset {name} {{\n\t\ttype {kind}");
    if !flags.is_empty() {
        let _ = writeln!(text, "\t\tflags {flags}");
    }
    let mut elements = elements.into_iter();
    if let Some(first) = elements.next() {
        let _ = write!(text, "\t\telements = {{\n\t\t\t{first}");
        for element in elements {
            let _ = write!(text, ",\n\t\t\t{element}");
        }
        text.push_str("\n\t\t}\n");
    }
    text.push_str("\t}\n");
}

/// `table` before `delete table` makes the deletion succeed when there is none yet.
const HEAD: &str = "\
table inet mvm
delete table inet mvm
table bridge mvm
delete table bridge mvm

";

/// `before_nat` sees where a packet was meant to go before anyone's port forwarding (priority -100) could turn the host's
/// address into a container's, and after connection tracking (-200), so that the replies to the host's probes pass.
const INET_CHAINS: &str = r#"
	chain before_nat {
		type filter hook prerouting priority mangle; policy accept;
		iifname "br-tenant-*" fib daddr type local goto to_host
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname "br-tenant-*" goto to_host
	}

	chain to_host {
		meta nfproto ipv6 drop
		iifname . ip saddr != @own_subnet drop
		ip saddr @builder_address drop
		ct state established,related accept
		iifname . ip daddr @own_gateway icmp type echo-request accept
		drop
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "br-tenant-*" goto from_tenant
		oifname "br-tenant-*" goto to_tenant
	}

	chain from_tenant {
		meta nfproto ipv6 drop
		oifname "br-tenant-*" ip saddr @builder_address drop
		oifname "br-tenant-*" ip daddr @builder_address drop
		iifname . oifname @same_tenant accept
		oifname "br-tenant-*" drop
		ct state invalid drop
		ip daddr { 10.240.0.0/12, 169.254.0.0/16 } drop
		iifname . ip saddr != @own_subnet drop
		accept
	}

	chain to_tenant {
		ct state established,related accept
		ct status dnat oifname . ip daddr . meta l4proto . th dport @exposed accept
		drop
	}

	chain expose {
		type nat hook prerouting priority dstnat; policy accept;
		iifname "br-tenant-*" return
		meta nfproto ipv4 fib daddr type local jump exposed_ports
	}

	chain expose_to_host {
		type nat hook output priority -100; policy accept;
		ip daddr != 127.0.0.0/8 fib daddr type local jump exposed_ports
	}

	chain masquerade_tenants {
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr @tenant_subnet oifname != "br-tenant-*" ip daddr != 10.240.0.0/12 masquerade
	}
"#;

/// Frames to 01:80:c2:00:00:0x, which bridges keep to themselves, mostly skip `prerouting`; `input` keeps them from the
/// host's own daemons. That the bridge learns nothing from them, nor from the few that skip this hook as well, is because
/// learning is off on every port.
const BRIDGE_CHAINS: &str = r#"
	chain prerouting {
		type filter hook prerouting priority dstnat; policy accept;
		iifname vmap @limited_from
		iifname @ours goto from_port
	}

	chain postrouting {
		type filter hook postrouting priority filter; policy accept;
		oifname vmap @limited_to
	}

	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname @builder drop
		oifname @builder drop
	}

	chain input {
		type filter hook input priority filter; policy accept;
		iifname @ours ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
	}

	chain from_port {
		ether type != { ip, arp } drop
		ip daddr 169.254.0.0/16 drop
		iifname . ether saddr . ip saddr @port accept
		iifname . ether saddr . arp saddr ip @port arp htype 1 arp ptype ip arp hlen 6 arp plen 4 iifname . arp saddr ether . arp saddr ip @port accept
		iifname . ether saddr . ip saddr @forwarder accept
		drop
	}
"#;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenant(net_id: u64, subnet: &str, instances: &[(u16, bool)]) -> (TenantNetwork, Vec<InstanceNetwork>) {
        let tenant = TenantNetwork { net_id: net_id.try_into().unwrap(), subnet: subnet.parse().unwrap() };
        let place = |&(offset, forwards)| InstanceNetwork { tenant, offset: InstanceOffset(offset), forwards, mbit: None };
        (tenant, instances.iter().map(place).collect())
    }

    #[test]
    fn the_text_of_two_tenants() {
        let tenants = vec![tenant(7, "10.240.7.0/24", &[(0, false)]), tenant(5, "10.240.5.0/24", &[(1, false), (0, true)])];
        let exposed = |protocol, host_port, port, targets: &[&str]| Exposed {
            protocol,
            host_port,
            port,
            bridge: "br-tenant-5".into(),
            targets: targets.iter().map(|target| target.parse().unwrap()).collect(),
        };
        let exposed =
            vec![exposed(Protocol::Udp, 53, 53, &["10.240.5.3"]), exposed(Protocol::Tcp, 8443, 443, &["10.240.5.3", "10.240.5.4"])];
        let mut tenants = tenants;
        tenants[0].1[0].mbit = Some(10);
        insta::assert_snapshot!(Ruleset { tenants, exposed }.render().unwrap());
    }

    #[test]
    fn the_text_of_nothing() {
        insta::assert_snapshot!(Ruleset::default().render().unwrap());
    }

    #[test]
    fn an_instance_without_an_address_is_refused() {
        let ruleset = Ruleset { tenants: vec![tenant(1, "10.240.1.0/29", &[(4, false)])], ..Ruleset::default() };
        assert_eq!(ruleset.render().unwrap_err().to_string(), "subnet 10.240.1.0/29 has room for 4 instances; offset 4 is beyond");
    }

    proptest! {
        #[test]
        fn the_order_of_the_state_does_not_matter(offsets in prop::collection::btree_set(0u16..200, 0..20).prop_map(|set| set.into_iter().collect::<Vec<_>>()).prop_shuffle()) {
            let sorted = { let mut sorted = offsets.clone(); sorted.sort_unstable(); sorted };
            let text = |offsets: &[u16]| {
                let instances: Vec<_> = offsets.iter().map(|&offset| (offset, false)).collect();
                let (one, two) = (tenant(1, "10.240.1.0/24", &instances), tenant(2, "10.240.2.0/24", &[]));
                let ahead = Ruleset { tenants: vec![one.clone(), two.clone()], ..Ruleset::default() }.render().unwrap();
                let behind = Ruleset { tenants: vec![two, one], ..Ruleset::default() }.render().unwrap();
                (ahead, behind)
            };
            let (a, b) = text(&offsets);
            prop_assert_eq!(&a, &b);
            prop_assert_eq!(a, text(&sorted).0);
        }
    }
}
