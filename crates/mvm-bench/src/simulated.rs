//! What mvm itself costs, over simulated machines: state on a real disk, everything else in memory.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use mvm::agent::desired::{DesiredState, Format, parse};
use mvm::agent::execute::{ExecuteOptions, Progress};
use mvm::agent::plan::Retry;
use mvm::agent::reconciler;
use mvm::cli::Cli;
use mvm::cli::open::{Intent, Opened, open};
use mvm::store::Wait;

use crate::Selection;
use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::measure::{Samples, timed};
use crate::program;
use crate::trace;

/// The sizes of fleets that passes are measured over; the empty one is what a pass costs before the first instance.
const SIZES: [usize; 5] = [0, 1, 100, 1_000, 10_000];
/// The largest of them, which is also listed.
const MOST: usize = 10_000;

/// What a pass may cost for each instance, in microseconds.
const PASS_US: f64 = 25.0;
/// How many instances are created and started in a second, at least.
const CREATED_PER_SECOND: f64 = 500.0;
/// How many times as much as at 100 an instance may cost at 10,000.
const CREATE_GROWTH: f64 = 1.5;
/// What `mvm --version` may take, in milliseconds.
const VERSION_MS: f64 = 5.0;
/// What `mvm instance list` may take, in milliseconds: so much, and for each instance so much more.
const LIST_MS: (f64, f64) = (10.0, 0.015);

/// Measures what is wanted.
pub fn measure(dir: &Path, selection: &Selection) -> Result<Vec<Figure>, String> {
    let any = |names: &[&str]| names.iter().any(|name| selection.wants(name));
    let fleets = Fleets { dir: dir.to_owned(), built: SIZES.map(|size| (size, OnceCell::new())).into() };
    let mut figures = Vec::new();
    if any(&["command/version", "command/list"]) {
        figures.extend(commands(&fleets, selection)?);
    }
    let passes: Vec<String> = SIZES.iter().filter(|size| **size > 0).map(|size| pass_name(*size)).collect();
    if passes.iter().any(|name| selection.wants(name)) {
        figures.extend(passes_time(&fleets, selection)?);
    }
    if any(&[trace::PROCESSES, trace::WRITES]) {
        figures.extend(trace::measure(&fleets, &SIZES[1..])?);
    }
    if any(&["create/rate", "create/growth"]) {
        figures.extend(create(dir, selection)?);
    }
    Ok(figures)
}

fn pass_name(size: usize) -> String {
    format!("pass/{size}")
}

/// Fleets by their size, each built when it is first wanted.
pub struct Fleets {
    dir: PathBuf,
    built: BTreeMap<usize, OnceCell<Fleet>>,
}

impl Fleets {
    /// Returns the fleet of this size, as declared.
    pub fn of(&self, size: usize) -> Result<&Fleet, String> {
        let cell = self.built.get(&size).ok_or_else(|| format!("no fleet of {size} was planned"))?;
        if let Some(fleet) = cell.get() {
            return Ok(fleet);
        }
        tell(&format!("a fleet of {size}"));
        let fleet = Fleet::declare(self.dir.join(size.to_string()), size)?;
        fleet.apply()?;
        Ok(cell.get_or_init(|| fleet))
    }
}

/// A simulated fleet of one pool.
pub struct Fleet {
    dir: PathBuf,
    size: usize,
}

impl Fleet {
    /// Writes the fleet's file.
    fn declare(dir: PathBuf, size: usize) -> Result<Fleet, String> {
        fs::create_dir_all(&dir).map_err(|error| format!("cannot make {}: {error}", dir.display()))?;
        let fleet = Fleet { dir, size };
        fs::write(fleet.file(), fleet.document()).map_err(|error| format!("cannot write {}: {error}", fleet.file().display()))?;
        Ok(fleet)
    }

    fn document(&self) -> String {
        format!(
            r#"
            schema_version = 1
            [[tenants]]
            tenant_id = "big"
            network = {{ tenant_net_id = 1, ipv4_subnet = "10.241.0.0/18" }}
            [[tenants.pools]]
            pool_id = "web"
            desired_counts = {{ running = {} }}
            instance_resources = {{ vcpus = 1, mem_mib = 64 }}
            "#,
            self.size
        )
    }

    /// The fleet's file.
    pub fn file(&self) -> PathBuf {
        self.dir.join("fleet.toml")
    }

    /// Where a trace of a pass goes: beside what the pass could write to.
    pub fn summary(&self) -> PathBuf {
        self.dir.join("strace.txt")
    }

    /// The directories that a pass could write to.
    pub fn places(&self) -> [PathBuf; 2] {
        ["state", "run"].map(|name| self.dir.join(name))
    }

    /// `mvm` on this fleet.
    pub fn mvm(&self, args: &[&str]) -> Command {
        let [state, run] = self.places();
        let mut command = program::mvm(&state, &run, args);
        command.env("MVM_VMM", "simulated");
        command
    }

    /// Makes the fleet as declared, and tells how long that took.
    fn apply(&self) -> Result<Duration, String> {
        let took = program::took(self.mvm(&["apply", "--timeout", "10m", "-f"]).arg(self.file()))?;
        let listed = program::printed(&mut self.mvm(&["instance", "list"]))?;
        let running = listed.lines().filter(|line| line.contains(" Running ")).count();
        if running == self.size { Ok(took) } else { Err(format!("{running} of {} instances run after apply", self.size)) }
    }

    fn desired(&self) -> Result<DesiredState, String> {
        parse(&self.document(), Format::Toml).map_err(|error| error.to_string())
    }

    fn open(&self) -> Result<Opened, String> {
        let [state_dir, run_dir] = self.places();
        let words = ["mvm".as_ref(), "--vmm=simulated".as_ref(), "--state-dir".as_ref(), state_dir.as_os_str()];
        let words = words.into_iter().chain(["--run-dir".as_ref(), run_dir.as_os_str(), "status".as_ref()]);
        let globals = Cli::try_parse_from(words).map_err(|error| error.to_string())?.globals;
        open(&globals, Intent::Change).map_err(|error| error.text)
    }
}

/// A pass over a fleet that is as declared, in this process: a command's start would hide what one instance costs.
fn passes_time(fleets: &Fleets, selection: &Selection) -> Result<Vec<Figure>, String> {
    let sizes: Vec<usize> = SIZES.into_iter().filter(|size| *size == 0 || selection.wants(&pass_name(*size))).collect();
    let mut opened = Vec::new();
    for size in &sizes {
        let fleet = fleets.of(*size)?;
        opened.push((fleet.open()?, fleet.desired()?));
    }
    tell("passes that change nothing");
    let mut samples = vec![Samples::default(); sizes.len()];
    // The first round is not counted: it reads from the disk what the others find in memory.
    for round in 0..=selection.rounds(15, 3) {
        for (index, size) in sizes.iter().enumerate() {
            // Small fleets as often as it takes to see them.
            let repeat = (100 / size.max(&1)).max(1);
            let (took, ()) = timed(|| (0..repeat).try_for_each(|_| pass(&opened[index].0, &opened[index].1)))?;
            if round > 0 {
                samples[index].add(took / u32::try_from(repeat).unwrap_or(1));
            }
        }
    }
    let empty = samples[0].median();
    let figure = |(size, samples): (&usize, &Samples)| Figure {
        name: pass_name(*size),
        measured: (samples.median() - empty) * 1000.0 / *size as f64,
        unit: Unit::Us,
        limit: Some(Limit::AtMost(PASS_US)),
        samples: samples.len(),
        detail: format!("each; the pass {}, over no instances {empty:.3} ms", samples.words()),
    };
    Ok(sizes.iter().zip(&samples).skip(1).map(figure).collect())
}

fn pass(opened: &Opened, desired: &DesiredState) -> Result<(), String> {
    let cancel = AtomicBool::new(false);
    let options = ExecuteOptions { parallel: 4, progress: &|_: Progress<'_>| {}, cancel: &cancel };
    let report = reconciler::pass(&opened.node, desired, Retry::Now, Wait::No, &options).map_err(|error| error.to_string())?;
    if report.plan.is_settled() && report.problems.is_empty() { Ok(()) } else { Err("the fleet is not as declared".into()) }
}

/// Fleets from nothing, as `mvm apply` makes them.
fn create(dir: &Path, selection: &Selection) -> Result<Vec<Figure>, String> {
    let (small, middle) = (100, 1_000);
    let sizes: Vec<usize> = if selection.wants("create/growth") { vec![small, middle, MOST] } else { vec![middle] };
    let mut samples = vec![Samples::default(); sizes.len()];
    for round in 0..selection.rounds(5, 2) {
        for (index, size) in sizes.iter().enumerate() {
            // The largest takes as long as all others.
            if *size == MOST && round >= selection.rounds(3, 1) {
                continue;
            }
            tell(&format!("create and start {size}"));
            // Each stays: what was deleted a moment ago makes the next one slower on ext4.
            samples[index].add(Fleet::declare(dir.join(format!("create-{size}-{round}")), *size)?.apply()?);
        }
    }
    let of = |wanted: usize| {
        sizes.iter().position(|size| *size == wanted).map(|index| (&samples[index], samples[index].median() / wanted as f64))
    };
    let mut figures = Vec::new();
    if let Some((samples, each)) = of(middle) {
        figures.push(Figure {
            name: "create/rate".into(),
            measured: 1000.0 / each,
            unit: Unit::PerSecond,
            limit: Some(Limit::AtLeast(CREATED_PER_SECOND)),
            samples: samples.len(),
            detail: format!("mvm apply of {middle}: {}", samples.words()),
        });
    }
    if let (Some((few, before)), Some((many, after))) = (of(small), of(MOST)) {
        figures.push(Figure {
            name: "create/growth".into(),
            measured: after / before,
            unit: Unit::Times,
            limit: Some(Limit::AtMost(CREATE_GROWTH)),
            samples: many.len(),
            detail: format!("mvm apply of {MOST}: {}, of {small}: {}", many.words(), few.words()),
        });
    }
    Ok(figures)
}

/// Commands that only look.
fn commands(fleets: &Fleets, selection: &Selection) -> Result<Vec<Figure>, String> {
    let mut figures = Vec::new();
    let mut repeat = |name: &str, rounds: usize, most: f64, what: &str, command: &mut dyn FnMut() -> Command| -> Result<(), String> {
        if !selection.wants(name) {
            return Ok(());
        }
        tell(what);
        let mut samples = Samples::default();
        for round in 0..=rounds {
            let mut command = command();
            command.stdout(Stdio::null());
            let took = program::took(&mut command)?;
            if round > 0 {
                samples.add(took);
            }
        }
        let (measured, detail) = (samples.median(), format!("{what}: {}", samples.words()));
        let limit = Some(Limit::AtMost(most));
        figures.push(Figure { name: name.to_owned(), measured, unit: Unit::Ms, limit, samples: samples.len(), detail });
        Ok(())
    };
    repeat("command/version", selection.rounds(50, 10), VERSION_MS, "mvm --version", &mut || {
        let mut command = Command::new(program::measured());
        command.arg("--version");
        command
    })?;
    if selection.wants("command/list") {
        let fleet = fleets.of(MOST)?;
        let most = LIST_MS.0 + LIST_MS.1 * MOST as f64;
        let what = format!("mvm instance list of {MOST}");
        repeat("command/list", selection.rounds(20, 5), most, &what, &mut || fleet.mvm(&["instance", "list"]))?;
    }
    Ok(figures)
}
