//! Roles: what a microVM is for.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::id::{MAX_NAME, parse_label};
use crate::{IdError, nearest};

/// The role of a pool: which services run in its instances, which drives must exist, what is exposed, and
/// its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Role {
    /// The tenant's entry: forwards for its tenant.
    Gateway,
    /// Builds images; no exposure, nothing kept.
    Builder,
    /// Runs the tenant's workload.
    #[default]
    Worker,
    /// A connector that needs another platform; isolated to its tenant.
    CapabilityImessage,
    /// One that the manifest of a flake defines.
    Custom(RoleName),
}

/// The name of a role that mvm itself does not know: a label of at most 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RoleName {
    /// Padded with NUL, which no label holds.
    bytes: [u8; MAX_NAME],
}

/// A name that is none of the roles that there are.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a role; roles are gateway, builder, worker, capability-imessage{}", suggest(.given))]
pub struct RoleError {
    given: String,
}

impl RoleError {
    /// Speaks of a role that only a manifest could define, where there is none.
    pub fn unknown(role: Role) -> RoleError {
        RoleError { given: role.to_string() }
    }
}

fn suggest(given: &str) -> String {
    nearest(given, Role::ALL.iter().map(Role::as_str)).map(|name| format!(" (did you mean {name}?)")).unwrap_or_default()
}

impl Role {
    /// Every role that mvm itself knows, in the order in which pools are brought up.
    pub const ALL: [Role; 4] = [Role::Gateway, Role::Builder, Role::Worker, Role::CapabilityImessage];

    /// Returns the name used in documents and on the command line.
    pub fn as_str(&self) -> &str {
        match self {
            Role::Gateway => "gateway",
            Role::Builder => "builder",
            Role::Worker => "worker",
            Role::CapabilityImessage => "capability-imessage",
            Role::Custom(name) => name.as_str(),
        }
    }

    /// Tells whether mvm knows the role without a manifest.
    pub fn is_built_in(&self) -> bool {
        !matches!(self, Role::Custom(_))
    }
}

impl RoleName {
    fn as_str(&self) -> &str {
        let end = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(MAX_NAME);
        std::str::from_utf8(&self.bytes[..end]).expect("a label is ASCII")
    }
}

impl fmt::Debug for RoleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdError;

    /// Reads a name: one of mvm's own roles, or any label, which a manifest has to define.
    fn from_str(given: &str) -> Result<Self, IdError> {
        if let Some(role) = Role::ALL.into_iter().find(|role| role.as_str() == given) {
            return Ok(role);
        }
        parse_label("role", given)?;
        let mut bytes = [0; MAX_NAME];
        bytes[..given.len()].copy_from_slice(given.as_bytes());
        Ok(Role::Custom(RoleName { bytes }))
    }
}

impl TryFrom<String> for Role {
    type Error = IdError;
    fn try_from(given: String) -> Result<Self, IdError> {
        given.parse()
    }
}

impl From<Role> for String {
    fn from(role: Role) -> String {
        role.as_str().to_owned()
    }
}

impl JsonSchema for Role {
    fn schema_name() -> Cow<'static, str> {
        "Role".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names: Vec<&str> = Role::ALL.iter().map(Role::as_str).collect();
        json_schema!({
            "description": "The role of a pool: one of mvm's own, or one that the manifest of the pool's flake defines.",
            "anyOf": [
                { "type": "string", "enum": names },
                { "type": "string", "pattern": "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$" }
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_that_is_none_lists_the_roles_and_suggests_the_nearest() {
        assert_eq!(
            RoleError::unknown("gatway".parse().unwrap()).to_string(),
            "\"gatway\" is not a role; roles are gateway, builder, worker, capability-imessage (did you mean gateway?)"
        );
    }

    #[test]
    fn names_and_serde_agree() {
        let longest = "a".repeat(MAX_NAME);
        for role in Role::ALL.into_iter().chain(["cache".parse().unwrap(), longest.parse().unwrap()]) {
            assert_eq!(serde_json::to_string(&role).unwrap(), format!("{:?}", role.as_str()));
            assert_eq!(serde_json::from_str::<Role>(&format!("{:?}", role.as_str())).unwrap(), role);
        }
        assert!(Role::Gateway.is_built_in() && !"cache".parse::<Role>().unwrap().is_built_in());
    }

    #[test]
    fn what_is_no_label_is_no_role() {
        for bad in ["", "-a", "a-", "A", "a/b", "a b", "ä", &"a".repeat(MAX_NAME + 1)] {
            assert!(bad.parse::<Role>().is_err(), "{bad:?}");
        }
    }
}
