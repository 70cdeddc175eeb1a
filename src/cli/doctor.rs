//! `mvm doctor`: every check says what is wrong and how to mend it.

use super::CliResult;
use super::exit::{CliError, Exit};
use super::open::{AccelChoice, Globals, Intent, VmmChoice, WhichBuilder, find_program, find_qemu, open};
use super::vmm::{firecracker, qemu};
use crate::agent::observe::observe;
use crate::host::{Ability, Host, LocalHost};
use crate::infra::display::{CheckRow, print_rows};
use crate::vm::error::with_causes;
use crate::vm::pool::BUILTIN;
use crate::vmm::firecracker::Verdict;
use crate::vmm::qemu::KvmVerdict;

/// Looks at everything that microVMs need here.
pub fn run(globals: &Globals) -> CliResult {
    let simulated = globals.vmm == VmmChoice::Simulated;
    // What is wrong with the documents must not keep the rest from being looked at.
    let opened = open(globals, Intent::Look);
    let facts = match &opened {
        Ok(opened) => opened.node.host().facts()?,
        Err(_) => LocalHost::new(globals.paths(), &"unborn".parse().expect("unborn is a node id")).facts()?,
    };
    let mut checks = Vec::new();
    let mut check = |name: &str, ok: bool, found: String, remedy: &str| {
        let remedy = (!ok).then(|| remedy.to_owned());
        checks.push(CheckRow { check: name.to_owned(), ok, found, remedy });
    };
    let ability = |ability: &Ability| match ability {
        Ability::Yes(text) | Ability::No(text) => text.clone(),
    };
    // A rehearsal touches nothing of the host.
    if !simulated {
        check("root", facts.is_root, if facts.is_root { "yes" } else { "no" }.into(), "run mvm as root, e.g. with sudo");
        let (tun, nftables) = match facts.is_root {
            true => ("load the tun module: modprobe tun", "a kernel with CONFIG_NF_TABLES, CONFIG_NF_TABLES_BRIDGE and CONFIG_NFT_NAT"),
            false => ("run mvm as root, e.g. with sudo", "run mvm as root, e.g. with sudo"),
        };
        check("tun", facts.tun.is_yes(), ability(&facts.tun), tun);
        check("nftables", facts.nftables.is_yes(), ability(&facts.nftables), nftables);
        check("nft", facts.nft.is_yes(), ability(&facts.nft), "apt-get install nftables");
        check("mke2fs", facts.mke2fs.is_yes(), ability(&facts.mke2fs), "apt-get install e2fsprogs");
        if globals.vmm != VmmChoice::Qemu {
            // It is no fault that there is none, unless it is asked for.
            let (ok, found) = firecracker_here(globals);
            check(
                "firecracker",
                ok || globals.vmm == VmmChoice::Auto && !globals.drivers.production,
                found,
                "mvm node install-firecracker --from FILE --sha256 SUM",
            );
        }
        let found = find_qemu();
        // It is no fault that there is none where it is not asked for.
        let is_wanted = globals.vmm != VmmChoice::Firecracker;
        match found {
            None => check("qemu", !is_wanted, "not found".to_owned(), "apt-get install qemu-system-x86 (or qemu-system-arm)"),
            Some(path) => {
                let (ok, state) = qemu_here(globals);
                check("qemu", ok || !is_wanted, format!("{state} ({})", path.display()), "a QEMU from 7.2 on that runs");
            }
        }
    }
    if !simulated {
        let agent = crate::image::find_agent(std::env::var_os(crate::image::AGENT_VARIABLE).as_deref());
        let found = agent.as_ref().map_or_else(|error| error.to_string(), |path| path.display().to_string());
        check("guest agent", agent.is_ok(), found, "cargo xtask build puts it beside mvm");
    }
    const LEAST_FREE_MIB: u64 = 1024;
    let free = facts.state_free_mib;
    check(
        "disk",
        free >= LEAST_FREE_MIB,
        format!("{free} MiB free"),
        "make room below the state directory: images and snapshots need at least 1 GiB",
    );
    const LEAST_MEMORY_MIB: u64 = 256;
    let memory = facts.memory_available_mib;
    check(
        "memory",
        memory >= LEAST_MEMORY_MIB,
        format!("{memory} MiB available"),
        "end something: a guest of the built-in image needs at least 112 MiB, mvm suggests 256",
    );
    checks.push(CheckRow {
        check: "swap".to_owned(),
        ok: true,
        found: format!("{} MiB", facts.swap_total_mib),
        remedy: (facts.swap_total_mib > 0)
            .then(|| "swapoff -a: secrets in the memory of guests may be written to disk (unless the swap is encrypted)".to_owned()),
    });
    if !simulated {
        // They are no part of the boundary between guest and host, but of that between tenants.
        let ok = facts.limits.is_yes() || !globals.drivers.production;
        checks.push(CheckRow { check: "limits".to_owned(), ok, found: limits(&facts.limits), remedy: facts.limits_remedy.clone() });
    }
    let mut check = |name: &str, ok: bool, found: String, remedy: &str| {
        let remedy = (!ok).then(|| remedy.to_owned());
        checks.push(CheckRow { check: name.to_owned(), ok, found, remedy });
    };
    let remedy = "restore the document from a backup, or apply the fleet again; without root they cannot be read";
    let flakes = |observed: &crate::agent::observe::Observed| {
        let mut pools = observed.tenants.values().flat_map(|tenant| tenant.pools.values());
        pools.any(|pool| pool.doc.spec.flake_ref != BUILTIN)
    };
    if !simulated
        && globals.builder != WhichBuilder::Vm
        && opened.as_ref().is_ok_and(|opened| observe(&opened.node).is_ok_and(|observed| flakes(&observed)))
    {
        let found = crate::image::nix::find_nix();
        let path = found.as_ref().map_or("not found, and pools have flakes".to_owned(), |path| path.display().to_string());
        check("nix", found.is_some(), path, "apt-get install nix-bin");
    }
    if !simulated && globals.builder != WhichBuilder::Host {
        let (ok, found) = builder_image(&globals.paths().images());
        check("builder image", ok, found, "apt-get, dpkg-deb and tar are needed once, or --builder host");
    }
    let problems = opened.and_then(|opened| {
        let observed = observe(&opened.node)?;
        let secrets = observed.tenants.values().filter_map(|tenant| opened.node.secrets(&tenant.doc).err());
        let secrets: Vec<String> = secrets.map(|error| with_causes(&error)).collect();
        Ok([observed.problems, secrets].concat())
    });
    match problems {
        Ok(problems) => problems.into_iter().for_each(|problem| check("documents", false, problem, remedy)),
        Err(error) => check("documents", false, error.text, remedy),
    }
    print_rows(&checks, globals.format())?;
    let wrong = checks.iter().filter(|check| !check.ok).count();
    if wrong == 0 {
        return Ok(Exit::Done);
    }
    Err(CliError::new(Exit::Failed, format!("{wrong} of {} checks found something wrong", checks.len())))
}

/// What builder microVMs are made of, or can be.
fn builder_image(images: &std::path::Path) -> (bool, String) {
    if let Some(root) = crate::image::builder::existing(images) {
        let nix = root.packages.iter().find(|package| package.starts_with("nix-bin_"));
        return (true, nix.map_or_else(|| format!("{} packages", root.packages.len()), Clone::clone));
    }
    let missing: Vec<&str> = ["apt-get", "apt-cache", "dpkg-deb", "tar"].into_iter().filter(|name| find_program(name).is_none()).collect();
    match missing.is_empty() {
        true => (true, "made of packages when a flake is built in a microVM for the first time".into()),
        false => (false, format!("cannot be made: there is no {}", missing.join(", "))),
    }
}

/// Which Firecrackers there are, and whether the first can be used.
fn firecracker_here(globals: &Globals) -> (bool, String) {
    let installed = match firecracker(globals, &globals.paths(), globals.drivers.first_uid.unwrap_or_default()).installed() {
        Ok(installed) => installed,
        Err(error) => return (false, with_causes(&error)),
    };
    let first = &installed[0];
    let others: Vec<&str> = installed[1..].iter().map(|one| one.version.as_str()).collect();
    let others = if others.is_empty() { String::new() } else { format!("; also {}", others.join(", ")) };
    let (ok, state) = match (&first.jailer, &first.verdict) {
        (None, _) => (false, "but no jailer beside it".to_owned()),
        (_, Verdict::Usable) => (true, "a guest booted with it".to_owned()),
        (_, Verdict::Unusable { why }) => (false, format!("cannot be used here: {why}")),
        (_, Verdict::Untried) => (true, "whether a guest boots with it is found out at the first boot".to_owned()),
    };
    (ok, format!("{} ({}), {state}{others}", first.version, first.firecracker.display()))
}

/// Whether VMMs are limited, and where or why not.
pub(super) fn limits(limits: &Ability) -> String {
    match limits {
        Ability::Yes(place) => format!("memory, CPU, processes and disks of each VMM, by cgroup v2 at {place}"),
        Ability::No(why) => format!("none are set on VMMs, which only quotas bound: {why}"),
    }
}

/// The QEMU of this host: whether it is good, and how it would run guests.
fn qemu_here(globals: &Globals) -> (bool, String) {
    let qemu = qemu(globals, &globals.paths());
    let facts = match qemu.host_facts(None) {
        Ok(facts) => facts,
        Err(error) => return (false, with_causes(&error)),
    };
    let version = &facts.version;
    match (globals.accel, facts.kvm) {
        (AccelChoice::Auto, KvmVerdict::Untried) => {
            (true, format!("{version}; /dev/kvm opens, and whether a guest boots with it is found out at the first boot"))
        }
        (AccelChoice::Auto | AccelChoice::Kvm, KvmVerdict::Usable) => (true, format!("{version} with KVM")),
        (AccelChoice::Kvm, KvmVerdict::Untried) => (true, format!("{version} with KVM, as was asked for; not tried")),
        (AccelChoice::Kvm, KvmVerdict::Unusable { why }) => (false, format!("{version} with KVM, as was asked for, but {why}")),
        (AccelChoice::Auto, KvmVerdict::Unusable { why }) => {
            (true, format!("{version} in software (TCG), which is slow and no boundary against hostile guests, since {why}"))
        }
        (AccelChoice::Tcg, _) => (true, format!("{version} in software (TCG), which is slow and no boundary against hostile guests")),
    }
}
