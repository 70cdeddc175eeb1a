//! The contract with Firecracker: its API's definition.
//!
//! The definition is Firecracker's `firecracker.yaml`, which is not part of this repository; `MVM_FIRECRACKER_SPEC` says
//! where it is. Without it these tests say that they did not run, and fail in CI.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

use mvm_firecracker::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use support::server::{Asked, DONE, Server, document};
use support::spec::Spec;
use support::strategies;
use support::values::boot;

/// Where the definition is.
const SPEC: &str = "MVM_FIRECRACKER_SPEC";

/// What mvm does not use. Whatever else the definition has is asked for here.
const UNUSED: [&str; 10] = [
    "GET /mmds",
    "PATCH /hotplug/memory",
    "PATCH /machine-config",
    "PATCH /mmds",
    "PATCH /pmem/{id}",
    "PUT /cpu-config",
    "PUT /hotplug/memory",
    "PUT /mmds",
    "PUT /mmds/config",
    "PUT /pmem/{id}",
];

/// A field of answers that is deprecated and not looked at.
const DEPRECATED: &str = "vsock_id";
/// A field that no definition has yet.
const LATER: &str = "from_a_later_version";

fn spec() -> Option<Spec> {
    match std::env::var_os(SPEC) {
        Some(path) => Some(Spec::read(Path::new(&path))),
        None => {
            eprintln!("not run: set {SPEC} to the path of Firecracker's firecracker.yaml (1.17)");
            None
        }
    }
}

/// Everything that one microVM can be asked.
#[derive(Clone, Debug)]
struct Whole {
    boot: Boot,
    load: SnapshotLoad,
    create: SnapshotCreate,
    drive: PartialDrive,
    interface: PartialNetworkInterface,
    amount_mib: u32,
    stats_polling_interval_s: u16,
    acknowledge_on_stop: bool,
}

fn whole() -> impl Strategy<Value = Whole> {
    let partial = (strategies::partial_drive(), strategies::partial_interface());
    (strategies::boot(), strategies::load(), strategies::create(), partial, any::<u32>(), any::<u16>(), any::<bool>()).prop_map(
        |(boot, load, create, (drive, interface), amount_mib, stats_polling_interval_s, acknowledge_on_stop)| Whole {
            boot,
            load,
            create,
            drive,
            interface,
            amount_mib,
            stats_polling_interval_s,
            acknowledge_on_stop,
        },
    )
}

/// Asks for everything, and for everything that can be read.
fn ask_everything(server: &Server, whole: &Whole) -> Result<(), ApiError> {
    let mut fresh = server.connect();
    fresh.version()?;
    fresh.instance_info()?;
    fresh.get_machine_config()?;
    fresh.vm_config()?;
    fresh.get_balloon()?;
    let mut running = fresh.boot(&whole.boot)?;
    running.patch_drive(&whole.drive)?;
    running.patch_network_interface(&whole.interface)?;
    running.patch_balloon(&BalloonUpdate { amount_mib: whole.amount_mib })?;
    running.patch_balloon_statistics(&BalloonStatsUpdate { stats_polling_interval_s: whole.stats_polling_interval_s })?;
    running.balloon_statistics()?;
    running.start_balloon_hinting(&BalloonStartCmd { acknowledge_on_stop: whole.acknowledge_on_stop })?;
    running.balloon_hinting_status()?;
    running.stop_balloon_hinting()?;
    running.memory_hotplug_status()?;
    running.flush_metrics()?;
    running.send_ctrl_alt_del()?;
    let mut paused = running.pause()?;
    paused.create_snapshot(&whole.create)?;
    paused.resume()?;
    server.connect().load_snapshot(&whole.boot.outputs, &whole.load)?;
    server.connect().load_and_resume(&Outputs::default(), &whole.load)?;
    Ok(())
}

/// The least that each answer has.
fn least(line: &str) -> Option<Value> {
    Some(match line {
        "GET /version" => json!({"firecracker_version": "1"}),
        "GET /" => json!({"app_name": "a", "id": "b", "state": "Running", "vmm_version": "1"}),
        "GET /machine-config" => json!({"vcpu_count": 1, "mem_size_mib": 128}),
        "GET /balloon" => json!({"amount_mib": 0, "deflate_on_oom": true}),
        "GET /balloon/statistics" => json!({"target_pages": 0, "actual_pages": 0, "target_mib": 0, "actual_mib": 0}),
        "GET /balloon/hinting/status" => json!({"host_cmd": 0}),
        "GET /vm/config" | "GET /hotplug/memory" => json!({}),
        _ => return None,
    })
}

fn obliging() -> Server {
    Server::start(|asked, stream| match least(&asked.line) {
        Some(body) => stream.write_all(&document(200, &body.to_string())).is_ok(),
        None => stream.write_all(DONE).is_ok(),
    })
}

/// Checks one request and returns the operation that it is of.
fn judge(spec: &Spec, asked: &Asked) -> Result<String, String> {
    let (method, path) = asked.line.split_once(' ').unwrap();
    let body: Option<Value> = (!asked.body.is_empty()).then(|| serde_json::from_str(&asked.body).unwrap());
    let pattern = spec.check_request(method, path, body.as_ref())?;
    if let (true, Some(body)) = (pattern.ends_with('}'), &body) {
        let id = body.get("drive_id").or(body.get("iface_id")).and_then(Value::as_str);
        if id != path.rsplit('/').next() {
            return Err(format!("{path} has the body of {id:?}"));
        }
    }
    Ok(format!("{method} {pattern}"))
}

#[test]
fn every_request_is_one_of_the_definition() {
    let Some(spec) = spec() else { return };
    let server = obliging();
    let mut used = BTreeSet::new();
    let checked = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() }).run(&whole(), |whole| {
        server.take();
        ask_everything(&server, &whole).map_err(|error| TestCaseError::fail(error.to_string()))?;
        for asked in server.take() {
            judge(&spec, &asked).map_err(|why| TestCaseError::fail(format!("{}: {why}: {}", asked.line, asked.body)))?;
        }
        Ok(())
    });
    checked.unwrap_or_else(|error| panic!("{error}"));

    let whole = Whole {
        boot: boot(),
        load: support::values::load(),
        create: SnapshotCreate { mem_file_path: "m".into(), snapshot_path: "s".into(), snapshot_type: SnapshotType::Full },
        drive: PartialDrive { drive_id: "data".try_into().unwrap(), path_on_host: None, rate_limiter: None },
        interface: PartialNetworkInterface { iface_id: "eth0".try_into().unwrap(), rx_rate_limiter: None, tx_rate_limiter: None },
        amount_mib: 1,
        stats_polling_interval_s: 1,
        acknowledge_on_stop: true,
    };
    ask_everything(&server, &whole).unwrap();
    used.extend(server.take().iter().map(|asked| judge(&spec, asked).unwrap()));
    let defined: BTreeSet<String> = spec.operations().iter().map(|(method, path, _)| format!("{method} {path}")).collect();
    let unused: BTreeSet<String> = UNUSED.map(String::from).into();
    assert_eq!(used, &defined - &unused, "what is asked for is what is defined, but for what mvm does not use");
}

type Read = dyn Fn(&mut Api<Running>) -> Result<Value, ApiError>;

fn written<T: serde::Serialize>(value: Result<T, ApiError>) -> Result<Value, ApiError> {
    value.map(|value| serde_json::to_value(value).unwrap())
}

/// How each answer is read.
fn readers() -> BTreeMap<&'static str, Box<Read>> {
    let mut readers: BTreeMap<&str, Box<Read>> = BTreeMap::new();
    readers.insert("/", Box::new(|api| written(api.instance_info())));
    readers.insert("/version", Box::new(|api| written(api.version())));
    readers.insert("/machine-config", Box::new(|api| written(api.get_machine_config())));
    readers.insert("/vm/config", Box::new(|api| written(api.vm_config())));
    readers.insert("/balloon", Box::new(|api| written(api.get_balloon())));
    readers.insert("/balloon/statistics", Box::new(|api| written(api.balloon_statistics())));
    readers.insert("/balloon/hinting/status", Box::new(|api| written(api.balloon_hinting_status())));
    readers.insert("/hotplug/memory", Box::new(|api| written(api.memory_hotplug_status())));
    readers
}

/// Whether everything that was sent was understood, nulls and what is unknown aside.
fn is_kept(sent: &Value, read: &Value) -> bool {
    match (sent, read) {
        (Value::Object(sent), read) => sent
            .iter()
            .filter(|(name, value)| !value.is_null() && *name != LATER && *name != DEPRECATED)
            .all(|(name, value)| read.get(name).is_some_and(|read| is_kept(value, read))),
        (Value::Array(sent), Value::Array(read)) => sent.len() == read.len() && sent.iter().zip(read).all(|(s, r)| is_kept(s, r)),
        (sent, read) => sent == read,
    }
}

#[test]
fn every_answer_of_the_definition_is_read() {
    let Some(spec) = spec() else { return };
    let next = Arc::new(Mutex::new((200_u16, String::new())));
    let answer = next.clone();
    let server = Server::start(move |asked, stream| match asked.line.starts_with("GET") {
        true => {
            let (status, body) = answer.lock().unwrap().clone();
            stream.write_all(&document(status, &body)).is_ok()
        }
        false => stream.write_all(DONE).is_ok(),
    });
    let mut api = server.connect().boot(&boot()).unwrap();
    let readers = readers();
    let mut read = BTreeSet::new();
    for (method, path, operation) in spec.operations() {
        let responses = operation["responses"].as_object().unwrap();
        for (status, response) in responses.iter().filter(|(_, response)| !response["schema"].is_null()) {
            let status = status.parse().unwrap_or(500_u16);
            let is_error = status >= 400;
            // A fault is read alike whatever was asked.
            let reader = if is_error {
                &readers["/"]
            } else if let Some(reader) = readers.get(path.as_str()) {
                reader
            } else {
                continue;
            };
            let runs = if is_error { 8 } else { 200 };
            for seed in 0..runs {
                let mut state = seed * 2_654_435_761_u64 + 1;
                let mut choose = |among: usize| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    usize::try_from(state >> 33).unwrap() % among
                };
                let sent = spec.example(&response["schema"], &mut choose);
                *next.lock().unwrap() = (status, sent.to_string());
                match reader(&mut api) {
                    Ok(value) => assert!(!is_error && is_kept(&sent, &value), "{path}: {sent} was read as {value}"),
                    Err(error) => {
                        let words = sent["fault_message"].as_str().unwrap_or("it gave no reason");
                        assert!(is_error && error.fault() == Some(words), "{path}: {sent}: {error}");
                    }
                }
            }
            if !is_error {
                read.insert(format!("{method} {path}"));
            }
        }
    }
    let answered = |(method, path, operation): &(String, String, &Value)| {
        (!operation["responses"]["200"]["schema"].is_null()).then(|| format!("{method} {path}"))
    };
    let defined: BTreeSet<String> = spec.operations().iter().filter_map(answered).collect();
    assert_eq!(read, &defined - &BTreeSet::from(["GET /mmds".to_owned()]), "every answer that mvm can ask for was read");
}

/// A definition that needs no file, to judge the judge.
const SMALL: &str = r##"
paths:
  /things/{id}:
    put:
      parameters:
        - {name: id, in: path, required: true, type: string}
        - {name: body, in: body, required: true, schema: {$ref: "#/definitions/Thing"}}
      responses:
        204: {description: done}
    get:
      responses:
        200: {description: it, schema: {$ref: "#/definitions/Thing"}}
definitions:
  Thing:
    type: object
    required: [kind, count]
    properties:
      kind: {type: string, enum: [A, B]}
      count: {type: integer, minimum: 1, maximum: 3}
      parts: {type: array, items: {$ref: "#/definitions/Thing"}}
      on: {type: boolean}
      names: {type: object, additionalProperties: {type: string}}
"##;

#[test]
fn what_is_not_defined_is_found() {
    let spec = Spec::parse(SMALL);
    let put = |path: &str, body: Value| spec.check_request("PUT", path, Some(&body));
    let good = json!({"kind": "A", "count": 3, "parts": [{"kind": "B", "count": 1}], "on": true, "names": {"x": "y"}});
    assert_eq!(put("/things/a", good), Ok("/things/{id}".into()));
    for (bad, why) in [
        (json!([]), "is no object"),
        (json!({"kind": "A"}), "count is missing"),
        (json!({"kind": "C", "count": 1}), "is none of"),
        (json!({"kind": null, "count": 1}), "is not of type"),
        (json!({"kind": "A", "count": 0}), "less than"),
        (json!({"kind": "A", "count": 4}), "more than"),
        (json!({"kind": "A", "count": "1"}), "is not of type"),
        (json!({"kind": "A", "count": u64::MAX}), "is not of type"),
        (json!({"kind": "A", "count": 1, "on": "yes"}), "is not of type"),
        (json!({"kind": "A", "count": 1, "parts": {}}), "is no array"),
        (json!({"kind": "A", "count": 1, "parts": [{"kind": "A"}]}), "body.parts[0]: count is missing"),
        (json!({"kind": "A", "count": 1, "other": 1}), "other is not defined"),
        (json!({"kind": "A", "count": 1, "names": {"x": 1}}), "is not of type"),
    ] {
        let said = put("/things/a", bad.clone()).unwrap_err();
        assert!(said.contains(why), "{bad}: {said}");
    }
    assert!(put("/things", json!({"kind": "A", "count": 1})).unwrap_err().contains("is not defined"));
    assert!(put("/things/", json!({"kind": "A", "count": 1})).unwrap_err().contains("is not defined"));
    assert!(spec.check_request("PATCH", "/things/a", None).unwrap_err().contains("is not defined"));
    assert!(spec.check_request("PUT", "/things/a", None).unwrap_err().contains("needs a body"));
    assert!(spec.check_request("GET", "/things/a", Some(&json!({}))).unwrap_err().contains("has no body"));
}
