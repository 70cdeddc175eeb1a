//! The packet filter: mvm's two tables, loaded in one transaction by one `nft` process, and compared without any.
//!
//! The kernel counts the transactions of a network namespace (`NFT_MSG_GETGEN`). After loading, the count is recorded in
//! the run directory together with the hash of the text; as long as boot, namespace, count and hash are the same, the
//! rules are those that were loaded, and nobody, also not another program, has changed any. When the count differs, the
//! rules are loaded again: that is one transaction, and connections that are open stay open.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use rustix::fs::{FlockOperation, OFlags};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};
use serde::{Deserialize, Serialize};

use crate::dir::Dir;
use crate::error::{During, HostdError};
use crate::program;

const RECORD: &str = "nft.json";
const LOCK: &str = "nft.lock";

/// Removes both tables; declaring a table first makes its deletion succeed when there is none.
const REMOVE: &str = "table inet mvm\ndelete table inet mvm\ntable bridge mvm\ndelete table bridge mvm\n";

/// What was loaded last, and when in the kernel's own count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Loaded {
    boot: String,
    namespace: u64,
    generation: u32,
    hash: String,
}

/// Whether an apply had anything to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// The rules were loaded.
    Loaded,
    /// They were there already; no process was started and nothing written.
    Unchanged,
}

/// Returns the hash of the rules that are loaded; `None` when they are not just those that mvm loaded last.
pub fn loaded(run: &Dir) -> Result<Option<String>, HostdError> {
    let Some(record) = run.read(RECORD)? else { return Ok(None) };
    let Ok(record) = serde_json::from_slice::<Loaded>(&record) else { return Ok(None) };
    let now = Loaded { boot: boot_id()?, namespace: namespace()?, generation: generation()?, hash: record.hash.clone() };
    Ok((now == record).then_some(record.hash))
}

/// Whether mvm's rules were loaded since the host booted; another program may have changed some since.
pub fn was_loaded(run: &Dir) -> Result<bool, HostdError> {
    let Some(record) = run.read(RECORD)? else { return Ok(false) };
    let Ok(record) = serde_json::from_slice::<Loaded>(&record) else { return Ok(false) };
    Ok(record.boot == boot_id()? && record.namespace == namespace()?)
}

/// Loads the rules in one transaction, unless they are loaded already; `hash` names this text, and only this one.
///
/// Errors when nftables refuses the text or lacks a part of the kernel; the rules that were loaded then still are.
pub fn apply(run: &Dir, text: &str, hash: &str) -> Result<Applied, HostdError> {
    if loaded(run)?.as_deref() == Some(hash) {
        return Ok(Applied::Unchanged);
    }
    let _lock = lock(run)?;
    // Another process that had the lock may have loaded the same.
    if loaded(run)?.as_deref() == Some(hash) {
        return Ok(Applied::Unchanged);
    }
    // Should another program change rules while ours are loaded, the count cannot tell before from after.
    for attempt in 1..=3 {
        let before = generation()?;
        run_nft(text)?;
        let after = generation()?;
        let mut record = Loaded { boot: boot_id()?, namespace: namespace()?, generation: after, hash: hash.to_owned() };
        let undisturbed = after == before.wrapping_add(1);
        if !undisturbed && attempt < 3 {
            continue;
        }
        if !undisturbed {
            tracing::warn!(
                "another program keeps changing packet filter rules; mvm's are loaded, and will be loaded again on the next pass"
            );
            // A count of the past: the next comparison fails.
            record.generation = before;
        }
        run.write(RECORD, &serde_json::to_vec(&record).expect("strings and numbers become JSON"), 0o600)?;
        break;
    }
    Ok(Applied::Loaded)
}

/// Removes mvm's tables, and what is recorded of them.
pub fn remove(run: &Dir) -> Result<(), HostdError> {
    let _lock = lock(run)?;
    run_nft(REMOVE)?;
    run.remove_file(RECORD)
}

fn run_nft(text: &str) -> Result<(), HostdError> {
    let mut command = Command::new(program::find("nft", "nftables")?);
    command.args(["-f", "-"]);
    program::run(command, "load the packet filter rules with nft", text.as_bytes()).map(drop)
}

fn lock(run: &Dir) -> Result<File, HostdError> {
    let file = run.open_file(LOCK, OFlags::RDWR | OFlags::CREATE, 0o600)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).during(|| format!("cannot lock {}", run.path().join(LOCK).display()))?;
    Ok(file)
}

fn boot_id() -> Result<String, HostdError> {
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(std::fs::read_to_string(path).during(|| format!("cannot read {path}"))?.trim().to_owned())
}

/// The inode of the calling thread's network namespace.
fn namespace() -> Result<u64, HostdError> {
    let path = "/proc/thread-self/ns/net";
    Ok(std::fs::metadata(path).during(|| format!("cannot look at {path}"))?.ino())
}

/// `struct nlmsghdr`, then `struct nfgenmsg`.
const HEADER: usize = 16 + 4;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN` of linux/netfilter/nfnetlink.h and nf_tables.h.
const GETGEN: u16 = 10 << 8 | 16;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`.
const NEWGEN: u16 = 10 << 8 | 15;
/// `NFTA_GEN_ID`: a number of 32 bits, big-endian.
const GEN_ID: u16 = 1;

/// Asks the kernel how many transactions this network namespace has seen.
pub fn generation() -> Result<u32, HostdError> {
    let what = || "cannot ask the kernel for the generation of its packet filter rules".to_owned();
    let socket = net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER)).during(what)?;
    let mut request = [0u8; HEADER];
    request[..4].copy_from_slice(&20u32.to_ne_bytes());
    request[4..6].copy_from_slice(&GETGEN.to_ne_bytes());
    // NLM_F_REQUEST.
    request[6..8].copy_from_slice(&1u16.to_ne_bytes());
    net::sendto(&socket, &request, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0)).during(what)?;
    let mut reply = [0u8; 512];
    let (length, _) = net::recv(&socket, &mut reply[..], RecvFlags::empty()).during(what)?;
    parse_generation(&reply[..length])
        .ok_or_else(|| HostdError::refused(what(), "nftables is missing in this kernel (CONFIG_NF_TABLES), or mvm is not root"))
}

fn parse_generation(reply: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    if kind != NEWGEN {
        return None;
    }
    let mut rest = reply.get(HEADER..)?;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let payload = rest.get(4..length)?;
        if u16::from_ne_bytes([rest[2], rest[3]]) == GEN_ID {
            return Some(u32::from_be_bytes(payload.try_into().ok()?));
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_strange_reply_is_no_generation_and_no_panic(mut reply in prop::collection::vec(any::<u8>(), 0..80), ours: bool) {
            if ours && reply.len() >= 6 {
                reply[4..6].copy_from_slice(&NEWGEN.to_ne_bytes());
            }
            let _ = parse_generation(&reply);
        }
    }

    #[test]
    fn a_generation_is_read() {
        let mut reply = vec![0; HEADER];
        reply[4..6].copy_from_slice(&NEWGEN.to_ne_bytes());
        reply.extend([8u16.to_ne_bytes(), 1u16.to_ne_bytes()].concat());
        reply.extend(42u32.to_be_bytes());
        assert_eq!(parse_generation(&reply), Some(42));
        assert_eq!(parse_generation(&reply[..HEADER + 6]), None);
    }
}
