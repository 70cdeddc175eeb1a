//! Names of drives and network interfaces.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The longest name taken here, in bytes; Firecracker has no limit of its own.
const MAX_LEN: usize = 64;

/// The name of a drive or a network interface: letters, digits and underscores (Firecracker 1.17, `checked_id`). It is
/// part of a request's path and cannot change what the request is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourceId(String);

/// What cannot be such a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a drive or network interface is named with 1 to 64 letters, digits and underscores, not {0:?}")]
pub struct InvalidResourceId(String);

impl ResourceId {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ResourceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ResourceId {
    type Error = InvalidResourceId;

    fn try_from(name: String) -> Result<Self, InvalidResourceId> {
        let fits = (1..=MAX_LEN).contains(&name.len());
        if fits && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Ok(Self(name));
        }
        Err(InvalidResourceId(name.chars().take(MAX_LEN).collect()))
    }
}

impl TryFrom<&str> for ResourceId {
    type Error = InvalidResourceId;

    fn try_from(name: &str) -> Result<Self, InvalidResourceId> {
        name.to_owned().try_into()
    }
}

impl From<ResourceId> for String {
    fn from(id: ResourceId) -> String {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_what_the_api_takes_is_a_name() {
        for good in ["root", "eth0", "a_b", &"x".repeat(64)] {
            assert_eq!(ResourceId::try_from(good).unwrap().as_str(), good);
        }
        for bad in ["", "a-b", "a/b", "..", "a b", "ü", "a\r\nb", &"x".repeat(65)] {
            assert!(ResourceId::try_from(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_name_can_leave_its_place_in_a_path(name in any::<String>()) {
            if let Ok(id) = ResourceId::try_from(name.as_str()) {
                prop_assert!(!id.as_str().contains(['/', '.', '?', '#', '%', ' ', '\r', '\n']));
            }
        }
    }
}
