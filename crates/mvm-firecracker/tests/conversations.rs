//! Whole conversations as text: what is sent, over which connection, in which order.

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use mvm_firecracker::*;
use support::server::{DONE, Server, document};
use support::values::{boot, load, outputs};

#[test]
fn boot_conversation() {
    let server = Server::obliging();
    let mut running = server.connect().boot(&boot()).unwrap();
    running.flush_metrics().unwrap();
    running.send_ctrl_alt_del().unwrap();
    insta::assert_snapshot!("boot", server.conversation());
}

#[test]
fn boot_conversation_call_by_call() {
    let server = Server::obliging();
    let boot = boot();
    let mut api = server.connect().configure();
    api.logger(boot.outputs.logger.as_ref().unwrap()).unwrap();
    api.metrics(boot.outputs.metrics.as_ref().unwrap()).unwrap();
    api.serial(boot.outputs.serial.as_ref().unwrap()).unwrap();
    api.machine_config(&boot.machine_config).unwrap();
    api.boot_source(&boot.boot_source).unwrap();
    boot.drives.iter().for_each(|drive| api.drive(drive).unwrap());
    boot.network_interfaces.iter().for_each(|interface| api.network_interface(interface).unwrap());
    api.vsock(boot.vsock.as_ref().unwrap()).unwrap();
    api.entropy(boot.entropy.as_ref().unwrap()).unwrap();
    api.balloon(boot.balloon.as_ref().unwrap()).unwrap();
    api.start().unwrap();
    let one_by_one = server.take();
    assert!(one_by_one.iter().all(|asked| asked.connection == 1), "{one_by_one:?}");

    server.connect().boot(&boot).unwrap();
    let sorted = |asked: Vec<support::server::Asked>| {
        let mut asked: Vec<_> = asked.into_iter().map(|asked| (asked.line, asked.body)).collect();
        asked.sort();
        asked
    };
    assert_eq!(sorted(one_by_one), sorted(server.take()), "both ways ask for the same");
}

#[test]
fn snapshot_conversation() {
    let server = Server::obliging();
    let mut paused = server.connect().boot(&boot()).unwrap().pause().unwrap();
    let files = |snapshot_type, n| SnapshotCreate {
        mem_file_path: format!("/snapshot/memory{n}"),
        snapshot_path: format!("/snapshot/state{n}"),
        snapshot_type,
    };
    server.take();
    paused.create_snapshot(&files(SnapshotType::Full, 0)).unwrap();
    let mut running = paused.resume().unwrap();
    running.patch_balloon(&BalloonUpdate { amount_mib: 64 }).unwrap();
    running.patch_balloon_statistics(&BalloonStatsUpdate { stats_polling_interval_s: 60 }).unwrap();
    let mut paused = running.pause().unwrap();
    paused.create_snapshot(&files(SnapshotType::Diff, 1)).unwrap();
    insta::assert_snapshot!("snapshot", server.conversation());
}

#[test]
fn restore_conversation() {
    let server = Server::obliging();
    let mut paused = server.connect().load_snapshot(&outputs(), &load()).unwrap();
    let config = PartialDrive { drive_id: "config".try_into().unwrap(), path_on_host: Some("/drives/config".into()), rate_limiter: None };
    paused.patch_drive(&config).unwrap();
    let limit = RateLimiter { bandwidth: None, ops: Some(TokenBucket { size: 10, refill_time: 100, one_time_burst: Some(50) }) };
    let interface = PartialNetworkInterface { iface_id: "eth0".try_into().unwrap(), rx_rate_limiter: None, tx_rate_limiter: Some(limit) };
    paused.patch_network_interface(&interface).unwrap();
    paused.resume().unwrap();
    server.connect().load_and_resume(&Outputs::default(), &load()).unwrap();
    insta::assert_snapshot!("restore", server.conversation());
}

#[test]
fn the_head_of_a_request() {
    let server = Server::obliging();
    let mut api = server.connect().configure();
    api.entropy(&EntropyDevice::default()).unwrap();
    insta::assert_snapshot!("head", server.take().remove(0).head);
}

#[test]
fn one_connection_is_used_again() {
    let server = Server::start(|asked, stream| match asked.line.as_str() {
        "GET /version" => stream.write_all(&document(200, r#"{"firecracker_version":"1.17.0"}"#)).is_ok(),
        _ => stream.write_all(DONE).is_ok(),
    });
    let mut api = server.connect();
    for _ in 0..20 {
        assert_eq!(api.version().unwrap().firecracker_version, "1.17.0");
    }
    let mut running = api.boot(&boot()).unwrap();
    server.take();
    for _ in 0..20 {
        running.version().unwrap();
    }
    assert!(server.take().iter().all(|asked| asked.connection == 1));
}

#[test]
fn a_connection_that_was_closed_between_calls_is_replaced() {
    let (closed, is_closed) = mpsc::channel();
    let server = Server::start(move |_, stream| {
        stream.write_all(DONE).unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
        closed.send(()).unwrap();
        false
    });
    let mut api = server.connect().configure();
    for _ in 0..10 {
        api.entropy(&EntropyDevice::default()).unwrap();
        is_closed.recv().unwrap();
    }
    let connections: Vec<usize> = server.take().iter().map(|asked| asked.connection).collect();
    assert_eq!(connections, (1..=10).collect::<Vec<_>>());
}

#[test]
fn what_nobody_asked_for_is_not_taken_for_an_answer() {
    let server = Server::start(|asked, stream| {
        let info = |state: &str| document(200, &format!(r#"{{"app_name":"a","id":"b","state":"{state}","vmm_version":"1"}}"#));
        let once = info(if asked.connection % 2 == 1 { "Running" } else { "Paused" });
        stream.write_all(&[once, info("Not started")].concat()).is_ok()
    });
    let mut api = Api::attach(&server.socket, Deadlines::default()).unwrap();
    for n in 0..20 {
        let state = api.instance_info().unwrap().state;
        assert_eq!(state, if n % 2 == 0 { InstanceState::Running } else { InstanceState::Paused });
    }
}

#[test]
fn an_adopted_microvm_is_found_in_its_phase() {
    let asked = AtomicUsize::new(0);
    let states = ["Not started", "Running", "Paused", "Confused"];
    let server = Server::start(move |_, stream| {
        let state = states[asked.fetch_add(1, Ordering::Relaxed)];
        let body = format!(r#"{{"app_name":"Firecracker","id":"i","state":"{state}","vmm_version":"1.17.0","new":{{}}}}"#);
        stream.write_all(&document(200, &body)).is_ok()
    });
    let find = || Api::attach(&server.socket, Deadlines::default()).unwrap().find_phase();
    assert!(matches!(find(), Ok(Found::Preboot(_))));
    assert!(matches!(find(), Ok(Found::Running(_))));
    assert!(matches!(find(), Ok(Found::Paused(_))));
    let error = find().unwrap_err();
    assert!(matches!(error.error.kind, ApiErrorKind::Garbage { .. }), "{error}");
}

#[test]
fn the_timeline_has_every_call_once() {
    let server = Server::obliging();
    let boot = boot();
    let mut running = server.connect().boot(&boot).unwrap();
    let timeline = running.take_timeline();
    let mut names: Vec<&str> = timeline.iter().map(|call| call.request.as_str()).collect();
    assert_eq!((names[0], names[names.len() - 1]), ("connect", "PUT /actions"));
    assert!(timeline.windows(2).all(|pair| pair[0].began_us <= pair[1].began_us));
    names.remove(0);
    names.sort_unstable();
    let asked = server.take();
    let mut lines: Vec<&str> = asked.iter().map(|asked| asked.line.as_str()).collect();
    lines.sort_unstable();
    assert_eq!(names, lines);
    assert!(running.take_timeline().is_empty());
}

#[test]
fn an_api_can_go_to_another_thread() {
    fn is_send<T: Send>(_: &T) {}
    let server = Server::obliging();
    let api = server.connect();
    is_send(&api);
    std::thread::spawn(move || api.boot(&boot()).map(drop).unwrap()).join().unwrap();
}
