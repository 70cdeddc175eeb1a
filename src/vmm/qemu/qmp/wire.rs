//! What goes over the wire (QEMU 7.2, `qapi/*.json`).

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The commands that are used.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub(in crate::vmm::qemu) enum Command {
    /// Ends the negotiation.
    #[serde(rename = "qmp_capabilities")]
    QmpCapabilities,
    /// Stops the virtual CPUs and flushes the drives.
    Stop,
    /// Lets the virtual CPUs run.
    Cont,
    /// Asks whether they run.
    QueryStatus,
    /// Takes a descriptor sent along into a set of its own.
    AddFd {
        /// A name for display.
        opaque: String,
    },
    /// Closes a set's descriptors.
    #[serde(rename_all = "kebab-case")]
    RemoveFd {
        /// The set.
        fdset_id: u64,
    },
    /// Writes the state of all devices, without RAM.
    ///
    /// Nothing in it is of Xen; it is in every build (`qapi/migration.json`).
    XenSaveDevicesState {
        /// The file, here always of an fdset.
        filename: String,
        /// Whether the drives are given up to another QEMU afterwards.
        live: bool,
    },
}

impl Command {
    /// The command's name, as errors show it.
    pub(in crate::vmm::qemu) fn name(&self) -> &'static str {
        match self {
            Command::QmpCapabilities => "qmp_capabilities",
            Command::Stop => "stop",
            Command::Cont => "cont",
            Command::QueryStatus => "query-status",
            Command::AddFd { .. } => "add-fd",
            Command::RemoveFd { .. } => "remove-fd",
            Command::XenSaveDevicesState { .. } => "xen-save-devices-state",
        }
    }
}

/// A line from QEMU.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Message {
    /// The first one of a connection.
    Greeting {
        /// Version and capabilities.
        #[serde(rename = "QMP")]
        _qmp: serde_json::Map<String, serde_json::Value>,
    },
    /// A command was done.
    Return {
        /// What it returned.
        #[serde(rename = "return")]
        value: serde_json::Value,
    },
    /// A command was not done.
    Error {
        /// Why.
        error: Refusal,
    },
    /// Something happened.
    Event(Event),
}

/// Why QEMU did not do a command.
#[derive(Debug, Deserialize)]
pub(super) struct Refusal {
    /// A coarse class, nearly always `GenericError`.
    pub class: String,
    /// For people.
    pub desc: String,
}

/// Something that happened in the virtual machine.
#[derive(Debug, Deserialize)]
pub(super) struct Event {
    /// What, e.g. `STOP`.
    pub event: String,
}

/// What `query-status` returns.
#[derive(Debug, Deserialize)]
pub(in crate::vmm::qemu) struct Status {
    /// The state.
    pub status: RunState,
}

/// Whether the virtual CPUs run, and if not, why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::vmm::qemu) enum RunState {
    /// They run.
    Running,
    /// Stopped on request.
    Paused,
    /// Never started (`-S`).
    Prelaunch,
    /// A device state is being read.
    Inmigrate,
    /// Any other; none of them runs.
    #[serde(other)]
    Other,
}

/// What `add-fd` returns.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::vmm::qemu) struct AddedFd {
    /// The set that was made.
    pub fdset_id: u64,
}

/// Reads one line.
pub(super) fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_written_as_qemu_wants_them() {
        let text = |c: Command| serde_json::to_string(&c).unwrap();
        insta::assert_snapshot!(
            [
                Command::QmpCapabilities,
                Command::Stop,
                Command::Cont,
                Command::QueryStatus,
                Command::AddFd { opaque: "device.state".into() },
                Command::RemoveFd { fdset_id: 7 },
                Command::XenSaveDevicesState { filename: "/dev/fdset/7".into(), live: false },
            ]
            .map(|command| {
                let name = command.name();
                let text = text(command);
                assert!(text.contains(&format!("\"execute\":\"{name}\"")), "{text} is not {name}");
                text
            })
            .join("\n")
        );
    }

    #[test]
    fn messages_are_told_apart() {
        let parse = |text: &str| super::parse::<Message>(text.as_bytes()).unwrap();
        assert!(matches!(
            parse(r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7}},"capabilities":["oob"]}}"#),
            Message::Greeting { .. }
        ));
        assert!(matches!(parse(r#"{"return":{}}"#), Message::Return { .. }));
        assert!(matches!(parse(r#"{"error":{"class":"GenericError","desc":"no"}}"#), Message::Error { .. }));
        let event = parse(r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"STOP"}"#);
        assert!(matches!(event, Message::Event(Event { event }) if event == "STOP"));
        let event = parse(r#"{"timestamp":{"seconds":1,"microseconds":2},"event":"VSERPORT_CHANGE","data":{"open":true,"id":"port0"}}"#);
        assert!(matches!(event, Message::Event(Event { event }) if event == "VSERPORT_CHANGE"));
    }

    #[test]
    fn an_unknown_state_is_not_running() {
        let status: Status = serde_json::from_str(r#"{"status":"guest-panicked","singlestep":false,"running":false}"#).unwrap();
        assert_eq!(status.status, RunState::Other);
    }
}
