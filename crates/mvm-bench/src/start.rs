//! From nothing to a guest that is ready: `mvm instance start` against a bare boot.

use crate::Selection;
use crate::bare;
use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::live::Live;
use crate::measure::Pairs;

/// The figures of this part.
pub const NAMES: [&str; 2] = ["start/against-bare", "start/own"];

/// How many times as long as bare a start may take.
const AGAINST_BARE: f64 = 1.05;
/// How much of it may be mvm's own, in milliseconds.
const OWN_MS: f64 = 30.0;

/// Measures both in pairs.
pub fn measure(live: &Live, selection: &Selection) -> Result<Vec<Figure>, String> {
    let (at, dir) = (&live.small, live.bare_dir("start")?);
    live.ask("start", at)?;
    let machine = live.machine(at)?;
    live.kill(at)?;
    bare::copy(&live.state_of(at)?.join("volumes/data.img"), &dir.join("data.img"))?;
    let rounds = selection.rounds(20, 4);
    tell(&format!("{rounds} starts, and as many bare ones"));
    let ours = || {
        let took = live.ask("start", at)?;
        live.kill(at)?;
        Ok(took)
    };
    let bare = || machine.prepare_boot(&dir)?.boot().map(|(took, _)| took);
    let mut pairs = Pairs::default();
    for _ in 0..rounds {
        pairs.round(ours, bare)?;
    }
    let figure = |name: &str, measured, unit, most| Figure {
        name: name.to_owned(),
        measured,
        unit,
        limit: Some(Limit::AtMost(most)),
        samples: rounds,
        detail: format!("mvm instance start of 128 MiB until it is ready: {}", pairs.words()),
    };
    Ok(vec![figure(NAMES[0], pairs.ratio(), Unit::Times, AGAINST_BARE), figure(NAMES[1], pairs.difference(), Unit::Ms, OWN_MS)])
}
