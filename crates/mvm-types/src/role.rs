//! Roles: what a microVM is for.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::nearest;

/// The role of a pool: which services run in its instances, which drives must exist, what is exposed, and
/// its place in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
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
}

/// A name that is not a role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a role; roles are gateway, builder, worker, capability-imessage{}", suggest(.given))]
pub struct RoleError {
    given: String,
}

fn suggest(given: &str) -> String {
    nearest(given, Role::ALL.iter().map(|role| role.as_str())).map(|name| format!(" (did you mean {name}?)")).unwrap_or_default()
}

impl Role {
    /// Every role, in the order in which pools are brought up.
    pub const ALL: [Role; 4] = [Role::Gateway, Role::Builder, Role::Worker, Role::CapabilityImessage];

    /// Returns the name used in documents and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Gateway => "gateway",
            Role::Builder => "builder",
            Role::Worker => "worker",
            Role::CapabilityImessage => "capability-imessage",
        }
    }

    /// Returns the role's place in the order: lower comes up earlier and goes to sleep later.
    pub fn priority(self) -> u8 {
        match self {
            Role::Gateway => 0,
            Role::Builder => 1,
            Role::Worker => 2,
            Role::CapabilityImessage => 3,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Role {
    type Err = RoleError;
    fn from_str(given: &str) -> Result<Self, RoleError> {
        Role::ALL.into_iter().find(|role| role.as_str() == given).ok_or_else(|| RoleError { given: given.chars().take(40).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_role_lists_the_roles_and_suggests_the_nearest() {
        assert_eq!(
            "gatway".parse::<Role>().unwrap_err().to_string(),
            "\"gatway\" is not a role; roles are gateway, builder, worker, capability-imessage (did you mean gateway?)"
        );
    }

    #[test]
    fn names_and_serde_agree() {
        for role in Role::ALL {
            assert_eq!(serde_json::to_string(&role).unwrap(), format!("{:?}", role.as_str()));
            assert_eq!(role.as_str().parse::<Role>().unwrap(), role);
        }
    }
}
