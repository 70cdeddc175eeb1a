//! The host's side of `mvm net verify`: what should be there, and whether it is.

use std::collections::BTreeMap;

use mvm_hostd::netlink::Link;
use mvm_hostd::{nft, sysctl};

use super::local::LocalHost;
use super::{HostError, NetworkCheck};
use crate::net::{BRIDGE_PREFIX, Ruleset, TenantNetwork};

const REPAIR: &str = "mvm apply mends it";

/// Looks at everything; a fault is a finding and not an error.
pub(super) fn verify(host: &LocalHost, ruleset: &Ruleset) -> Result<Vec<NetworkCheck>, HostError> {
    let mut checks = Vec::new();
    let mut check = |what: String, fault: Option<String>| checks.push(NetworkCheck { what, fault });

    let loaded = match host.try_run()? {
        Some(run) => nft::loaded(&run)?,
        None => None,
    };
    let wanted = ruleset
        .fingerprint()
        .map_err(|error| HostError::Failed { what: "cannot render the packet filter rules".into(), why: error.to_string() })?;
    check(
        "packet filter rules are loaded and unchanged".into(),
        match loaded {
            Some(loaded) if loaded == wanted => None,
            Some(_) => Some(format!("older rules are loaded; {REPAIR}")),
            None => Some(format!("they are not loaded, or another program changed rules since; {REPAIR}")),
        },
    );
    if !ruleset.tenants.is_empty() {
        let off = (!sysctl::forwards()?).then(|| format!("net.ipv4.ip_forward is 0, so nothing leaves the host; {REPAIR}"));
        check("the host forwards".into(), off);
    }

    let netlink = host.netlink()?;
    let links: BTreeMap<String, Link> = netlink.list_links()?.into_iter().map(|link| (link.name.clone(), link)).collect();
    let by_index: BTreeMap<u32, &str> = links.values().map(|link| (link.index, link.name.as_str())).collect();
    let mut listed = BTreeMap::new();
    for (tenant, instances) in &ruleset.tenants {
        let name = tenant.bridge();
        let link = links.get(&name);
        check(format!("bridge {name} is there, ours and up"), bridge_fault(link, tenant, host.alias()));
        if let Some(link) = link {
            let addresses = netlink.addresses(link.index)?;
            let wrong = addresses != [(tenant.subnet.gateway(), tenant.subnet.prefix())];
            let found: Vec<String> = addresses.iter().map(|(address, prefix)| format!("{address}/{prefix}")).collect();
            let fault = wrong.then(|| format!("it has {}; {REPAIR}", if found.is_empty() { "none".into() } else { found.join(", ") }));
            check(format!("bridge {name} has the address {}/{}", tenant.subnet.gateway(), tenant.subnet.prefix()), fault);
        }
        listed.insert(tenant.builder().tap(), name.clone());
        listed.extend(instances.iter().map(|instance| (instance.tap(), name.clone())));
    }
    for link in links.values() {
        let bridge = link.master.and_then(|master| by_index.get(&master).copied());
        if let Some(wanted) = listed.get(&link.name) {
            let fault = match bridge {
                Some(found) if found == wanted && link.up => None,
                Some(found) if found == wanted => Some("it is down; stop and start its instance".into()),
                Some(found) => Some(format!("it is a port of {found}; stop and start its instance")),
                None => Some(format!("it is a port of no bridge; {REPAIR}")),
            };
            check(format!("TAP {} is a port of {wanted}", link.name), fault);
        } else if let Some(bridge) = bridge.filter(|bridge| bridge.starts_with(BRIDGE_PREFIX)) {
            check(
                format!("bridge {bridge} has only ports that mvm knows"),
                Some(format!("{} is none of them; find out who added it", link.name)),
            );
        }
    }
    Ok(checks)
}

fn bridge_fault(link: Option<&Link>, tenant: &TenantNetwork, alias: &str) -> Option<String> {
    let Some(link) = link else { return Some(format!("it is missing; {REPAIR}")) };
    if !link.is_bridge || link.alias.as_deref() != Some(alias) {
        return Some(format!("an interface of that name is there that is not marked {alias}; remove or rename it"));
    }
    if !link.up {
        return Some(format!("it is down; {REPAIR}"));
    }
    (link.mac != tenant.bridge_mac().0).then(|| format!("it has another MAC than {}; {REPAIR}", tenant.bridge_mac()))
}
