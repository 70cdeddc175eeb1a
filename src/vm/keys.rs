//! PURE: the keys of documents and locks.

use mvm_types::{InstanceAddress, PoolAddress, RevisionId, TenantId};

/// `node.json`.
pub const NODE: &str = "node.json";

/// The directory of all tenants.
pub const TENANTS: &str = "tenants";

/// The lock that a reconcile pass holds: one at a time on a state directory.
pub const RECONCILE_LOCK: &str = "reconcile";

/// The lock around bridges and rules, which are rendered from all tenants together.
pub const NETWORK_LOCK: &str = "network";

/// The lock under which instance ids are given out.
pub const IDS_LOCK: &str = "instance-ids";

/// A tenant's directory; also the name of its lock.
pub fn tenant_dir(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}")
}

/// A tenant's document.
pub fn tenant_doc(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}/tenant.json")
}

/// A tenant's sealed secrets.
pub fn secrets_doc(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}/secrets.json")
}

/// The lock under which room in a tenant's quotas is taken.
pub fn admission_lock(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}/admission")
}

/// One of the locks that builds in microVMs hold, of which there are as many as the host's memory is enough for.
pub fn builder_slot(number: u64) -> String {
    format!("builder-slots/{number}")
}

/// The lock that a build holds which uses the tenant's network: there is one address for builders.
pub fn builder_lock(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}/builder")
}

/// The directory of a tenant's pools.
pub fn pools_dir(tenant: &TenantId) -> String {
    format!("{TENANTS}/{tenant}/pools")
}

/// A pool's directory; also the name of its lock.
pub fn pool_dir(pool: &PoolAddress) -> String {
    format!("{TENANTS}/{}/pools/{}", pool.tenant, pool.pool)
}

/// A pool's document.
pub fn pool_doc(pool: &PoolAddress) -> String {
    format!("{}/pool.json", pool_dir(pool))
}

/// The lock under which images are given to pools, and taken away.
pub const IMAGES_LOCK: &str = "images";

/// The directory of a pool's revisions.
pub fn revisions_dir(pool: &PoolAddress) -> String {
    format!("{}/revisions", pool_dir(pool))
}

/// The document of one of a pool's revisions.
pub fn revision_doc(pool: &PoolAddress, revision: &RevisionId) -> String {
    format!("{}/{revision}.json", revisions_dir(pool))
}

/// The directory of a pool's instances.
pub fn instances_dir(pool: &PoolAddress) -> String {
    format!("{}/instances", pool_dir(pool))
}

/// An instance's directory; also the name of its lock.
pub fn instance_dir(at: &InstanceAddress) -> String {
    format!("{TENANTS}/{}/pools/{}/instances/{}", at.tenant, at.pool, at.instance)
}

/// An instance's document.
pub fn instance_doc(at: &InstanceAddress) -> String {
    format!("{}/instance.json", instance_dir(at))
}
