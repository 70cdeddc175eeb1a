//! The append-only log of what was done: who, what, from, to, result; one chain of hashes per tenant.
//!
//! `audit/<tenant>.log` holds one JSON object a line. Each line names the hash of the one before it and ends with its own, BLAKE3
//! over everything before it; a line that was changed, removed from the middle, or put in breaks the chain. (Lines cut off at the
//! end are found by whoever remembers the last hash.) The log outlives its tenant.

mod chain;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mvm_types::TenantId;
use serde::{Deserialize, Serialize};

pub use chain::{Broken, verify};

use crate::infra::clock::Clock;
use crate::store::{DocumentStore, StoreError, Wait};

/// One thing that was done, or tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the log, from 1.
    pub seq: u64,
    /// When, RFC 3339 with milliseconds.
    pub at: String,
    /// Who asked: the user and the command.
    pub who: String,
    /// The tenant, pool or instance.
    pub object: String,
    /// The role of the pool, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<mvm_types::Role>,
    /// What was done, e.g. `start`.
    pub action: String,
    /// The state before, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The state after, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// How it ended: `ok`, or the error.
    pub result: String,
    /// Why it was done, where that was nobody's wish: what a VMM ended of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// How long it took, in milliseconds.
    #[serde(default)]
    pub took_ms: u64,
    /// The hash of the line before, 64 hex digits; zeros in the first.
    pub prev: String,
}

/// What the caller says of an event; the log adds the rest.
#[derive(Debug, Clone, Default)]
pub struct Entry {
    /// The tenant, pool or instance.
    pub object: String,
    /// The role of the pool, where there is one.
    pub role: Option<mvm_types::Role>,
    /// What was done.
    pub action: String,
    /// The state before.
    pub from: Option<String>,
    /// The state after.
    pub to: Option<String>,
    /// The error, when it failed.
    pub error: Option<String>,
    /// Why it was done, where that was nobody's wish.
    pub why: Option<String>,
    /// How long it took.
    pub took: Duration,
}

/// How much of the end of a log is looked through for its last record, in bytes, before it is four times as much.
const TAIL: u64 = 8 << 10;

/// Where the last whole line is, without its newline.
fn last_line(content: &[u8]) -> Option<Range<usize>> {
    let end = content.iter().rposition(|byte| *byte == b'\n')?;
    let start = content[..end].iter().rposition(|byte| *byte == b'\n').map_or(0, |before| before + 1);
    Some(start..end)
}

#[derive(Default)]
struct Log {
    /// The end of the log as this process knows it: length in bytes, last number, last hash.
    end: Mutex<Option<(u64, u64, String)>>,
    /// How much of it is durable, in bytes.
    durable: Mutex<u64>,
}

/// The logs of all tenants.
pub struct Audit {
    store: Arc<dyn DocumentStore>,
    clock: Arc<dyn Clock>,
    who: String,
    logs: Mutex<HashMap<TenantId, Arc<Log>>>,
}

/// Returns where a tenant's log is.
pub fn log_key(tenant: &TenantId) -> String {
    format!("audit/{tenant}.log")
}

impl Audit {
    /// Opens the logs; `who` goes into every record.
    pub fn new(store: Arc<dyn DocumentStore>, clock: Arc<dyn Clock>, who: String) -> Self {
        Self { store, clock, who, logs: Mutex::default() }
    }

    /// Appends a record and makes it durable. Callers that wait at the same time share one flush of the disk.
    pub fn record(&self, tenant: &TenantId, entry: Entry) -> Result<(), StoreError> {
        self.note(tenant, entry)?;
        self.flush(tenant)
    }

    /// Appends a record that is durable only after [`Audit::flush`]: for many at once.
    pub fn note(&self, tenant: &TenantId, entry: Entry) -> Result<(), StoreError> {
        self.append(&log_key(tenant), &self.log(tenant), entry)
    }

    /// Makes durable what was appended so far.
    pub fn flush(&self, tenant: &TenantId) -> Result<(), StoreError> {
        let log = self.log(tenant);
        let written = || log.end.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |end| end.0);
        let mine = written();
        let mut durable = log.durable.lock().unwrap_or_else(PoisonError::into_inner);
        if *durable < mine {
            // Also what others appended while this one waited.
            let all = written();
            self.store.sync(&log_key(tenant))?;
            *durable = all;
        }
        Ok(())
    }

    fn log(&self, tenant: &TenantId) -> Arc<Log> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner).entry(tenant.clone()).or_default().clone()
    }

    fn append(&self, key: &str, log: &Log, entry: Entry) -> Result<(), StoreError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let mut end = log.end.lock().unwrap_or_else(PoisonError::into_inner);
        let _other_processes = self.store.lock(key, Wait::Until(Instant::now() + PATIENCE))?;
        let there = self.store.len(key)?;
        let (_, seq, prev) = match end.take() {
            Some(known) if known.0 == there => known,
            _ => self.find_end(key)?,
        };
        let event = Event {
            seq: seq + 1,
            at: self.clock.now().to_rfc3339(),
            who: self.who.clone(),
            object: entry.object,
            role: entry.role,
            action: entry.action,
            from: entry.from,
            to: entry.to,
            result: entry.error.unwrap_or_else(|| "ok".to_owned()),
            why: entry.why,
            took_ms: u64::try_from(entry.took.as_millis()).unwrap_or(u64::MAX),
            prev,
        };
        let (line, hash) = chain::seal(&event);
        let before = self.store.len(key)?;
        self.store.append(key, line.as_bytes())?;
        let after = before + line.len() as u64;
        *end = Some((after, event.seq, hash));
        Ok(())
    }

    /// Reads the end of the log; cuts off a line that a killed process left half-written.
    fn find_end(&self, key: &str) -> Result<(u64, u64, String), StoreError> {
        let there = self.store.len(key)?;
        let mut length = TAIL;
        // A log of years is longer than a wake has time for.
        let (begin, content) = loop {
            let begin = there.saturating_sub(length);
            let content = self.store.read_from(key, begin)?;
            if begin == 0 || last_line(&content).is_some_and(|line| line.start > 0) {
                break (begin, content);
            }
            length *= 4;
        };
        let line = last_line(&content);
        let whole = line.as_ref().map_or(0, |line| line.end + 1);
        if whole < content.len() {
            self.store.truncate(key, begin + whole as u64)?;
        }
        let last = line.and_then(|line| chain::open(&content[line]));
        let (seq, hash) = last.map_or((0, chain::GENESIS.to_owned()), |(event, hash)| (event.seq, hash));
        Ok((begin + whole as u64, seq, hash))
    }

    /// Reads a tenant's records in order; what does not parse is left out ([`verify`] names it).
    pub fn events(&self, tenant: &TenantId) -> Result<Vec<Event>, StoreError> {
        let content = self.store.read(&log_key(tenant))?.unwrap_or_default();
        Ok(content.split(|byte| *byte == b'\n').filter_map(chain::open).map(|(event, _)| event).collect())
    }

    /// Returns the tenants that have a log, also those that are gone.
    pub fn tenants(&self) -> Result<Vec<TenantId>, StoreError> {
        let names = self.store.list("audit")?;
        Ok(names.iter().filter_map(|name| name.strip_suffix(".log")?.parse().ok()).collect())
    }

    /// Checks a tenant's chain; the number of records, or the first bad one.
    pub fn verify(&self, tenant: &TenantId) -> Result<Result<u64, Broken>, StoreError> {
        Ok(verify(&self.store.read(&log_key(tenant))?.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infra::clock::ManualClock;
    use crate::store::MemoryStore;

    fn entry(n: u32) -> Entry {
        Entry { object: format!("acme/web/{n}"), action: "start".into(), ..Entry::default() }
    }

    #[test]
    fn two_processes_write_one_chain_and_a_torn_line_is_cut() {
        let store = Arc::new(MemoryStore::new());
        let tenant: TenantId = "acme".parse().unwrap();
        let open = || Audit::new(store.clone(), Arc::new(ManualClock::new()), "test".into());
        let (a, b) = (open(), open());
        for n in 0..4 {
            a.record(&tenant, entry(n)).unwrap();
            b.record(&tenant, entry(n)).unwrap();
        }
        store.append(&log_key(&tenant), b"{\"seq\":9,\"at").unwrap();
        open().record(&tenant, entry(9)).unwrap();
        assert_eq!(a.verify(&tenant).unwrap(), Ok(9));
        assert_eq!(a.events(&tenant).unwrap().len(), 9);
        assert_eq!(a.tenants().unwrap(), [tenant]);
    }

    #[test]
    fn the_end_of_a_long_log_is_found_whatever_its_last_lines_are_like() {
        let dir = tempfile::tempdir().unwrap();
        let files = Arc::new(crate::store::FileStore::new(dir.path().join("state"), dir.path().join("locks")));
        let tenant: TenantId = "acme".parse().unwrap();
        for store in [files as Arc<dyn DocumentStore>, Arc::new(MemoryStore::new())] {
            let log = |length: usize| {
                let audit = Audit::new(store.clone(), Arc::new(ManualClock::new()), "test".into());
                audit.record(&tenant, Entry { error: Some("x".repeat(length)), ..entry(0) }).unwrap();
                audit.verify(&tenant).unwrap()
            };
            let tail = usize::try_from(TAIL).unwrap();
            // Lines that are shorter than what is looked through at once, as long, and longer.
            let lengths: Vec<usize> =
                [1, 10, 1000].into_iter().chain(tail - 400..tail - 200).chain([tail, 5 * tail, 1, 40 * tail]).collect();
            for (before, length) in lengths.iter().enumerate() {
                assert_eq!(log(*length), Ok(before as u64 + 1), "{length}");
            }
            let torn = "{".to_owned() + &"y".repeat(3 * tail);
            store.append(&log_key(&tenant), torn.as_bytes()).unwrap();
            assert_eq!(log(1), Ok(lengths.len() as u64 + 1));
        }
    }

    #[test]
    fn every_changed_byte_is_found() {
        let store = Arc::new(MemoryStore::new());
        let tenant: TenantId = "acme".parse().unwrap();
        let audit = Audit::new(store.clone(), Arc::new(ManualClock::new()), "test".into());
        for n in 0..3 {
            audit.record(&tenant, entry(n)).unwrap();
        }
        let good = store.read(&log_key(&tenant)).unwrap().unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(verify(&bad).is_err(), "byte {at}");
        }
        let lines: Vec<&[u8]> = good.split_inclusive(|byte| *byte == b'\n').collect();
        let removed: Vec<u8> = [lines[0], lines[2]].concat();
        assert_eq!(verify(&removed).unwrap_err().record, 2);
    }
}
