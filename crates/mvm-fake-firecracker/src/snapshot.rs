//! Files of a snapshot.
//!
//! The state is `FAKEFC01`, its version, a document and a CRC-64 over all of it. Memory is a file of the guest's size with a
//! few pages in it: who the guest is, how often it ran, and filling that belongs to it. A guest whose pages do not belong
//! together does not live long, as a real one does not.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

use crate::bodies::{Balloon, BootSource, Drive, Entropy, MachineConfig, NetworkInterface, Vsock};
use crate::crc::crc64;

const MAGIC: &[u8; 8] = b"FAKEFC01";
const MAX_STATE: u64 = 10_000_000;
const PAGE: usize = 4096;
/// Pages that have something in them.
const PAGES: usize = 64;
/// The page that changes whenever the guest runs.
const COUNTER: usize = 1;

/// What a snapshot knows.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    pub machine: MachineConfig,
    pub boot_source: BootSource,
    pub drives: Vec<Drive>,
    pub network_interfaces: Vec<NetworkInterface>,
    pub vsock: Option<Vsock>,
    pub entropy: Option<Entropy>,
    pub balloon: Option<Balloon>,
    pub guest: u64,
    pub runs: u64,
}

pub fn write_state(file: &mut File, state: &State, version: &str) -> io::Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(format!("{version}\n").bytes());
    serde_json::to_writer(&mut bytes, state)?;
    bytes.extend(crc64(&bytes).to_le_bytes());
    file.set_len(0)?;
    file.write_all(&bytes)
}

/// Reads it, or says why not in Firecracker's words.
pub fn read_state(path: &str, own_version: &str) -> Result<State, String> {
    let file = File::open(path).map_err(|error| format!("Failed to open snapshot file: {error}"))?;
    let load = |why: &str| format!("Failed to load snapshot state from file: {why}");
    let mut bytes = Vec::new();
    file.take(MAX_STATE + 1).read_to_end(&mut bytes).map_err(|error| load(&format!("IO Error: {error}")))?;
    if bytes.len() as u64 > MAX_STATE {
        return Err(load(&format!("Snapshot size exceeds limit of {MAX_STATE} bytes")));
    }
    let Some((content, crc)) = bytes.len().checked_sub(8).map(|at| bytes.split_at(at)) else {
        return Err(load("IO Error: File too short to contain CRC"));
    };
    let undecoded = || load("An error occurred during bitcode serialization: bitcode error");
    let text = content.strip_prefix(MAGIC).and_then(|rest| std::str::from_utf8(rest).ok()).ok_or_else(undecoded)?;
    let (version, document) = text.split_once('\n').ok_or_else(undecoded)?;
    // As there, a version is looked at before the sum.
    let major = |version: &str| version.strip_prefix('v')?.split('.').next()?.parse::<u32>().ok();
    let state: State = serde_json::from_str(document).map_err(|_| undecoded())?;
    if major(version).is_none() || major(version) != major(own_version) {
        return Err(load(&format!("Invalid data version: {}", version.trim_start_matches('v'))));
    }
    if crc != crc64(content).to_le_bytes() {
        return Err(load("CRC64 validation failed"));
    }
    Ok(state)
}

/// Guest memory, as far as there is any.
#[derive(Debug)]
pub struct Memory {
    pub guest: u64,
    pub runs: u64,
    dirty: [bool; PAGES],
    /// Whether pages belong together.
    pub is_whole: bool,
}

impl Memory {
    pub fn of_a_new_guest() -> Self {
        let mut guest = [0; 8];
        // No guest is like another.
        let random = rustix::rand::getrandom(&mut guest[..], rustix::rand::GetRandomFlags::empty());
        let guest = if random == Ok(8) { u64::from_le_bytes(guest) } else { u64::from(std::process::id()) };
        Self { guest, runs: 0, dirty: [true; PAGES], is_whole: true }
    }

    pub fn run(&mut self) {
        self.runs += 1;
        self.dirty[COUNTER] = true;
    }

    /// Writes all pages, or those that changed, in place.
    pub fn write(&mut self, file: &mut File, size: u64, all: bool, middle: &mut dyn FnMut()) -> io::Result<()> {
        if file.metadata()?.len() != size {
            file.set_len(0)?;
            file.set_len(size)?;
        }
        for page in 0..PAGES {
            if page == PAGES / 2 {
                middle();
            }
            let at = (page * PAGE) as u64;
            if (all || self.dirty[page]) && at + (PAGE as u64) <= size {
                file.seek(SeekFrom::Start(at))?;
                file.write_all(&self.page(page))?;
            }
        }
        self.dirty = [false; PAGES];
        file.sync_all()
    }

    fn page(&self, page: usize) -> Vec<u8> {
        let word = if page == COUNTER { self.runs } else { self.guest };
        word.to_le_bytes().repeat(PAGE / 8)
    }

    /// Maps a file, or says why not in Firecracker's words.
    pub fn read(path: &str, state: &State) -> Result<Self, String> {
        let load = |why: &str| format!("Failed to load guest memory: Error creating guest memory from file: {why}");
        let mut file = File::open(path).map_err(|error| load(&format!("Failed to load guest memory: {error}")))?;
        let length = file.metadata().map_err(|error| load(&error.to_string()))?.len();
        if length < (state.machine.mem_size_mib as u64) << 20 {
            return Err(load("Failed to restore guest memory: Total sum of memory regions exceeds largest possible file offset"));
        }
        let mut memory = Self { guest: state.guest, runs: state.runs, dirty: [false; PAGES], is_whole: true };
        for page in 0..PAGES {
            let mut there = vec![0; PAGE];
            let read = file.read_exact(&mut there);
            memory.is_whole &= read.is_ok() && there == memory.page(page);
        }
        Ok(memory)
    }
}
