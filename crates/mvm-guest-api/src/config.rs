//! `config.json`, by which a guest learns who it is.
//!
//! Written by the host onto the config drive at every start and wake. Unknown fields are ignored by the agent, so
//! that an older image can be started by a newer host; another `version` is refused.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::limits;

/// The version this crate reads and writes.
pub const VERSION: u32 = 1;

/// The whole document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Always [`VERSION`].
    pub version: u32,
    /// Whose guest this is.
    pub identity: Identity,
    /// The role of the pool.
    pub role: String,
    /// The profile of the pool.
    pub profile: String,
    /// What the guest calls itself.
    pub hostname: String,
    /// Grows with every change of this document for one instance.
    pub config_version: u64,
    /// The tenant's epoch of secrets that the secrets drive holds.
    pub secrets_epoch: u64,
    /// Absent: a guest without a network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Whether the guest forwards packets for its tenant (gateways).
    #[serde(default)]
    pub forward: bool,
    /// What the agent starts and keeps up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<Workload>,
    /// What must be there before the guest is ready.
    #[serde(default)]
    pub requires: Requires,
    /// What the agent does for the host: `exec`, `shell`, `copy`, `logs`. Absent: all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handlers: Option<Vec<String>>,
    /// systemd units that have to be active before the guest is ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<String>,
    /// What is left out because a secret is missing, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub not_enabled: Vec<String>,
}

/// Whose guest this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Identity {
    pub tenant: String,
    pub pool: String,
    pub instance: String,
    pub node: String,
}

/// The guest's one network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// As in `02:fc:00:00:00:03`; the guest takes it over when its device has another.
    pub mac: Mac,
    /// Address and prefix length.
    pub address: Ipv4Cidr,
    /// The default route.
    pub gateway: Ipv4Addr,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// In bytes; 0 leaves the device's own.
    #[serde(default)]
    pub mtu: u32,
}

/// What the agent starts and keeps up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Workload {
    /// Program and arguments; a program without a slash is looked up in `PATH`.
    pub command: Vec<String>,
    /// Added to the agent's small default environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What happens when it ends.
    #[serde(default)]
    pub restart: Restart,
    /// The first pause before it is started again, in milliseconds; doubles up to a minute. 0 takes one second.
    #[serde(default)]
    pub backoff_ms: u64,
}

/// What happens when the workload ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// Started again.
    #[default]
    Always,
    /// Started again unless it ended with code 0.
    OnFailure,
    /// Left.
    Never,
}

/// Drives that must be mounted before the guest is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Requires {
    #[serde(default)]
    pub data: bool,
    #[serde(default)]
    pub config: bool,
    #[serde(default)]
    pub secrets: bool,
}

/// An Ethernet address, written with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// An IPv4 address with the length of its network's prefix, written `10.240.0.3/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Cidr {
    /// The guest's own address.
    pub address: Ipv4Addr,
    /// 0 to 32.
    pub prefix: u8,
}

/// Why a document was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON of this shape.
    #[error("config.json is not a configuration of a guest")]
    Syntax(#[source] serde_json::Error),
    /// From another version of mvm.
    #[error("config.json has version {found}, and this agent reads {VERSION}")]
    Version {
        /// What it says.
        found: u64,
    },
    /// A value that cannot be.
    #[error("config.json: {0}")]
    Value(String),
}

impl GuestConfig {
    /// Reads and checks a document.
    ///
    /// # Errors
    /// When it is not JSON of this shape, has another version, or holds a value that cannot be used.
    pub fn parse(bytes: &[u8]) -> Result<GuestConfig, ConfigError> {
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        if bytes.len() as u64 > limits::MAX_CONFIG {
            return Err(ConfigError::Value(format!("{} bytes are more than {}", bytes.len(), limits::MAX_CONFIG)));
        }
        let version: Version = serde_json::from_slice(bytes).map_err(ConfigError::Syntax)?;
        if version.version != u64::from(VERSION) {
            return Err(ConfigError::Version { found: version.version });
        }
        let config: GuestConfig = serde_json::from_slice(bytes).map_err(ConfigError::Syntax)?;
        config.check()?;
        Ok(config)
    }

    /// The document as it goes onto the drive.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a document of strings and numbers can be written");
        bytes.push(b'\n');
        bytes
    }

    fn check(&self) -> Result<(), ConfigError> {
        let name = &self.hostname;
        let label = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(label) {
            return Err(ConfigError::Value(format!("hostname {name:?} is not 1 to 64 letters, digits, dots and hyphens")));
        }
        if let Some(workload) = &self.workload {
            if workload.command.is_empty() || workload.command[0].is_empty() {
                return Err(ConfigError::Value("workload.command names no program".into()));
            }
            let strings = workload.command.iter().chain(workload.env.values());
            if strings.chain(workload.env.keys()).any(|s| s.contains('\0')) {
                return Err(ConfigError::Value("workload holds a NUL".into()));
            }
            if workload.env.keys().any(|k| k.is_empty() || k.contains('=')) {
                return Err(ConfigError::Value("workload.env has an empty name or one with '='".into()));
            }
        }
        Ok(())
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let wrong = || format!("{text:?} is not an Ethernet address such as 02:fc:00:00:00:03");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = part.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u8::from_str_radix(part, 16).ok()).flatten().ok_or_else(wrong)?;
        }
        match parts.next() {
            None if bytes[0] & 1 == 0 => Ok(Mac(bytes)),
            None => Err(format!("{text:?} is a group address")),
            Some(_) => Err(wrong()),
        }
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        let [a, b, c, d, e, f] = mac.0;
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl TryFrom<String> for Ipv4Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let wrong = || format!("{text:?} is not an address with a prefix such as 10.240.0.3/24");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        if prefix.is_empty() || prefix.len() > 2 || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(wrong());
        }
        let cidr = Ipv4Cidr { address: address.parse().map_err(|_| wrong())?, prefix: prefix.parse().map_err(|_| wrong())? };
        (cidr.prefix <= 32).then_some(cidr).ok_or_else(wrong)
    }
}

impl From<Ipv4Cidr> for String {
    fn from(cidr: Ipv4Cidr) -> String {
        format!("{}/{}", cidr.address, cidr.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example() -> GuestConfig {
        GuestConfig {
            version: VERSION,
            identity: Identity { tenant: "acme".into(), pool: "web".into(), instance: "i-1a2b3c4d".into(), node: "n1".into() },
            role: "worker".into(),
            profile: "minimal".into(),
            hostname: "web-1a2b3c4d".into(),
            config_version: 3,
            secrets_epoch: 2,
            network: Some(Network {
                mac: Mac([2, 0xfc, 0, 0, 0, 3]),
                address: Ipv4Cidr { address: Ipv4Addr::new(10, 240, 0, 3), prefix: 24 },
                gateway: Ipv4Addr::new(10, 240, 0, 1),
                dns: vec![Ipv4Addr::new(10, 240, 0, 1)],
                mtu: 1500,
            }),
            forward: false,
            workload: Some(Workload {
                command: vec!["/bin/sleep".into(), "100".into()],
                env: BTreeMap::from([("A".into(), "b".into())]),
                restart: Restart::OnFailure,
                backoff_ms: 0,
            }),
            requires: Requires { data: true, config: true, secrets: true },
            handlers: Some(vec!["exec".into(), "logs".into()]),
            services: vec!["redis.service".into()],
            not_enabled: vec!["sync.service: secret sync-token is missing".into()],
        }
    }

    #[test]
    fn a_document_reads_back() {
        let config = example();
        assert_eq!(GuestConfig::parse(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let text = r#"{"version": 2, "anything": []}"#;
        let error = GuestConfig::parse(text.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "config.json has version 2, and this agent reads 1");
    }

    #[test]
    fn a_truncated_document_is_refused_at_every_byte() {
        let whole = example().to_json();
        for end in 0..whole.len() - 2 {
            assert!(GuestConfig::parse(&whole[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn values_that_cannot_be_are_refused() {
        for (from, to) in [
            ("web-1a2b3c4d", "a b"),
            ("10.240.0.3/24", "10.240.0.3/33"),
            ("10.240.0.3/24", "10.240.0.3"),
            ("02:fc:00:00:00:03", "03:fc:00:00:00:03"),
            ("02:fc:00:00:00:03", "02:fc:00:00:00:+3"),
            ("/bin/sleep", ""),
        ] {
            let text = String::from_utf8(example().to_json()).unwrap();
            assert!(text.contains(from));
            assert!(GuestConfig::parse(text.replace(from, to).as_bytes()).is_err(), "{to}");
        }
    }

    proptest! {
        #[test]
        fn addresses_read_back(mac: [u8; 6], ip: [u8; 4], prefix in 0u8..=32) {
            let mac = Mac([mac[0] & 0xfe, mac[1], mac[2], mac[3], mac[4], mac[5]]);
            prop_assert_eq!(Mac::try_from(String::from(mac)), Ok(mac));
            let cidr = Ipv4Cidr { address: ip.into(), prefix };
            prop_assert_eq!(Ipv4Cidr::try_from(String::from(cidr)), Ok(cidr));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), text in "\\PC{0,30}") {
            let _ = GuestConfig::parse(&bytes);
            let _ = Mac::try_from(text.clone());
            let _ = Ipv4Cidr::try_from(text);
        }
    }
}
