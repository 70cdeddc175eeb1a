//! `mvm-guest-agent`: PID 1 of the built-in image, or `mvm-guest-agent serve` as a service.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use mvm_guest_agent::agent::{Agent, Manage, Settings};
use mvm_guest_agent::service::Service;
use mvm_guest_agent::setup::{Occasion, set_up};
use mvm_guest_agent::{boot, network, notify, port, power, services, session};
use mvm_guest_api::{BUSY_DIR, CONFIG_DIR, CONFIG_FILE, HOOKS_DIR};

#[global_allocator]
static MEMORY: mvm_guest_agent::wiping::Wiping = mvm_guest_agent::wiping::Wiping;

const USAGE: &str = "usage: mvm-guest-agent serve [--listen SOCKET]... [--config FILE] [--hooks DIR] [--busy DIR] [--systemctl FILE]
  Serves mvm inside a guest. Without --listen it mounts mvm's drives, sets up the network, and serves the virtio-serial
  ports mvm.agent.N; with --listen it serves these unix sockets and leaves the system as it is.";

fn main() -> ExitCode {
    if std::process::id() == 1 {
        run_as_init();
    }
    let outcome = parse(std::env::args().skip(1)).and_then(|(settings, sockets)| {
        let runtime = runtime().map_err(|error| error.to_string())?;
        runtime.block_on(serve(settings, sockets))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("mvm-guest-agent: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run_as_init() -> ! {
    let mut outcome = boot::run().map_err(|error| match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    });
    if outcome.is_ok() {
        outcome = network::loopback();
    }
    if let Err(why) = outcome.and_then(|()| {
        let runtime = runtime().map_err(|error| error.to_string())?;
        runtime.block_on(serve(system_settings(), Vec::new()))
    }) {
        eprintln!("mvm-agent: {why}");
    }
    power::off()
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn system_settings() -> Settings {
    Settings {
        manage: Manage::System,
        hooks: HOOKS_DIR.into(),
        busy: BUSY_DIR.into(),
        config: Path::new(CONFIG_DIR).join(CONFIG_FILE),
        systemctl: "systemctl".into(),
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<(Settings, Vec<PathBuf>), String> {
    let mut settings = system_settings();
    let mut sockets = Vec::new();
    if arguments.next().as_deref() != Some("serve") {
        return Err(USAGE.into());
    }
    while let Some(option) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{option} needs a value\n{USAGE}"))?;
        match option.as_str() {
            "--listen" => sockets.push(value.into()),
            "--config" => settings.config = value.into(),
            "--hooks" => settings.hooks = value.into(),
            "--busy" => settings.busy = value.into(),
            "--systemctl" => settings.systemctl = value.into(),
            _ => return Err(format!("unknown option {option}\n{USAGE}")),
        }
    }
    if !sockets.is_empty() {
        settings.manage = Manage::Nothing;
    }
    Ok((settings, sockets))
}

async fn serve(settings: Settings, sockets: Vec<PathBuf>) -> Result<(), String> {
    let agent = Agent::new(settings);
    let reaping = agent.clone();
    tokio::spawn(async move { reaping.reaper.run().await });
    if agent.settings.manage == Manage::System {
        prepare_run(&agent);
    }
    set_up(&agent, Occasion::Boot);
    services::look(&agent).await;
    agent.state().holding = None;
    agent.note_ready();
    tokio::spawn(services::watch(agent.clone()));
    if let Err(error) = notify::started() {
        agent.say(&format!("the service manager was not told: {error}"));
    }
    let service = Service(agent.clone());
    if sockets.is_empty() {
        serve_ports(&agent, &service)?;
    }
    for path in sockets {
        let listener = tokio::net::UnixListener::bind(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let service = service.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // One after the other, as on a port. What breaks a session is its client's affair.
                let _ = session::serve_with_handshake(stream, service.clone()).await;
            }
        });
    }
    std::future::pending().await
}

fn prepare_run(agent: &Agent) {
    let make = |path: &str, mode: u32| {
        let made = std::fs::create_dir_all(path).and_then(|()| {
            // What an agent that was started again finds may be read-only by now.
            let is = std::fs::metadata(path)?.permissions().mode() & 0o7777;
            if is == mode { Ok(()) } else { std::fs::set_permissions(path, PermissionsExt::from_mode(mode)) }
        });
        if let Err(error) = made {
            agent.say(&format!("{path}: {error}"));
        }
    };
    // Any program of the guest may take a lease.
    make(BUSY_DIR, 0o1777);
    make(mvm_guest_api::SECRETS_DIR, 0o755);
}

fn serve_ports(agent: &Arc<Agent>, service: &Service) -> Result<(), String> {
    let devices = port::wait_for_devices();
    if devices.is_empty() && !Path::new("/dev/vsock").exists() {
        return Err("there is neither a virtio-serial port named mvm.agent.0 nor vsock; the VMM must provide one".into());
    }
    for (number, device) in devices {
        let port = port::Port::open(&device).map_err(|error| format!("{}: {error}", device.display()))?;
        let (service, agent) = (service.clone(), agent.clone());
        tokio::spawn(async move {
            if let Err(error) = session::serve_port(port, service).await {
                agent.say(&format!("port {number} failed: {error}"));
            }
        });
    }
    let (service, agent) = (service.clone(), agent.clone());
    tokio::spawn(async move {
        if let Err(error) = session::serve_vsock(service).await {
            agent.say(&format!("vsock failed: {error}"));
        }
    });
    Ok(())
}
