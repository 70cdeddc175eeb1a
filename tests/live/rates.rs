//! What a pool's instances may use of the host, beside what they have.

use mvm_firecracker::{Api, Deadlines, Unknown};

use crate::firecracker::is_real;
use crate::rig::{Driver, ONE, Rig, on_a_host, on_a_host_of};

/// [`ONE`], with more in its resources.
fn one_with(resources: &str) -> String {
    let with = ONE.replace("data_disk_mib = 64 }", &format!("data_disk_mib = 64, {resources} }}"));
    assert_ne!(with, ONE);
    with
}

/// Writes to the data disk, and tells how many milliseconds that took by the guest's own clock.
fn write_ms(rig: &Rig, at: &str, mib: u32) -> u64 {
    // Busybox tells the time since the boot in hundredths of a second there.
    let script = format!(
        "read a b </proc/uptime; dd if=/dev/zero of=/data/f bs=64k count={} conv=fsync 2>/dev/null; read c d </proc/uptime; echo $a $c",
        mib * 16
    );
    let said = rig.sh(at, &script);
    let times: Vec<f64> = said.split(' ').map(|time| time.parse().unwrap()).collect();
    ((times[1] - times[0]) * 1000.0) as u64
}

#[test]
fn a_drive_moves_no_more_than_its_pool_may() {
    on_a_host(1, |rig| {
        rig.apply(&one_with("drive_mib_per_second = 2, drive_iops = 500, net_mbit_per_second = 50"));
        let at = rig.only();
        // A tenth of a second may come at once, and as much may be on its way.
        let took = write_ms(rig, &at, 8);
        assert!(took >= 3000, "8 MiB in {took} ms");
        rig.ok(&["instance", "sleep", &at]);
        rig.ok(&["instance", "wake", &at]);
        let took = write_ms(rig, &at, 8);
        assert!(took >= 3000, "8 MiB in {took} ms after a wake");
        let info = rig.ok(&["instance", "info", &at]);
        assert!(info.contains("2 MiB/s for each drive, 500 requests/s for each drive, 50 Mbit/s each way"), "{info}");
        // A change is applied, by replacing what has the old one.
        rig.apply(ONE);
        assert!(!rig.ok(&["instance", "info", &rig.only()]).contains("MiB/s"));
        rig.prune();
    });
}

#[test]
fn a_limit_of_the_network_is_in_the_packet_filter_as_long_as_it_is_declared() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        let rules = || crate::wire::run("nft", &["list", "table", "bridge", "mvm"]);
        // The most that is taken is something that the kernel can count.
        rig.apply(&one_with("net_mbit_per_second = 100000"));
        assert!(rules().contains("limit rate over"), "{}", rules());
        rig.apply(&one_with("net_mbit_per_second = 50, reclaim_memory = true"));
        let tap = "tn7i0";
        let text = rules();
        assert!(text.contains(&format!("\"{tap}\" : jump from_{tap}")) && text.contains(&format!("\"{tap}\" : jump to_{tap}")), "{text}");
        let said = rig.ok(&["pool", "update", "acme/web", "--net-mbit-per-second", "0", "--reclaim-memory", "false"]);
        rig.apply(ONE);
        assert!(!rules().contains("limit rate"), "{said}");
        rig.prune();
    });
}

#[test]
fn a_guest_reports_what_it_frees_where_that_is_declared() {
    on_a_host_of(Driver::Firecracker, 1, |rig| {
        rig.apply(&one_with("reclaim_memory = true"));
        let at = rig.only();
        for wakes in 0..2 {
            let socket = rig.run_dir().join("instances").join(at.rsplit('/').next().unwrap()).join("jail/api.sock");
            let mut api = Api::<Unknown>::attach(&socket, Deadlines::default()).unwrap();
            let balloon = api.get_balloon().unwrap();
            assert_eq!((balloon.amount_mib, balloon.free_page_reporting), (0, Some(true)), "after {wakes} wakes");
            // The stand-in has no kernel.
            if is_real() {
                assert!(rig.sh(&at, "dmesg").contains("Free page reporting enabled"));
            }
            rig.ok(&["instance", "sleep", &at]);
            rig.ok(&["instance", "wake", &at]);
            assert_eq!(rig.sh(&at, "echo alive"), "alive");
        }
        rig.prune();
    });
}
