//! `mvm net`: does the isolation hold, right now?

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
            wanted.iter().map(|(address, name, expect)| probe(&from, address, name, *expect)).collect()
        };
        let threads: Vec<_> = wanted_of.into_iter().map(|one| scope.spawn(move || probe_all(one))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("probing does not panic")).collect()
    })
}

fn probe(from: &ObservedInstance, address: &str, name: &str, expect: Expect) -> CheckRow {
    let says = if expect == Expect::Answer { "reaches" } else { "does not reach" };
    let check = format!("{} {says} {name}", from.doc.at());
    let remedy = |ok: bool| (!ok).then(|| "mvm apply loads the rules again; `nft list ruleset` shows what else decides".to_owned());
    match ping(from, address) {
        Ok(answered) => {
            let ok = answered == (expect == Expect::Answer);
            CheckRow { check, ok, found: if answered { "answered" } else { "no answer" }.to_owned(), remedy: remedy(ok) }
        }
        Err(error) => CheckRow {
            check,
            ok: false,
            found: error.text,
            remedy: Some("the probe needs a guest with ping; the built-in image has it".to_owned()),
        },
    }
}

fn ping(from: &ObservedInstance, address: &str) -> Result<bool, CliError> {
    let Some(vm) = from.doc.state.vm() else { return Err(CliError::new(Exit::Refused, "it does not run any more")) };
    let mut client = GuestClient::connect(&vm.run_dir, Purpose::Interactive, Instant::now() + Duration::from_secs(10))?;
    let argv = ["ping", "-c", "2", "-W", "1", "-q", address].map(|word| word.as_bytes().to_vec()).to_vec();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let end = client.exec(ExecRequest { argv, ..ExecRequest::default() }, None::<std::io::Empty>, &mut out, &mut err)?;
    match end.code() {
        0 => Ok(true),
        // busybox: 1 for no answer.
        1 => Ok(false),
        _ => Err(CliError::new(Exit::Failed, String::from_utf8_lossy(&err).trim().to_owned())),
    }
}
