//! A TAP in a network namespace of its own, joined to the bridge of the host by a cable.
//!
//! ```text
//!  host                        namespace, which has nothing else
//!  bridge --- NAME ============ cable --- joint --- NAME --- VMM
//!             one end of a      the      a bridge   the TAP
//!             veth pair         other
//! ```
//!
//! The cable's end in the host takes the place of the TAP: its name, its alias, its bridge and what that was told of it. Namespace, TAP
//! and both ends of the cable are gone when nobody is in the namespace and nobody has it open: nothing can leave them behind. The
//! kernel does that a moment later; [`unplug`] takes the cable's end out of the host at once.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::error::{During, HostdError};
use crate::netlink::Netlink;
use crate::{sysctl, tap};

/// The cable's end in the namespace.
const CABLE: &str = "cable";
/// The bridge in the namespace.
const JOINT: &str = "joint";

/// The way from the host into a namespace, as long as it is not known whether somebody will use it; dropped before that, it is gone.
#[derive(Debug)]
pub struct Cable {
    namespace: Option<OwnedFd>,
}

impl Cable {
    /// The namespace that it leads to.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn namespace(&self) -> Result<OwnedFd, HostdError> {
        let what = || "cannot open a network namespace".to_owned();
        let namespace = self.namespace.as_ref().ok_or_else(|| HostdError::refused(what(), "it was let go of"))?;
        namespace.try_clone().during(what)
    }

    /// Lets it end with the namespace, which ends with whoever is in it.
    pub fn let_go(mut self) {
        self.namespace = None;
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let Some(namespace) = self.namespace.take() else { return };
        if let Err(error) = unplug(namespace.as_fd()) {
            // The kernel does it when the namespace is gone.
            tracing::debug!(%error, "a cable stays for a moment");
        }
    }
}

/// Moves a TAP that is a port of a bridge into a namespace of its own, where it stays although nobody has it open, and puts a cable in
/// its place, which this returns.
///
/// `guest_mac` is the MAC of the guest behind it.
///
/// # Errors
/// What could not be made; all of it is gone then, the TAP too.
pub fn take_apart(tap: OwnedFd, name: &str, guest_mac: [u8; 6]) -> Result<Cable, HostdError> {
    let what = || format!("cannot move TAP {name} into a network namespace of its own");
    let host = Netlink::open()?;
    let port = host.link(name)?.ok_or_else(|| HostdError::refused(what(), "there is none of that name"))?;
    let (Some(bridge), Some(alias)) = (port.master, port.alias) else {
        return Err(HostdError::refused(what(), "it is a port of no bridge of ours"));
    };
    let (namespace, inner) = elsewhere(|| {
        // SAFETY: only the network namespace of this one thread changes.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.during(what)?;
        sysctl::set_apart()?;
        let namespace = File::open("/proc/thread-self/ns/net").during(what)?;
        Ok((OwnedFd::from(namespace), Netlink::open()?))
    })?;
    host.move_link(port.index, namespace.as_fd(), name)?;
    tap::persist(&tap, 1).during(what)?;
    host.add_cable(name, CABLE, namespace.as_fd())?;
    let cable = Cable { namespace: Some(namespace) };
    // Nothing comes through before both of its ends are up.
    inner.join(JOINT, &[name, CABLE])?;
    sysctl::set_port(name)?;
    let end = host.link(name)?.ok_or_else(|| HostdError::refused(what(), "its cable was gone as soon as it was made"))?;
    host.attach_port(&what(), end.index, bridge, guest_mac, &alias)?;
    Ok(cable)
}

/// Removes the cable of a namespace that [`take_apart`] made, if it is there.
///
/// # Errors
/// When the namespace cannot be entered, or the cable not removed.
pub fn unplug(namespace: BorrowedFd<'_>) -> Result<(), HostdError> {
    let what = || format!("cannot remove {CABLE} of network namespace {}", namespace.as_raw_fd());
    elsewhere(|| {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)).during(what)?;
        let netlink = Netlink::open()?;
        // Another namespace than was meant has no such bridge, and an interface of that name there is not ours.
        let cable = if netlink.link(JOINT)?.is_some_and(|joint| joint.is_bridge) { netlink.link(CABLE)? } else { None };
        cable.map_or(Ok(()), |cable| netlink.remove_link(cable.index, &what()))
    })
}

/// Does something on a thread of its own, which may be in another namespace afterwards.
fn elsewhere<T: Send>(does: impl FnOnce() -> Result<T, HostdError> + Send) -> Result<T, HostdError> {
    std::thread::scope(|scope| scope.spawn(does).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}
