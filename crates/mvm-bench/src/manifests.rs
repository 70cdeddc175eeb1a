//! What manifests cost: one read on its own, and a pass over pools whose flake has one against pools whose flake has none.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use mvm::agent::desired::{DesiredState, Format, parse};
use mvm::agent::execute::{ExecuteOptions, Progress};
use mvm::agent::plan::Retry;
use mvm::agent::reconciler;
use mvm::audit::Audit;
use mvm::host::FakeHost;
use mvm::image::nix::FlakeImage;
use mvm::infra::clock::SystemClock;
use mvm::infra::paths::Paths;
use mvm::store::{DocumentStore, Documents, FileStore, Wait};
use mvm::vm::node::{Node, Seams, VmmUids};
use mvm::vm::pool::nix_manifest::NixManifest;
use mvm::vm::pool::{ImageSource, LastBuild, NodeImages, PoolDoc};
use mvm::vm::tenant::NodeSealer;
use mvm::vmm::simulated::{Script, SimulatedVmm};
use mvm_types::{ProfileName, Role};

use crate::Selection;
use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::measure::{Pairs, Samples, timed};

/// How many pools a pass is measured over.
const POOLS: usize = 1_000;
/// What reading a manifest and finding a role and a profile in it may take, in milliseconds.
const LOAD_MS: f64 = 1.0;
/// How many times as long a pass may take where the flake has a manifest: as long, but for the one line more that each pool's document
/// has, and what a ratio of two such passes scatters.
const PASS_RATIO: f64 = 1.05;
/// Their names.
const LOAD: &str = "manifest/load";
const PASS: &str = "manifest/pass";

/// Measures what is wanted.
pub fn measure(dir: &Path, selection: &Selection) -> Result<Vec<Figure>, String> {
    let mut figures = Vec::new();
    if selection.wants(LOAD) {
        figures.push(load(dir, selection)?);
    }
    if selection.wants(PASS) {
        figures.push(pass(dir, selection)?);
    }
    Ok(figures)
}

/// A manifest as large as a busy flake's: twenty roles that use everything a role can have, and twenty profiles.
fn manifest() -> String {
    let profiles: String = (0..20).map(|n| format!("[profiles.p{n}]\nmodule = \"nix/p{n}.nix\"\n")).collect();
    let role = |name: &str| {
        format!(
            "[roles.{name}]\nmodule = \"nix/worker.nix\"\nrequires_config_drive = true\nmin_running_seconds = 30\n\
             ports = [{{ port = 8080 }}, {{ port = 8443 }}]\nservices = [\"web.service\"]\n"
        )
    };
    let roles: String = (0..19).map(|n| role(&format!("r{n}"))).collect();
    format!("[meta]\nversion = 1\n{profiles}{}{roles}", role("worker"))
}

/// Writes a flake's sources; nothing here asks nix of them.
fn flake(dir: &Path, with_manifest: bool) -> Result<PathBuf, String> {
    let nix = dir.join("nix");
    fs::create_dir_all(&nix).map_err(failed("make", &nix))?;
    let write = |name: &str, text: &str| fs::write(dir.join(name), text).map_err(failed("write", &dir.join(name)));
    write("flake.nix", "{ outputs = _: { }; }")?;
    write("nix/worker.nix", "{ }")?;
    (0..20).try_for_each(|n| write(&format!("nix/p{n}.nix"), "{ }"))?;
    if with_manifest {
        write("mvm-profiles.toml", &manifest())?;
    }
    Ok(dir.to_owned())
}

fn load(dir: &Path, selection: &Selection) -> Result<Figure, String> {
    tell("loading a manifest");
    let flake = flake(&dir.join("load"), true)?;
    let profile: ProfileName = "p7".parse().map_err(|error| format!("{error}"))?;
    let mut samples = Samples::default();
    for round in 0..=selection.rounds(200, 20) {
        let (took, ()) = timed(|| {
            let manifest = NixManifest::load(&flake).map_err(|error| error.to_string())?.ok_or("no manifest")?;
            let resolved = manifest.resolve(Role::Worker, &profile).map_err(|error| error.to_string())?;
            if resolved.attribute == "tenant-worker-p7" { Ok(()) } else { Err(format!("resolved to {}", resolved.attribute)) }
        })?;
        if round > 0 {
            samples.add(took);
        }
    }
    let detail = format!("{} bytes, 20 roles and 20 profiles, each module looked for: {}", manifest().len(), samples.words());
    let limit = Some(Limit::AtMost(LOAD_MS));
    Ok(Figure { name: LOAD.into(), measured: samples.median(), unit: Unit::Ms, limit, samples: samples.len(), detail })
}

/// Both fleets are built pools of a flake, as a pass finds them that has nothing to do.
fn pass(dir: &Path, selection: &Selection) -> Result<Figure, String> {
    tell(&format!("passes over {POOLS} pools, with a manifest and without"));
    let with = Fleet::build(&dir.join("with"), true)?;
    let without = Fleet::build(&dir.join("without"), false)?;
    let mut pairs = Pairs::default();
    for fleet in [&with, &without] {
        fleet.pass()?;
    }
    for _ in 0..selection.rounds(60, 10) {
        pairs.round(|| with.pass(), || without.pass())?;
    }
    Ok(Figure {
        name: PASS.into(),
        measured: pairs.ratio(),
        unit: Unit::Times,
        limit: Some(Limit::AtMost(PASS_RATIO)),
        samples: pairs.ours.len(),
        detail: format!("of {POOLS} pools: with {}, without {}", pairs.ours.words(), pairs.bare.words()),
    })
}

/// A node whose documents and images are real files, and whose host is not.
struct Fleet {
    node: Node,
    desired: DesiredState,
}

impl Fleet {
    fn build(dir: &Path, with_manifest: bool) -> Result<Fleet, String> {
        let reference = format!("path:{}", flake(&dir.join("flake"), with_manifest)?.display());
        let paths = Paths::new(dir.join("state"), Some(dir.join("run")));
        let image = image(&paths.images())?;
        let images = NodeImages::new(paths.images());
        let fingerprint = images.fingerprint(&reference)?;
        let node = node(paths, images)?;
        let pools: String =
            (0..POOLS).map(|n| format!("[[tenants.pools]]\npool_id = \"p{n}\"\nflake_ref = \"{reference}\"\nprofile = \"p7\"\n")).collect();
        let network = "network = { tenant_net_id = 7, ipv4_subnet = \"10.240.7.0/24\" }";
        let document = format!("schema_version = 1\n[[tenants]]\ntenant_id = \"acme\"\n{network}\n{pools}");
        let desired = parse(&document, Format::Toml).map_err(|error| error.to_string())?;
        let fleet = Fleet { node, desired };
        fleet.reconcile()?;
        // As a build would have left them.
        let built = LastBuild { flake_ref: reference, profile: "p7".parse().map_err(|error| format!("{error}"))?, fingerprint };
        for n in 0..POOLS {
            let key = format!("tenants/acme/pools/p{n}/pool.json");
            let documents = fleet.node.documents();
            let doc: PoolDoc = documents.read(&key).map_err(|error| error.to_string())?.ok_or_else(|| format!("no {key}"))?;
            if doc.traits.is_some() != with_manifest {
                return Err(format!("{key} has {:?} of a manifest", doc.traits));
            }
            let doc = PoolDoc { revision: Some(image.manifest.revision.clone()), built: Some(built.clone()), ..doc };
            documents.write(&key, &doc).map_err(|error| error.to_string())?;
        }
        Ok(fleet)
    }

    fn reconcile(&self) -> Result<reconciler::Report, String> {
        let cancel = AtomicBool::new(false);
        let options = ExecuteOptions { parallel: 4, progress: &|_: Progress<'_>| {}, cancel: &cancel };
        reconciler::pass(&self.node, &self.desired, Retry::Now, Wait::No, &options).map_err(|error| error.to_string())
    }

    fn pass(&self) -> Result<Duration, String> {
        let (took, report) = timed(|| self.reconcile())?;
        if report.plan.is_settled() && report.problems.is_empty() { Ok(took) } else { Err("the fleet is not as declared".into()) }
    }
}

fn node(paths: Paths, images: NodeImages) -> Result<Node, String> {
    let clock = Arc::new(SystemClock::new());
    let store: Arc<dyn DocumentStore> = Arc::new(FileStore::new(paths.state().to_owned(), paths.run().join("locks")));
    let vmm = SimulatedVmm::new(Script::default());
    let seams = Seams {
        documents: Documents::new(store.clone()),
        host: Arc::new(FakeHost::new()),
        vmm: Arc::new(vmm.clone()),
        guests: Arc::new(vmm),
        images: Arc::new(images),
        clock: clock.clone(),
        random: Box::new(|bytes| bytes.fill(7)),
        sealer: Arc::new(NodeSealer::new(paths.state().to_owned())),
        audit: Audit::new(store, clock, "bench".into()),
    };
    Node::open(paths, seams, VmmUids::PerInstance).map_err(|error| error.to_string())
}

/// The smallest thing that is taken for a built image: passes look whether it is there, and boot nothing.
fn image(images: &Path) -> Result<FlakeImage, String> {
    let delivered = images.join("delivered");
    fs::create_dir_all(&delivered).map_err(failed("make", &delivered))?;
    fs::set_permissions(images, fs::Permissions::from_mode(0o700)).map_err(failed("guard", images))?;
    let mut kernel = vec![0; 4096];
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    kernel[0x12] = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let write = |name: &str, bytes: &[u8]| fs::write(delivered.join(name), bytes).map_err(failed("write", &delivered.join(name)));
    write("vmlinux", &kernel)?;
    write("rootfs", b"hsqs")?;
    write("vmm.json", br#"{"version":1,"root_format":"squashfs"}"#)?;
    FlakeImage::adopt(&delivered, images, "packages.any.tenant-worker-p7").map_err(|error| error.to_string())
}

fn failed<'a>(doing: &'a str, path: &'a Path) -> impl Fn(std::io::Error) -> String + 'a {
    move |error| format!("cannot {doing} {}: {error}", path.display())
}
