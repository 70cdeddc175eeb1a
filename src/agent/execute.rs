//! Carries out a plan: one match over [`Action`], as many steps at a time as their edges allow.
//!
//! A step that fails holds back what needs it and nothing else. Steps are idempotent: what has become true meanwhile is done.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mvm_types::{InstanceAddress, PoolAddress, TenantId};

use crate::agent::plan::{Action, Need, Plan, Step, Target};
use crate::vm::error::{LifecycleError, with_causes};
use crate::vm::instance::{StateName, StopMode, Verb};
use crate::vm::node::Node;
use crate::vm::pool::{BuildOptions, BuildWatch, Limits};
use crate::vmm::Liveness;

/// How a plan is carried out.
pub struct ExecuteOptions<'a> {
    /// How many steps run at the same time, at least 1.
    pub parallel: usize,
    /// Told of every visible step as it begins and ends.
    pub progress: &'a (dyn Fn(Progress<'_>) + Sync),
    /// Once true, no further step begins.
    pub cancel: &'a AtomicBool,
}

/// What happens while a plan is carried out.
#[derive(Debug, Clone, Copy)]
pub enum Progress<'a> {
    /// A step begins.
    Begun {
        /// The step.
        step: &'a Step,
        /// The instance that it turned out to be, for one that the plan made.
        object: &'a str,
    },
    /// A step tells how far it is.
    Note {
        /// The step.
        step: &'a Step,
        /// In words.
        text: &'a str,
    },
    /// A step is over.
    Over {
        /// The step.
        step: &'a Step,
        /// What became of it.
        outcome: &'a Outcome,
    },
}

/// What became of one step.
#[derive(Debug)]
pub struct Outcome {
    /// The object, with the id that a new instance got.
    pub object: String,
    /// How it ended.
    pub end: End,
    /// How long it took.
    pub took: Duration,
}

/// How a step ended.
#[derive(Debug)]
pub enum End {
    /// It went well.
    Done,
    /// It failed.
    Failed {
        /// The error with its causes.
        error: String,
        /// Whether trying again can help.
        retry: bool,
    },
    /// Something that it needs failed.
    Held {
        /// What that was.
        by: String,
    },
    /// The pass was interrupted before it.
    Cancelled,
}

impl Outcome {
    /// Tells whether the step went well.
    pub fn is_done(&self) -> bool {
        matches!(self.end, End::Done)
    }
}

/// Why a step cannot be done.
#[derive(Clone)]
struct Held {
    /// What failed that it needs, in words.
    by: String,
    /// The step that failed.
    root: usize,
    /// Its error; none where it was interrupted.
    error: Option<String>,
}

struct Board<'p> {
    plan: &'p Plan,
    /// For each step, how many of its edges are still open.
    open: Vec<usize>,
    /// For each step, why it cannot be done.
    held: Vec<Option<Held>>,
    outcomes: Vec<Option<Outcome>>,
    ready: std::collections::VecDeque<usize>,
    left: usize,
    /// How many builds go on.
    building: usize,
    /// How many may.
    most_building: usize,
}

/// Carries out a plan and returns what became of every step, in the plan's order.
pub fn execute(node: &Node, plan: &Plan, options: &ExecuteOptions<'_>) -> Vec<Outcome> {
    let count = plan.steps.len();
    let mut followers: Vec<Vec<(usize, Need)>> = vec![Vec::new(); count];
    for (index, step) in plan.steps.iter().enumerate() {
        for edge in &step.after {
            followers[edge.step].push((index, edge.need));
        }
    }
    let board = Mutex::new(Board {
        plan,
        open: plan.steps.iter().map(|step| step.after.len()).collect(),
        held: vec![None; count],
        outcomes: (0..count).map(|_| None).collect(),
        ready: plan.steps.iter().enumerate().filter(|(_, step)| step.after.is_empty()).map(|(index, _)| index).collect(),
        left: count,
        building: 0,
        // One is left for everything else.
        most_building: options.parallel.saturating_sub(1).max(1),
    });
    let changed = Condvar::new();
    let runner = Runner { node, plan, options, made: Mutex::default() };
    let work = || {
        let mut state = lock(&board);
        while state.left > 0 {
            let Some(index) = state.next() else {
                state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let held = state.held[index].clone();
            drop(state);
            let step = &plan.steps[index];
            let outcome = runner.run(step, held);
            if step.action.is_visible() {
                (options.progress)(Progress::Over { step, outcome: &outcome });
            }
            state = lock(&board);
            let before = state.ready.len();
            state.finish(index, outcome, &followers[index]);
            if state.left == 0 {
                changed.notify_all();
            }
            // This thread goes on with one of them itself.
            for _ in before + 1..state.ready.len() {
                changed.notify_one();
            }
        }
    };
    std::thread::scope(|scope| {
        // One of them is this thread.
        for _ in 1..options.parallel.min(count) {
            scope.spawn(work);
        }
        work();
    });
    let outcomes = std::mem::take(&mut lock(&board).outcomes);
    outcomes.into_iter().map(|outcome| outcome.expect("every step has an outcome when none is left")).collect()
}

fn lock<'a, 'p>(board: &'a Mutex<Board<'p>>) -> MutexGuard<'a, Board<'p>> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board<'_> {
    /// Takes the next step that can begin: builds last, since they take their time and nobody waits for them but their own pools.
    fn next(&mut self) -> Option<usize> {
        let builds = |index: &usize| matches!(self.plan.steps[*index].action, Action::BuildImage { .. });
        match self.ready.iter().position(|index| !builds(index)) {
            Some(at) => self.ready.remove(at),
            None if self.building < self.most_building => {
                let index = self.ready.pop_front()?;
                self.building += 1;
                Some(index)
            }
            None => None,
        }
    }

    fn finish(&mut self, index: usize, outcome: Outcome, followers: &[(usize, Need)]) {
        let why = match &outcome.end {
            End::Done => None,
            End::Failed { .. } | End::Cancelled => {
                let by = format!("{} {}", self.plan.steps[index].action.verb(), outcome.object).trim().to_owned();
                let error = if let End::Failed { error, .. } = &outcome.end { Some(error.clone()) } else { None };
                Some(Held { by, root: index, error })
            }
            End::Held { .. } => self.held[index].clone(),
        };
        for (follower, need) in followers {
            if *need == Need::Success && self.held[*follower].is_none() {
                self.held[*follower].clone_from(&why);
            }
            self.open[*follower] -= 1;
            if self.open[*follower] == 0 {
                self.ready.push_back(*follower);
            }
        }
        self.outcomes[index] = Some(outcome);
        self.building -= usize::from(matches!(self.plan.steps[index].action, Action::BuildImage { .. }));
        self.left -= 1;
    }
}

struct Runner<'a> {
    node: &'a Node,
    plan: &'a Plan,
    options: &'a ExecuteOptions<'a>,
    /// The instances that the plan made, by pool and ordinal.
    made: Mutex<HashMap<(PoolAddress, u32), InstanceAddress>>,
}

/// Shows what a build says, and ends it when the pass is interrupted.
struct StepWatch<'a> {
    step: &'a Step,
    options: &'a ExecuteOptions<'a>,
}

impl BuildWatch for StepWatch<'_> {
    fn line(&self, line: &str) {
        (self.options.progress)(Progress::Note { step: self.step, text: line });
    }

    fn cancelled(&self) -> bool {
        self.options.cancel.load(Ordering::SeqCst)
    }
}

impl Runner<'_> {
    fn run(&self, step: &Step, held: Option<Held>) -> Outcome {
        let object = match &step.action {
            Action::Change { target, .. } => self.resolve(target).map_or_else(|| target.to_string(), |at| at.to_string()),
            action => action.object(),
        };
        if self.options.cancel.load(Ordering::SeqCst) {
            return Outcome { object, end: End::Cancelled, took: Duration::ZERO };
        }
        if let Some(Held { by, root, error }) = held {
            self.share_failure(step, root, error);
            return Outcome { object, end: End::Held { by }, took: Duration::ZERO };
        }
        if step.action.is_visible() {
            (self.options.progress)(Progress::Begun { step, object: &object });
        }
        let begun = Instant::now();
        let end = match self.act(step) {
            Ok(()) => End::Done,
            Err(error) => End::Failed { error: with_causes(&error), retry: error.retry_can_help() },
        };
        Outcome { object, end, took: begun.elapsed() }
    }

    /// A pool whose image is built with another pool's shows why there is none, as that one does.
    fn share_failure(&self, step: &Step, root: usize, error: Option<String>) {
        let (Action::BuildImage { pool }, Action::BuildImage { .. }) = (&step.action, &self.plan.steps[root].action) else { return };
        if let Some(error) = error
            && let Err(unwritten) = self.node.pool_build_failed(pool, &error)
        {
            tracing::warn!(%pool, error = with_causes(&unwritten), "that its image cannot be built is not written down");
        }
    }

    /// Tells whether the plan makes another tenant than this one.
    fn others_come(&self, tenant: &TenantId) -> bool {
        self.plan.steps.iter().any(|step| matches!(&step.action, Action::CreateTenant { tenant: new, .. } if new != tenant))
    }

    fn resolve(&self, target: &Target) -> Option<InstanceAddress> {
        match target {
            Target::Existing(at) => Some(at.clone()),
            Target::New { pool, ordinal } => {
                self.made.lock().unwrap_or_else(PoisonError::into_inner).get(&(pool.clone(), *ordinal)).cloned()
            }
        }
    }

    fn act(&self, step: &Step) -> Result<(), LifecycleError> {
        let node = self.node;
        match &step.action {
            Action::CreateTenant { tenant, network, quotas } => node.tenant_create(tenant, network.clone(), quotas.clone()),
            Action::UpdateTenant { tenant, quotas } => node.tenant_update(tenant, quotas.clone()),
            Action::CreatePool { pool, spec } => node.pool_create(&pool.tenant, spec.role, (**spec).clone()),
            Action::UpdatePool { pool, spec } => node.pool_update(pool, (**spec).clone()),
            Action::BuildImage { pool } => {
                let watch = StepWatch { step, options: self.options };
                let others_come = self.others_come(&pool.tenant);
                node.pool_build(pool, &BuildOptions { watch: &watch, limits: Limits::default(), others_come }).map(|_| ())
            }
            Action::Recover { at } => node.recover(at).map(|_| ()),
            Action::CreateInstances { pool, count, standing_in } => {
                let made = node.instances_create_with(pool, *count, *standing_in)?;
                let numbered = (0..).zip(made).map(|(ordinal, at)| ((pool.clone(), ordinal), at));
                self.made.lock().unwrap_or_else(PoisonError::into_inner).extend(numbered);
                Ok(())
            }
            Action::ApplyNetwork => node.apply_network(),
            Action::Change { verb, target, goal } => self.change(*verb, target, *goal),
            Action::Gate { pool, wanted } => self.gate(pool, *wanted),
            Action::Barrier => Ok(()),
            Action::DestroyPool { pool } => node.pool_destroy(pool),
            Action::DestroyTenant { tenant } => node.tenant_destroy(tenant),
        }
    }

    fn change(&self, verb: Verb, target: &Target, goal: StateName) -> Result<(), LifecycleError> {
        let node = self.node;
        let at = self
            .resolve(target)
            .ok_or_else(|| LifecycleError::Refused { what: format!("{verb} {target}"), why: "it was not made".to_owned() })?;
        let result = match verb {
            Verb::Start => node.start(&at, goal),
            Verb::Warm => node.warm(&at),
            Verb::Resume => node.resume(&at),
            Verb::Sleep => node.sleep(&at),
            Verb::Wake => node.wake(&at, goal),
            Verb::Stop => node.stop(&at, StopMode::Graceful),
            Verb::Rebuild => node.rebuild(&at),
            Verb::Destroy => node.destroy(&at),
        };
        match result {
            // Somebody was quicker.
            Err(LifecycleError::Illegal(illegal)) if illegal.from == verb.target() => Ok(()),
            Err(LifecycleError::NotFound { .. }) if verb == Verb::Destroy => Ok(()),
            other => other,
        }
    }

    fn gate(&self, pool: &PoolAddress, wanted: u32) -> Result<(), LifecycleError> {
        let mut ready = 0;
        for doc in self.node.pool_instances(pool, &mut Vec::new())? {
            let runs = doc.state.name() == StateName::Running && doc.transition.is_none();
            ready += u32::from(runs && doc.state.vm().is_some_and(|vm| self.node.vmm().liveness(vm) == Liveness::Alive));
        }
        if ready >= wanted {
            return Ok(());
        }
        Err(LifecycleError::Unready { what: format!("open the gate of {pool}"), why: format!("it has {ready} of {wanted} ready") })
    }
}
