//! A network namespace of a test's own, and guests that consist of a TAP and a few kinds of frames.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use mvm::net::Mac;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// How long to watch for what must not come.
pub const QUIET: Duration = Duration::from_millis(250);
/// How long to wait for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test in a thread with a network namespace of its own, which is gone afterwards with all that is in it.
pub fn in_own_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: only the network namespace of this one thread changes; no file descriptor table or address space is shared anew.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("tests of the real network need root");
        run("ip", &["link", "set", "lo", "up"]);
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a program in this thread's network namespace.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Sets a kernel setting of this thread's network namespace.
pub fn set(name: &str, value: &str) {
    std::fs::write(format!("/proc/sys/{name}"), value).unwrap();
}

/// A guest, as far as the network knows.
pub struct Guest {
    tap: OwnedFd,
    pub mac: Mac,
    pub address: Ipv4Addr,
}

/// `IFF_VNET_HDR`: virtio-net's header before every frame, here all zero.
const VNET_HEADER: usize = 10;
pub const ARP: u16 = 0x0806;
pub const IPV4: u16 = 0x0800;
const ICMP: u8 = 1;
const UDP: u8 = 17;

impl Guest {
    pub fn new(tap: OwnedFd, mac: Mac, address: Ipv4Addr) -> Self {
        Self { tap, mac, address }
    }

    pub fn send(&self, frame: &[u8]) {
        let bytes = [&[0; VNET_HEADER], frame].concat();
        assert_eq!(rustix::io::write(&self.tap, &bytes).unwrap(), bytes.len());
    }

    /// Answers ARP, and returns the first frame that is wanted, or nothing when the time is over.
    pub fn receive(&self, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.checked_duration_since(Instant::now())?;
            let mut polled = [PollFd::new(&self.tap, PollFlags::IN)];
            poll(&mut polled, Some(&Timespec::try_from(left).unwrap())).unwrap();
            let mut buffer = [0; 4096];
            let length = match rustix::io::read(self.tap.as_fd(), &mut buffer) {
                Ok(length) => length,
                Err(rustix::io::Errno::AGAIN) => continue,
                Err(error) => panic!("{error}"),
            };
            let frame = &buffer[VNET_HEADER..length];
            if wanted(frame) {
                return Some(frame.to_vec());
            }
            if frame[12..14] == ARP.to_be_bytes() && frame[20..22] == [0, 1] && frame[38..42] == self.address.octets() {
                let asker = Mac(frame[6..12].try_into().unwrap());
                self.send(&arp(self.mac, asker, 2, (self.mac, self.address), Ipv4Addr::from_octets(frame[28..32].try_into().unwrap())));
            }
        }
    }

    /// An echo request from this guest as it should be.
    pub fn echo_to(&self, mac: Mac, address: Ipv4Addr, tag: u16) -> Vec<u8> {
        ethernet(self.mac, mac, IPV4, &ipv4(self.address, address, ICMP, &icmp(8, tag)))
    }

    /// A datagram from this guest as it should be.
    pub fn datagram_to(&self, mac: Mac, address: Ipv4Addr, port: u16, content: &[u8]) -> Vec<u8> {
        self.reply_to(mac, address, (40_000, port), content)
    }

    /// A datagram from one port of this guest to another port.
    pub fn reply_to(&self, mac: Mac, address: Ipv4Addr, ports: (u16, u16), content: &[u8]) -> Vec<u8> {
        ethernet(self.mac, mac, IPV4, &ipv4(self.address, address, UDP, &udp(ports, content)))
    }
}

pub fn ethernet(from: Mac, to: Mac, kind: u16, content: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &kind.to_be_bytes(), content].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

/// An ARP packet of an operation, claiming that the sender is `claim`.
pub fn arp(from: Mac, to: Mac, operation: u16, claim: (Mac, Ipv4Addr), target: Ipv4Addr) -> Vec<u8> {
    let head = [0, 1, 8, 0, 6, 4];
    let content = [&head[..], &operation.to_be_bytes(), &claim.0.0, &claim.1.octets(), &[0; 6], &target.octets()].concat();
    ethernet(from, to, ARP, &content)
}

pub fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + content.len()).unwrap().to_be_bytes();
    let mut packet = [&[0x45, 0], &length[..], &[0, 0, 0, 0, 64, protocol, 0, 0], &from.octets(), &to.octets(), content].concat();
    let sum = checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum);
    packet
}

fn icmp(kind: u8, tag: u16) -> Vec<u8> {
    let mut packet = [&[kind, 0, 0, 0], &tag.to_be_bytes()[..], &[0, 1], b"mvm test"].concat();
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum);
    packet
}

fn udp((from, to): (u16, u16), content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + content.len()).unwrap().to_be_bytes();
    // No checksum: it is optional over IPv4.
    [&from.to_be_bytes(), &to.to_be_bytes(), &length, &[0, 0], content].concat()
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let pairs = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low)));
    let sum: u32 = pairs.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!u16::try_from(folded).unwrap()).to_be_bytes()
}

/// Whether a frame is an echo message of a kind (8 asks, 0 answers) with a tag.
pub fn is_echo(frame: &[u8], kind: u8, tag: u16) -> bool {
    frame.len() >= 42 && frame[12..14] == IPV4.to_be_bytes() && frame[23] == ICMP && frame[34] == kind && frame[38..40] == tag.to_be_bytes()
}
