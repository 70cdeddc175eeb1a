//! `fake-jailer`: what Firecracker's jailer does that mvm depends on, for tests where there is no release of it.
//!
//! ```text
//!  B/<name>/<id>/root/   made, the program copied into it, /dev/net/tun and /dev/kvm where the host has them, /run
//!  new mount namespace, pivot_root, limits, gid, uid, then: /<name> --id <id> --start-time-us 0 <what follows `--`>
//! ```
//!
//! What it refuses, it refuses in the jailer's order: leftovers of an earlier jail, first of all.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::fs::{FileType, Mode, makedev, mknodat};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, unmount};
use rustix::process::{Resource, Rlimit, chdir, pivot_root, setrlimit};
use rustix::thread::{UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe};

/// What it is told.
#[derive(Default)]
struct Options {
    id: String,
    exec_file: PathBuf,
    base: PathBuf,
    uid: u32,
    gid: u32,
    limits: Vec<(Resource, u64)>,
    rest: Vec<OsString>,
}

fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1)).and_then(|options| jail(&options)) {
        Ok(never) => match never {},
        Err(why) => {
            eprintln!("{why}\nError: {why:?}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Options, String> {
    let mut options = Options { base: "/srv/jailer".into(), ..Options::default() };
    while let Some(argument) = arguments.next() {
        let name = argument.to_string_lossy().into_owned();
        if name == "--" {
            options.rest.extend(arguments.by_ref());
            break;
        }
        let value = arguments.next().ok_or_else(|| format!("The argument '{name}' requires a value, but none was supplied."))?;
        let text = value.to_string_lossy().into_owned();
        let number = |what: &str| text.parse().map_err(|_| format!("Invalid {what}: {text}"));
        match name.as_str() {
            "--id" => options.id = text,
            "--exec-file" => options.exec_file = value.into(),
            "--chroot-base-dir" => options.base = value.into(),
            "--uid" => options.uid = number("uid")?,
            "--gid" => options.gid = number("gid")?,
            "--resource-limit" => {
                let (kind, limit) = text.split_once('=').ok_or_else(|| format!("Invalid resource argument: {text}"))?;
                let limit = limit.parse().map_err(|_| format!("Invalid resource argument: {text}"))?;
                let resource = match kind {
                    "fsize" => Resource::Fsize,
                    "no-file" => Resource::Nofile,
                    _ => return Err(format!("Invalid resource argument: {kind}")),
                };
                options.limits.push((resource, limit));
            }
            _ => return Err(format!("Found argument '{name}' which wasn't expected, or isn't valid in this context.")),
        }
    }
    let plain = |id: &str| !id.is_empty() && id.len() <= 64 && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if !plain(&options.id) {
        return Err(format!("Invalid instance ID: {}", options.id));
    }
    Ok(options)
}

fn jail(options: &Options) -> Result<std::convert::Infallible, String> {
    let name = options.exec_file.file_name().ok_or("Failed to extract filename from the executable's path")?;
    if !name.to_string_lossy().contains("firecracker") {
        return Err(format!(
            "Invalid filename. The filename of `--exec-file` option must contain \"firecracker\": {}",
            name.to_string_lossy()
        ));
    }
    let at = |what: String| move |error: io::Error| format!("{what}: {error}");
    let root = options.base.join(name).join(&options.id).join("root");
    fs::create_dir_all(&root).map_err(at(format!("Failed to create directory {}", root.display())))?;
    own(&root, 0o700, options)?;
    let program = root.join(name);
    fs::copy(&options.exec_file, &program).map_err(at(format!(
        "Failed to copy {} to {}",
        options.exec_file.display(),
        program.display()
    )))?;
    own(&program, 0o755, options)?;
    for (resource, limit) in &options.limits {
        setrlimit(*resource, Rlimit { current: Some(*limit), maximum: Some(*limit) })
            .map_err(|error| at("Failed to set limit".into())(error.into()))?;
    }
    enter(&root)?;
    let devices = [("/dev/net/tun", 10, 200), ("/dev/kvm", 10, 232), ("/dev/urandom", 1, 9)];
    for dir in ["/dev", "/dev/net", "/run"] {
        fs::create_dir_all(dir).map_err(at(format!("Failed to create directory {dir}")))?;
        own(Path::new(dir), 0o700, options)?;
    }
    for (path, major, minor) in devices {
        mknodat(rustix::fs::CWD, path, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(major, minor))
            .map_err(|error| at(format!("Failed to create {path} via mknod inside the jail"))(error.into()))?;
        own(Path::new(path), 0o600, options)?;
    }
    let pid = "/firecracker.pid";
    let file = fs::File::options().write(true).create_new(true).open(pid).map_err(at(format!("Failed to open file {pid}")))?;
    io::Write::write_all(&mut &file, std::process::id().to_string().as_bytes()).map_err(at(pid.to_owned()))?;
    drop(file);
    become_user(options).map_err(at("Failed to become another user".to_owned()))?;
    let mut command = Command::new(Path::new("/").join(name));
    command.env_clear().arg("--id").arg(&options.id).args(["--start-time-us", "0", "--start-time-cpu-us", "0"]).args(&options.rest);
    Err(format!("Failed to exec into Firecracker: {}", command.exec()))
}

fn own(path: &Path, mode: u32, options: &Options) -> Result<(), String> {
    let done = fs::set_permissions(path, fs::Permissions::from_mode(mode)).and_then(|()| chown(path, Some(options.uid), Some(options.gid)));
    done.map_err(|error| format!("Failed to change owner for {}: {error}", path.display()))
}

/// Makes the jail the only file system there is.
fn enter(root: &Path) -> Result<(), String> {
    let entered = || -> rustix::io::Result<()> {
        // SAFETY: this process has one thread.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        mount_bind_recursive(root, root)?;
        chdir(root)?;
        rustix::fs::mkdir("old_root", Mode::RWXU)?;
        pivot_root(".", "old_root")?;
        chdir("/")?;
        unmount("old_root", UnmountFlags::DETACH)?;
        rustix::fs::rmdir("old_root")
    };
    entered().map_err(|error| format!("Failed to pivot root: {error}"))
}

fn become_user(options: &Options) -> io::Result<()> {
    let (uid, gid) = (rustix::process::Uid::from_raw(options.uid), rustix::process::Gid::from_raw(options.gid));
    // Everything that is open goes, but for the standard streams.
    // SAFETY: no descriptor above 2 is used after this.
    if unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0_u32) } != 0 {
        return Err(io::Error::last_os_error());
    }
    set_thread_groups(&[])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}
