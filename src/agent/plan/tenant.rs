//! Planning one tenant.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mvm_types::{PoolAddress, PoolId, TenantId};

use super::assign::{Assignment, Chain, assign, destroy_verbs};
use super::room::Ask;
use super::{Action, Edge, Planner, Retry, SharedBuild, Target, follows, needs};
use crate::agent::desired::DesiredTenant;
use crate::agent::observe::{ImagePresence, ObservedInstance, ObservedPool, ObservedTenant};
use crate::agent::order::{bring_up_order, waits_for, waits_on};
use crate::vm::instance::{StateName, Verb};
use crate::vm::pool::PoolSpec;
use crate::vm::pool::role::Roles;
use crate::vm::sleep_policy;
use crate::vmm::Liveness;

/// What is known of a pool while its tenant is planned.
#[derive(Default)]
struct PoolWork<'a> {
    /// What its instances wait for: its document, its image.
    ready: Vec<Edge>,
    assignment: Assignment<'a>,
    /// Why nothing of it is planned in this pass.
    held: Option<String>,
    /// The last steps of what goes down.
    down: Vec<usize>,
    /// The last steps of what comes up.
    up: Vec<usize>,
    /// Whether something that should go down cannot yet.
    down_deferred: bool,
    /// The step that writes down its new instances.
    created: Option<usize>,
    /// The step after which it has its wanted number of ready instances; none when it has them already.
    gate: Option<usize>,
    /// Why it will not have them in this pass.
    not_ready: Option<String>,
    /// What runs beside its instances while they are replaced.
    stand_in: Option<Target>,
}

impl Planner<'_> {
    /// Plans the document of a tenant that has lost it, and nothing else of it. Rules and bridges are made to fit by the next pass:
    /// before that they would leave its machines out.
    pub(super) fn adopt(&mut self, desired: &DesiredTenant) {
        let (tenant, network, quotas) = (desired.tenant_id.clone(), desired.network.clone(), desired.quotas.clone());
        let adopted = self.step(Action::CreateTenant { tenant, network, quotas }, "its document is gone", Vec::new());
        self.adopted.push(follows(adopted));
        self.plan.look_again = Some(Duration::ZERO);
        self.network = true;
    }

    /// Plans a declared tenant.
    pub(super) fn tenant(&mut self, desired: &DesiredTenant, prune_unknown_pools: bool) {
        if self.observed.orphans.contains_key(&desired.tenant_id) {
            return;
        }
        let observed = self.observed.tenants.get(&desired.tenant_id);
        let document = self.tenant_document(desired, observed);
        let mut down_ends = Vec::new();
        let mut kept = observed.map_or(0, |observed| observed.pools.len() + observed.orphans.len());
        if prune_unknown_pools && let Some(observed) = observed {
            let named: BTreeSet<&PoolId> = desired.pools.iter().map(|pool| &pool.pool_id).collect();
            let unknown: Vec<_> = observed.pools.values().filter(|pool| !named.contains(&pool.doc.spec.pool_id)).collect();
            kept -= unknown.len();
            down_ends.extend(self.destroy_pools(unknown));
        }
        // A new pool has its place once those that are pruned have given it up.
        let new_pool: Vec<Edge> = document.map(needs).into_iter().chain(down_ends.iter().copied().map(follows)).collect();
        let order = bring_up_order(&desired.pools, &self.observed.roles);
        let mut works: BTreeMap<&PoolId, PoolWork<'_>> = BTreeMap::new();
        for &spec in &order {
            let pool = observed.and_then(|tenant| tenant.pools.get(&spec.pool_id));
            let orphan = observed.is_some_and(|tenant| tenant.orphans.contains_key(&spec.pool_id));
            let new = pool.is_none() && !orphan;
            kept += usize::from(new);
            let work = match desired.quotas.check_pools(&desired.tenant_id, kept) {
                _ if orphan => self.orphan_pool(desired, spec, document),
                Err(quota) if new => {
                    kept -= 1;
                    self.no_place(desired, spec, &quota.to_string())
                }
                _ => self.pool_work(desired, spec, pool, (document, &new_pool)),
            };
            works.insert(&spec.pool_id, work);
        }
        for &spec in order.iter().rev() {
            self.down(desired, spec, &mut works);
        }
        down_ends.extend(works.values().flat_map(|work| work.down.iter().copied()));
        let destroyed: Vec<Edge> = down_ends.iter().copied().filter(|step| self.destroys(*step)).map(follows).collect();
        let down_over = match down_ends[..] {
            [] => None,
            _ => Some(self.step(Action::Barrier, "room is given back before it is taken", down_ends.into_iter().map(follows).collect())),
        };
        // One after the other, so that addresses are given out in the order of the pools.
        let mut created = None;
        for &spec in &order {
            self.admit(desired, spec, &mut works, down_over.into_iter().chain(created).map(follows).collect());
            created = works[&spec.pool_id].created.or(created);
        }
        let new = document.filter(|_| observed.is_none());
        let network = self.network_for(&desired.tenant_id, &works, new, destroyed);
        for &spec in &order {
            self.up(desired, spec, &mut works, network);
        }
        self.expose(desired, &works);
    }

    /// Plans that ports which are exposed lead to the instances that run at the end.
    fn expose(&mut self, desired: &DesiredTenant, works: &BTreeMap<&PoolId, PoolWork<'_>>) {
        let exposing = desired.pools.iter().filter(|pool| !pool.expose.is_empty());
        let changes: Vec<Edge> = exposing
            .filter_map(|pool| works.get(&pool.pool_id))
            .flat_map(|work| work.down.iter().chain(&work.up).copied().map(follows))
            .collect();
        if !changes.is_empty() {
            self.step(Action::ApplyNetwork, "exposed ports lead to what runs", changes);
        }
    }

    /// Tells whether a step takes something away that rules or bridges were made for.
    fn destroys(&self, step: usize) -> bool {
        matches!(self.plan.steps[step].action, Action::Change { verb: Verb::Destroy, .. } | Action::DestroyPool { .. })
    }

    /// Plans to make bridge and rules fit, after what is created and destroyed and before what starts.
    fn network_for(
        &mut self,
        tenant: &TenantId,
        works: &BTreeMap<&PoolId, PoolWork<'_>>,
        new: Option<usize>,
        destroyed: Vec<Edge>,
    ) -> Option<usize> {
        let created: Vec<Edge> = works.values().filter_map(|work| work.created).map(needs).collect();
        let boots = |verb: &Verb| matches!(verb, Verb::Start | Verb::Wake);
        let mut chains = works.values().flat_map(|work| work.assignment.up.iter().chain(&work.assignment.replace));
        let why = if !created.is_empty() {
            format!("new instances in {tenant}")
        } else if new.is_some() {
            format!("{tenant} is new")
        } else if !destroyed.is_empty() {
            format!("instances of {tenant} are gone")
        } else if chains.any(|chain| chain.verbs.iter().any(boots)) {
            format!("instances of {tenant} start")
        } else {
            return None;
        };
        let step = self.step(
            Action::ApplyNetwork,
            why,
            new.map(needs).into_iter().chain(created).chain(destroyed).chain(self.adopted.clone()).collect(),
        );
        self.network = true;
        Some(step)
    }

    fn tenant_document(&mut self, desired: &DesiredTenant, observed: Option<&ObservedTenant>) -> Option<usize> {
        let tenant = desired.tenant_id.clone();
        let quotas = desired.quotas.clone();
        match observed {
            None => {
                let network = desired.network.clone();
                Some(self.step(Action::CreateTenant { tenant, network, quotas }, "declared", Vec::new()))
            }
            Some(observed) if observed.doc.quotas != quotas => {
                Some(self.step(Action::UpdateTenant { tenant, quotas }, "quotas changed", Vec::new()))
            }
            Some(_) => None,
        }
    }

    /// A pool that the tenant's quota of pools leaves no place for.
    fn no_place<'a>(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, why: &str) -> PoolWork<'a> {
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        self.defer(&pool, "create pool", why, None);
        PoolWork { held: Some(why.to_owned()), not_ready: Some(format!("pool {pool} is not there: {why}")), ..PoolWork::default() }
    }

    /// Plans the document of a pool that has lost it; what its instances should become is seen by the next pass.
    fn orphan_pool<'a>(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, tenant_document: Option<usize>) -> PoolWork<'a> {
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        let after = tenant_document.map(needs).into_iter().collect();
        self.step(Action::CreatePool { pool: pool.clone(), spec: spec.clone().into() }, "its document is gone", after);
        self.plan.look_again = Some(Duration::ZERO);
        let held = "its document is written first".to_owned();
        PoolWork { not_ready: Some(format!("pool {pool}: {held}")), held: Some(held), down_deferred: true, ..PoolWork::default() }
    }

    /// Plans a pool's document and image, and decides what its instances should become.
    fn pool_work<'a>(
        &mut self,
        tenant: &DesiredTenant,
        spec: &PoolSpec,
        observed: Option<&'a ObservedPool>,
        (tenant_document, new_pool): (Option<usize>, &[Edge]),
    ) -> PoolWork<'a> {
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        let after: Vec<Edge> = tenant_document.map(needs).into_iter().collect();
        let mut work = PoolWork::default();
        let mut ready = after.clone();
        match observed {
            None => {
                let action = Action::CreatePool { pool: pool.clone(), spec: spec.clone().into() };
                ready = vec![needs(self.step(action, "declared", new_pool.to_vec()))];
            }
            Some(observed) if observed.doc.spec != *spec || self.observed.roles.say_else(spec, &observed.doc) => {
                let why = match observed.doc.spec == *spec {
                    true => format!("the manifest says something else of role {}", spec.role),
                    false => changed_fields(&observed.doc.spec, spec),
                };
                ready = vec![needs(self.step(Action::UpdatePool { pool: pool.clone(), spec: spec.clone().into() }, why, after))];
            }
            Some(_) => {}
        }
        if spec.desired_counts.total() > 0 {
            match self.image(&pool, spec, observed, &ready) {
                Ok(built) => ready.extend(built),
                Err(why) => {
                    work.not_ready = Some(format!("pool {pool} has no image"));
                    work.held = Some(why);
                    return work;
                }
            }
        }
        work.ready = ready;
        let Some(observed) = observed else {
            work.assignment = assign(spec.desired_counts, &[], |_| false, |_| false);
            return work;
        };
        if let Some(busy) = observed.instances.iter().find(|one| one.busy) {
            let why = format!("{} is being changed by another mvm", busy.doc.at());
            self.defer(&pool, "everything", &why, Some(Duration::from_secs(1)));
            work.held = Some(why);
        }
        for one in observed.instances.iter().filter(|one| !one.busy && one.needs_recovery()) {
            if one.doc.transition.as_ref().is_some_and(|transition| transition.to == StateName::Destroyed) {
                let target = Target::Existing(one.doc.at());
                let gone = self.step(
                    Action::Change { verb: Verb::Destroy, target, goal: StateName::Destroyed },
                    "its end was cut off",
                    Vec::new(),
                );
                let after = self.adopted.iter().copied().chain([follows(gone)]).collect();
                self.step(Action::ApplyNetwork, "an instance is gone", after);
                self.network = true;
                self.plan.look_again = Some(Duration::ZERO);
                work.held = Some(format!("{} is destroyed first", one.doc.at()));
                continue;
            }
            let why = match &one.doc.transition {
                Some(transition) => format!("it was cut off on its way from {} to {}", one.doc.state.name(), transition.to),
                None if one.doc.state.vm().is_some() && one.liveness == Liveness::Gone => {
                    format!("its virtual machine died while it was {}", one.doc.state.name())
                }
                None => "it was brought up for another state, and went no further".to_owned(),
            };
            self.step(Action::Recover { at: one.doc.at() }, why, Vec::new());
            self.plan.look_again = Some(Duration::ZERO);
            work.held = Some(format!("{} is recovered first", one.doc.at()));
        }
        if let Some(held) = &work.held {
            work.not_ready = Some(format!("pool {pool}: {held}"));
            work.down_deferred = true;
            return work;
        }
        let blueprint = spec.blueprint();
        let revision = observed.doc.revision.clone();
        // A pool that has no image yet, as one that lost its document, does not know what its instances should be made from.
        let known = revision.is_some();
        let outdated = |one: &ObservedInstance| {
            one.doc.blueprint != blueprint || (known && one.doc.revision.is_some() && one.doc.revision != revision)
        };
        let whole = self.observed;
        work.assignment = assign(spec.desired_counts, &observed.instances, outdated, |one| whole.lost_tap(one).is_some());
        let Assignment { down, replace, stand_ins, .. } = &mut work.assignment;
        if !replace.iter().any(|chain| chain.goal == StateName::Running) {
            let gone = |one: &'a ObservedInstance| Chain { instance: Some(one), verbs: destroy_verbs(one), goal: StateName::Destroyed };
            down.extend(stand_ins.drain(..).map(gone));
        }
        work
    }

    /// Plans to build a pool's image where it is not what it should be, and returns what its instances wait for besides.
    ///
    /// # Errors
    /// Why nothing can be done without the image.
    fn image(
        &mut self,
        pool: &PoolAddress,
        spec: &PoolSpec,
        observed: Option<&ObservedPool>,
        after: &[Edge],
    ) -> Result<Option<Edge>, String> {
        let declared = observed.is_some_and(|observed| observed.doc.built.as_ref().is_some_and(|built| !built.is_of(spec)));
        let (why, missing) = match observed.map(|observed| observed.image) {
            None | Some(ImagePresence::Missing) => ("the image is missing", true),
            _ if declared => ("another image is declared", false),
            Some(ImagePresence::Outdated) => ("the flake has changed", false),
            Some(ImagePresence::Present) => return Ok(None),
        };
        let shared = SharedBuild::of(spec);
        // What failed for one pool would fail for all that share it.
        let failure = observed
            .and_then(|observed| observed.doc.failure.as_ref().filter(|_| observed.doc.spec.flake_ref == spec.flake_ref))
            .or_else(|| self.failed_builds.get(shared.as_ref()?).copied());
        if let Some((why, wait)) = self.waits(failure) {
            self.defer(pool, "build image", &why, Some(wait));
            return if missing { Err("it has no image".to_owned()) } else { Ok(None) };
        }
        let why = match failure {
            Some(failure) => format!("{why}; the last try failed: {}", failure.error),
            None => why.to_owned(),
        };
        // Once for all that share it: the others find it built.
        let first = shared.as_ref().and_then(|shared| self.builds.get(shared)).copied().map(needs);
        let step = self.step(Action::BuildImage { pool: pool.clone() }, why, after.iter().copied().chain(first).collect());
        if let Some(shared) = shared {
            self.builds.insert(shared, step);
        }
        // The image that there is stays in service until the new one is built, and when it cannot be.
        Ok(match (missing, declared) {
            (true, _) => Some(needs(step)),
            (false, true) => Some(follows(step)),
            (false, false) => None,
        })
    }

    /// Tells whether a failure still waits, with what to say.
    fn waits(&self, failure: Option<&crate::infra::failure::Failure>) -> Option<(String, Duration)> {
        let failure = failure.filter(|_| self.retry != Retry::Now)?;
        let wait = failure.wait(self.now);
        let times = if failure.attempts == 1 { "once".to_owned() } else { format!("{} times", failure.attempts) };
        (!wait.is_zero() || self.retry == Retry::Never).then(|| (format!("{} failed {times}: {}", failure.step, failure.error), wait))
    }

    /// Plans what goes down in a pool, after the pools that wait for it.
    fn down<'a>(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, works: &mut BTreeMap<&PoolId, PoolWork<'a>>) {
        let chains: Vec<Chain<'a>> = std::mem::take(&mut works.get_mut(&spec.pool_id).expect("every pool has work").assignment.down);
        if chains.is_empty() {
            return;
        }
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        let behind = |other: &&PoolSpec| self.observed.roles.priority(other) > self.observed.roles.priority(spec) || waits_on(other, spec);
        let later: Vec<&PoolId> = tenant.pools.iter().filter(behind).map(|other| &other.pool_id).collect();
        let first = later.iter().find(|id| works[**id].down_deferred).map(|id| (*id).clone());
        let after: Vec<Edge> = works[&spec.pool_id]
            .ready
            .iter()
            .copied()
            .chain(later.iter().flat_map(|id| works[*id].down.iter().copied().map(needs)))
            .collect();
        let traits = self.observed.roles.of(spec).into_owned();
        let policy = sleep_policy::effective(&spec.runtime_policy, &traits);
        let mut running = works[&spec.pool_id].assignment.keep_running
            + u32::try_from(chains.iter().filter(|chain| leaves_running(chain)).count()).unwrap_or(u32::MAX);
        for chain in chains {
            let instance = chain.instance.expect("what goes down is there");
            let at = instance.doc.at();
            let what = chain.verbs[0].as_str();
            let wait = if leaves_running(&chain) && running <= policy.min_running {
                Some((format!("{} of {pool} run at least (min_running of role {})", policy.min_running, spec.role), None))
            } else if spec.pinned && !instance.doc.stands_in {
                Some(("the pool is pinned".to_owned(), None))
            } else if let Some(first) = &first {
                Some((format!("pool {}/{first} goes down first, and cannot yet", tenant.tenant_id), None))
            } else if let Some((why, wait)) = self.waits(instance.doc.failure.as_ref()) {
                Some((why, Some(wait)))
            } else if instance.doc.stands_in {
                // It ran for the others' sake, however long that was.
                None
            } else {
                sleep_policy::may(chain.verbs[0], &instance.doc.state, &policy, self.now).err().map(|keep| (keep.why, Some(keep.wait)))
            };
            let work = works.get_mut(&spec.pool_id).expect("every pool has work");
            if let Some((why, wait)) = wait {
                work.down_deferred = true;
                // What goes away only because there is too much of a pinned pool stays for good: nothing waits for it.
                if !spec.pinned || instance.doc.stands_in {
                    self.defer(&at, what, why, wait);
                } else {
                    work.down_deferred = false;
                }
                continue;
            }
            let state = instance.doc.state.name();
            let resources = &instance.doc.blueprint.resources;
            let before = self.room.clone();
            self.room.give_back(&tenant.tenant_id, state, resources);
            match chain.goal {
                StateName::Destroyed => self.room.remove(&tenant.tenant_id, &spec.pool_id, resources),
                StateName::Warm => {
                    let ask = Ask { tenant: &tenant.tenant_id, quotas: &tenant.quotas, pool: &spec.pool_id, resources };
                    if let Err(why) = self.room.take(&ask, false, StateName::Warm) {
                        self.room = before;
                        work.down_deferred = true;
                        self.defer(&at, what, why, None);
                        continue;
                    }
                }
                _ => {}
            }
            let why = match chain.goal {
                StateName::Destroyed if instance.doc.stands_in => "it stood in for others, which run again".to_owned(),
                StateName::Destroyed => {
                    format!("{} instances are wanted, and this is the newest beyond them", spec.desired_counts.total())
                }
                goal => format!("{pool} wants {}", wanted(spec, goal)),
            };
            running -= u32::from(leaves_running(&chain));
            let last = self.chain(&Target::Existing(at), &chain, &why, after.clone());
            works.get_mut(&spec.pool_id).expect("every pool has work").down.push(last);
        }
    }

    /// Adds the steps of a chain, each after the one before it, and returns the last one.
    fn chain(&mut self, target: &Target, chain: &Chain<'_>, why: &str, mut after: Vec<Edge>) -> usize {
        let mut last = 0;
        for verb in &chain.verbs {
            let action = Action::Change { verb: *verb, target: target.clone(), goal: chain.goal };
            last = self.step(action, why, std::mem::take(&mut after));
            after = vec![needs(last)];
        }
        last
    }

    /// Decides what of a pool's way up is done in this pass, and writes new instances down.
    fn admit(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, works: &mut BTreeMap<&PoolId, PoolWork<'_>>, behind: Vec<Edge>) {
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        let blocked = waits_for(spec, &tenant.pools).find_map(|other| works[&other.pool_id].not_ready.clone());
        let work = works.get_mut(&spec.pool_id).expect("every pool has work");
        if work.held.is_some() {
            return;
        }
        work.ready.extend(behind);
        let Assignment { up, replace, .. } = &mut work.assignment;
        if let Some(why) = blocked.filter(|_| !up.is_empty() || !replace.is_empty()) {
            self.defer(&pool, describe(up, replace), format!("it waits for another pool: {why}"), None);
            up.clear();
            replace.clear();
        }
        let failing = up.iter().chain(replace.iter()).find_map(|chain| self.chain_waits(chain));
        *up = self.with_room(tenant, spec, &pool, std::mem::take(up));
        if let Some((at, why, wait)) = failing.filter(|_| !replace.is_empty()) {
            // The rollout goes no further while one of the pool does not come up.
            let why = format!("the rollout waits for {at}: {why}");
            self.defer(&pool, format!("replace {}", replace.len()), why, Some(wait));
            replace.clear();
        }
        *replace = self.with_room_again(tenant, spec, std::mem::take(replace));
        let new = u32::try_from(up.iter().filter(|chain| chain.instance.is_none()).count()).unwrap_or(u32::MAX);
        match self.stand_in(tenant, spec, &work.assignment, new) {
            Ok(stand_in) => work.stand_in = stand_in,
            Err(why) => {
                let replace = &mut work.assignment.replace;
                self.defer(&pool, format!("replace {}", replace.len()), why, None);
                replace.clear();
            }
        }
        let Assignment { up, replace, .. } = &work.assignment;
        let standing_in = u32::from(matches!(work.stand_in, Some(Target::New { .. })));
        let count = new + standing_in;
        if count > 0 {
            let why = match new {
                0 => format!("it stands in while instances of {pool} are replaced"),
                _ => format!("{pool} wants {} in all", spec.desired_counts.total()),
            };
            let action = Action::CreateInstances { pool: pool.clone(), count, standing_in };
            work.created = Some(self.step(action, why, work.ready.clone()));
        }
        let running = up.iter().chain(replace.iter()).filter(|chain| chain.goal == StateName::Running).count();
        let ready = u64::from(work.assignment.keep_running) + running as u64;
        let wanted = u64::from(spec.desired_counts.running);
        if ready < wanted {
            work.not_ready = Some(format!("{} pool {pool} has {ready} of {wanted} ready", spec.role));
        }
    }

    /// Finds what keeps enough instances running while others are replaced, one at a time; `None` where enough run without it. `new` is
    /// how many instances are made besides.
    ///
    /// # Errors
    /// Why they cannot be replaced.
    fn stand_in(
        &mut self,
        tenant: &DesiredTenant,
        spec: &PoolSpec,
        assignment: &Assignment<'_>,
        new: u32,
    ) -> Result<Option<Target>, String> {
        let Assignment { up, replace, keep_running, stand_ins, .. } = assignment;
        let count = |chains: &[Chain<'_>]| {
            u32::try_from(chains.iter().filter(|chain| chain.goal == StateName::Running).count()).unwrap_or(u32::MAX)
        };
        let replaced = count(replace);
        let least = sleep_policy::effective(&spec.runtime_policy, &self.observed.roles.of(spec)).min_running;
        if replaced == 0 || keep_running + count(up) + replaced > least {
            return Ok(None);
        }
        if let Some(one) = stand_ins.first() {
            return match self.waits(one.doc.failure.as_ref()) {
                None => Ok(Some(Target::Existing(one.doc.at()))),
                Some((why, _)) => Err(format!("{} stands in for them, and does not come up: {why}", one.doc.at())),
            };
        }
        self.room
            .take(&Self::ask(tenant, spec), true, StateName::Running)
            .map_err(|why| format!("{least} run at least (min_running of role {}), and one more cannot run meanwhile: {why}", spec.role))?;
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        Ok(Some(Target::New { pool, ordinal: new }))
    }

    fn chain_waits(&self, chain: &Chain<'_>) -> Option<(mvm_types::InstanceAddress, String, Duration)> {
        let one = chain.instance?;
        self.waits(one.doc.failure.as_ref()).map(|(why, wait)| (one.doc.at(), why, wait))
    }

    /// Plans what comes up in a pool, and its gate.
    fn up(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, works: &mut BTreeMap<&PoolId, PoolWork<'_>>, network: Option<usize>) {
        let pool = PoolAddress::new(tenant.tenant_id.clone(), spec.pool_id.clone());
        let work = works.get_mut(&spec.pool_id).expect("every pool has work");
        let Assignment { up, replace, .. } = std::mem::take(&mut work.assignment);
        if up.is_empty() && replace.is_empty() {
            return;
        }
        let mut after: Vec<Edge> = work.ready.clone();
        after.extend(work.created.map(needs));
        after.extend(network.map(needs));
        after.extend(waits_for(spec, &tenant.pools).filter_map(|other| works[&other.pool_id].gate).map(needs));
        let lower = tenant.pools.iter().filter(|other| self.observed.roles.priority(other) < self.observed.roles.priority(spec));
        after.extend(lower.filter_map(|other| works[&other.pool_id].gate).map(follows));
        let mut ends = Vec::new();
        let mut lasts = Vec::new();
        let mut ordinal = 0;
        let mut serial = None;
        for chain in &up {
            let target = match chain.instance {
                Some(one) => Target::Existing(one.doc.at()),
                None => {
                    ordinal += 1;
                    Target::New { pool: pool.clone(), ordinal: ordinal - 1 }
                }
            };
            let mut after = after.clone();
            // Instances that are made only to sleep share the room that one of them needs on its way.
            if chain.goal == StateName::Sleeping {
                after.extend(serial.map(follows));
            }
            let last = self.chain(&target, chain, &format!("{pool} wants {}", wanted(spec, chain.goal)), after);
            lasts.push(last);
            match chain.goal {
                StateName::Sleeping => serial = Some(last),
                StateName::Running => ends.push(needs(last)),
                _ => {}
            }
        }
        let standing = self.start_stand_in(works.get_mut(&spec.pool_id).expect("every pool has work").stand_in.take(), &pool, &after);
        // One after the other, and no further when one does not come up.
        let mut rolling: Option<usize> = None;
        for chain in &replace {
            let one = chain.instance.expect("what is replaced is there");
            let mut after = after.clone();
            after.extend(ends.iter().copied());
            after.extend(standing.map(needs));
            after.extend(rolling.map(needs));
            let why = match self.observed.lost_tap(one).filter(|_| !chain.verbs.contains(&Verb::Rebuild)) {
                Some(tap) => format!("its TAP {tap} is gone"),
                None => "it is made from something else than the pool is now".to_owned(),
            };
            rolling = Some(self.chain(&Target::Existing(one.doc.at()), chain, &why, after));
        }
        ends.extend(rolling.map(needs));
        lasts.extend(rolling);
        works.get_mut(&spec.pool_id).expect("every pool has work").up = lasts;
        if !ends.is_empty() && has_followers(spec, tenant, &self.observed.roles) {
            let wanted = spec.desired_counts.running;
            let gate = self.step(Action::Gate { pool, wanted }, "what waits for this pool starts when it is ready", ends);
            works.get_mut(&spec.pool_id).expect("every pool has work").gate = Some(gate);
        }
    }

    /// Plans the start of what stands in, unless it runs, and returns the last step.
    fn start_stand_in(&mut self, stand_in: Option<Target>, pool: &PoolAddress, after: &[Edge]) -> Option<usize> {
        let target = stand_in?;
        // The next pass ends it.
        self.plan.look_again = Some(Duration::ZERO);
        let state = match &target {
            Target::New { .. } => StateName::Ready,
            Target::Existing(at) => {
                let there = self.observed.tenants.get(&at.tenant).and_then(|tenant| tenant.pools.get(&at.pool));
                there?.instances.iter().find(|one| one.doc.instance_id == at.instance)?.doc.state.name()
            }
        };
        let verbs = match state {
            StateName::Running => return None,
            StateName::Warm => vec![Verb::Resume],
            StateName::Sleeping => vec![Verb::Wake],
            StateName::Created => vec![Verb::Rebuild, Verb::Start],
            _ => vec![Verb::Start],
        };
        let chain = Chain { instance: None, verbs, goal: StateName::Running };
        Some(self.chain(&target, &chain, &format!("it stands in while instances of {pool} are replaced"), after.to_vec()))
    }

    fn ask<'s>(tenant: &'s DesiredTenant, spec: &'s PoolSpec) -> Ask<'s> {
        Ask { tenant: &tenant.tenant_id, quotas: &tenant.quotas, pool: &spec.pool_id, resources: &spec.instance_resources }
    }

    /// Counts an instance no more, before it is counted as what it becomes.
    fn forget(&mut self, instance: Option<&ObservedInstance>) {
        if let Some(one) = instance {
            self.room.give_back(&one.doc.tenant_id, one.doc.state.name(), &one.doc.blueprint.resources);
            self.room.remove(&one.doc.tenant_id, &one.doc.pool_id, &one.doc.blueprint.resources);
        }
    }

    /// Keeps the replacements that there is room for: what is not started again must not be stopped.
    fn with_room_again<'a>(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, replace: Vec<Chain<'a>>) -> Vec<Chain<'a>> {
        let mut admitted = Vec::new();
        for chain in replace {
            let before = self.room.clone();
            self.forget(chain.instance);
            match self.room.take(&Self::ask(tenant, spec), true, chain.goal) {
                Ok(()) => admitted.push(chain),
                Err(why) => {
                    self.room = before;
                    self.defer(chain.instance.map(|one| one.doc.at()).expect("what is replaced is there"), "replace", why, None);
                }
            }
        }
        admitted
    }

    /// Keeps the chains up that may be done now and that there is room for; defers the others.
    fn with_room<'a>(&mut self, tenant: &DesiredTenant, spec: &PoolSpec, pool: &PoolAddress, up: Vec<Chain<'a>>) -> Vec<Chain<'a>> {
        let mut admitted = Vec::new();
        let mut refused: BTreeMap<(Verb, String), u32> = BTreeMap::new();
        for chain in up {
            if let Some(one) = chain.instance
                && let Some((why, wait)) = self.waits(one.doc.failure.as_ref())
            {
                self.defer(one.doc.at(), chain.verbs[0].as_str(), why, Some(wait));
                continue;
            }
            let before = self.room.clone();
            self.forget(chain.instance);
            match self.room.take(&Self::ask(tenant, spec), true, chain.goal) {
                Ok(()) => admitted.push(chain),
                Err(why) => {
                    self.room = before;
                    *refused.entry((chain.verbs[0], why)).or_default() += 1;
                }
            }
        }
        for ((verb, why), count) in refused {
            let what = if count == 1 { format!("{verb} 1 instance") } else { format!("{verb} {count} instances") };
            self.defer(pool, what, why, None);
        }
        admitted
    }

    /// Plans the end of pools with all their instances, and returns the last steps.
    fn destroy_pools(&mut self, pools: Vec<&ObservedPool>) -> Vec<usize> {
        let specs: Vec<PoolSpec> = pools.iter().map(|pool| pool.doc.spec.clone()).collect();
        let mut ends: Vec<usize> = Vec::new();
        for spec in bring_up_order(&specs, &self.observed.roles).into_iter().rev() {
            let pool = pools.iter().find(|pool| pool.doc.spec.pool_id == spec.pool_id).expect("the order has the same pools");
            let tenant = &pool.doc.tenant_id;
            let before: Vec<Edge> = ends.iter().copied().map(needs).collect();
            let mut newest_first: Vec<&ObservedInstance> = pool.instances.iter().collect();
            newest_first.sort_by(|a, b| b.age().cmp(&a.age()));
            let mut gone = Vec::new();
            for one in newest_first {
                let verbs = if one.needs_recovery() { vec![Verb::Destroy] } else { destroy_verbs(one) };
                let chain = Chain { instance: Some(one), verbs, goal: StateName::Destroyed };
                self.room.give_back(tenant, one.doc.state.name(), &one.doc.blueprint.resources);
                self.room.remove(tenant, &spec.pool_id, &one.doc.blueprint.resources);
                let why = "it is not declared, and what is unknown is pruned";
                gone.push(needs(self.chain(&Target::Existing(one.doc.at()), &chain, why, before.clone())));
            }
            gone.extend(before);
            let action = Action::DestroyPool { pool: pool.doc.address() };
            ends.push(self.step(action, "it is not declared, and unknown pools are pruned", gone));
        }
        ends
    }

    /// Plans the end of a tenant that is not declared.
    pub(super) fn destroy_tenant(&mut self, id: &TenantId, tenant: &ObservedTenant) {
        let ends = self.destroy_pools(tenant.pools.values().collect());
        let gone = self.step(
            Action::DestroyTenant { tenant: id.clone() },
            "it is not declared, and unknown tenants are pruned",
            ends.into_iter().map(needs).collect(),
        );
        let after = self.adopted.iter().copied().chain([follows(gone)]).collect();
        self.step(Action::ApplyNetwork, format!("tenant {id} is gone"), after);
        self.network = true;
    }
}

/// Tells whether a running instance would not run any more.
fn leaves_running(chain: &Chain<'_>) -> bool {
    chain.goal != StateName::Running && chain.instance.is_some_and(|one| one.doc.state.name() == StateName::Running)
}

/// Tells whether other pools come after this one.
fn has_followers(spec: &PoolSpec, tenant: &DesiredTenant, roles: &Roles) -> bool {
    tenant.pools.iter().any(|other| roles.priority(other) > roles.priority(spec) || waits_on(other, spec))
}

fn wanted(spec: &PoolSpec, goal: StateName) -> String {
    let counts = spec.desired_counts;
    match goal {
        StateName::Warm => format!("{} warm", counts.warm),
        StateName::Sleeping => format!("{} sleeping", counts.sleeping),
        _ => format!("{} running", counts.running),
    }
}

fn describe(up: &[Chain<'_>], replace: &[Chain<'_>]) -> String {
    match (up.len(), replace.len()) {
        (0, n) => format!("replace {n}"),
        (n, 0) => format!("bring up {n}"),
        (n, m) => format!("bring up {n}, replace {m}"),
    }
}

/// Names the fields in which two declarations differ.
fn changed_fields(old: &PoolSpec, new: &PoolSpec) -> String {
    let value = |spec: &PoolSpec| serde_json::to_value(spec).expect("declarations have string keys and no failing serializers");
    let (old, new) = (value(old), value(new));
    let keys: BTreeSet<&String> = [&old, &new].into_iter().filter_map(|value| value.as_object()).flat_map(|map| map.keys()).collect();
    let changed: Vec<&str> = keys.into_iter().filter(|key| old.get(*key) != new.get(*key)).map(String::as_str).collect();
    format!("changed: {}", changed.join(", "))
}
