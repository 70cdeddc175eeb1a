//! `mvm doctor`: every check says what is wrong and how to mend it.

use super::CliResult;
use super::exit::{CliError, Exit};
use super::open::{Globals, Intent, find_program, open};
use crate::host::Ability;
use crate::infra::display::{CheckRow, print_rows};

/// Looks at everything that microVMs need here.
pub fn run(globals: &Globals) -> CliResult {
    let opened = open(globals, Intent::Look)?;
    let node = &opened.node;
    let facts = node.host().facts()?;
    let mut checks = Vec::new();
    let mut check = |name: &str, ok: bool, found: String, remedy: &str| {
        let remedy = (!ok).then(|| remedy.to_owned());
        checks.push(CheckRow { check: name.to_owned(), ok, found, remedy });
    };
    let ability = |ability: &Ability| match ability {
        Ability::Yes(text) | Ability::No(text) => text.clone(),
    };
    check("root", facts.is_root, if facts.is_root { "yes" } else { "no" }.into(), "run mvm as root, e.g. with sudo");
    check("tun", facts.tun.is_yes(), ability(&facts.tun), "load the tun module: modprobe tun");
    check(
        "nftables",
        facts.nftables.is_yes(),
        ability(&facts.nftables),
        "a kernel with CONFIG_NF_TABLES, CONFIG_NF_TABLES_BRIDGE and CONFIG_NFT_NAT",
    );
    check("nft", facts.nft.is_yes(), ability(&facts.nft), "apt-get install nftables");
    check("mke2fs", facts.mke2fs.is_yes(), ability(&facts.mke2fs), "apt-get install e2fsprogs");
    let qemu = find_program(&format!("qemu-system-{}", std::env::consts::ARCH));
    let found = qemu.as_ref().map_or("not found".to_owned(), |path| path.display().to_string());
    let simulated = globals.vmm == super::open::VmmChoice::Simulated;
    check("qemu", qemu.is_some() || simulated, found, "apt-get install qemu-system-x86 (or qemu-system-arm)");
    match node.vmm().stamp() {
        Ok(stamp) => check("vmm", true, format!("{}, {}", stamp.build, format!("{:?}", stamp.acceleration).to_lowercase()), ""),
        Err(error) => check(
            "vmm",
            qemu.is_none() || !facts.is_root,
            error.to_string(),
            "start an instance once: whether KVM works is found out by booting a guest",
        ),
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
        "end something: a guest needs at least 64 MiB, mvm suggests 256",
    );
    check(
        "swap",
        facts.swap_total_mib == 0,
        format!("{} MiB", facts.swap_total_mib),
        "swapoff -a: secrets in the memory of guests may be written to disk (unless the swap is encrypted)",
    );
    let cgroups = if facts.cgroup2_controllers.is_empty() {
        "no controllers: limits of CPU and memory are not enforced by the host".to_owned()
    } else {
        facts.cgroup2_controllers.join(", ")
    };
    check("cgroup v2", true, cgroups, "");
    for problem in crate::agent::observe::observe(node)?.problems {
        check("documents", false, problem, "restore the document from a backup, or apply the fleet again");
    }
    print_rows(&checks, globals.format())?;
    let wrong = checks.iter().filter(|check| !check.ok).count();
    if wrong == 0 {
        return Ok(Exit::Done);
    }
    Err(CliError::new(Exit::Failed, format!("{wrong} of {} checks found something wrong", checks.len())))
}
