//! Any microVM, for property tests.

use mvm_firecracker::*;
use proptest::collection::{btree_map, vec};
use proptest::option::of;
use proptest::prelude::*;

/// Any text that can stand in JSON, which is any.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![any::<String>(), "[ -~]{0,60}", Just("/a b\"\\\n\u{0}\u{1f980}".to_owned())]
}

pub fn id() -> impl Strategy<Value = ResourceId> {
    "[A-Za-z0-9_]{1,64}".prop_map(|id| ResourceId::try_from(id).unwrap())
}

/// An amount; the API's integers have a sign.
fn amount() -> impl Strategy<Value = u64> {
    prop_oneof![0_u64..=i64::MAX as u64, Just(0), Just(i64::MAX as u64)]
}

pub fn bucket() -> impl Strategy<Value = TokenBucket> {
    (amount(), amount(), of(amount())).prop_map(|(size, refill_time, one_time_burst)| TokenBucket { size, refill_time, one_time_burst })
}

pub fn limiter() -> impl Strategy<Value = RateLimiter> {
    (of(bucket()), of(bucket())).prop_map(|(bandwidth, ops)| RateLimiter { bandwidth, ops })
}

pub fn logger() -> impl Strategy<Value = Logger> {
    use LogLevel::{Debug, Error, Info, Off, Trace, Warning};
    let level = prop::sample::select(vec![Error, Warning, Info, Debug, Trace, Off]);
    (of(text()), of(level), of(any::<bool>()), of(any::<bool>()), of(text()))
        .prop_map(|(log_path, level, show_level, show_log_origin, module)| Logger { log_path, level, show_level, show_log_origin, module })
}

pub fn outputs() -> impl Strategy<Value = Outputs> {
    let metrics = (text(), of(any::<bool>()), of(btree_map(text(), text(), 0..3)))
        .prop_map(|(metrics_path, emit_id, properties)| Metrics { metrics_path, emit_id, properties });
    let serial = (of(text()), of(bucket())).prop_map(|(serial_out_path, rate_limiter)| SerialDevice { serial_out_path, rate_limiter });
    (of(logger()), of(metrics), of(serial)).prop_map(|(logger, metrics, serial)| Outputs { logger, metrics, serial })
}

pub fn machine_config() -> impl Strategy<Value = MachineConfiguration> {
    use CpuTemplate as Cpu;
    let template = prop::sample::select(vec![Cpu::C3, Cpu::T2, Cpu::T2S, Cpu::T2CL, Cpu::T2A, Cpu::V1N1, Cpu::None]);
    let pages = prop::sample::select(vec![HugePages::None, HugePages::Transparent, HugePages::TwoMib]);
    (1_u32..=32, any::<u32>(), of(any::<bool>()), of(any::<bool>()), of(template), of(pages)).prop_map(
        |(vcpus, mem_size_mib, smt, track_dirty_pages, cpu_template, huge_pages)| MachineConfiguration {
            vcpu_count: vcpus.try_into().unwrap(),
            mem_size_mib,
            smt,
            track_dirty_pages,
            cpu_template,
            huge_pages,
        },
    )
}

pub fn drive() -> impl Strategy<Value = Drive> {
    let cache = prop::sample::select(vec![CacheType::Unsafe, CacheType::Writeback]);
    let engine = prop::sample::select(vec![IoEngine::Sync, IoEngine::Async]);
    (id(), text(), any::<bool>(), any::<bool>(), of(text()), of(cache), of(engine), of(limiter())).prop_map(
        |(drive_id, path_on_host, is_root_device, is_read_only, partuuid, cache_type, io_engine, rate_limiter)| Drive {
            drive_id,
            path_on_host,
            is_root_device,
            is_read_only,
            partuuid,
            cache_type,
            io_engine,
            rate_limiter,
        },
    )
}

pub fn interface() -> impl Strategy<Value = NetworkInterface> {
    let mtu = (68_u32..=65_535).prop_map(|mtu| mtu.try_into().unwrap());
    (id(), text(), of(text()), of(mtu), of(limiter()), of(limiter())).prop_map(
        |(iface_id, host_dev_name, guest_mac, mtu, rx_rate_limiter, tx_rate_limiter)| NetworkInterface {
            iface_id,
            host_dev_name,
            guest_mac,
            mtu,
            rx_rate_limiter,
            tx_rate_limiter,
        },
    )
}

pub fn balloon() -> impl Strategy<Value = Balloon> {
    (any::<u32>(), any::<bool>(), of(any::<u16>()), of(any::<bool>()), of(any::<bool>())).prop_map(
        |(amount_mib, deflate_on_oom, stats_polling_interval_s, free_page_hinting, free_page_reporting)| Balloon {
            amount_mib,
            deflate_on_oom,
            stats_polling_interval_s,
            free_page_hinting,
            free_page_reporting,
        },
    )
}

pub fn boot() -> impl Strategy<Value = Boot> {
    let source = (text(), of(text()), of(text())).prop_map(|(kernel_image_path, initrd_path, boot_args)| BootSource {
        kernel_image_path,
        initrd_path,
        boot_args,
    });
    let vsock = (3_u32..u32::MAX, text()).prop_map(|(cid, uds_path)| Vsock { guest_cid: cid.try_into().unwrap(), uds_path });
    let entropy = of(limiter()).prop_map(|rate_limiter| EntropyDevice { rate_limiter });
    let devices = (vec(drive(), 0..4), vec(interface(), 0..3), of(vsock), of(entropy), of(balloon()));
    (outputs(), machine_config(), source, devices).prop_map(
        |(outputs, machine_config, boot_source, (drives, network_interfaces, vsock, entropy, balloon))| Boot {
            outputs,
            machine_config,
            boot_source,
            drives,
            network_interfaces,
            vsock,
            entropy,
            balloon,
        },
    )
}

pub fn load() -> impl Strategy<Value = SnapshotLoad> {
    use RestoredHugePages as Pages;
    let backend = (prop::sample::select(vec![MemoryBackendType::File, MemoryBackendType::Uffd]), text())
        .prop_map(|(backend_type, backend_path)| MemoryBackend { backend_type, backend_path });
    let network = (id(), text()).prop_map(|(iface_id, host_dev_name)| NetworkOverride { iface_id, host_dev_name });
    let vsock = text().prop_map(|uds_path| VsockOverride { uds_path });
    let pages = prop::sample::select(vec![Pages::Snapshot, Pages::None, Pages::Transparent, Pages::TwoMib]);
    (text(), backend, of(any::<bool>()), vec(network, 0..3), of(vsock), of(any::<bool>()), of(pages)).prop_map(
        |(snapshot_path, mem_backend, track_dirty_pages, network_overrides, vsock_override, clock_realtime, huge_pages)| SnapshotLoad {
            snapshot_path,
            mem_backend,
            track_dirty_pages,
            network_overrides,
            vsock_override,
            clock_realtime,
            huge_pages,
        },
    )
}

pub fn create() -> impl Strategy<Value = SnapshotCreate> {
    (text(), text(), prop::sample::select(vec![SnapshotType::Full, SnapshotType::Diff]))
        .prop_map(|(mem_file_path, snapshot_path, snapshot_type)| SnapshotCreate { mem_file_path, snapshot_path, snapshot_type })
}

pub fn partial_drive() -> impl Strategy<Value = PartialDrive> {
    (id(), of(text()), of(limiter())).prop_map(|(drive_id, path_on_host, rate_limiter)| PartialDrive {
        drive_id,
        path_on_host,
        rate_limiter,
    })
}

pub fn partial_interface() -> impl Strategy<Value = PartialNetworkInterface> {
    (id(), of(limiter()), of(limiter())).prop_map(|(iface_id, rx_rate_limiter, tx_rate_limiter)| PartialNetworkInterface {
        iface_id,
        rx_rate_limiter,
        tx_rate_limiter,
    })
}
