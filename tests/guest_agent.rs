//! The guest agent as a process, over sockets that behave like its serial ports, and the host's client of it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mvm::guest::{
    Drained, ExecEnd, ExecRequest, Follow, GuestClient, GuestControl, GuestError, LogSource, Purpose, Tty, TtySize, WakeFixup,
};

/// An agent that leaves the system alone; gone with its directory afterwards.
struct Agent {
    process: Child,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start(config: Option<&str>) -> Agent {
        let named = std::env::var_os(mvm::image::AGENT_VARIABLE);
        let program = mvm::image::find_agent(named.as_deref()).expect("the guest agent is built before the tests run");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        if let Some(config) = config {
            fs::write(at("config.json"), config).unwrap();
        }
        for hooks in ["drain.d", "pre-sleep.d", "post-wake.d"] {
            fs::create_dir_all(at("hooks").join(hooks)).unwrap();
        }
        fs::create_dir(at("busy")).unwrap();
        let mut command = Command::new(program);
        command.arg("serve");
        for number in 0..4 {
            command.arg("--listen").arg(at(&format!("agent.{number}.sock")));
        }
        command.arg("--config").arg(at("config.json")).arg("--hooks").arg(at("hooks")).arg("--busy").arg(at("busy"));
        // Says that a unit is active where there is a file of its name.
        fs::write(at("systemctl"), format!("#!/bin/sh\ntest -e {}/\"$3\"\n", dir.path().display())).unwrap();
        fs::set_permissions(at("systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
        command.arg("--systemctl").arg(at("systemctl"));
        let process = command.stdin(Stdio::null()).spawn().unwrap();
        Agent { process, dir }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn client(&self, purpose: Purpose) -> GuestClient {
        GuestClient::connect(self.dir.path(), purpose, soon()).unwrap()
    }

    fn hook(&self, at: &str, script: &str) {
        let path = self.at("hooks").join(at);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn config(more: &str) -> String {
    format!(
        r#"{{"version":1,"identity":{{"tenant":"t","pool":"p","instance":"i-00000001","node":"n"}},"role":"worker",
        "profile":"minimal","hostname":"h","config_version":7,"secrets_epoch":9{more}}}"#
    )
}

fn command(argv: &[&str]) -> ExecRequest {
    ExecRequest { argv: argv.iter().map(|arg| arg.as_bytes().to_vec()).collect(), ..ExecRequest::default() }
}

fn sh(script: &str) -> ExecRequest {
    command(&["sh", "-c", script])
}

/// Runs without input; returns the end, the output and the errors.
fn run(client: &mut GuestClient, request: ExecRequest) -> (ExecEnd, Vec<u8>, Vec<u8>) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let end = client.exec(request, None::<std::io::Empty>, &mut out, &mut err).unwrap();
    (end, out, err)
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = soon();
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn commands_have_their_streams_codes_and_surroundings() {
    let agent = Agent::start(None);
    let mut client = agent.client(Purpose::Interactive);
    assert_eq!(run(&mut client, sh("echo out; echo err >&2; exit 3")), (ExecEnd::Code(3), b"out\n".to_vec(), b"err\n".to_vec()));
    assert_eq!(run(&mut client, sh("kill -9 $$")).0, ExecEnd::Signal(9));
    assert_eq!(run(&mut client, command(&["/no/such/program"])).0, ExecEnd::Code(127));
    assert_eq!(run(&mut client, command(&["/etc/passwd"])).0, ExecEnd::Code(126));
    let mut request = sh("echo $A; pwd; id -u; cat");
    request.env = vec![b"A=b=c".to_vec()];
    request.cwd = Some("/usr".into());
    request.user = Some("65534".into());
    assert_eq!(run(&mut client, request).1, b"b=c\n/usr\n65534\n");
    let mut request = sh("true");
    request.user = Some("nobody-knows".into());
    let error = client.exec(request, None::<std::io::Empty>, &mut Vec::new(), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("no user"), "{error}");
}

#[test]
fn a_command_has_a_terminal_whose_size_follows() {
    let agent = Agent::start(None);
    let mut client = agent.client(Purpose::Interactive);
    let (sizes, windows) = tokio::sync::mpsc::channel(4);
    let (input, mut typed) = std::io::pipe().unwrap();
    let tty = Tty { size: Some(TtySize { rows: 20, cols: 70 }), term: "vt220".into() };
    let script =
        sh("echo $TERM; stty size; read line; echo got $line; trap 'stty size; exit 5' WINCH; echo set; while :; do sleep 0.02; done");
    /// Types when asked and changes the window when told.
    struct Screen<F: FnMut(&str)>(String, F);
    impl<F: FnMut(&str)> Write for Screen<F> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let new = String::from_utf8_lossy(bytes);
            self.0.push_str(&new);
            (self.1)(&self.0);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut step = 0;
    let mut screen = Screen(String::new(), |seen: &str| {
        if step == 0 && seen.contains("20 70") {
            step = 1;
            typed.write_all(b"hello\r").unwrap();
        }
        if step == 1 && seen.contains("set\r\n") {
            step = 2;
            sizes.try_send((33, 99)).unwrap();
        }
    });
    let end = client.exec_in_window(script, tty, windows, input, &mut screen).unwrap();
    let seen = screen.0;
    assert_eq!(end, ExecEnd::Code(5), "{seen}");
    assert!(seen.starts_with("vt220\r\n20 70\r\n") && seen.contains("got hello\r\n") && seen.ends_with("33 99\r\n"), "{seen:?}");
}

#[test]
fn large_input_and_output_pass_unchanged() {
    let agent = Agent::start(None);
    let mut client = agent.client(Purpose::Interactive);
    let sent: Vec<u8> = (0..5_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    let mut received = Vec::new();
    let input = std::io::Cursor::new(sent.clone());
    let end = client.exec(command(&["cat"]), Some(input), &mut received, &mut Vec::new()).unwrap();
    assert_eq!(end, ExecEnd::Code(0));
    assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
}

#[test]
fn a_background_process_does_not_hold_the_command() {
    let agent = Agent::start(None);
    let mut client = agent.client(Purpose::Interactive);
    let began = Instant::now();
    let (end, pid, _) = run(&mut client, sh("sleep 30 & echo $!"));
    assert_eq!(end, ExecEnd::Code(0));
    assert!(began.elapsed() < Duration::from_secs(10));
    let pid = String::from_utf8(pid).unwrap();
    assert_eq!(run(&mut client, command(&["kill", pid.trim()])).0, ExecEnd::Code(0), "it was still there");
}

/// Takes the first bytes and then fails, as a reader that has gone does.
struct FirstOnly(Vec<u8>);

impl Write for FirstOnly {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !self.0.is_empty() {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_command_whose_caller_went_away_is_killed_with_its_children() {
    let agent = Agent::start(None);
    let pids = {
        let mut client = agent.client(Purpose::Interactive);
        let mut out = FirstOnly(Vec::new());
        let script = sh("sleep 100 & echo $$ $!; while :; do echo more; sleep 0.05; done");
        client.exec(script, None::<std::io::Empty>, &mut out, &mut Vec::new()).unwrap_err();
        String::from_utf8(out.0).unwrap()
    };
    for pid in pids.lines().next().unwrap().split(' ') {
        until("the end of the process group", || {
            fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
        });
    }
}

#[test]
fn files_are_copied_both_ways() {
    let agent = Agent::start(None);
    let mut client = agent.client(Purpose::Interactive);
    let here = agent.at("here");
    fs::create_dir_all(here.join("sub")).unwrap();
    fs::write(here.join("sub/data"), vec![5; 300_000]).unwrap();
    std::os::unix::fs::symlink("data", here.join("sub/link")).unwrap();
    let there = agent.at("there");
    fs::create_dir(&there).unwrap();
    let copied = client.upload(&here, there.to_str().unwrap()).unwrap();
    assert_eq!((copied.entries, copied.bytes), (4, 300_000));
    let back = agent.at("back");
    client.download(there.join("here").to_str().unwrap(), &back).unwrap();
    assert_eq!(fs::read(back.join("sub/data")).unwrap(), vec![5; 300_000]);
    assert_eq!(fs::read_link(back.join("sub/link")).unwrap(), PathBuf::from("data"));
    let error = client.download("/no/such/file", &back).unwrap_err();
    assert!(error.to_string().contains("/no/such/file"), "{error}");
    let error = client.upload(&here, "/no/such/place/at/all").unwrap_err();
    assert!(error.to_string().contains("/no/such/place/at"), "{error}");
    let error = client.upload(&here, "relative").unwrap_err();
    assert!(error.to_string().contains("absolute"), "{error}");
    // The line is as good as before.
    assert_eq!(run(&mut client, command(&["true"])).0, ExecEnd::Code(0));
}

#[test]
fn the_workload_is_kept_up_and_its_output_kept() {
    let workload = r#","workload":{"command":["sh","-c","echo run; exit 4"],"restart":"on-failure","backoff_ms":10}"#;
    let agent = Agent::start(Some(&config(workload)));
    let mut client = agent.client(Purpose::Lifecycle);
    client.wait_ready(soon()).unwrap();
    until("two restarts", || {
        let status = client.status(Duration::from_secs(5)).unwrap();
        assert_eq!((status.config_version, status.secrets_epoch), (7, 9));
        status.workload.unwrap().restarts >= 2
    });
    let mut log = Vec::new();
    client.logs(LogSource::Workload, Follow::No, Some(1), &mut log).unwrap();
    assert_eq!(log, b"run\n");
    let mut log = FirstOnly(Vec::new());
    client.logs(LogSource::Workload, Follow::Yes, None, &mut log).unwrap();
    assert!(log.0.starts_with(b"run\nrun\n"));
    let mut log = Vec::new();
    client.logs(LogSource::Agent, Follow::No, None, &mut log).unwrap();
    let log = String::from_utf8(log).unwrap();
    assert!(log.contains("ready") && log.contains("workload ended with code 4"), "{log}");
}

#[test]
fn what_is_missing_is_named_and_not_waited_for_in_vain() {
    let agent = Agent::start(Some(&config(r#","requires":{"data":true}"#)));
    let mut client = agent.client(Purpose::Lifecycle);
    match client.wait_ready(Instant::now() + Duration::from_millis(100)).unwrap_err() {
        GuestError::NotReady { missing, .. } => assert_eq!(missing, "drive mvm-data"),
        other => panic!("{other}"),
    }
    let agent = Agent::start(Some(&config("").replace("\"version\":1", "\"version\":3")));
    let error = agent.client(Purpose::Lifecycle).wait_ready(Instant::now() + Duration::from_millis(100)).unwrap_err();
    assert!(error.to_string().contains("version 3"), "{error}");
}

#[test]
fn a_role_has_only_the_handlers_that_it_names() {
    let agent = Agent::start(Some(&config(r#","handlers":["logs"],"not_enabled":["sync.service: no token"]"#)));
    let mut client = agent.client(Purpose::Lifecycle);
    client.wait_ready(soon()).unwrap();
    let refused = client.exec(sh("true"), None::<std::io::Empty>, &mut Vec::new(), &mut Vec::new()).unwrap_err();
    assert!(matches!(refused, GuestError::Refused { .. }), "{refused:?}");
    assert!(refused.to_string().contains("role worker has no handler exec; it has: logs"), "{refused}");
    let refused = client.download("/etc/hostname", &agent.at("back")).unwrap_err();
    assert!(refused.to_string().contains("no handler copy"), "{refused}");
    let mut log = Vec::new();
    client.logs(LogSource::Agent, Follow::No, None, &mut log).unwrap();
    assert!(String::from_utf8(log).unwrap().contains("sync.service: no token"));
    // The lifecycle is no handler.
    assert_eq!(client.drain(Duration::from_secs(5)).unwrap(), Drained::Idle);
}

#[test]
fn a_guest_is_ready_when_its_services_are_active() {
    let agent = Agent::start(Some(&config(r#","services":["redis.service"]"#)));
    let mut client = agent.client(Purpose::Lifecycle);
    match client.wait_ready(Instant::now() + Duration::from_millis(300)).unwrap_err() {
        GuestError::NotReady { missing, .. } => assert_eq!(missing, "services: redis.service is not active"),
        other => panic!("{other}"),
    }
    fs::write(agent.at("redis.service"), "").unwrap();
    client.wait_ready(soon()).unwrap();
    client.prepare_sleep(soon()).unwrap();
    fs::remove_file(agent.at("redis.service")).unwrap();
    let woken = client.wake(&WakeFixup { entropy: [3; 64] }, Instant::now() + Duration::from_secs(1));
    assert!(woken.unwrap_err().to_string().contains("redis.service is not active"));
}

#[test]
fn drain_waits_for_commands_runs_hooks_and_says_what_is_busy() {
    let agent = Agent::start(None);
    agent.hook("drain.d/10-mark", &format!("touch {}", agent.at("drained").display()));
    agent.hook("drain.d/20-fails", "exit 6");
    agent.hook("drain.d/30-hangs", "sleep 100");
    let mut control = agent.client(Purpose::Lifecycle);
    let mut other = agent.client(Purpose::Interactive);
    let release = agent.at("release");
    let script = sh(&format!("while [ ! -e {} ]; do sleep 0.02; done", release.display()));
    let busy = std::thread::spawn(move || run(&mut other, script).0);
    until("the start of the command", || control.status(Duration::from_secs(5)).unwrap().running_execs == 1);
    match control.drain(Duration::from_millis(300)).unwrap() {
        Drained::Busy(busy) => {
            let text = busy.join("\n");
            assert!(text.contains("20-fails: ended with code 6") && text.contains("30-hangs: took too long"), "{text}");
            assert!(text.contains("command sh"), "{text}");
        }
        Drained::Idle => panic!("a command is running"),
    }
    assert!(agent.at("drained").exists());
    let mut third = agent.client(Purpose::Interactive);
    let error = third.exec(sh("true"), None::<std::io::Empty>, &mut Vec::new(), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("draining"), "{error}");
    fs::write(release, "").unwrap();
    fs::remove_file(agent.at("hooks/drain.d/30-hangs")).unwrap();
    assert_eq!(control.drain(Duration::from_secs(20)).unwrap(), Drained::Idle);
    assert_eq!(busy.join().unwrap(), ExecEnd::Code(0));
    control.undrain().unwrap();
    assert_eq!(run(&mut third, sh("true")).0, ExecEnd::Code(0));
}

#[test]
fn sleep_and_wake_take_readiness_away_and_give_it_back() {
    let agent = Agent::start(Some(&config("")));
    agent.hook("post-wake.d/mark", &format!("touch {}", agent.at("woke").display()));
    let mut control = agent.client(Purpose::Lifecycle);
    control.prepare_sleep(soon()).unwrap();
    let status = control.status(Duration::from_secs(5)).unwrap();
    assert_eq!((status.ready, status.missing), (false, vec!["wake".to_owned()]));
    fs::write(agent.at("config.json"), config("").replace("\"config_version\":7", "\"config_version\":8")).unwrap();
    fs::write(agent.at("busy/import"), "100").unwrap();
    control.wake(&WakeFixup { entropy: [3; 64] }, soon()).unwrap();
    let status = control.status(Duration::from_secs(5)).unwrap();
    assert!(status.ready && agent.at("woke").exists());
    assert_eq!((status.config_version, status.wakes, status.busy[0].holder.as_str()), (8, 1, "import"));
}

#[test]
fn garbage_on_a_line_harms_nobody() {
    let agent = Agent::start(None);
    // The file is there before anybody listens on it.
    until("the socket", || UnixStream::connect(agent.at("agent.0.sock")).is_ok());
    let raw = || UnixStream::connect(agent.at("agent.0.sock")).unwrap();
    let connect = b"MVM-CONNECT 0123456789abcdef\n";
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let oversized = [0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1];
    let attacks: [&[&[u8]]; 6] = [
        &[&[0xa5; 100_000]],
        &[b"MVM-CONNECT 01234"],
        &[connect, b"not http at all, and long enough to be told from it"],
        &[connect, preface, &[0x5a; 5000]],
        &[connect, preface, &oversized, &[0; 70_000]],
        &[connect, connect, b"PRI * HT"],
    ];
    for parts in attacks {
        let mut stream = raw();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        for part in parts {
            // The agent may have hung up by now.
            let _ = stream.write_all(part);
        }
        let _ = stream.read(&mut [0; 4096]);
        drop(stream);
        let mut client = agent.client(Purpose::Lifecycle);
        assert!(client.status(Duration::from_secs(5)).unwrap().ready);
    }
}
