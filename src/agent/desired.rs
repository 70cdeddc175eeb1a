//! The desired-state document: schema, parsing, validation, admission by generation.
//!
//! A document is parsed and validated whole before anything happens: all or nothing. Every problem names its place,
//! e.g. `tenants[1].pools[0].role`.

mod admission;
mod parse;
mod validate;

use mvm_types::{NodeId, PoolAddress, TenantId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use admission::{AdmissionError, admit};
pub use parse::{Format, parse};
pub use validate::pool_problems;

use crate::vm::pool::PoolSpec;
use crate::vm::tenant::{NetworkSpec, Quotas};

/// The version of the document's schema that this program reads and writes.
pub const SCHEMA_VERSION: u32 = 1;

/// The most bytes that a document may have.
pub const MAX_DOCUMENT: usize = 16 * 1024 * 1024;

/// What should exist on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DesiredState {
    /// The schema's version: 1.
    #[schemars(range(min = 1, max = 1))]
    pub schema_version: u32,
    /// The node that the document is for; a document for another node is refused. Any node when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    /// Grows with each change; an older document is refused, and so is another one of the same generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// The tenants.
    #[serde(default)]
    pub tenants: Vec<DesiredTenant>,
    /// Whether tenants that the document does not name are destroyed.
    #[serde(default)]
    pub prune_unknown_tenants: bool,
    /// Whether pools that the document does not name are destroyed, in tenants that it does name.
    #[serde(default)]
    pub prune_unknown_pools: bool,
}

/// One tenant as declared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DesiredTenant {
    /// The tenant's name.
    pub tenant_id: TenantId,
    /// Its network; fixed for the tenant's life.
    pub network: NetworkSpec,
    /// Its quotas.
    #[serde(default)]
    pub quotas: Quotas,
    /// Its pools.
    #[serde(default)]
    pub pools: Vec<PoolSpec>,
}

impl DesiredState {
    /// Returns an empty document.
    pub fn empty() -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            node_id: None,
            generation: None,
            tenants: Vec::new(),
            prune_unknown_tenants: false,
            prune_unknown_pools: false,
        }
    }

    /// Returns every declared pool with its address.
    pub fn pools(&self) -> impl Iterator<Item = (PoolAddress, &PoolSpec)> {
        self.tenants
            .iter()
            .flat_map(|tenant| tenant.pools.iter().map(|pool| (PoolAddress::new(tenant.tenant_id.clone(), pool.pool_id.clone()), pool)))
    }
}

/// Returns the JSON Schema of the document, from the types.
pub fn json_schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(DesiredState).to_value();
    schema["title"] = "mvm desired state, version 1".into();
    schema
}

/// One thing that is wrong with a document, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The place, e.g. `tenants[1].pools[0].role`; empty for the document itself.
    pub place: String,
    /// What is wrong and what would be right.
    pub what: String,
}

/// How many problems are shown: who has more has made the same mistake everywhere.
const MOST_SHOWN: usize = 20;
/// The longest problem, in characters: some of what is quoted in it is the document's.
const LONGEST: usize = 300;

impl Problem {
    /// Describes a problem, shortened where it quotes too much.
    pub fn new(place: String, what: String) -> Self {
        let cut = what.char_indices().nth(LONGEST).map(|(at, _)| at);
        let what = match cut {
            Some(at) => format!("{}… ({} characters)", &what[..at], what.chars().count()),
            None => what,
        };
        Self { place, what }
    }
}

/// Everything that is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.lines())]
pub struct InvalidDocument {
    /// At least one problem.
    pub problems: Vec<Problem>,
}

impl InvalidDocument {
    fn lines(&self) -> String {
        let line = |problem: &Problem| match problem.place.as_str() {
            "" => problem.what.clone(),
            place => format!("{place}: {}", problem.what),
        };
        let mut lines: Vec<String> = self.problems.iter().take(MOST_SHOWN).map(line).collect();
        if self.problems.len() > MOST_SHOWN {
            lines.push(format!("and {} more", self.problems.len() - MOST_SHOWN));
        }
        lines.join("\n")
    }
}
