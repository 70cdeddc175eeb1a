//! The instance's document.

use std::net::Ipv4Addr;

use mvm_types::{InstanceAddress, InstanceId, PoolId, RevisionId, Role, TenantId};
use serde::{Deserialize, Serialize};

use super::state::{InstanceState, StateName, Transition};
use crate::infra::clock::Moment;
use crate::infra::failure::Failure;
use crate::net::{InstanceNetwork, InstanceOffset, Place, TenantNetId, TenantNetwork};
use crate::store::Document;
use crate::vm::pool::Blueprint;

/// `tenants/<t>/pools/<p>/instances/<i>/instance.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceDoc {
    /// The document's version.
    pub version: u32,
    /// The instance.
    pub instance_id: InstanceId,
    /// Its tenant.
    pub tenant_id: TenantId,
    /// Its pool.
    pub pool_id: PoolId,
    /// Its pool's role.
    pub role: Role,
    /// What it is made from.
    pub blueprint: Blueprint,
    /// The image it is made from; none while it is only Created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<RevisionId>,
    /// Its tenant's net id.
    pub net_id: TenantNetId,
    /// Its place in the tenant's subnet, from which address, MAC, TAP name and uid follow.
    pub offset: InstanceOffset,
    /// Its address.
    pub address: Ipv4Addr,
    /// The version of the pool's declaration that its config drive was last built from.
    pub config_version: u64,
    /// The epoch of the tenant's secrets that its secrets drive was last built from.
    pub secrets_epoch: u64,
    /// When it was made.
    pub created: Moment,
    /// Whether it is beside the wanted ones, so that enough run while those are replaced; it is destroyed when they are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stands_in: bool,
    /// Its state.
    pub state: InstanceState,
    /// The change of state under way, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transition: Option<Transition>,
    /// The state that it is brought up for, when that is not to run: it counts as that meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passing_to: Option<StateName>,
    /// What last went wrong, until it goes right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

impl InstanceDoc {
    /// Returns the instance's address among mvm's nouns.
    pub fn at(&self) -> InstanceAddress {
        InstanceAddress::new(self.tenant_id.clone(), self.pool_id.clone(), self.instance_id.clone())
    }

    /// Returns where it is, whatever its tenant's document says.
    pub fn place(&self) -> Place {
        Place { net_id: self.net_id, offset: self.offset, address: self.address }
    }

    /// Returns its network identity.
    pub fn network(&self, tenant: &TenantNetwork) -> InstanceNetwork {
        InstanceNetwork {
            tenant: *tenant,
            offset: self.offset,
            forwards: self.role == Role::Gateway,
            mbit: self.blueprint.resources.net_mbit_per_second,
        }
    }
}

impl Document for InstanceDoc {
    const KIND: &'static str = "instance";
    const VERSION: u32 = 1;
    fn version(&self) -> u32 {
        self.version
    }
}
