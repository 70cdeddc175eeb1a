//! `mvm net`: does the isolation hold, right now?

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Subcommand;

use super::CliResult;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, VmmChoice, open};
use crate::agent::observe::{Observed, ObservedInstance, observe};
use crate::guest::{ExecRequest, GuestClient, Purpose};
use crate::infra::display::{CheckRow, print_rows};
use crate::vm::instance::InstanceState;

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Check bridges and rules, and prove with packets between running instances that tenants are apart
    Verify,
}

/// Carries out a verb.
pub fn run(globals: &Globals, command: &NetCommand) -> CliResult {
    let NetCommand::Verify = command;
    let opened = open(globals, Intent::Change)?;
    let node = &opened.node;
    let observed = observe(node)?;
    let mut rows: Vec<CheckRow> = node
        .host()
        .verify_network(&observed.ruleset())?
        .into_iter()
        .map(|check| CheckRow {
            check: check.what,
            ok: check.fault.is_none(),
            found: check.fault.clone().unwrap_or_else(|| "yes".to_owned()),
            remedy: check.fault.map(|_| "mvm apply makes bridges and rules what the documents say".to_owned()),
        })
        .collect();
    rows.extend(lost_taps(&observed));
    rows.extend(observed.problems.iter().map(|problem| CheckRow {
        check: "what is there is known".to_owned(),
        ok: false,
        found: problem.clone(),
        remedy: Some("mvm doctor says what to do; until then nobody knows which networks are apart".to_owned()),
    }));
    if globals.vmm != VmmChoice::Simulated {
        rows.extend(probes(&observed));
    }
    print_rows(&rows, globals.format())?;
    opened.close()?;
    let wrong = rows.iter().filter(|row| !row.ok).count();
    if wrong == 0 {
        Ok(Exit::Done)
    } else {
        Err(CliError::new(Exit::Failed, format!("{wrong} of {} checks found something wrong", rows.len())))
    }
}

/// A machine holds its TAP for as long as it runs, unless somebody removes it.
fn lost_taps(observed: &Observed) -> Vec<CheckRow> {
    let instances = observed.tenants.values().flat_map(|tenant| tenant.pools.values()).flat_map(|pool| &pool.instances);
    let lost = instances.filter_map(|one| Some((one.doc.at(), observed.lost_tap(one)?)));
    lost.map(|(at, tap)| CheckRow {
        check: format!("TAP {tap} of {at} is there"),
        ok: false,
        found: "missing; stop and start it".to_owned(),
        remedy: Some(format!("mvm instance stop {at} and mvm instance start {at}; mvm apply does it for one that is to run")),
    })
    .collect()
}

/// What a packet should do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    Answer,
    Silence,
}

/// Sends packets from one running instance of each tenant: to its own tenant and gateway, to every other tenant, to the metadata
/// address.
fn probes(observed: &Observed) -> Vec<CheckRow> {
    let running = |tenant: &crate::agent::observe::ObservedTenant| -> Vec<ObservedInstance> {
        let all = tenant.pools.values().flat_map(|pool| &pool.instances);
        all.filter(|one| matches!(one.doc.state, InstanceState::Running { .. }) && !one.needs_recovery()).cloned().collect()
    };
    let mut wanted_of = Vec::new();
    for (id, tenant) in &observed.tenants {
        let own = running(tenant);
        let Some(from) = own.first() else { continue };
        let gateway = tenant.doc.network.ipv4_subnet.gateway();
        let mut wanted = vec![(gateway.to_string(), format!("the gateway of {id} ({gateway})"), Expect::Answer)];
        wanted.extend(
            own.iter().skip(1).map(|to| (to.doc.address.to_string(), format!("{} of its own tenant", to.doc.at()), Expect::Answer)),
        );
        for (other, tenant) in observed.tenants.iter().filter(|(other, _)| *other != id) {
            let gateway = tenant.doc.network.ipv4_subnet.gateway();
            wanted.push((gateway.to_string(), format!("the bridge of tenant {other} ({gateway})"), Expect::Silence));
            wanted.extend(
                running(tenant)
                    .first()
                    .map(|to| (to.doc.address.to_string(), format!("{} of another tenant", to.doc.at()), Expect::Silence)),
            );
        }
        wanted.push(("169.254.169.254".to_owned(), "the metadata address 169.254.169.254".to_owned(), Expect::Silence));
        wanted_of.push((from.clone(), wanted));
    }
    // Silence takes seconds to hear; the tenants listen at the same time.
    std::thread::scope(|scope| {
        let probe_all = |(from, wanted): (ObservedInstance, Vec<(String, String, Expect)>)| -> Vec<CheckRow> {
            let mut rows = Vec::new();
            for (address, name, expect) in &wanted {
                let Some(row) = probe(&from, address, name, *expect) else {
                    // Each further one would take as long, and one of the guest's few ports.
                    rows.push(CheckRow {
                        check: format!("{} sends probes", from.doc.at()),
                        ok: false,
                        found: format!("the guest did not end a ping within {} s; its other probes are left out", LONGEST.as_secs()),
                        remedy: Some(format!("mvm instance stop {} and apply again, or look at what runs in it", from.doc.at())),
                    });
                    break;
                };
                rows.push(row);
            }
            rows
        };
        let threads: Vec<_> = wanted_of.into_iter().map(|one| scope.spawn(move || probe_all(one))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("probing does not panic")).collect()
    })
}

/// How long one probe may take, with reaching the guest.
const LONGEST: Duration = Duration::from_secs(10);

/// Sends packets from a guest; `None` when it does not come to an end.
fn probe(from: &ObservedInstance, address: &str, name: &str, expect: Expect) -> Option<CheckRow> {
    let says = if expect == Expect::Answer { "reaches" } else { "does not reach" };
    let check = format!("{} {says} {name}", from.doc.at());
    let remedy = |ok: bool| (!ok).then(|| "mvm apply loads the rules again; `nft list ruleset` shows what else decides".to_owned());
    Some(match ping(from, address)? {
        Ok(answered) => {
            let ok = answered == (expect == Expect::Answer);
            let found = if answered { "answered" } else { "no answer" };
            // The ping runs in the guest, which may lie about it; bridges and rules above are what the host sees.
            CheckRow { check, ok, found: format!("{found}, says the guest"), remedy: remedy(ok) }
        }
        Err(error) => CheckRow {
            check,
            ok: false,
            found: error.text,
            remedy: Some("the probe needs a guest with ping; the built-in image has it".to_owned()),
        },
    })
}

/// Pings from a guest, on a thread of its own since a guest need not end anything; `None` when the time is over.
fn ping(from: &ObservedInstance, address: &str) -> Option<Result<bool, CliError>> {
    let Some(vm) = from.doc.state.vm() else { return Some(Err(CliError::new(Exit::Refused, "it does not run any more"))) };
    let deadline = Instant::now() + LONGEST;
    let (run_dir, address) = (vm.run_dir.clone(), address.to_owned());
    let (done, result) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Nobody waits for it any more when the time is over.
        let _ = done.send(ping_until(&run_dir, &address, deadline));
    });
    result.recv_timeout(LONGEST).ok()
}

fn ping_until(run_dir: &Path, address: &str, deadline: Instant) -> Result<bool, CliError> {
    let mut client = GuestClient::connect(run_dir, Purpose::Interactive, deadline)?;
    let argv = ["ping", "-c", "2", "-W", "1", "-q", address].map(|word| word.as_bytes().to_vec()).to_vec();
    let mut out = Capped { kept: Vec::new(), most: 0, deadline };
    let mut err = Capped { kept: Vec::new(), most: 1024, deadline };
    let end = client.exec(ExecRequest { argv, ..ExecRequest::default() }, None::<std::io::Empty>, &mut out, &mut err)?;
    match end.code() {
        0 => Ok(true),
        // busybox: 1 for no answer.
        1 => Ok(false),
        code => {
            let words: String = String::from_utf8_lossy(&err.kept).trim().chars().filter(|c| !c.is_control()).collect();
            Err(CliError::new(Exit::Failed, format!("ping ended with {code}: {words}")))
        }
    }
}

/// Keeps the beginning of what a guest says, and ends what goes on for too long.
struct Capped {
    kept: Vec<u8>,
    most: usize,
    deadline: Instant,
}

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if Instant::now() > self.deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let room = self.most.saturating_sub(self.kept.len()).min(bytes.len());
        self.kept.extend_from_slice(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_is_cut_and_has_an_end() {
        let mut writer = Capped { kept: Vec::new(), most: 3, deadline: Instant::now() + Duration::from_secs(60) };
        writer.write_all(b"ab").unwrap();
        writer.write_all(b"cdef").unwrap();
        assert_eq!(writer.kept, b"abc");
        writer.deadline = Instant::now() - Duration::from_millis(1);
        assert!(writer.write_all(b"g").is_err());
    }
}
