//! A microVM in each of its phases, and what each allows.

use std::error::Error;
use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use crate::boot::{Boot, Outputs, drive, network_interface};
use crate::connection::{Connection, Deadlines, Limit, Socket};
use crate::error::ApiError;
use crate::request::Request;
use crate::resources::{
    ActionType, Balloon, BalloonHintingStatus, BalloonStartCmd, BalloonStats, BalloonStatsUpdate, BalloonUpdate, BootSource, Drive,
    EntropyDevice, FirecrackerVersion, FullVmConfiguration, InstanceActionInfo, InstanceInfo, InstanceState, Logger, MachineConfiguration,
    MemoryHotplugStatus, Metrics, NetworkInterface, PartialDrive, PartialNetworkInterface, SerialDevice, SnapshotCreate, SnapshotLoad,
    SnapshotLoadParams, Vm, VmState, Vsock,
};
use crate::timeline::CallTiming;

/// Nothing but outputs is configured: a snapshot can still be loaded.
#[derive(Debug)]
pub enum Fresh {}
/// It is configured and has not booted.
#[derive(Debug)]
pub enum Preboot {}
/// Its vCPUs run.
#[derive(Debug)]
pub enum Running {}
/// Its vCPUs stand still.
#[derive(Debug)]
pub enum Paused {}
/// Nobody has asked.
#[derive(Debug)]
pub enum Unknown {}

mod phase {
    pub trait BeforeBoot {}
    impl BeforeBoot for super::Fresh {}
    impl BeforeBoot for super::Preboot {}
    pub trait Booted {}
    impl Booted for super::Running {}
    impl Booted for super::Paused {}
}

/// The API of one Firecracker process, in a phase that is known when this is compiled.
///
/// Every call blocks until it is answered, fails, or its deadline has passed. Not to be used within an async runtime.
pub struct Api<P> {
    connection: Box<Connection>,
    phase: PhantomData<fn() -> P>,
}

/// A change of phase that failed, and the microVM in the phase it is in as far as is known.
pub struct Failed<P> {
    /// The microVM.
    pub api: Api<P>,
    /// What went wrong.
    pub error: ApiError,
}

/// A microVM whose phase was asked for.
#[derive(Debug)]
pub enum Found {
    /// It has not booted. What is configured is not known, so that it cannot be asked to load.
    Preboot(Api<Preboot>),
    /// Its vCPUs run.
    Running(Api<Running>),
    /// Its vCPUs stand still.
    Paused(Api<Paused>),
}

impl Api<Fresh> {
    /// Connects to a process that was just started, as soon as it listens.
    ///
    /// # Errors
    /// When it does not listen before the deadline.
    pub fn connect(socket: &Path, deadlines: Deadlines) -> Result<Self, ApiError> {
        Self::connect_while(socket, deadlines, || true)
    }

    /// Like [`Api::connect`], and stops waiting when the process is no longer alive.
    ///
    /// # Errors
    /// When it ends or does not listen before the deadline.
    pub fn connect_while(socket: &Path, deadlines: Deadlines, mut is_alive: impl FnMut() -> bool) -> Result<Self, ApiError> {
        Connection::open(socket, deadlines, Socket::MayCome, &mut is_alive).map(|connection| Self::of(Box::new(connection)))
    }

    /// Gives up loading a snapshot, for configuring a boot.
    #[must_use]
    pub fn configure(self) -> Api<Preboot> {
        self.now()
    }

    /// Configures everything and boots. Returns when the vCPUs run, which is long before the guest is ready.
    ///
    /// # Errors
    /// When a call fails; the process is of no further use then.
    pub fn boot(self, boot: &Boot) -> Result<Api<Running>, Failed<Preboot>> {
        let mut api = self.configure();
        match api.connection.tell_all(boot.lanes()) {
            Ok(()) => api.start(),
            Err(error) => Err(Failed { api, error }),
        }
    }

    /// Loads a snapshot, whose vCPUs stand still.
    ///
    /// # Errors
    /// When a call fails. Firecracker ends when it began to load.
    pub fn load_snapshot(self, outputs: &Outputs, load: &SnapshotLoad) -> Result<Api<Paused>, Failed<Unknown>> {
        self.load(outputs, load, false).map(Api::now)
    }

    /// Loads a snapshot and lets it run.
    ///
    /// # Errors
    /// When a call fails. Firecracker ends when it began to load.
    pub fn load_and_resume(self, outputs: &Outputs, load: &SnapshotLoad) -> Result<Api<Running>, Failed<Unknown>> {
        self.load(outputs, load, true).map(Api::now)
    }

    fn load(mut self, outputs: &Outputs, load: &SnapshotLoad, resume_vm: bool) -> Result<Self, Failed<Unknown>> {
        let body = SnapshotLoadParams { load, resume_vm };
        let configured = self.connection.tell_all(vec![outputs.requests()]);
        match configured.and_then(|()| self.connection.tell(&Request::put("/snapshot/load", &body), Limit::Snapshot)) {
            Ok(()) => Ok(self),
            Err(error) => Err(Failed { api: self.now(), error }),
        }
    }
}

impl<P: phase::BeforeBoot> Api<P> {
    /// Says where the log goes.
    ///
    /// # Errors
    /// When the call fails.
    pub fn logger(&mut self, body: &Logger) -> Result<(), ApiError> {
        self.tell(&Request::put("/logger", body))
    }

    /// Says where metrics go; once.
    ///
    /// # Errors
    /// When the call fails.
    pub fn metrics(&mut self, body: &Metrics) -> Result<(), ApiError> {
        self.tell(&Request::put("/metrics", body))
    }

    /// Says where the guest's console goes.
    ///
    /// # Errors
    /// When the call fails.
    pub fn serial(&mut self, body: &SerialDevice) -> Result<(), ApiError> {
        self.tell(&Request::put("/serial", body))
    }
}

impl Api<Preboot> {
    /// Says how many vCPUs and how much memory.
    ///
    /// # Errors
    /// When the call fails.
    pub fn machine_config(&mut self, body: &MachineConfiguration) -> Result<(), ApiError> {
        self.tell(&Request::put("/machine-config", body))
    }

    /// Says what to boot.
    ///
    /// # Errors
    /// When the call fails.
    pub fn boot_source(&mut self, body: &BootSource) -> Result<(), ApiError> {
        self.tell(&Request::put("/boot-source", body))
    }

    /// Adds a drive, or changes the one of this name.
    ///
    /// # Errors
    /// When the call fails.
    pub fn drive(&mut self, body: &Drive) -> Result<(), ApiError> {
        self.tell(&drive(body))
    }

    /// Adds a network interface, or changes the one of this name.
    ///
    /// # Errors
    /// When the call fails.
    pub fn network_interface(&mut self, body: &NetworkInterface) -> Result<(), ApiError> {
        self.tell(&network_interface(body))
    }

    /// Says where the guest is reached.
    ///
    /// # Errors
    /// When the call fails.
    pub fn vsock(&mut self, body: &Vsock) -> Result<(), ApiError> {
        self.tell(&Request::put("/vsock", body))
    }

    /// Gives the guest random numbers.
    ///
    /// # Errors
    /// When the call fails.
    pub fn entropy(&mut self, body: &EntropyDevice) -> Result<(), ApiError> {
        self.tell(&Request::put("/entropy", body))
    }

    /// Gives the guest a balloon; after the machine configuration, by which it is judged.
    ///
    /// # Errors
    /// When the call fails.
    pub fn balloon(&mut self, body: &Balloon) -> Result<(), ApiError> {
        self.tell(&Request::put("/balloon", body))
    }

    /// Boots. Returns when the vCPUs run, which is long before the guest is ready.
    ///
    /// # Errors
    /// When the call fails.
    pub fn start(mut self) -> Result<Api<Running>, Failed<Preboot>> {
        let body = InstanceActionInfo { action_type: ActionType::InstanceStart };
        match self.connection.tell(&Request::put("/actions", &body), Limit::Start) {
            Ok(()) => Ok(self.now()),
            Err(error) => Err(Failed { api: self, error }),
        }
    }
}

impl<P: phase::Booted> Api<P> {
    /// Changes a drive's file or limits.
    ///
    /// # Errors
    /// When the call fails.
    pub fn patch_drive(&mut self, body: &PartialDrive) -> Result<(), ApiError> {
        self.tell(&Request::patch(format!("/drives/{}", body.drive_id), body))
    }

    /// Changes a network interface's limits.
    ///
    /// # Errors
    /// When the call fails.
    pub fn patch_network_interface(&mut self, body: &PartialNetworkInterface) -> Result<(), ApiError> {
        self.tell(&Request::patch(format!("/network-interfaces/{}", body.iface_id), body))
    }

    /// Changes the balloon's size, which the guest does in its own time.
    ///
    /// # Errors
    /// When the call fails.
    pub fn patch_balloon(&mut self, body: &BalloonUpdate) -> Result<(), ApiError> {
        self.tell(&Request::patch("/balloon", body))
    }

    /// Changes how often the guest's statistics are looked at.
    ///
    /// # Errors
    /// When the call fails, as it does when they were off at the boot.
    pub fn patch_balloon_statistics(&mut self, body: &BalloonStatsUpdate) -> Result<(), ApiError> {
        self.tell(&Request::patch("/balloon/statistics", body))
    }

    /// The guest's statistics.
    ///
    /// # Errors
    /// When the call fails, as it does when they were off at the boot.
    pub fn balloon_statistics(&mut self) -> Result<BalloonStats, ApiError> {
        self.connection.ask(&Request::get("/balloon/statistics"))
    }

    /// Asks the guest which pages are free.
    ///
    /// # Errors
    /// When the call fails, as it does when this was off at the boot.
    pub fn start_balloon_hinting(&mut self, body: &BalloonStartCmd) -> Result<(), ApiError> {
        self.tell(&Request::patch("/balloon/hinting/start", body))
    }

    /// How far that is.
    ///
    /// # Errors
    /// When the call fails, as it does when this was off at the boot.
    pub fn balloon_hinting_status(&mut self) -> Result<BalloonHintingStatus, ApiError> {
        self.connection.ask(&Request::get("/balloon/hinting/status"))
    }

    /// Ends it.
    ///
    /// # Errors
    /// When the call fails, as it does when this was off at the boot.
    pub fn stop_balloon_hinting(&mut self) -> Result<(), ApiError> {
        self.tell(&Request::bare_patch("/balloon/hinting/stop"))
    }

    /// How much of the memory that can be plugged is.
    ///
    /// # Errors
    /// When the call fails, as it does when there is none.
    pub fn memory_hotplug_status(&mut self) -> Result<MemoryHotplugStatus, ApiError> {
        self.connection.ask(&Request::get("/hotplug/memory"))
    }

    /// Writes the metrics now.
    ///
    /// # Errors
    /// When the call fails.
    pub fn flush_metrics(&mut self) -> Result<(), ApiError> {
        self.tell(&Request::put("/actions", &InstanceActionInfo { action_type: ActionType::FlushMetrics }))
    }

    fn set_state<To>(mut self, state: VmState) -> Result<Api<To>, Failed<P>> {
        match self.tell(&Request::patch("/vm", &Vm { state })) {
            Ok(()) => Ok(self.now()),
            Err(error) => Err(Failed { api: self, error }),
        }
    }
}

impl Api<Running> {
    /// Makes the vCPUs stand still.
    ///
    /// # Errors
    /// When the call fails.
    pub fn pause(self) -> Result<Api<Paused>, Failed<Running>> {
        self.set_state(VmState::Paused)
    }

    /// Asks the guest to restart, which ends Firecracker. A guest without a driver for an i8042 keyboard does not notice.
    ///
    /// # Errors
    /// When the call fails.
    pub fn send_ctrl_alt_del(&mut self) -> Result<(), ApiError> {
        self.tell(&Request::put("/actions", &InstanceActionInfo { action_type: ActionType::SendCtrlAltDel }))
    }
}

impl Api<Paused> {
    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// When the call fails.
    pub fn resume(self) -> Result<Api<Running>, Failed<Paused>> {
        self.set_state(VmState::Resumed)
    }

    /// Writes memory and state to files. The microVM stays, and may go on. The guest drops its vsock connections, of which
    /// the host's ends notice nothing: whoever has one is to connect anew after [`Api::resume`].
    ///
    /// # Errors
    /// When the call fails; the files may be there in part, and nothing tells them from whole ones.
    pub fn create_snapshot(&mut self, body: &SnapshotCreate) -> Result<(), ApiError> {
        self.connection.tell(&Request::put("/snapshot/create", body), Limit::Snapshot)
    }
}

impl Api<Unknown> {
    /// Connects to a process that listens already, such as one that another run of this program started.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn attach(socket: &Path, deadlines: Deadlines) -> Result<Self, ApiError> {
        Connection::open(socket, deadlines, Socket::MustBeThere, &mut || true).map(|connection| Self::of(Box::new(connection)))
    }

    /// Asks for the phase.
    ///
    /// # Errors
    /// When the call fails.
    pub fn find_phase(mut self) -> Result<Found, Failed<Unknown>> {
        match self.instance_info() {
            Ok(info) => Ok(match info.state {
                InstanceState::NotStarted => Found::Preboot(self.now()),
                InstanceState::Running => Found::Running(self.now()),
                InstanceState::Paused => Found::Paused(self.now()),
            }),
            Err(error) => Err(Failed { api: self, error }),
        }
    }
}

impl<P> Api<P> {
    fn of(connection: Box<Connection>) -> Self {
        Self { connection, phase: PhantomData }
    }

    fn now<To>(self) -> Api<To> {
        Api::of(self.connection)
    }

    fn tell(&mut self, request: &Request) -> Result<(), ApiError> {
        self.connection.tell(request, Limit::Call)
    }

    /// Forgets the phase, as after a call of which nobody knows whether it was done.
    #[must_use]
    pub fn forget_phase(self) -> Api<Unknown> {
        self.now()
    }

    /// The program's version.
    ///
    /// # Errors
    /// When the call fails.
    pub fn version(&mut self) -> Result<FirecrackerVersion, ApiError> {
        self.connection.ask(&Request::get("/version"))
    }

    /// What it is and what it is doing.
    ///
    /// # Errors
    /// When the call fails.
    pub fn instance_info(&mut self) -> Result<InstanceInfo, ApiError> {
        self.connection.ask(&Request::get("/"))
    }

    /// Its vCPUs and memory.
    ///
    /// # Errors
    /// When the call fails.
    pub fn get_machine_config(&mut self) -> Result<MachineConfiguration, ApiError> {
        self.connection.ask(&Request::get("/machine-config"))
    }

    /// Everything that was configured.
    ///
    /// # Errors
    /// When the call fails.
    pub fn vm_config(&mut self) -> Result<FullVmConfiguration, ApiError> {
        self.connection.ask(&Request::get("/vm/config"))
    }

    /// Its balloon.
    ///
    /// # Errors
    /// When the call fails, as it does when there is none.
    pub fn get_balloon(&mut self) -> Result<Balloon, ApiError> {
        self.connection.ask(&Request::get("/balloon"))
    }

    /// Changes the deadlines of the calls to come.
    pub fn set_deadlines(&mut self, deadlines: Deadlines) {
        self.connection.deadlines = deadlines;
    }

    /// The calls since the connection was made or this was last asked for, in the order in which they began; the last of
    /// them when there were more than some hundred.
    pub fn take_timeline(&mut self) -> Vec<CallTiming> {
        self.connection.timeline.take()
    }
}

impl<P> fmt::Debug for Api<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("phase", &std::any::type_name::<P>()).field("connection", &self.connection).finish()
    }
}

impl<P> fmt::Debug for Failed<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failed").field("api", &self.api).field("error", &self.error).finish()
    }
}

impl<P> fmt::Display for Failed<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<P> Error for Failed<P> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.error.source()
    }
}

impl<P> From<Failed<P>> for ApiError {
    fn from(failed: Failed<P>) -> ApiError {
        failed.error
    }
}
