//! The command line of one QEMU, as a pure function of what it gets.

use std::os::fd::RawFd;

use crate::vmm::{Acceleration, DriveAccess, Rates};

/// Everything that the command line depends on. Descriptors are named by their numbers, which the child keeps.
#[derive(Debug, Clone)]
pub(super) struct CommandLine<'a> {
    /// What `-name` says, by which a process that nobody recorded is found.
    pub marker: &'a str,
    pub acceleration: Acceleration,
    pub vcpus: u8,
    pub mem_mib: u32,
    pub ram: RamArg,
    /// The listening QMP socket; the probe has none.
    pub qmp: Option<RawFd>,
    /// The listening sockets of the agent ports, in order.
    pub agents: &'a [RawFd],
    /// Where the serial console goes, opened write-only and appending.
    pub console: RawFd,
    pub drives: &'a [DriveArg<'a>],
    pub nic: Option<NicArg>,
    pub rates: Rates,
    pub start: Start<'a>,
}

/// Guest RAM, opened again by QEMU through `/proc/self/fd`.
#[derive(Debug, Clone, Copy)]
pub(super) struct RamArg {
    pub fd: RawFd,
    pub mapping: RamMapping,
}

/// How QEMU maps the RAM's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RamMapping {
    /// Writes go to the file, which is a memfd.
    Shared,
    /// Writes stay in the process; the file is a snapshot's memory.
    Private,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct DriveArg<'a> {
    pub name: &'a str,
    pub fd: RawFd,
    pub access: DriveAccess,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct NicArg {
    pub tap: RawFd,
    pub mac: [u8; 6],
}

/// How the guest comes to life.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start<'a> {
    /// From a kernel, running at once.
    Boot { kernel: RawFd, initrd: Option<RawFd>, append: &'a str },
    /// From a device state, left paused. The kernel is not needed: it is in the RAM already.
    Restore { device_state: RawFd },
}

/// The cache of translated code of a machine in software, in MiB.
pub(super) const TCG_CACHE_MIB: u32 = 64;

/// The fdset ids: the console has the first one, drives follow.
const CONSOLE_FDSET: usize = 1;

/// Renders the arguments that follow the program's name.
pub(super) fn render(line: &CommandLine<'_>) -> Vec<String> {
    let mut args = Args::default();
    args.option("-name", format!("guest={}", escape(line.marker)));
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    args.flag("-nographic");
    // A guest that resets or panics ends the process, which the pidfd reports.
    args.flag("-no-reboot");
    args.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    // No memory merging: it would show one tenant what another has, and hide private pages from the snapshot.
    // No description in the device state: xen-save-devices-state writes none, and the reader would complain.
    args.option("-machine", "microvm,acpi=on,rtc=on,memory-backend=ram,mem-merge=off,dump-guest-core=off,suppress-vmdesc=on");
    let (accel, cpu) = match line.acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        Acceleration::Tcg | Acceleration::None => ("tcg", "max"),
    };
    // Translated code: QEMU's own choice is up to a gigabyte for every machine.
    let accel = if accel == "tcg" { format!("tcg,tb-size={TCG_CACHE_MIB}") } else { accel.to_owned() };
    args.option("-accel", accel);
    args.option("-cpu", cpu);
    args.option("-smp", line.vcpus.to_string());
    args.option("-m", format!("{}M", line.mem_mib));
    let share = match line.ram.mapping {
        RamMapping::Shared => "on",
        RamMapping::Private => "off",
    };
    args.option(
        "-object",
        format!("memory-backend-file,id=ram,size={}M,mem-path=/proc/self/fd/{},share={share}", line.mem_mib, line.ram.fd),
    );
    // The device state of xen-save-devices-state lacks the section that names the machine type.
    args.option("-global", "migration.send-configuration=off");

    if let Some(qmp) = line.qmp {
        args.option("-chardev", format!("socket,id=qmp,fd={qmp},server=on,wait=off"));
        args.option("-mon", "chardev=qmp,mode=control");
    }
    args.option("-add-fd", format!("fd={},set={CONSOLE_FDSET},opaque=console", line.console));
    args.option("-chardev", format!("file,id=console,path=/dev/fdset/{CONSOLE_FDSET},append=on"));
    args.option("-serial", "chardev:console");

    for (index, drive) in line.drives.iter().enumerate() {
        let (set, name) = (CONSOLE_FDSET + 1 + index, escape(drive.name));
        let access = match drive.access {
            DriveAccess::ReadOnly => "read-only=on",
            DriveAccess::ReadWrite => "read-only=off,discard=unmap",
        };
        args.option("-add-fd", format!("fd={},set={set},opaque={name}", drive.fd));
        args.option(
            "-blockdev",
            format!("driver=raw,node-name={name},file.driver=file,file.filename=/dev/fdset/{set},file.locking=off,{access}"),
        );
        let device = match throttle(line.rates) {
            Some(limits) => {
                args.option("-object", format!("throttle-group,id=rate-{name},{limits}"));
                args.option(
                    "-blockdev",
                    format!("driver=throttle,node-name=limited-{name},throttle-group=rate-{name},file={name},{access}"),
                );
                format!("limited-{name}")
            }
            None => name.clone(),
        };
        // QEMU's own choice for a full disk is to pause the machine, and nobody would let it go on: the guest is told instead.
        args.option("-device", format!("virtio-blk-device,id=drive-{name},drive={device},werror=report"));
    }
    if let Some(nic) = line.nic {
        let [a, b, c, d, e, f] = nic.mac;
        args.option("-netdev", format!("tap,id=net,fd={},vhost=off", nic.tap));
        args.option("-device", format!("virtio-net-device,id=nic,netdev=net,mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"));
    }
    if !line.agents.is_empty() {
        args.option("-device", "virtio-serial-device,id=ports,max_ports=31");
        for (port, fd) in line.agents.iter().enumerate() {
            args.option("-chardev", format!("socket,id=agent{port},fd={fd},server=on,wait=off"));
            // Port 0 of the bus is reserved for a console.
            args.option(
                "-device",
                format!("virtserialport,id=port{port},bus=ports.0,nr={},chardev=agent{port},name=mvm.agent.{port}", port + 1),
            );
        }
    }
    args.option("-object", "rng-random,id=entropy,filename=/dev/urandom");
    args.option("-device", "virtio-rng-device,id=rng,rng=entropy");

    match line.start {
        Start::Boot { kernel, initrd, append } => {
            args.option("-kernel", format!("/proc/self/fd/{kernel}"));
            if let Some(initrd) = initrd {
                args.option("-initrd", format!("/proc/self/fd/{initrd}"));
            }
            args.option("-append", append);
        }
        Start::Restore { device_state } => {
            args.flag("-S");
            args.option("-incoming", format!("fd:{device_state}"));
        }
    }
    args.0
}

/// What a drive may move, as properties of a group of its own (`ThrottleGroupProperties` of QEMU's qapi/block-core.json).
fn throttle(rates: Rates) -> Option<String> {
    let bytes = rates.drive_mib.map(|mib| format!("x-bps-total={}", u64::from(mib) << 20));
    let times = rates.drive_iops.map(|rate| format!("x-iops-total={rate}"));
    let all: Vec<String> = bytes.into_iter().chain(times).collect();
    (!all.is_empty()).then(|| all.join(","))
}

/// The kernel arguments that the driver itself needs, before those of the caller.
///
/// Under TCG the kernel is told the rate of its time stamp counter: `microvm` with ACPI has no other reference than the PIT, and on a
/// busy host the calibration against that fails about every second time; such a kernel hangs, having no timer at all. And it is told to
/// trust the counter: its watchdog compares it with the timer's ticks, which are what a busy host loses, and would then keep time by
/// them (measured: 26 s lost in 26 minutes).
pub(super) fn kernel_arguments(acceleration: Acceleration, tsc_khz: u64, extra: &[String]) -> String {
    let mut all = vec!["console=ttyS0".to_owned(), "panic=-1".to_owned()];
    if acceleration == Acceleration::Tcg {
        all.push(format!("tsc_early_khz={tsc_khz}"));
        all.push("tsc=reliable".to_owned());
    }
    all.extend_from_slice(extra);
    all.join(" ")
}

/// Doubles commas, as QEMU's option syntax wants them inside a value.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[derive(Default)]
struct Args(Vec<String>);

impl Args {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line<'a>(drives: &'a [DriveArg<'a>], start: Start<'a>) -> CommandLine<'a> {
        CommandLine {
            marker: "mvm:node/acme/web/i-1a2b3c4d",
            acceleration: Acceleration::Tcg,
            vcpus: 2,
            mem_mib: 128,
            ram: RamArg { fd: 10, mapping: RamMapping::Shared },
            qmp: Some(11),
            agents: &[12, 13, 14, 15],
            console: 16,
            drives,
            nic: Some(NicArg { tap: 30, mac: [2, 0, 0xa, 0xf0, 1, 3] }),
            rates: Rates::default(),
            start,
        }
    }

    #[test]
    fn drives_are_bounded_where_it_is_said() {
        let drives = [DriveArg { name: "data", fd: 20, access: DriveAccess::ReadWrite }];
        let mut line = line(&drives, Start::Restore { device_state: 9 });
        let said = |line: &CommandLine<'_>| render(line).join(" ");
        assert!(!said(&line).contains("throttle"));
        line.rates = Rates { drive_mib: Some(2), drive_iops: Some(100), net_mbit: Some(1) };
        let text = said(&line);
        assert!(text.contains("-object throttle-group,id=rate-data,x-bps-total=2097152,x-iops-total=100 "), "{text}");
        assert!(
            text.contains("driver=throttle,node-name=limited-data,throttle-group=rate-data,file=data,read-only=off,discard=unmap "),
            "{text}"
        );
        assert!(text.contains("virtio-blk-device,id=drive-data,drive=limited-data,"), "{text}");
    }

    /// One option and its value per line.
    fn text(args: &[String]) -> String {
        let mut out = String::new();
        for arg in args {
            out.push_str(if arg.starts_with('-') && !out.is_empty() {
                "\n"
            } else if out.is_empty() {
                ""
            } else {
                " "
            });
            out.push_str(arg);
        }
        out
    }

    #[test]
    fn a_boot() {
        let drives = [
            DriveArg { name: "root", fd: 20, access: DriveAccess::ReadOnly },
            DriveArg { name: "data", fd: 21, access: DriveAccess::ReadWrite },
        ];
        let append = kernel_arguments(Acceleration::Tcg, 2_596_140, &["quiet".into()]);
        let args = render(&line(&drives, Start::Boot { kernel: 40, initrd: Some(41), append: &append }));
        insta::assert_snapshot!(text(&args));
    }

    #[test]
    fn a_restore_maps_privately_and_needs_no_kernel() {
        let mut line = line(&[], Start::Restore { device_state: 50 });
        line.ram.mapping = RamMapping::Private;
        line.acceleration = Acceleration::Kvm;
        line.nic = None;
        insta::assert_snapshot!(text(&render(&line)));
    }

    #[test]
    fn a_name_cannot_add_an_option() {
        let mut line = line(&[], Start::Restore { device_state: 50 });
        line.marker = "a,process=b";
        assert_eq!(render(&line)[1], "guest=a,,process=b");
    }

    #[test]
    fn kvm_guests_take_the_rate_from_their_paravirtual_clock() {
        assert_eq!(kernel_arguments(Acceleration::Kvm, 1, &["quiet".into()]), "console=ttyS0 panic=-1 quiet");
    }
}
