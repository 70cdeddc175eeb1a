//! Which instance of a pool takes which state: the fewest and quickest changes that reach the wanted counts.

use std::collections::VecDeque;

use crate::agent::observe::ObservedInstance;
use crate::vm::instance::{MOST_REFUSALS, SNAPSHOT_REFUSED, StateName, VMM_REFUSED, Verb};
use crate::vm::pool::DesiredCounts;

/// What happens to one instance, or to one that is yet to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain<'a> {
    /// The instance; `None` for a new one.
    pub instance: Option<&'a ObservedInstance>,
    /// The verbs in order.
    pub verbs: Vec<Verb>,
    /// The state that it leads to.
    pub goal: StateName,
}

impl PartialEq for ObservedInstance {
    fn eq(&self, other: &Self) -> bool {
        self.doc.instance_id == other.doc.instance_id
    }
}

impl Eq for ObservedInstance {}

/// The changes that a pool needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Assignment<'a> {
    /// Those that give room back, newest instance first.
    pub down: Vec<Chain<'a>>,
    /// Those that need room, in the order of preference: wake, resume, start, create.
    pub up: Vec<Chain<'a>>,
    /// Instances that keep their state and have to be started afresh for it, oldest first.
    pub replace: Vec<Chain<'a>>,
    /// How many instances run already and are not changed.
    pub keep_running: u32,
    /// Those that stand in, and are no part of the wanted counts.
    pub stand_ins: Vec<&'a ObservedInstance>,
}

/// Assigns states. `instances` are oldest first; `outdated` tells which ones are made from something else than the pool is now,
/// `cut_off` which ones lost their way to the network.
pub(super) fn assign<'a>(
    wanted: DesiredCounts,
    instances: &'a [ObservedInstance],
    outdated: impl Fn(&ObservedInstance) -> bool,
    cut_off: impl Fn(&ObservedInstance) -> bool,
) -> Assignment<'a> {
    let mut result = Assignment::default();
    let in_state = |names: &[StateName]| -> VecDeque<&'a ObservedInstance> {
        instances.iter().filter(|one| !one.doc.stands_in && names.contains(&one.doc.state.name())).collect()
    };
    result.stand_ins = instances.iter().filter(|one| one.doc.stands_in).collect();
    let mut running = in_state(&[StateName::Running]);
    let mut warm = in_state(&[StateName::Warm]);
    let mut sleeping = in_state(&[StateName::Sleeping]);
    let mut idle = in_state(&[StateName::Stopped, StateName::Ready, StateName::Created]);

    // The oldest keep their state; what is left in the queues is to spare, newest at the back.
    let mut keep = |queue: &mut VecDeque<&'a ObservedInstance>, count: u32, state: StateName| -> u32 {
        let kept: Vec<_> = queue.drain(..queue.len().min(count as usize)).collect();
        for &instance in kept.iter().filter(|one| outdated(one)) {
            let verbs = match state {
                StateName::Running => vec![Verb::Stop, Verb::Rebuild, Verb::Start],
                StateName::Warm => vec![Verb::Stop, Verb::Rebuild, Verb::Start, Verb::Warm],
                _ => vec![Verb::Stop, Verb::Rebuild, Verb::Start, Verb::Sleep],
            };
            result.replace.push(Chain { instance: Some(instance), verbs, goal: state });
        }
        // A warm one serves nobody, and is seen to when it runs again.
        for &instance in kept.iter().filter(|one| state == StateName::Running && !outdated(one) && cut_off(one)) {
            result.replace.push(Chain { instance: Some(instance), verbs: vec![Verb::Stop, Verb::Start], goal: state });
        }
        u32::try_from(kept.len()).unwrap_or(u32::MAX)
    };
    let kept_running = keep(&mut running, wanted.running, StateName::Running);
    let kept_warm = keep(&mut warm, wanted.warm, StateName::Warm);
    let kept_sleeping = keep(&mut sleeping, wanted.sleeping, StateName::Sleeping);
    let replaced = result.replace.iter().filter(|chain| chain.goal == StateName::Running).count();
    result.keep_running = kept_running - u32::try_from(replaced).unwrap_or(kept_running);

    // Idle instances made from something else are rebuilt on the way up.
    let from_idle = |instance: &'a ObservedInstance, then: &[Verb]| -> Vec<Verb> {
        let rebuild = outdated(instance) || instance.doc.state.name() == StateName::Created;
        rebuild.then_some(Verb::Rebuild).into_iter().chain([Verb::Start]).chain(then.iter().copied()).collect()
    };
    let from_sleep = |instance: &'a ObservedInstance, then: &[Verb]| -> Vec<Verb> {
        let refused = instance.doc.failure.as_ref().is_some_and(|failure| match failure.step.as_str() {
            SNAPSHOT_REFUSED => true,
            VMM_REFUSED => failure.attempts >= MOST_REFUSALS,
            _ => false,
        });
        if refused && !outdated(instance) {
            // Loudly booted afresh rather than never again.
            [Verb::Stop, Verb::Start].into_iter().chain(then.iter().copied()).collect()
        } else if outdated(instance) {
            [Verb::Stop, Verb::Rebuild, Verb::Start].into_iter().chain(then.iter().copied()).collect()
        } else {
            [Verb::Wake].into_iter().chain(then.iter().copied()).collect()
        }
    };

    for _ in kept_running..wanted.running {
        let goal = StateName::Running;
        let (instance, verbs) = if let Some(one) = sleeping.pop_front() {
            (Some(one), from_sleep(one, &[]))
        } else if let Some(one) = warm.pop_front() {
            (Some(one), if outdated(one) { vec![Verb::Stop, Verb::Rebuild, Verb::Start] } else { vec![Verb::Resume] })
        } else if let Some(one) = idle.pop_front() {
            (Some(one), from_idle(one, &[]))
        } else {
            (None, vec![Verb::Start])
        };
        result.up.push(Chain { instance, verbs, goal });
    }
    for _ in kept_warm..wanted.warm {
        let goal = StateName::Warm;
        if let Some(one) = running.pop_back() {
            result.down.push(Chain { instance: Some(one), verbs: vec![Verb::Warm], goal });
        } else if let Some(one) = sleeping.pop_front() {
            result.up.push(Chain { instance: Some(one), verbs: from_sleep(one, &[Verb::Warm]), goal });
        } else if let Some(one) = idle.pop_front() {
            result.up.push(Chain { instance: Some(one), verbs: from_idle(one, &[Verb::Warm]), goal });
        } else {
            result.up.push(Chain { instance: None, verbs: vec![Verb::Start, Verb::Warm], goal });
        }
    }
    for _ in kept_sleeping..wanted.sleeping {
        let goal = StateName::Sleeping;
        if let Some(one) = warm.pop_back().or_else(|| running.pop_back()) {
            result.down.push(Chain { instance: Some(one), verbs: vec![Verb::Sleep], goal });
        } else if let Some(one) = idle.pop_front() {
            result.up.push(Chain { instance: Some(one), verbs: from_idle(one, &[Verb::Sleep]), goal });
        } else {
            result.up.push(Chain { instance: None, verbs: vec![Verb::Start, Verb::Sleep], goal });
        }
    }

    // More than wanted altogether: the newest go.
    let mut surplus: Vec<&'a ObservedInstance> = running.into_iter().chain(warm).chain(sleeping).chain(idle).collect();
    surplus.sort_by(|a, b| b.age().cmp(&a.age()));
    for instance in surplus {
        result.down.push(Chain { instance: Some(instance), verbs: destroy_verbs(instance), goal: StateName::Destroyed });
    }
    result
}

/// The verbs that remove an instance: what runs is stopped in order first.
pub(super) fn destroy_verbs(instance: &ObservedInstance) -> Vec<Verb> {
    match instance.doc.state.name() {
        StateName::Running | StateName::Warm => vec![Verb::Stop, Verb::Destroy],
        _ => vec![Verb::Destroy],
    }
}
