//! The way to real guests.

use std::time::Instant;

use super::{GuestChannel, GuestClient, GuestControl, GuestError, Purpose};
use crate::vmm::VmHandle;

/// Reaches guests over the sockets in their run directories.
#[derive(Debug, Clone, Copy, Default)]
pub struct SerialChannel;

impl GuestChannel for SerialChannel {
    fn control(&self, vm: &VmHandle, deadline: Instant) -> Result<Box<dyn GuestControl>, GuestError> {
        Ok(Box::new(GuestClient::connect_while(&vm.run_dir, Purpose::Lifecycle, deadline, &|| vm.process.is_alive())?))
    }
}
