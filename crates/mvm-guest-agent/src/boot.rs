//! What PID 1 of the built-in image does before anything else: from the initramfs to the root drive.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::mount::MountFlags;

/// Names the modules of the initramfs in the order in which they must be loaded: a file and the number of the virtio
/// device that it is for (0: always) on each line.
const MODULE_ORDER: &str = "/lib/modules/order";
/// The first drive is the root.
const ROOT_DEVICE: &str = "/dev/vda";
/// Where the root drive is mounted before it becomes the root.
const NEW_ROOT: &str = "/newroot";

/// Why a guest cannot start.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct BootError {
    what: String,
    #[source]
    source: io::Error,
}

fn at<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> BootError {
    let what = what.into();
    move |source| BootError { what, source: source.into() }
}

/// Makes the root drive the root and mounts what every program expects.
///
/// # Errors
/// What keeps the guest from starting.
pub fn run() -> Result<(), BootError> {
    mount("proc", "/proc", "proc", "")?;
    mount("sys", "/sys", "sysfs", "")?;
    mount("dev", "/dev", "devtmpfs", "mode=0755")?;
    load_modules()?;
    enter_root()?;
    mount("pts", "/dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666")?;
    mount("shm", "/dev/shm", "tmpfs", "mode=1777")?;
    mount("run", "/run", "tmpfs", "mode=0755")?;
    mount("tmp", "/tmp", "tmpfs", "mode=1777")?;
    Ok(())
}

fn mount(source: &str, target: &str, kind: &str, data: &str) -> Result<(), BootError> {
    let mut flags = MountFlags::NOSUID;
    if kind != "devtmpfs" && kind != "devpts" {
        flags |= MountFlags::NODEV;
    }
    if matches!(kind, "proc" | "sysfs" | "devpts") {
        flags |= MountFlags::NOEXEC;
    }
    // devtmpfs makes the directories below /dev itself only for devices.
    if !Path::new(target).exists() {
        fs::create_dir(target).map_err(at(target))?;
    }
    let data = std::ffi::CString::new(data).expect("mount options have no NUL");
    match rustix::mount::mount(source, target, kind, flags, Some(data.as_c_str())) {
        // A kernel with CONFIG_DEVTMPFS_MOUNT has done it itself where there is no initial RAM disk.
        Err(rustix::io::Errno::BUSY) if kind == "devtmpfs" => Ok(()),
        other => other.map_err(at(format!("mount {target}"))),
    }
}

fn load_modules() -> Result<(), BootError> {
    let order = match fs::read_to_string(MODULE_ORDER) {
        Ok(order) => order,
        // A kernel with everything built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(at(MODULE_ORDER)(error)),
    };
    let mut present = None;
    for line in order.lines() {
        let (name, device) = line.split_once(' ').unwrap_or((line, "0"));
        let device: u32 = device.parse().unwrap_or(0);
        // The transport is loaded by then, and has found the devices.
        if device != 0 && !present.get_or_insert_with(virtio_devices).contains(&device) {
            continue;
        }
        let path = Path::new("/lib/modules").join(name);
        let file = File::open(&path).map_err(at(path.display().to_string()))?;
        match rustix::system::finit_module(&file, c"", 0) {
            // A module for a device that is not there says so; that is no reason not to start.
            Ok(()) | Err(rustix::io::Errno::EXIST | rustix::io::Errno::NODEV) => {}
            Err(error) => return Err(at(path.display().to_string())(error)),
        }
    }
    Ok(())
}

/// The kinds of virtio devices that are there (virtio specification 1.2, chapter 5).
fn virtio_devices() -> BTreeSet<u32> {
    let Ok(entries) = fs::read_dir("/sys/bus/virtio/devices") else {
        return BTreeSet::new();
    };
    let kind = |entry: fs::DirEntry| {
        let text = fs::read_to_string(entry.path().join("device")).ok()?;
        u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
    };
    entries.flatten().filter_map(kind).collect()
}

fn enter_root() -> Result<(), BootError> {
    fs::create_dir_all(NEW_ROOT).map_err(at(NEW_ROOT))?;
    let flags = MountFlags::RDONLY;
    rustix::mount::mount(ROOT_DEVICE, NEW_ROOT, "ext4", flags, Some(c"noload"))
        .map_err(at(format!("mount {ROOT_DEVICE} as the root: is the first drive an ext4 file system?")))?;
    for kept in ["/proc", "/sys", "/dev"] {
        rustix::mount::mount_move(kept, format!("{NEW_ROOT}{kept}").as_str()).map_err(at(format!("move {kept}")))?;
    }
    // The initramfs stays in memory for ever; at least its modules need not.
    let _ = fs::remove_dir_all("/lib");
    rustix::process::chdir(NEW_ROOT).map_err(at(NEW_ROOT))?;
    rustix::mount::mount_move(".", "/").map_err(at("move the root"))?;
    rustix::process::chroot(".").map_err(at("chroot"))?;
    rustix::process::chdir("/").map_err(at("/"))
}
