//! Addresses: `tenant`, `tenant/pool`, `tenant/pool/instance`.

use std::fmt;
use std::str::FromStr;

use crate::{IdError, InstanceId, PoolId, TenantId};

/// Why a string is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The number of parts is wrong.
    #[error("{given:?} is not an address of {wanted}")]
    Shape {
        /// The string.
        given: String,
        /// The form that is wanted here.
        wanted: &'static str,
    },
    /// One of the parts is not an id.
    #[error(transparent)]
    Id(#[from] IdError),
    /// The instance part is neither an id nor the start of one.
    #[error("{given:?} is not an instance id or the start of one; one looks like i-1a2b3c4d")]
    Selector {
        /// The instance part.
        given: String,
    },
}

fn cut(given: &str) -> String {
    given.chars().take(80).collect()
}

/// `tenant/pool`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolAddress {
    /// The tenant.
    pub tenant: TenantId,
    /// The pool within it.
    pub pool: PoolId,
}

impl PoolAddress {
    /// Makes an address from its parts.
    pub fn new(tenant: TenantId, pool: PoolId) -> Self {
        Self { tenant, pool }
    }
}

impl fmt::Display for PoolAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.tenant, self.pool))
    }
}

impl FromStr for PoolAddress {
    type Err = AddressError;
    fn from_str(given: &str) -> Result<Self, AddressError> {
        match given.split('/').collect::<Vec<_>>()[..] {
            [tenant, pool] => Ok(Self { tenant: tenant.parse()?, pool: pool.parse()? }),
            _ => Err(AddressError::Shape { given: cut(given), wanted: "a pool: TENANT/POOL" }),
        }
    }
}

/// `tenant/pool/instance`, the instance being a full id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceAddress {
    /// The tenant.
    pub tenant: TenantId,
    /// The pool within it.
    pub pool: PoolId,
    /// The instance within the pool.
    pub instance: InstanceId,
}

impl InstanceAddress {
    /// Makes an address from its parts.
    pub fn new(tenant: TenantId, pool: PoolId, instance: InstanceId) -> Self {
        Self { tenant, pool, instance }
    }

    /// Returns the address of the pool.
    pub fn pool_address(&self) -> PoolAddress {
        PoolAddress { tenant: self.tenant.clone(), pool: self.pool.clone() }
    }
}

impl fmt::Display for InstanceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}/{}", self.tenant, self.pool, self.instance))
    }
}

/// What a user writes for one instance: `tenant/pool/<the start of an instance id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceSelector {
    /// The tenant.
    pub tenant: TenantId,
    /// The pool within it.
    pub pool: PoolId,
    /// The start of an instance id, with or without its leading `i-`; only `i`, `-` and hex digits.
    pub prefix: String,
}

impl InstanceSelector {
    /// Tells whether an instance id is one that the prefix can mean.
    pub fn matches(&self, id: &InstanceId) -> bool {
        id.as_str().starts_with(&self.prefix) || id.as_str().strip_prefix("i-").is_some_and(|hex| hex.starts_with(&self.prefix))
    }
}

impl fmt::Display for InstanceSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}/{}", self.tenant, self.pool, self.prefix))
    }
}

impl FromStr for InstanceSelector {
    type Err = AddressError;
    fn from_str(given: &str) -> Result<Self, AddressError> {
        let [tenant, pool, prefix] = given.split('/').collect::<Vec<_>>()[..] else {
            return Err(AddressError::Shape { given: cut(given), wanted: "an instance: TENANT/POOL/INSTANCE" });
        };
        let (tenant, pool) = (tenant.parse()?, pool.parse()?);
        let hex = prefix.strip_prefix("i-").unwrap_or(prefix);
        let plausible = prefix == "i" || (hex.len() <= 8 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
        if prefix.is_empty() || !plausible {
            return Err(AddressError::Selector { given: cut(prefix) });
        }
        Ok(Self { tenant, pool, prefix: prefix.to_owned() })
    }
}

/// What a user can point at: a tenant, a pool or an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A whole tenant.
    Tenant(TenantId),
    /// One pool.
    Pool(PoolAddress),
    /// One instance, perhaps by the start of its id.
    Instance(InstanceSelector),
}

impl FromStr for Address {
    type Err = AddressError;
    fn from_str(given: &str) -> Result<Self, AddressError> {
        match given.bytes().filter(|b| *b == b'/').count() {
            0 => Ok(Address::Tenant(given.parse()?)),
            1 => Ok(Address::Pool(given.parse()?)),
            _ => Ok(Address::Instance(given.parse()?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_take_a_prefix_with_or_without_the_i() {
        let id: InstanceId = "i-1a2b3c4d".parse().unwrap();
        for given in ["acme/web/i-1a", "acme/web/1a2b", "acme/web/i-1a2b3c4d", "acme/web/i"] {
            assert!(given.parse::<InstanceSelector>().unwrap().matches(&id), "{given}");
        }
        assert!(!"acme/web/2b".parse::<InstanceSelector>().unwrap().matches(&id));
    }

    #[test]
    fn hostile_addresses_are_refused() {
        for given in ["", "a/", "/a", "a/b/", "a/b/c/d", "a/../b", "a/b/i-XY", "a/b/i-123456789", "a/b/*", "a\0/b/i-1", "a/b/;"] {
            assert!(given.parse::<InstanceSelector>().is_err(), "{given:?}");
        }
        assert!("".parse::<Address>().is_err());
        assert!("a/b/c/d".parse::<Address>().is_err());
    }
}
