//! PURE: what each driver can do, for whoever chooses one and for the table in the documents.

use std::fmt::Write;

use super::VmmKind;

/// What a driver can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// What is between a guest and the host.
    pub boundary: &'static str,
    /// Whether it can execute guests in software where there is no usable KVM.
    pub runs_without_kvm: bool,
    /// Whether a machine can be made that ends with the process that started it, however that ends.
    pub ends_with_caller: bool,
    /// Whether a snapshot's memory is mapped on a wake, so that a large guest wakes as quickly as a small one.
    pub maps_memory: bool,
    /// Whether a second sleep writes only what changed since the wake.
    pub writes_only_changes: bool,
    /// Whether several versions lie side by side, and a snapshot is woken by the one that made it.
    pub keeps_versions: bool,
    /// How the guest agent is reached.
    pub guest_channel: &'static str,
    /// Whether the CPU that guests see can be made the same on unlike hosts.
    pub cpu_templates: bool,
    /// Whether guest memory can be made of huge pages.
    pub huge_pages: bool,
    /// Whether what drives move is bounded by choice.
    pub drive_limits: bool,
    /// What bounds what interfaces move.
    pub net_limits: &'static str,
    /// Whether memory that guests free can go back to the host.
    pub reclaims_memory: bool,
    /// Whether it counts what its devices do.
    pub metrics: bool,
    /// Whether each machine can have a network namespace of its own.
    pub network_namespace: bool,
    /// Whether the calls of a start are shown by `--timings`.
    pub timings: bool,
}

impl VmmKind {
    /// All drivers.
    pub const ALL: [VmmKind; 3] = [VmmKind::Firecracker, VmmKind::Qemu, VmmKind::Simulated];

    /// What it can do.
    pub fn capabilities(self) -> Capabilities {
        match self {
            VmmKind::Firecracker => Capabilities {
                boundary: "KVM, Firecracker's seccomp filters, jail: own uid, tmpfs root, mount and PID namespace, network namespace by choice",
                runs_without_kvm: false,
                ends_with_caller: true,
                maps_memory: true,
                writes_only_changes: true,
                keeps_versions: true,
                guest_channel: "vsock",
                cpu_templates: true,
                huge_pages: true,
                drive_limits: true,
                net_limits: "shaped, and the packet filter",
                reclaims_memory: true,
                metrics: true,
                network_namespace: true,
                timings: true,
            },
            VmmKind::Qemu => Capabilities {
                boundary: "KVM (none in software), QEMU's seccomp filters, own uid, no paths",
                runs_without_kvm: true,
                ends_with_caller: true,
                maps_memory: true,
                writes_only_changes: true,
                keeps_versions: false,
                guest_channel: "virtio-serial",
                cpu_templates: false,
                huge_pages: false,
                drive_limits: true,
                net_limits: "the packet filter",
                reclaims_memory: false,
                metrics: false,
                network_namespace: false,
                timings: false,
            },
            VmmKind::Simulated => Capabilities {
                boundary: "no guest runs",
                runs_without_kvm: true,
                ends_with_caller: false,
                maps_memory: false,
                writes_only_changes: false,
                keeps_versions: false,
                guest_channel: "in the simulation",
                cpu_templates: false,
                huge_pages: false,
                drive_limits: false,
                net_limits: "nothing moves",
                reclaims_memory: false,
                metrics: false,
                network_namespace: false,
                timings: false,
            },
        }
    }
}

/// Writes the drivers and what they can do as a table in Markdown.
pub fn table() -> String {
    type Show = fn(&Capabilities) -> String;
    let rows: [(&str, Show); 15] = [
        ("between guest and host", |one| one.boundary.to_owned()),
        ("runs guests without usable KVM", |one| yes_or_no(one.runs_without_kvm)),
        ("a machine can end with its caller (`mvm run`, builds)", |one| yes_or_no(one.ends_with_caller)),
        ("memory is mapped on a wake", |one| yes_or_no(one.maps_memory)),
        ("a second sleep writes only what changed", |one| yes_or_no(one.writes_only_changes)),
        ("versions side by side, each wakes its own snapshots", |one| yes_or_no(one.keeps_versions)),
        ("way to the guest agent", |one| one.guest_channel.to_owned()),
        ("`--cpu-template`", |one| yes_or_no(one.cpu_templates)),
        ("`--huge-pages`", |one| yes_or_no(one.huge_pages)),
        ("`drive_mib_per_second`, `drive_iops` of a pool", |one| yes_or_no(one.drive_limits)),
        ("`net_mbit_per_second` of a pool", |one| one.net_limits.to_owned()),
        ("`reclaim_memory` of a pool", |one| yes_or_no(one.reclaims_memory)),
        ("`mvm instance metrics`", |one| yes_or_no(one.metrics)),
        ("`--jail-netns`", |one| yes_or_no(one.network_namespace)),
        ("`--timings`", |one| yes_or_no(one.timings)),
    ];
    let mut text = String::from("| |");
    for kind in VmmKind::ALL {
        write!(text, " {} |", kind.as_str()).expect("writing to a string does not fail");
    }
    text.push_str("\n|---|---|---|---|\n");
    for (name, show) in rows {
        let cells: Vec<String> = VmmKind::ALL.iter().map(|kind| show(&kind.capabilities())).collect();
        writeln!(text, "| {name} | {} |", cells.join(" | ")).expect("writing to a string does not fail");
    }
    text
}

fn yes_or_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_in_the_documents_is_this_one() {
        let document = include_str!("../../docs/firecracker.md");
        assert!(document.contains(&table()), "docs/firecracker.md should contain\n{}", table());
    }
}
