//! `mvm run`, and terminals.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::rig::{ONE, Ran, Rig, finish, on_a_host, signal};

fn left(rig: &Rig) -> usize {
    std::fs::read_dir(rig.run_dir().join("throwaway")).map_or(0, Iterator::count)
}

#[test]
fn a_throwaway_machine_is_gone_whatever_happens() {
    on_a_host(2, |rig| {
        let ran = rig.ran(&["run", "--", "sh", "-c", "uname -s; exit 3"]);
        assert_eq!((ran.code(), ran.text().as_str(), ran.err.as_str()), (3, "Linux\n", ""));
        eprintln!("mvm run took {:?}", ran.took);
        assert_eq!((rig.machines().len(), left(rig)), (0, 0));
        let ran = rig.ran_with(&["run", "-i", "--mem", "192", "--", "sh", "-c", "cat; grep MemTotal /proc/meminfo >&2"], b"through\n");
        assert_eq!((ran.code(), ran.text().as_str()), (0, "through\n"));
        assert!(ran.err.contains("MemTotal"));

        for how in [Signal::TERM, Signal::INT, Signal::KILL] {
            let child = rig.mvm(&["run", "--", "sleep", "1000"]).spawn().unwrap();
            rig.eventually("it runs", Duration::from_secs(60), || rig.machines().len() == 1);
            // It is booting, or its command runs: both must do.
            std::thread::sleep(Duration::from_millis(if how == Signal::TERM { 200 } else { 4000 }));
            let began = Instant::now();
            signal(i32::try_from(child.id()).unwrap(), how);
            rig.eventually("QEMU is gone", Duration::from_secs(1), || rig.machines().is_empty());
            eprintln!("{how:?}: gone after {:?}", began.elapsed());
            let ran = finish(child, "mvm run");
            if how != Signal::KILL {
                assert_eq!(ran.code(), 130, "{}", ran.err);
            }
            assert_eq!(left(rig), 0, "{how:?}");
        }
        rig.assert_nothing_left();
    });
}

/// Runs a script on a terminal of its own, typing what is given once the output has what is waited for.
fn on_a_terminal(rig: &Rig, script: &str, typed: &[(&str, &[u8])]) -> Ran {
    let log = rig.path("typescript");
    let mut child = rig.command("script", &["-qefc", script, log.to_str().unwrap()]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for (after, bytes) in typed {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !std::fs::read_to_string(&log).unwrap_or_default().contains(after) {
            assert!(Instant::now() < deadline, "{after:?} was not seen: {:?}", std::fs::read_to_string(&log));
            std::thread::sleep(Duration::from_millis(10));
        }
        stdin.write_all(bytes).unwrap();
        stdin.flush().unwrap();
    }
    finish(child, script)
}

#[test]
fn a_terminal_has_its_size_passes_keys_and_is_as_before() {
    on_a_host(1, |rig| {
        rig.apply(ONE);
        let at = rig.only();
        let mvm = env!("CARGO_BIN_EXE_mvm");
        let script = format!(
            "stty rows 33 cols 101; stty -a > {before}; {mvm} exec -it {at} -- sh -c 'stty size; tty; trap \"echo inter\"rupted INT; echo re\"\"ady; cat; exit 5'; echo code $?; stty -a > {after}",
            before = rig.path("before").display(),
            after = rig.path("after").display(),
        );
        // What is typed comes back from the terminal and then from `cat`: only then is it `cat` that the key interrupts.
        let ran = on_a_terminal(rig, &script, &[("ready", b"go\n"), ("go\r\ngo", b"\x03")]);
        let said = ran.text();
        assert!(said.contains("33 101"), "{said}");
        assert!(said.contains("/dev/pts/"), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        assert!(said.contains("code 5"), "{said}");
        let terminal = |name: &str| std::fs::read_to_string(rig.path(name)).unwrap();
        assert_eq!(terminal("before"), terminal("after"));

        let ran = on_a_terminal(rig, &format!("{mvm} shell {at}; echo code $?"), &[("#", b"stty size; echo $((6*7))0; exit 9\n")]);
        assert!(ran.text().contains("420") && ran.text().contains("code 9"), "{}", ran.text());
        // Its window changes while it runs.
        let script = format!(
            "stty rows 20 cols 70; (sleep 2; stty rows 44 cols 122 < /dev/tty) & {mvm} exec -it {at} -- sh -c 'trap \"stty size; exit\" WINCH; echo re\"\"ady; while :; do sleep 0.1; done'"
        );
        let ran = on_a_terminal(rig, &script, &[]);
        assert!(ran.text().contains("44 122"), "{}", ran.text());
        // Without one, asking for one is refused.
        assert!(rig.fails(2, &["exec", "-it", &at, "--", "sh"]).contains("not a terminal"));
        rig.prune();
    });
}
