//! MicroVMs as mvm makes them.

use mvm_firecracker::*;

pub fn drive(name: &str, root: bool, read_only: bool) -> Drive {
    Drive {
        drive_id: name.try_into().unwrap(),
        path_on_host: format!("/drives/{name}"),
        is_root_device: root,
        is_read_only: read_only,
        partuuid: None,
        cache_type: None,
        io_engine: None,
        rate_limiter: None,
    }
}

pub fn outputs() -> Outputs {
    Outputs {
        logger: Some(Logger { log_path: Some("/log".into()), level: Some(LogLevel::Warning), ..Logger::default() }),
        metrics: Some(Metrics { metrics_path: "/metrics".into(), emit_id: None, properties: None }),
        serial: Some(SerialDevice { serial_out_path: Some("/console".into()), rate_limiter: Some(TokenBucket::per_second(65_536)) }),
    }
}

pub fn boot() -> Boot {
    let limit = RateLimiter { bandwidth: Some(TokenBucket::per_second(1 << 20)), ops: Some(TokenBucket::per_second(1000)) };
    Boot {
        outputs: outputs(),
        machine_config: MachineConfiguration {
            vcpu_count: 2.try_into().unwrap(),
            mem_size_mib: 256,
            smt: Some(false),
            track_dirty_pages: Some(true),
            cpu_template: Some(CpuTemplate::T2S),
            huge_pages: Some(HugePages::TwoMib),
        },
        boot_source: BootSource {
            kernel_image_path: "/vmlinux".into(),
            initrd_path: Some("/initrd".into()),
            boot_args: Some("console=ttyS0 reboot=k panic=1".into()),
        },
        drives: vec![
            drive("root", true, true),
            Drive {
                cache_type: Some(CacheType::Writeback),
                io_engine: Some(IoEngine::Async),
                rate_limiter: Some(limit.clone()),
                ..drive("data", false, false)
            },
            drive("secrets", false, true),
            drive("config", false, true),
        ],
        network_interfaces: vec![NetworkInterface {
            iface_id: "eth0".try_into().unwrap(),
            host_dev_name: "tap0".into(),
            guest_mac: Some("06:00:0a:f0:00:03".into()),
            mtu: Some(1400.try_into().unwrap()),
            rx_rate_limiter: Some(limit.clone()),
            tx_rate_limiter: Some(limit),
        }],
        vsock: Some(Vsock { guest_cid: 3.try_into().unwrap(), uds_path: "/v.sock".into() }),
        entropy: Some(EntropyDevice::default()),
        balloon: Some(Balloon {
            amount_mib: 0,
            deflate_on_oom: true,
            stats_polling_interval_s: Some(5),
            free_page_hinting: None,
            free_page_reporting: None,
        }),
    }
}

pub fn load() -> SnapshotLoad {
    SnapshotLoad {
        snapshot_path: "/snapshot/state".into(),
        mem_backend: MemoryBackend { backend_type: MemoryBackendType::File, backend_path: "/snapshot/memory".into() },
        track_dirty_pages: Some(true),
        network_overrides: vec![NetworkOverride { iface_id: "eth0".try_into().unwrap(), host_dev_name: "tap7".into() }],
        vsock_override: Some(VsockOverride { uds_path: "/v7.sock".into() }),
        clock_realtime: Some(true),
        huge_pages: None,
    }
}
