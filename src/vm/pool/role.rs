//! What a role means: its place in the order, the drives it needs, what it may expose, and what is on in its guests.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use mvm_types::{Role, SecretName};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::config::{PoolDoc, PoolSpec};
pub use crate::net::Protocol;

/// The highest place in the order that a manifest can give.
pub const MAX_PRIORITY: u16 = 1000;

/// What a role means for the pools and instances that have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoleTraits {
    /// Its place in the order: lower comes up earlier and goes to sleep later; 0 to [`MAX_PRIORITY`].
    pub priority: u16,
    /// Whether an instance starts only with its configuration drive.
    pub requires_config_drive: bool,
    /// Whether an instance gets the tenant's secrets, and starts only with them.
    pub requires_secrets_drive: bool,
    /// How many instances of a pool a plan leaves running, whatever counts are wanted and however short memory is, as long as the
    /// pool is declared.
    #[serde(default)]
    pub min_running: u32,
    /// Seconds that an instance runs at least before a plan takes it down; a pool's own policy can only make it longer.
    #[serde(default)]
    pub min_running_seconds: u32,
    /// What a pool may expose outside its tenant.
    #[serde(default)]
    pub ports: Ports,
    /// What has to run before a guest counts as ready.
    #[serde(default)]
    pub services: Vec<Service>,
    /// What the guest agent does for the host.
    #[serde(default = "Handler::all")]
    pub vsock_handlers: BTreeSet<Handler>,
}

/// Which ports may be exposed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ports {
    /// Every one that a pool asks for.
    Any,
    /// These.
    Only(Vec<Port>),
}

impl Default for Ports {
    fn default() -> Self {
        Ports::Only(Vec::new())
    }
}

/// One port of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Its number, not 0.
    pub port: u16,
    /// Its protocol.
    #[serde(default)]
    pub protocol: Protocol,
}

/// A service of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The name of its systemd unit.
    pub unit: String,
    /// Secrets without which it is not enabled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretName>,
}

/// Something that the guest agent does for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Handler {
    /// Runs commands.
    Exec,
    /// Opens terminals.
    Shell,
    /// Sends and takes files.
    Copy,
    /// Shows logs.
    Logs,
}

impl Handler {
    /// Every handler there is.
    pub const ALL: [Handler; 4] = [Handler::Exec, Handler::Shell, Handler::Copy, Handler::Logs];

    fn all() -> BTreeSet<Handler> {
        Handler::ALL.into()
    }

    /// Returns the name used in documents.
    pub fn as_str(self) -> &'static str {
        match self {
            Handler::Exec => "exec",
            Handler::Shell => "shell",
            Handler::Copy => "copy",
            Handler::Logs => "logs",
        }
    }
}

impl RoleTraits {
    /// What mvm's own roles mean; any other means what a worker does and requires nothing, unless its manifest says more.
    pub fn built_in(role: Role) -> RoleTraits {
        let (config, secrets) = match role {
            Role::Gateway => (true, true),
            Role::Worker => (false, true),
            Role::Builder | Role::CapabilityImessage | Role::Custom(_) => (false, false),
        };
        RoleTraits {
            priority: role_priority(role),
            requires_config_drive: config,
            requires_secrets_drive: secrets,
            min_running: 0,
            min_running_seconds: 0,
            ports: if role == Role::Gateway { Ports::Any } else { Ports::default() },
            services: Vec::new(),
            vsock_handlers: Handler::all(),
        }
    }

    /// Tells whether a pool of the role may expose a port.
    pub fn may_expose(&self, port: Port) -> bool {
        match &self.ports {
            Ports::Any => true,
            Ports::Only(ports) => ports.contains(&port),
        }
    }
}

/// Traits as documents hold them: in one line, and one for all pools that hold the same line.
pub(super) mod shared {
    use super::{Arc, BTreeMap, Deserialize, Deserializer, Error, Mutex, PoisonError, RawValue, RoleTraits, Serialize};

    /// How many lines are remembered; a node has a few flakes with a few roles each.
    const MOST_REMEMBERED: usize = 1024;

    /// Writes them in one line, whatever is around it.
    pub fn serialize<S: serde::Serializer>(traits: &Option<Arc<RoleTraits>>, serializer: S) -> Result<S::Ok, S::Error> {
        let line = traits.as_ref().map(serde_json::value::to_raw_value).transpose().map_err(serde::ser::Error::custom)?;
        line.serialize(serializer)
    }

    /// Reads them; a line that was read before is not parsed again.
    ///
    /// # Errors
    /// When they are no traits.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<RoleTraits>>, D::Error> {
        // Few and alike in their beginnings at most: compared faster than hashed.
        static KNOWN: Mutex<BTreeMap<Box<str>, Arc<RoleTraits>>> = Mutex::new(BTreeMap::new());
        let Some(raw) = Option::<Box<RawValue>>::deserialize(deserializer)? else { return Ok(None) };
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(traits) = known.get(raw.get()) {
            return Ok(Some(traits.clone()));
        }
        let traits: Arc<RoleTraits> = Arc::new(serde_json::from_str(raw.get()).map_err(D::Error::custom)?);
        if known.len() == MOST_REMEMBERED {
            known.clear();
        }
        known.insert(raw.get().into(), traits.clone());
        Ok(Some(traits))
    }
}

/// What the roles of the pools that are planned mean.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, BTreeMap<Role, Arc<RoleTraits>>>);

impl Roles {
    /// Learns what a role means in a flake.
    pub fn learn(&mut self, flake_ref: &str, role: Role, traits: &Arc<RoleTraits>) {
        match self.0.get_mut(flake_ref) {
            // A thousand pools of one flake say the same.
            Some(roles) if roles.get(&role).is_some_and(|known| Arc::ptr_eq(known, traits) || known == traits) => {}
            Some(roles) => drop(roles.insert(role, traits.clone())),
            None => drop(self.0.insert(flake_ref.to_owned(), BTreeMap::from([(role, traits.clone())]))),
        }
    }

    fn learned(&self, spec: &PoolSpec) -> Option<&Arc<RoleTraits>> {
        self.0.get(&spec.flake_ref)?.get(&spec.role)
    }

    /// What the role of a pool means.
    pub fn of(&self, spec: &PoolSpec) -> Cow<'_, RoleTraits> {
        self.learned(spec).map_or_else(|| Cow::Owned(RoleTraits::built_in(spec.role)), |traits| Cow::Borrowed(&**traits))
    }

    /// Tells whether the role of a pool means something else than is written down of it.
    pub fn say_else(&self, spec: &PoolSpec, doc: &PoolDoc) -> bool {
        match (self.learned(spec), &doc.traits) {
            (None, None) => false,
            (Some(now), Some(then)) => !Arc::ptr_eq(now, then) && now != then,
            (Some(one), None) | (None, Some(one)) => **one != RoleTraits::built_in(spec.role),
        }
    }

    /// The place of a pool in the order: lower comes up earlier and goes to sleep later.
    pub fn priority(&self, spec: &PoolSpec) -> u16 {
        self.learned(spec).map_or_else(|| role_priority(spec.role), |traits| traits.priority)
    }
}

/// Returns the place in the order of mvm's own roles: lower comes up earlier and goes to sleep later. One that a manifest defines has
/// a worker's, unless the manifest gives it another.
pub fn role_priority(role: Role) -> u16 {
    match role {
        Role::Gateway => 0,
        Role::Builder => 1,
        Role::Worker | Role::Custom(_) => 2,
        Role::CapabilityImessage => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_come_first_and_connectors_last() {
        assert_eq!(Role::ALL.map(role_priority), [0, 1, 2, 3]);
        assert_eq!(role_priority("cache".parse().unwrap()), role_priority(Role::Worker));
    }

    #[test]
    fn documents_share_traits_that_read_the_same() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Doc {
            #[serde(default, skip_serializing_if = "Option::is_none", with = "shared")]
            traits: Option<Arc<RoleTraits>>,
        }
        let doc = Doc { traits: Some(Arc::new(RoleTraits { min_running: 3, ..RoleTraits::built_in(Role::Gateway) })) };
        let text = serde_json::to_string_pretty(&doc).unwrap();
        let read = || serde_json::from_str::<Doc>(&text).unwrap();
        let (one, other) = (read(), read());
        assert_eq!(one, doc);
        assert!(Arc::ptr_eq(&one.traits.unwrap(), &other.traits.unwrap()));
        assert_eq!(serde_json::from_str::<Doc>("{}").unwrap().traits, None);
        assert_eq!(serde_json::from_str::<Doc>("{\"traits\": null}").unwrap().traits, None);
        assert!(serde_json::from_str::<Doc>("{\"traits\": {\"priority\": -1}}").is_err());
    }

    #[test]
    fn roles_require_and_expose_what_the_picture_says() {
        let of = |role: Role| {
            let traits = RoleTraits::built_in(role);
            let exposes = traits.may_expose(Port { port: 443, protocol: Protocol::Tcp });
            (traits.requires_config_drive, traits.requires_secrets_drive, exposes)
        };
        assert_eq!(of(Role::Gateway), (true, true, true));
        assert_eq!(of(Role::Worker), (false, true, false));
        assert_eq!(of(Role::Builder), (false, false, false));
        assert_eq!(of(Role::CapabilityImessage), (false, false, false));
    }
}
