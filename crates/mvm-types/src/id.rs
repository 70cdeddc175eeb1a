//! Names that are parsed once: lower-case DNS labels, and the ids that mvm makes itself.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest tenant, pool, profile or node name, in bytes.
///
/// 32 leaves room for `<tenant>-<pool>-<instance>` in a host name of at most 63 bytes (RFC 1035).
pub const MAX_NAME: usize = 32;

/// Why a string is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The string is empty.
    #[error("a {kind} cannot be empty")]
    Empty {
        /// What was to be parsed.
        kind: &'static str,
    },
    /// The string is longer than allowed.
    #[error("a {kind} has at most {max} characters, this one has {len}")]
    TooLong {
        /// What was to be parsed.
        kind: &'static str,
        /// Its length in bytes.
        len: usize,
        /// The longest allowed, in bytes.
        max: usize,
    },
    /// A character that is not allowed where it stands.
    #[error("{kind} {given:?} has {found:?} at position {position}; allowed are {allowed}")]
    Character {
        /// What was to be parsed.
        kind: &'static str,
        /// The string, escaped when shown.
        given: String,
        /// The offending character.
        found: char,
        /// Its position, counted from 1.
        position: usize,
        /// What would be right.
        allowed: &'static str,
    },
    /// Not of the form `i-` and eight hex digits.
    #[error("{given:?} is not an instance id; one looks like i-1a2b3c4d")]
    Instance {
        /// The string.
        given: String,
    },
    /// Not 16 lower-case hex digits.
    #[error("{given:?} is not a revision id; one has 16 hex digits")]
    Revision {
        /// The string.
        given: String,
    },
}

pub(crate) fn parse_label(kind: &'static str, given: &str) -> Result<(), IdError> {
    if given.is_empty() {
        return Err(IdError::Empty { kind });
    }
    if given.len() > MAX_NAME {
        return Err(IdError::TooLong { kind, len: given.len(), max: MAX_NAME });
    }
    let last = given.chars().count() - 1;
    for (index, found) in given.chars().enumerate() {
        let inner = found.is_ascii_lowercase() || found.is_ascii_digit();
        let allowed = match index {
            0 => found.is_ascii_lowercase(),
            n if n == last => inner,
            _ => inner || found == '-',
        };
        if !allowed {
            return Err(IdError::Character {
                kind,
                given: given.to_owned(),
                found,
                position: index + 1,
                allowed: "a-z first, then a-z, 0-9 and -, and no - at the end",
            });
        }
    }
    Ok(())
}

fn shorten(given: &str) -> String {
    given.chars().take(40).collect()
}

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident, $parse:expr, $pattern:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// Returns the id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(given: String) -> Result<Self, IdError> {
                let parse: fn(&str) -> Result<(), IdError> = $parse;
                parse(&given)?;
                Ok(Self(given.into_boxed_str()))
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(given: &str) -> Result<Self, IdError> {
                let parse: fn(&str) -> Result<(), IdError> = $parse;
                parse(given)?;
                Ok(Self(given.into()))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

string_id!(
    /// Identifies a tenant: a lower-case label of at most [`MAX_NAME`] bytes.
    TenantId, |s| parse_label("tenant id", s), "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
);
string_id!(
    /// Identifies a pool within its tenant: a lower-case label of at most [`MAX_NAME`] bytes.
    PoolId, |s| parse_label("pool id", s), "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
);
string_id!(
    /// Names a profile, the language or runtime layer of an image.
    ProfileName, |s| parse_label("profile", s), "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
);
string_id!(
    /// Identifies a node, one host with its agent.
    NodeId, |s| parse_label("node id", s), "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"
);
string_id!(
    /// Identifies an instance: `i-` and eight lower-case hex digits, made by the node.
    InstanceId,
    |s| match s.strip_prefix("i-") {
        Some(hex) if is_lower_hex(hex, 8) => Ok(()),
        _ => Err(IdError::Instance { given: shorten(s) }),
    },
    "^i-[0-9a-f]{8}$"
);
string_id!(
    /// Identifies one built image by its content: 16 lower-case hex digits.
    RevisionId,
    |s| if is_lower_hex(s, 16) { Ok(()) } else { Err(IdError::Revision { given: shorten(s) }) },
    "^[0-9a-f]{16}$"
);
string_id!(
    /// Names a secret: the name of a file below `/run/secrets`, at most 64 of `A-Z a-z 0-9 . _ -`, not starting with `.`.
    SecretName, parse_secret_name, "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"
);

fn parse_secret_name(given: &str) -> Result<(), IdError> {
    const MAX: usize = 64;
    let kind = "secret name";
    if given.is_empty() {
        return Err(IdError::Empty { kind });
    }
    if given.len() > MAX {
        return Err(IdError::TooLong { kind, len: given.len(), max: MAX });
    }
    for (index, found) in given.chars().enumerate() {
        let allowed = found.is_ascii_alphanumeric() || found == '_' || found == '-' || (found == '.' && index > 0);
        if !allowed {
            return Err(IdError::Character {
                kind,
                given: given.to_owned(),
                found,
                position: index + 1,
                allowed: "A-Z, a-z, 0-9, _, - and, not at the start, a dot",
            });
        }
    }
    Ok(())
}

fn is_lower_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl InstanceId {
    /// Makes an id from 32 bits, usually random ones.
    pub fn from_bits(bits: u32) -> Self {
        Self(format!("i-{bits:08x}").into_boxed_str())
    }
}

impl RevisionId {
    /// Makes an id from the first 8 bytes of a content hash.
    pub fn from_hash(hash: [u8; 8]) -> Self {
        Self(format!("{:016x}", u64::from_be_bytes(hash)).into_boxed_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_ids_are_refused() {
        for given in ["", "..", "a/b", "../x", "a b", "a;rm", "$(x)", "A", "1a", "-a", "a-", "a\0", "ä", "a.b", "a_b", &"a".repeat(10_000)]
        {
            assert!(given.parse::<TenantId>().is_err(), "{given:?}");
            assert!(given.parse::<PoolId>().is_err(), "{given:?}");
        }
        for given in ["i-", "i-1234567", "i-123456789", "i-1234567G", "i-ABCDEF12", "x-12345678"] {
            assert!(given.parse::<InstanceId>().is_err(), "{given:?}");
        }
        for given in [".", "..", ".hidden", "a/b", "", "a b", "a\n"] {
            assert!(given.parse::<SecretName>().is_err(), "{given:?}");
        }
    }

    #[test]
    fn the_error_says_where() {
        let error = "web/one".parse::<PoolId>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "pool id \"web/one\" has '/' at position 4; allowed are a-z first, then a-z, 0-9 and -, and no - at the end"
        );
    }

    proptest! {
        #[test]
        fn what_parses_is_safe_and_comes_back(given in "\\PC{0,40}") {
            if let Ok(id) = given.parse::<TenantId>() {
                prop_assert!(id.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
                prop_assert_eq!(id.as_str(), &given);
                let json = serde_json::to_string(&id).unwrap();
                prop_assert_eq!(serde_json::from_str::<TenantId>(&json).unwrap(), id);
            }
        }

        #[test]
        fn made_instance_ids_parse(bits: u32) {
            let id = InstanceId::from_bits(bits);
            prop_assert_eq!(id.as_str().parse::<InstanceId>().unwrap(), id);
        }
    }
}
