//! Sentences of Firecracker 1.17.

pub const PREBOOT: &str = "The requested operation is not supported before starting the microVM.";
pub const POSTBOOT: &str = "The requested operation is not supported after starting the microVM.";
pub const NO_PCI: &str = "PCI is not enabled";
pub const VCPUS: &str =
    "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled.";
pub const MEMORY: &str = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.";
pub const MEMORY_BELOW_BALLOON: &str =
    "Machine config error: The memory size (MiB) is smaller than the previously set balloon device target size.";
pub const LOAD_TOO_LATE: &str = "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.";
pub const NOT_PAUSED: &str =
    "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running";
pub const NO_KERNEL: &str = "Start microvm error: Cannot start microvm without kernel configuration.";
pub const BAD_KERNEL: &str = "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or \
     invalid kernel image: Kernel Loader: failed to load bzImage kernel image: Kernel Loader: Invalid bzImage";
pub const DRIVE: &str = "Drive config error: Unable to create the virtio block device: ";
pub const BACKING_FILE: &str = "Virtio backend error: Error manipulating the backing file: ";
pub const NETWORK: &str = "Network config error: ";
pub const VSOCK: &str = "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: ";
pub const RESTORE: &str = "Load snapshot error: Failed to restore from snapshot: ";
pub const RESTORE_STATE: &str = "Failed to get snapshot state from file: ";
pub const RESTORE_DEVICES: &str = "Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: ";

pub fn json(error: &dyn std::fmt::Display) -> String {
    format!("An error occurred when deserializing the json body of a request: {error}.")
}
