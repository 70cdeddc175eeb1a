//! PURE: the states of an instance and what is legal between them.
//!
//! ```text
//!          create        image ready        start
//! (absent) ------> Created ------> Ready ------------> Running <----> Warm        warm = vCPUs paused, RAM kept
//!                                    ^                  |  ^           |
//!                                    | rebuild     stop |  | wake      | sleep    sleep = snapshot, process gone
//!                                    |                  v  |           v
//!                                    +----------------- Stopped <-- Sleeping
//! any ------> Destroyed (terminal)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::infra::clock::Moment;
use crate::vmm::VmHandle;

/// A state by name alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateName {
    /// Written down; its image is not built yet.
    Created,
    /// Can be started.
    Ready,
    /// Its guest runs and is ready.
    Running,
    /// Its virtual CPUs are paused.
    Warm,
    /// It is a snapshot on disk.
    Sleeping,
    /// It ran before, and has neither process nor snapshot.
    Stopped,
    /// It is gone.
    Destroyed,
}

impl StateName {
    /// Every state, in the order of the picture.
    pub const ALL: [StateName; 7] = [
        StateName::Created,
        StateName::Ready,
        StateName::Running,
        StateName::Warm,
        StateName::Sleeping,
        StateName::Stopped,
        StateName::Destroyed,
    ];

    /// The states that a state can turn into.
    pub fn successors(self) -> &'static [StateName] {
        use StateName::*;
        match self {
            Created => &[Ready, Destroyed],
            Ready => &[Running, Destroyed],
            Running => &[Warm, Stopped, Destroyed],
            Warm => &[Running, Sleeping, Stopped, Destroyed],
            Sleeping => &[Running, Stopped, Destroyed],
            Stopped => &[Running, Ready, Destroyed],
            Destroyed => &[],
        }
    }
}

impl fmt::Display for StateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            StateName::Created => "Created",
            StateName::Ready => "Ready",
            StateName::Running => "Running",
            StateName::Warm => "Warm",
            StateName::Sleeping => "Sleeping",
            StateName::Stopped => "Stopped",
            StateName::Destroyed => "Destroyed",
        })
    }
}

/// Why an instance is stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// It was asked to.
    Requested,
    /// Its VMM ended by itself or was killed by somebody else.
    Died,
    /// As [`StopReason::Died`], with what its VMM said last.
    DiedOf(String),
    /// Its snapshot could not be used; the reason.
    SnapshotLost(String),
}

impl StopReason {
    /// Why, where it was not asked to and somebody said.
    pub fn words(&self) -> Option<String> {
        match self {
            StopReason::Requested | StopReason::Died => None,
            StopReason::DiedOf(why) | StopReason::SnapshotLost(why) => Some(why.clone()),
        }
    }
}

/// The state of an instance, with what exists in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "kebab-case")]
pub enum InstanceState {
    /// Written down; its image is not built yet.
    Created,
    /// Can be started.
    Ready,
    /// Its guest runs and is ready.
    Running {
        /// Its virtual machine.
        vm: VmHandle,
        /// Since when.
        since: Moment,
        /// The guest kernel's boot id.
        guest_boot: String,
    },
    /// Its virtual CPUs are paused, its memory is kept.
    Warm {
        /// Its virtual machine.
        vm: VmHandle,
        /// Since when.
        since: Moment,
        /// The guest kernel's boot id.
        guest_boot: String,
    },
    /// It is a snapshot on disk; no process, no memory.
    Sleeping {
        /// Since when.
        since: Moment,
        /// The guest kernel's boot id.
        guest_boot: String,
        /// Which snapshot ([`super::SnapshotManifest::id`]); absent in documents from before there was a name for it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<String>,
    },
    /// It ran before, and has neither process nor snapshot; its data disk is there.
    Stopped {
        /// Since when.
        since: Moment,
        /// Why.
        why: StopReason,
    },
}

impl InstanceState {
    /// Returns the name alone.
    pub fn name(&self) -> StateName {
        match self {
            InstanceState::Created => StateName::Created,
            InstanceState::Ready => StateName::Ready,
            InstanceState::Running { .. } => StateName::Running,
            InstanceState::Warm { .. } => StateName::Warm,
            InstanceState::Sleeping { .. } => StateName::Sleeping,
            InstanceState::Stopped { .. } => StateName::Stopped,
        }
    }

    /// Returns the virtual machine, in the states that have one.
    pub fn vm(&self) -> Option<&VmHandle> {
        match self {
            InstanceState::Running { vm, .. } | InstanceState::Warm { vm, .. } => Some(vm),
            _ => None,
        }
    }

    /// Returns since when it is in this state, where that is known.
    pub fn since(&self) -> Option<&Moment> {
        match self {
            InstanceState::Created | InstanceState::Ready => None,
            InstanceState::Running { since, .. }
            | InstanceState::Warm { since, .. }
            | InstanceState::Sleeping { since, .. }
            | InstanceState::Stopped { since, .. } => Some(since),
        }
    }
}

/// A change of state that has begun. It is written before the first effect and removed with the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Where it leads.
    pub to: StateName,
    /// How far it has come.
    pub step: TransitionStep,
    /// When it began.
    pub since: Moment,
}

/// How far a change of state has come. Each step is written before it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "kebab-case")]
pub enum TransitionStep {
    /// Nothing that cannot be undone has happened: whatever was started is ended, and the state stays what it was.
    Undoable,
    /// The snapshot is used up: the guest may have run on. What was started is finished, or else the instance is stopped.
    Resumed {
        /// The machine that was restored.
        vm: VmHandle,
    },
    /// The snapshot is whole: the process is ended, and the instance sleeps.
    Saved,
}

/// A change of state that is not legal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {verb} {object}: it is {from}{}", remedy(*.verb, *.from))]
pub struct IllegalTransition {
    /// What was asked for.
    pub verb: Verb,
    /// Of which instance.
    pub object: String,
    /// Its state.
    pub from: StateName,
}

fn remedy(verb: Verb, from: StateName) -> String {
    let legal: Vec<String> = verb.legal_from().iter().map(ToString::to_string).collect();
    let can: Vec<&str> = Verb::ALL.iter().filter(|verb| verb.legal_from().contains(&from)).map(|verb| verb.as_str()).collect();
    format!(", and only a {} instance can be {}; now possible: {}", legal.join(" or "), verb.participle(), can.join(", "))
}

/// What can be asked of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// Boot afresh.
    Start,
    /// Pause the virtual CPUs.
    Warm,
    /// Let them run again.
    Resume,
    /// Snapshot and end the process.
    Sleep,
    /// Go on from the snapshot.
    Wake,
    /// End the process, and drop the snapshot.
    Stop,
    /// Take the pool's present image and resources.
    Rebuild,
    /// Remove everything.
    Destroy,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Verb; 8] = [Verb::Start, Verb::Warm, Verb::Resume, Verb::Sleep, Verb::Wake, Verb::Stop, Verb::Rebuild, Verb::Destroy];

    /// The verb as written on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Verb::Start => "start",
            Verb::Warm => "warm",
            Verb::Resume => "resume",
            Verb::Sleep => "sleep",
            Verb::Wake => "wake",
            Verb::Stop => "stop",
            Verb::Rebuild => "rebuild",
            Verb::Destroy => "destroy",
        }
    }

    fn participle(self) -> &'static str {
        match self {
            Verb::Start => "started",
            Verb::Warm => "warmed",
            Verb::Resume => "resumed",
            Verb::Sleep => "put to sleep",
            Verb::Wake => "woken",
            Verb::Stop => "stopped",
            Verb::Rebuild => "rebuilt",
            Verb::Destroy => "destroyed",
        }
    }

    /// The state that it leads to.
    pub fn target(self) -> StateName {
        match self {
            Verb::Start | Verb::Resume | Verb::Wake => StateName::Running,
            Verb::Warm => StateName::Warm,
            Verb::Sleep => StateName::Sleeping,
            Verb::Stop => StateName::Stopped,
            Verb::Rebuild => StateName::Ready,
            Verb::Destroy => StateName::Destroyed,
        }
    }

    /// The states in which it is legal.
    pub fn legal_from(self) -> &'static [StateName] {
        use StateName::*;
        match self {
            Verb::Start => &[Ready, Stopped],
            Verb::Warm => &[Running],
            Verb::Resume => &[Warm],
            Verb::Sleep => &[Running, Warm],
            Verb::Wake => &[Sleeping],
            Verb::Stop => &[Running, Warm, Sleeping],
            Verb::Rebuild => &[Created, Ready, Stopped],
            Verb::Destroy => &[Created, Ready, Running, Warm, Sleeping, Stopped],
        }
    }

    /// Tells whether it is legal in a state.
    ///
    /// # Errors
    /// [`IllegalTransition`], which names the state, the legal ones, and what can be asked instead.
    pub fn check(self, from: StateName, object: &impl fmt::Display) -> Result<(), IllegalTransition> {
        if self.legal_from().contains(&from) { Ok(()) } else { Err(IllegalTransition { verb: self, object: object.to_string(), from }) }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    #[test]
    fn the_refusal_names_the_state_and_what_is_legal() {
        let error = Verb::Wake.check(StateName::Running, &"acme/web/i-1a2b3c4d").unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot wake acme/web/i-1a2b3c4d: it is Running, and only a Sleeping instance can be woken; \
             now possible: warm, sleep, stop, destroy"
        );
    }

    /// A Ready instance whose pool changed is rebuilt in place; to sleep a Running instance is warmed on the way.
    fn leads_to(from: StateName, to: StateName) -> bool {
        let via_warm = from.successors().contains(&StateName::Warm) && StateName::Warm.successors().contains(&to);
        from == to || from.successors().contains(&to) || via_warm
    }

    #[test]
    fn verbs_follow_the_picture() {
        for verb in Verb::ALL {
            for from in verb.legal_from() {
                assert!(leads_to(*from, verb.target()), "{verb} from {from}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_sequence_of_legal_verbs_stays_in_the_picture(verbs in proptest::collection::vec(select(&Verb::ALL[..]), 0..40)) {
            let mut state = StateName::Created;
            for verb in verbs {
                if verb.check(state, &"x").is_ok() {
                    let next = verb.target();
                    prop_assert!(leads_to(state, next));
                    state = next;
                } else {
                    prop_assert!(!verb.legal_from().contains(&state));
                }
            }
        }
    }
}
