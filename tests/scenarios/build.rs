//! Images from flakes: when they are built, for whom, and what stays in service meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mvm::agent::desired::DesiredState;
use mvm::agent::plan::{Action, Retry};
use mvm::agent::reconciler::{Applied, look};
use mvm::image::nix::{BuildError, BuilderKind, FlakeImage};
use mvm::vm::collect::Collect;
use mvm::vm::pool::role::RoleTraits;
use mvm::vm::pool::{
    BuildOptions, BuildRequest, BuilderChoice, Image, ImageError, ImageSource, LastBuild, Limits, NodeImages, Origin, PoolDoc, PoolSpec,
    Quiet, SimulatedImages, StoredImage,
};
use mvm_types::{PoolAddress, RevisionId};

use crate::world::{World, apply_on, toml};

/// Flakes that change and fail when a test says so.
#[derive(Default)]
struct Flakes {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the sources of every flake are.
    sources: String,
    fails: Option<String>,
    built: BTreeMap<String, Origin>,
    /// How often something was really built, or tried to be.
    builds: u32,
    /// Where each flake was built.
    builders: BTreeMap<String, BuilderKind>,
    images: BTreeSet<RevisionId>,
}

impl Flakes {
    fn change(&self, sources: &str) {
        self.state.lock().unwrap().sources = sources.to_owned();
    }

    fn fail(&self, why: Option<&str>) {
        self.state.lock().unwrap().fails = why.map(str::to_owned);
    }

    fn builds(&self) -> u32 {
        std::mem::take(&mut self.state.lock().unwrap().builds)
    }
}

impl ImageSource for Flakes {
    fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError> {
        let spec = request.spec;
        let mut state = self.state.lock().unwrap();
        state.builders.insert(spec.flake_ref.clone(), request.builder.kind());
        let key = format!("{} {}", spec.flake_ref, state.sources);
        if let Some(origin) = state.built.get(&key).filter(|origin| state.images.contains(&origin.revision)) {
            return Ok(origin.clone());
        }
        state.builds += 1;
        if let Some(why) = &state.fails {
            let source = BuildError::Failed { attribute: "a".into(), said: why.clone() }.into();
            return Err(ImageError::Flake { flake_ref: spec.flake_ref.clone(), profile: spec.profile.to_string(), source });
        }
        let origin = Origin { fingerprint: Some(state.sources.clone()), ..SimulatedImages.ensure(request)? };
        let hash = blake3::hash(key.as_bytes());
        let origin = Origin { revision: RevisionId::from_hash(*hash.as_bytes().first_chunk().unwrap()), ..origin };
        state.images.insert(origin.revision.clone());
        state.built.insert(key, origin.clone());
        Ok(origin)
    }

    fn ensure_builtin(&self, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        SimulatedImages.ensure_builtin(progress)
    }

    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        if !self.state.lock().unwrap().images.contains(revision) {
            return Err(ImageError::Unusable { revision: revision.clone(), why: "it is not there".into() });
        }
        SimulatedImages.open(revision)
    }

    fn fingerprint(&self, _flake_ref: &str) -> Result<Option<String>, String> {
        Ok(Some(self.state.lock().unwrap().sources.clone()))
    }

    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        SimulatedImages.role_traits(spec)
    }

    fn stored(&self) -> Result<Vec<StoredImage>, ImageError> {
        let stored =
            |revision: &RevisionId| StoredImage { revision: revision.clone(), size: 1, made: SystemTime::UNIX_EPOCH, pinned: false };
        Ok(self.state.lock().unwrap().images.iter().map(stored).collect())
    }

    fn remove(&self, revision: &RevisionId) -> Result<(), ImageError> {
        self.state.lock().unwrap().images.remove(revision);
        Ok(())
    }

    fn sweep(&self) -> Result<Vec<String>, ImageError> {
        Ok(Vec::new())
    }
}

fn world() -> (World, Arc<Flakes>) {
    let flakes = Arc::new(Flakes::default());
    flakes.change("first");
    let mut world = World::new();
    world.images = flakes.clone();
    (world, flakes)
}

/// Two pools of one flake in two tenants, and one of another.
fn fleet(count: u32) -> DesiredState {
    let tenant = |id: &str, net: u32, pools: &str| {
        format!("[[tenants]]\ntenant_id = \"{id}\"\nnetwork = {{ tenant_net_id = {net}, ipv4_subnet = \"10.240.{net}.0/24\" }}\n{pools}")
    };
    let pool = |id: &str, flake: &str| {
        format!(
            "[[tenants.pools]]\npool_id = \"{id}\"\nflake_ref = \"path:/flakes/{flake}\"\ndesired_counts = {{ running = {count} }}\nruntime_policy = {{ min_running_seconds = 0 }}\n"
        )
    };
    let acme = tenant("acme", 7, &format!("{}{}", pool("web", "shared"), pool("solo", "own")));
    toml(&format!("schema_version = 1\n{acme}{}", tenant("beta", 8, &pool("web", "shared"))))
}

fn revision(world: &World, pool: &str) -> Option<RevisionId> {
    let pool: PoolAddress = pool.parse().unwrap();
    world.node().pool(&pool).unwrap().revision
}

/// The images that a pool's instances are of.
fn images_of(world: &World, pool: &str) -> Vec<RevisionId> {
    let pool: PoolAddress = pool.parse().unwrap();
    let docs = world.node().pool_instances(&pool, &mut Vec::new()).unwrap();
    docs.into_iter().filter_map(|doc| doc.revision).collect()
}

#[test]
fn a_shared_flake_is_built_once_and_again_when_it_changes() {
    let (world, flakes) = world();
    world.ready(&fleet(2));
    assert_eq!(flakes.builds(), 2, "one for each flake");
    let first = revision(&world, "acme/web").unwrap();
    assert_eq!(revision(&world, "beta/web").as_ref(), Some(&first));
    assert!(world.pass(&fleet(2)).plan.is_settled());
    flakes.change("second");
    let plan = world.plan(&fleet(2));
    let whys: Vec<&str> =
        plan.steps.iter().filter(|step| matches!(step.action, Action::BuildImage { .. })).map(|step| step.why.as_str()).collect();
    assert_eq!(whys, ["the flake has changed"; 3]);
    world.ready(&fleet(2));
    assert_eq!(flakes.builds(), 2);
    let second = revision(&world, "acme/web").unwrap();
    assert_ne!(first, second);
    assert_eq!(images_of(&world, "beta/web"), [second.clone(), second]);
}

#[test]
fn a_build_that_fails_leaves_the_old_image_in_service_and_is_not_tried_for_everybody() {
    let (world, flakes) = world();
    world.ready(&fleet(1));
    let first = revision(&world, "acme/web").unwrap();
    flakes.builds();
    flakes.change("broken");
    flakes.fail(Some("no such luck"));
    let report = world.pass(&fleet(1));
    assert_eq!(report.failed().count(), 2, "one for each flake");
    assert_eq!(flakes.builds(), 2);
    for pool in ["acme/web", "beta/web"] {
        assert_eq!(revision(&world, pool).as_ref(), Some(&first));
        assert_eq!(world.states(pool), [1, 0, 0]);
    }
    // Until the next try, everything else of the pools goes on: more instances of the image that there is.
    let report = world.pass(&fleet(2));
    assert_eq!((report.failed().count(), flakes.builds()), (0, 0));
    assert_eq!(report.plan.deferred.iter().filter(|one| one.what == "build image" && one.why.contains("no such luck")).count(), 3);
    assert_eq!(images_of(&world, "beta/web"), [first.clone(), first.clone()]);
    assert!(matches!(world.apply(&fleet(2)).unwrap(), Applied::Partly { .. }));
    flakes.fail(None);
    world.advance(600);
    world.ready(&fleet(2));
    assert!(!images_of(&world, "beta/web").contains(&first));
}

#[test]
fn a_first_build_that_fails_holds_only_those_that_need_it() {
    let (world, flakes) = world();
    flakes.fail(Some("never"));
    let mut desired = fleet(1);
    desired.tenants[0].pools[1].flake_ref = "builtin".into();
    flakes.change("any");
    let report = world.pass(&desired);
    assert!(report.failed().count() >= 1);
    assert_eq!(world.states("acme/web"), [0, 0, 0]);
    assert_eq!(world.states("beta/web"), [0, 0, 0]);
    for pool in ["acme/web", "beta/web"] {
        let failure = world.node().pool(&pool.parse().unwrap()).unwrap().failure.expect("both say why they have no image");
        assert_eq!((failure.step.as_str(), failure.attempts), ("build image", 1), "{pool}");
        assert!(failure.error.contains("never"), "{}", failure.error);
    }
    flakes.fail(None);
    world.advance(600);
    world.ready(&desired);
}

#[test]
fn the_host_builds_for_the_only_tenant_and_for_nobody_when_another_comes() {
    let built = |desired: &DesiredState| {
        let (world, flakes) = world();
        let mut node = world.node();
        node.builder = BuilderChoice::Auto;
        assert_eq!(apply_on(&node, desired, 4).unwrap(), Applied::Ready);
        let builders = flakes.state.lock().unwrap().builders.clone();
        builders.into_values().collect::<BTreeSet<_>>()
    };
    let both = fleet(1);
    assert_eq!(built(&both), BTreeSet::from([BuilderKind::Vm]));
    let alone = DesiredState { tenants: vec![both.tenants[0].clone()], ..both };
    assert_eq!(built(&alone), BTreeSet::from([BuilderKind::Host]));
}

#[test]
fn a_rollback_is_not_undone_by_a_pass_and_is_by_a_changed_flake() {
    let (world, flakes) = world();
    world.ready(&fleet(1));
    let first = revision(&world, "acme/web").unwrap();
    world.advance(10);
    flakes.change("second");
    world.ready(&fleet(1));
    let second = revision(&world, "acme/web").unwrap();
    let pool: PoolAddress = "acme/web".parse().unwrap();
    let node = world.node();
    let before = node.pool_revision_before(&pool).unwrap();
    assert_eq!(before.origin.revision, first);
    node.pool_rollback(&pool, &first).unwrap();
    world.ready(&fleet(1));
    assert_eq!((revision(&world, "acme/web"), images_of(&world, "acme/web")), (Some(first.clone()), vec![first.clone()]));
    assert!(node.pool_revision_before(&pool).unwrap_err().to_string().contains("no revision before the current one"));
    assert_eq!(node.pool_revision(&pool, &second.as_str()[..6]).unwrap().origin.revision, second);
    assert!(node.pool_revision(&pool, "zz").unwrap_err().to_string().contains(second.as_str()), "it lists those that there are");
    flakes.change("third");
    world.ready(&fleet(1));
    let third = revision(&world, "acme/web").unwrap();
    assert!(third != first && third != second);
}

#[test]
fn a_changed_declaration_is_built_before_its_instances_come_up() {
    let (world, flakes) = world();
    world.ready(&fleet(1));
    let mut desired = fleet(2);
    desired.tenants[0].pools[0].flake_ref = "path:/flakes/other".into();
    flakes.builds();
    world.ready(&desired);
    assert_eq!(flakes.builds(), 1);
    let other = revision(&world, "acme/web").unwrap();
    assert_eq!(images_of(&world, "acme/web"), [other.clone(), other]);
}

#[test]
fn what_is_in_use_is_never_collected() {
    let (world, flakes) = world();
    world.ready(&fleet(1));
    for sources in ["second", "third", "fourth"] {
        world.advance(10);
        flakes.change(sources);
        world.ready(&fleet(1));
    }
    let node = world.node();
    let pool: PoolAddress = "acme/web".parse().unwrap();
    let count = || flakes.state.lock().unwrap().images.len();
    assert_eq!(count(), 8);
    let told = node.pool_collect(&pool, 2, Collect::Tell).unwrap();
    assert_eq!((told.len(), count()), (2, 8), "{told:?}");
    // The other tenant's pool still has the images.
    assert_eq!(node.pool_collect(&pool, 2, Collect::Remove).unwrap().len(), 2);
    assert_eq!((count(), node.pool_revisions(&pool, &mut Vec::new()).unwrap().len()), (8, 2));
    assert_eq!(node.node_collect(Duration::from_secs(86_400), Collect::Remove).unwrap(), Vec::new());
    world.advance(2 * 86_400);
    node.node_collect(Duration::from_secs(86_400), Collect::Remove).unwrap();
    assert_eq!(count(), 2, "what runs");
    assert!(world.pass(&fleet(1)).plan.is_settled());
    // What cannot be read may refer to anything; also when somebody else has moved it aside before.
    let current = revision(&world, "acme/web").unwrap();
    let key = format!("tenants/acme/pools/web/revisions/{current}.json");
    let whole = world.store.raw().read(&key).unwrap().unwrap();
    world.store.raw().write(&key, b"torn").unwrap();
    for _ in 0..2 {
        let refused = node.node_collect(Duration::ZERO, Collect::Remove).unwrap_err().to_string();
        assert!(refused.contains("what is in use is not known") && refused.contains(&key), "{refused}");
    }
    world.store.raw().write(&key, &whole).unwrap();
    node.node_collect(Duration::ZERO, Collect::Tell).unwrap();
    let at = world.node().pool_instances(&pool, &mut Vec::new()).unwrap()[0].at();
    world.store.raw().write(&format!("tenants/acme/pools/web/instances/{}/instance.json", at.instance), b"torn").unwrap();
    let refused = node.node_collect(Duration::ZERO, Collect::Remove).unwrap_err().to_string();
    assert!(refused.contains("what is in use is not known"), "{refused}");
    assert_eq!(count(), 2);
}

#[test]
fn an_interrupted_build_is_no_failure_of_the_pool() {
    struct Interrupted;
    impl ImageSource for Interrupted {
        fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError> {
            let source = BuildError::Interrupted { attribute: "a".into() }.into();
            Err(ImageError::Flake { flake_ref: request.spec.flake_ref.clone(), profile: "minimal".into(), source })
        }
        fn ensure_builtin(&self, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
            SimulatedImages.ensure_builtin(progress)
        }
        fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
            SimulatedImages.open(revision)
        }
        fn fingerprint(&self, flake_ref: &str) -> Result<Option<String>, String> {
            SimulatedImages.fingerprint(flake_ref)
        }
        fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
            SimulatedImages.role_traits(spec)
        }
        fn stored(&self) -> Result<Vec<StoredImage>, ImageError> {
            SimulatedImages.stored()
        }
        fn remove(&self, revision: &RevisionId) -> Result<(), ImageError> {
            SimulatedImages.remove(revision)
        }
        fn sweep(&self) -> Result<Vec<String>, ImageError> {
            SimulatedImages.sweep()
        }
    }
    let mut world = World::new();
    world.images = Arc::new(Interrupted);
    world.ready(&fleet(0));
    let pool: PoolAddress = "acme/web".parse().unwrap();
    let options = BuildOptions { watch: &Quiet, limits: Limits::default(), others_come: false };
    assert!(world.node().pool_build(&pool, &options).is_err());
    assert_eq!(world.node().pool(&pool).unwrap().failure, None);
}

/// Counts what a pass asks of the images; everything else is theirs.
struct Counted {
    images: NodeImages,
    fingerprints: AtomicUsize,
    manifests: AtomicUsize,
}

impl ImageSource for Counted {
    fn ensure(&self, request: &BuildRequest<'_>) -> Result<Origin, ImageError> {
        self.images.ensure(request)
    }
    fn ensure_builtin(&self, progress: &dyn Fn(&str)) -> Result<RevisionId, ImageError> {
        self.images.ensure_builtin(progress)
    }
    fn open(&self, revision: &RevisionId) -> Result<Image, ImageError> {
        self.images.open(revision)
    }
    fn fingerprint(&self, flake_ref: &str) -> Result<Option<String>, String> {
        self.fingerprints.fetch_add(1, Ordering::SeqCst);
        self.images.fingerprint(flake_ref)
    }
    fn role_traits(&self, spec: &PoolSpec) -> Result<Option<RoleTraits>, ImageError> {
        self.manifests.fetch_add(1, Ordering::SeqCst);
        self.images.role_traits(spec)
    }
    fn stored(&self) -> Result<Vec<StoredImage>, ImageError> {
        self.images.stored()
    }
    fn remove(&self, revision: &RevisionId) -> Result<(), ImageError> {
        self.images.remove(revision)
    }
    fn sweep(&self) -> Result<Vec<String>, ImageError> {
        self.images.sweep()
    }
}

/// What that costs is measured by `cargo xtask bench manifest`.
#[test]
fn a_pass_reads_the_manifest_and_the_sources_of_a_flake_once_for_all_its_pools() {
    const POOLS: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    let flake = dir.path().join("flake");
    fs::create_dir(&flake).unwrap();
    fs::write(flake.join("worker.nix"), "{ }").unwrap();
    let manifest = "[meta]\nversion = 1\n[profiles.minimal]\nmodule = \"worker.nix\"\n[roles.worker]\nmodule = \"worker.nix\"\n";
    fs::write(flake.join("mvm-profiles.toml"), manifest).unwrap();
    let images_dir = dir.path().join("images");
    let delivered = images_dir.join("delivered");
    fs::create_dir_all(&delivered).unwrap();
    let mut kernel = vec![0; 4096];
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    kernel[0x12] = 62;
    fs::write(delivered.join("vmlinux"), kernel).unwrap();
    fs::write(delivered.join("rootfs"), "hsqs").unwrap();
    fs::write(delivered.join("vmm.json"), r#"{"version":1,"root_format":"squashfs"}"#).unwrap();
    let image = FlakeImage::adopt(&delivered, &images_dir, "a").unwrap();
    let images = NodeImages::new(images_dir);
    let reference = format!("path:{}", flake.display());
    let built = LastBuild {
        flake_ref: reference.clone(),
        profile: "minimal".parse().unwrap(),
        fingerprint: images.fingerprint(&reference).unwrap(),
    };
    assert!(built.fingerprint.is_some());
    let counted = Arc::new(Counted { images, fingerprints: AtomicUsize::new(0), manifests: AtomicUsize::new(0) });
    let mut world = World::new();
    world.images = counted.clone();
    let pools = (0..POOLS).map(|n| format!("[[tenants.pools]]\npool_id = \"p{n}\"\nflake_ref = \"{reference}\"\n")).collect::<String>();
    let network = "network = { tenant_net_id = 7, ipv4_subnet = \"10.240.7.0/24\" }";
    let desired = toml(&format!("schema_version = 1\n[[tenants]]\ntenant_id = \"acme\"\n{network}\n{pools}"));
    world.ready(&desired);
    let node = world.node();
    for n in 0..POOLS {
        let key = format!("tenants/acme/pools/p{n}/pool.json");
        let doc: PoolDoc = node.documents().read(&key).unwrap().unwrap();
        let doc = PoolDoc { revision: Some(image.manifest.revision.clone()), built: Some(built.clone()), ..doc };
        node.documents().write(&key, &doc).unwrap();
    }
    let asked = || (counted.manifests.load(Ordering::SeqCst), counted.fingerprints.load(Ordering::SeqCst));
    let before = asked();
    let (_, plan) = look(&node, &desired, Retry::WhenDue).unwrap();
    assert!(plan.is_settled(), "{plan:?}");
    let after = asked();
    assert_eq!((after.0 - before.0, after.1 - before.1), (1, 1));
}
