//! Kernel settings, by writing below `/proc/sys`, which shows the network namespace of the calling thread.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::dir::Dir;
use crate::error::{During, HostdError};

const IP_FORWARD: &str = "net/ipv4/ip_forward";
const RECORD: &str = "sysctl.json";

/// What a setting was before mvm changed it, kept in the run directory, since a reboot restores it anyway.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The setting, as below `/proc/sys`.
    pub name: String,
    /// Its former value.
    pub was: String,
}

/// Reads a setting; `None` when this kernel does not have it.
pub fn read(name: &str) -> Result<Option<String>, HostdError> {
    match fs::read_to_string(format!("/proc/sys/{name}")) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).during(|| format!("cannot read /proc/sys/{name}")),
    }
}

/// Writes a setting if it is something else; returns what it was then.
fn ensure(name: &str, value: &str) -> Result<Option<String>, HostdError> {
    match read(name)? {
        Some(was) if was != value => {
            fs::write(format!("/proc/sys/{name}"), value).during(|| format!("cannot set /proc/sys/{name} to {value}"))?;
            Ok(Some(was))
        }
        _ => Ok(None),
    }
}

/// Whether this host forwards between its interfaces.
pub fn forwards() -> Result<bool, HostdError> {
    Ok(read(IP_FORWARD)?.as_deref() == Some("1"))
}

/// Makes the host forward, and records in the run directory what it did before.
pub fn ensure_forwarding(run: &Dir) -> Result<(), HostdError> {
    if forwards()? {
        return Ok(());
    }
    let changed = Changed { name: IP_FORWARD.to_owned(), was: read(IP_FORWARD)?.unwrap_or_default() };
    // The record comes first: a process killed in between must not leave a change that nobody knows of.
    run.write(RECORD, &serde_json::to_vec(&changed).expect("two strings become JSON"), 0o600)?;
    ensure(IP_FORWARD, "1")?;
    Ok(())
}

/// Takes back what [`ensure_forwarding`] changed, if it did; returns it.
pub fn restore_forwarding(run: &Dir) -> Result<Option<Changed>, HostdError> {
    let Some(record) = run.read(RECORD)? else { return Ok(None) };
    let changed = serde_json::from_slice::<Changed>(&record).ok().filter(|changed| changed.name == IP_FORWARD);
    if let Some(changed) = &changed {
        ensure(IP_FORWARD, &changed.was)?;
    }
    run.remove_file(RECORD)?;
    Ok(changed)
}

/// Settings of a tenant's bridge; they vanish with it.
///
/// No IPv6 (a guest could otherwise advertise itself as the host's router), answers to ARP only for the bridge's own
/// address, no packets whose way back leads elsewhere, no redirects.
pub(crate) fn set_bridge(name: &str) -> Result<(), HostdError> {
    ensure(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    for (key, value) in [
        ("arp_ignore", "1"),
        ("rp_filter", "1"),
        ("proxy_arp", "0"),
        ("send_redirects", "0"),
        ("accept_redirects", "0"),
        ("route_localnet", "0"),
    ] {
        ensure(&format!("net/ipv4/conf/{name}/{key}"), value)?;
    }
    Ok(())
}

/// Settings of the calling thread's network namespace, which has no addresses and is to have none: nothing speaks of itself, and
/// nothing is forwarded but by a bridge.
pub(crate) fn set_apart() -> Result<(), HostdError> {
    ensure("net/ipv6/conf/default/disable_ipv6", "1")?;
    ensure(IP_FORWARD, "0").map(drop)
}

/// Settings of a TAP, or of what is in its place; they vanish with it.
pub(crate) fn set_port(name: &str) -> Result<(), HostdError> {
    ensure(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1").map(drop)
}
