//! What is there: documents, virtual machines, host.

use std::collections::{BTreeMap, BTreeSet};

use mvm_types::{NodeId, PoolId, TenantId};

use crate::host::ObservedNetwork;
use crate::net::{Ruleset, TenantNetId};
use crate::vm::instance::InstanceDoc;
use crate::vm::pool::PoolDoc;
use crate::vm::tenant::TenantDoc;
use crate::vmm::Liveness;

/// Everything that a plan depends on besides what is desired, the time and the options.
#[derive(Debug, Clone)]
pub struct Observed {
    /// This node.
    pub node: NodeId,
    /// Memory that guests may have altogether, in MiB.
    pub capacity_mib: u64,
    /// Net ids that tenants had who are gone, and which are never given again.
    pub retired_net_ids: BTreeSet<TenantNetId>,
    /// The tenants that are there.
    pub tenants: BTreeMap<TenantId, ObservedTenant>,
    /// Bridges and rules.
    pub network: ObservedNetwork,
    /// What could not be read: quarantined documents and the like, in words.
    pub problems: Vec<String>,
}

/// One tenant that is there.
#[derive(Debug, Clone)]
pub struct ObservedTenant {
    /// Its document.
    pub doc: TenantDoc,
    /// Its pools.
    pub pools: BTreeMap<PoolId, ObservedPool>,
}

/// One pool that is there.
#[derive(Debug, Clone)]
pub struct ObservedPool {
    /// Its document.
    pub doc: PoolDoc,
    /// Whether its image is there, whole as far as sizes tell.
    pub image: ImagePresence,
    /// Its instances, oldest first.
    pub instances: Vec<ObservedInstance>,
}

/// Whether a pool's image is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImagePresence {
    /// It is.
    Present,
    /// It is not, or was never built.
    Missing,
}

/// One instance that is there.
#[derive(Debug, Clone)]
pub struct ObservedInstance {
    /// Its document.
    pub doc: InstanceDoc,
    /// Whether its virtual machine runs, in the states that have one.
    pub liveness: Liveness,
    /// Whether another process of mvm is changing it at this moment.
    pub busy: bool,
}

impl ObservedInstance {
    /// Tells whether the document and the world disagree: a change of state was cut off, or the virtual machine died.
    pub fn needs_recovery(&self) -> bool {
        self.doc.transition.is_some() || (self.doc.state.vm().is_some() && self.liveness == Liveness::Gone)
    }
}

impl Observed {
    /// Returns what the packet filter rules are rendered from.
    pub fn ruleset(&self) -> Ruleset {
        let tenants = self.tenants.values().map(|tenant| {
            let network = tenant.doc.network.network();
            let instances = tenant.pools.values().flat_map(|pool| &pool.instances).map(|one| one.doc.network(&network)).collect();
            (network, instances)
        });
        Ruleset { tenants: tenants.collect() }
    }

    /// Returns the hash of the rules that the documents give; `None` where they give none.
    pub fn ruleset_hash(&self) -> Option<String> {
        self.ruleset().fingerprint().ok()
    }
}
