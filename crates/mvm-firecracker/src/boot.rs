//! Everything that is configured before a boot or a load.

use crate::request::Request;
use crate::resources::{
    Balloon, BootSource, Drive, EntropyDevice, Logger, MachineConfiguration, Metrics, NetworkInterface, SerialDevice, Vsock,
};

/// Where a microVM writes to: what may be configured before a snapshot is loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outputs {
    /// Its log.
    pub logger: Option<Logger>,
    /// Its metrics.
    pub metrics: Option<Metrics>,
    /// The guest's console.
    pub serial: Option<SerialDevice>,
}

/// A microVM as it is before it boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// Where it writes to.
    pub outputs: Outputs,
    /// vCPUs and memory.
    pub machine_config: MachineConfiguration,
    /// Kernel, initrd and command line.
    pub boot_source: BootSource,
    /// Drives, in the order in which the guest finds them; the root device is before all others.
    pub drives: Vec<Drive>,
    /// Network interfaces, in the order in which the guest finds them.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The way to the guest agent.
    pub vsock: Option<Vsock>,
    /// Random numbers for the guest.
    pub entropy: Option<EntropyDevice>,
    /// The balloon.
    pub balloon: Option<Balloon>,
}

impl Outputs {
    pub(crate) fn requests(&self) -> Vec<Request> {
        let logger = self.logger.iter().map(|body| Request::put("/logger", body));
        let metrics = self.metrics.iter().map(|body| Request::put("/metrics", body));
        let serial = self.serial.iter().map(|body| Request::put("/serial", body));
        logger.chain(metrics).chain(serial).collect()
    }
}

impl Boot {
    /// The calls in lanes: within a lane the order counts, between lanes it does not.
    ///
    /// - The log comes first where anything is to be logged; the machine comes before the balloon, which is judged by it.
    /// - The order of drives and that of interfaces is the order in which the guest finds them.
    pub(crate) fn lanes(&self) -> Vec<Vec<Request>> {
        let mut machine = self.outputs.requests();
        machine.push(Request::put("/machine-config", &self.machine_config));
        machine.push(Request::put("/boot-source", &self.boot_source));
        machine.extend(self.balloon.iter().map(|body| Request::put("/balloon", body)));
        let drives: Vec<Request> = self.drives.iter().map(drive).collect();
        let mut others: Vec<Request> = self.network_interfaces.iter().map(network_interface).collect();
        others.extend(self.vsock.iter().map(|body| Request::put("/vsock", body)));
        others.extend(self.entropy.iter().map(|body| Request::put("/entropy", body)));
        [machine, drives, others].into_iter().filter(|lane| !lane.is_empty()).collect()
    }
}

pub(crate) fn drive(body: &Drive) -> Request {
    Request::put(format!("/drives/{}", body.drive_id), body)
}

pub(crate) fn network_interface(body: &NetworkInterface) -> Request {
    Request::put(format!("/network-interfaces/{}", body.iface_id), body)
}
