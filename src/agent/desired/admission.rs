//! Which documents a node takes: for itself, and never an older one.

use mvm_types::NodeId;

use super::DesiredState;
use crate::vm::node::Admitted;

/// Why a document is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdmissionError {
    /// It is for another node.
    #[error("node_id: the document is for {wanted}, {}", whose(.here, .wanted))]
    OtherNode {
        /// The document's node.
        wanted: NodeId,
        /// This node.
        here: NodeId,
    },
    /// It is older than what was admitted.
    #[error("generation: {given} is older than {admitted}, which this node has admitted already")]
    Older {
        /// The document's generation.
        given: u64,
        /// The one admitted last.
        admitted: u64,
    },
    /// It is another one of the same generation.
    #[error("generation: another document of generation {0} has been admitted already; give a changed document a higher generation")]
    Changed(u64),
}

fn whose(here: &NodeId, wanted: &NodeId) -> String {
    match here.as_str() {
        "unborn" => format!("and this node is new and has no id yet; `mvm node init --id {wanted}` gives it that"),
        here => format!("this node is {here}"),
    }
}

/// Checks a document against this node and what it admitted last; returns what to remember, when there is something new.
pub fn admit(desired: &DesiredState, here: &NodeId, last: Option<&Admitted>) -> Result<Option<Admitted>, AdmissionError> {
    if let Some(wanted) = desired.node_id.as_ref().filter(|wanted| *wanted != here) {
        return Err(AdmissionError::OtherNode { wanted: wanted.clone(), here: here.clone() });
    }
    let Some(generation) = desired.generation else { return Ok(None) };
    let canonical = serde_json::to_vec(desired).expect("documents have string keys and no failing serializers");
    let admission = Admitted { generation, hash: blake3::hash(&canonical).to_hex().to_string() };
    match last {
        Some(last) if generation < last.generation => Err(AdmissionError::Older { given: generation, admitted: last.generation }),
        Some(last) if generation == last.generation && last.hash != admission.hash => Err(AdmissionError::Changed(generation)),
        Some(last) if *last == admission => Ok(None),
        _ => Ok(Some(admission)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_newer_documents_for_this_node_are_taken() {
        let here: NodeId = "here".parse().unwrap();
        let mut desired = DesiredState { generation: Some(3), ..DesiredState::empty() };
        let first = admit(&desired, &here, None).unwrap().unwrap();
        assert_eq!(admit(&desired, &here, Some(&first)), Ok(None));
        desired.prune_unknown_pools = true;
        assert_eq!(admit(&desired, &here, Some(&first)), Err(AdmissionError::Changed(3)));
        desired.generation = Some(2);
        assert_eq!(admit(&desired, &here, Some(&first)), Err(AdmissionError::Older { given: 2, admitted: 3 }));
        desired.generation = Some(4);
        assert_eq!(admit(&desired, &here, Some(&first)).unwrap().unwrap().generation, 4);
        desired.node_id = Some("there".parse().unwrap());
        assert!(matches!(admit(&desired, &here, None), Err(AdmissionError::OtherNode { .. })));
    }
}
