//! `PUT /boot-source`.

use serde::{Deserialize, Serialize};

/// The body of `PUT /boot-source`. Paths are as Firecracker sees them: inside its jail.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootSource {
    /// An uncompressed ELF kernel; Firecracker opens it when it gets this.
    pub kernel_image_path: String,
    /// The initrd, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// The kernel's command line, at most 2,047 bytes with what Firecracker adds; Firecracker has one of its own when it is absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}
