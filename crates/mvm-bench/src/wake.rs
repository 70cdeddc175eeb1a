//! There and back: `mvm instance sleep` and `wake`, of 128 and of 512 MiB, against a bare restore of the same snapshot.

use crate::Selection;
use crate::bare::{Machine, Snapshot};
use crate::figure::{Figure, Limit, Unit};
use crate::inside::tell;
use crate::live::Live;
use crate::measure::{Pairs, Samples};

/// The figures of this part.
pub const NAMES: [&str; 5] =
    ["wake/against-bare", "wake/against-first-word", "wake/512-against-128", "sleep/512-against-128", "sleep/first-512-against-128"];

/// How many times as long as bare a wake may take.
const AGAINST_BARE: f64 = 1.15;
/// How many times as long as 128 MiB may 512 MiB take: no longer, as far as two medians of this many measurements can tell.
const AGAINST_SMALL: f64 = 1.1;

/// One instance, and what is measured of it.
struct Subject<'a> {
    at: &'a str,
    machine: Machine,
    snapshot: Snapshot,
    dir: std::path::PathBuf,
    wakes: Pairs,
    /// How long a bare guest's agent took to its first word, at which nothing is set right yet.
    first_words: Samples,
    sleeps: Samples,
    /// Sleeps of a guest that was booted, and not woken: all of its memory is written.
    first_sleeps: Samples,
}

impl<'a> Subject<'a> {
    /// Brings an instance up, and to sleep with a snapshot of which there is a copy.
    fn new(live: &Live, at: &'a str, name: &str) -> Result<Subject<'a>, String> {
        let dir = live.bare_dir(name)?;
        live.ask("start", at)?;
        let mut first_sleeps = Samples::default();
        first_sleeps.add(live.ask("sleep", at)?);
        live.ask("wake", at)?;
        let machine = live.machine(at)?;
        live.ask("sleep", at)?;
        let snapshot = Snapshot::copy(&live.state_of(at)?, &live.bare_dir(&format!("{name}-snapshot"))?)?;
        Ok(Subject {
            at,
            machine,
            snapshot,
            dir,
            wakes: Pairs::default(),
            first_words: Samples::default(),
            sleeps: Samples::default(),
            first_sleeps,
        })
    }

    fn first_sleep(&mut self, live: &Live) -> Result<(), String> {
        live.kill(self.at)?;
        live.ask("start", self.at)?;
        self.first_sleeps.add(live.ask("sleep", self.at)?);
        Ok(())
    }

    /// Measures one more wake, sleep and bare restore.
    fn round(&mut self, live: &Live) -> Result<(), String> {
        let Subject { at, machine, snapshot, dir, wakes, first_words, sleeps, .. } = self;
        let ours = || {
            let took = live.ask("wake", at)?;
            sleeps.add(live.ask("sleep", at)?);
            Ok(took)
        };
        let bare = || {
            let (first_word, ready, _running) = machine.prepare_restore(snapshot, dir)?.restore()?;
            first_words.add(first_word);
            Ok(ready)
        };
        wakes.round(ours, bare)
    }
}

/// Measures both sizes in turn.
pub fn measure(live: &Live, selection: &Selection) -> Result<Vec<Figure>, String> {
    let mut small = Subject::new(live, &live.small, "wake-128")?;
    let mut large = Subject::new(live, &live.large, "wake-512")?;
    let (rounds, firsts) = (selection.rounds(25, 5), selection.rounds(6, 1));
    tell(&format!("{rounds} wakes and sleeps of 128 and 512 MiB, and as many bare restores"));
    for _ in 0..rounds {
        small.round(live)?;
        large.round(live)?;
    }
    tell(&format!("{firsts} sleeps after a boot"));
    for _ in 0..firsts {
        small.first_sleep(live)?;
        large.first_sleep(live)?;
    }
    let against = |name: &str, small: &Samples, large: &Samples, what: &str| Figure {
        name: name.to_owned(),
        measured: large.median() / small.median(),
        unit: Unit::Times,
        limit: Some(Limit::AtMost(AGAINST_SMALL)),
        samples: small.len().min(large.len()),
        detail: format!("{what}: 512 MiB {}, 128 MiB {}", large.words(), small.words()),
    };
    Ok(vec![
        Figure {
            name: NAMES[0].to_owned(),
            measured: small.wakes.ratio(),
            unit: Unit::Times,
            limit: Some(Limit::AtMost(AGAINST_BARE)),
            samples: rounds,
            detail: format!("mvm instance wake of 128 MiB until the guest is set right: {}", small.wakes.words()),
        },
        Figure {
            name: NAMES[1].to_owned(),
            measured: small.wakes.ours.median() / small.first_words.median(),
            unit: Unit::Times,
            limit: None,
            samples: rounds,
            detail: format!("the same against a bare agent's first word, at which nothing is set right yet: {}", small.first_words.words()),
        },
        against(NAMES[2], &small.wakes.ours, &large.wakes.ours, "mvm instance wake"),
        against(NAMES[3], &small.sleeps, &large.sleeps, "mvm instance sleep after a wake"),
        // As long as what the guest has written is large, of which its kernel writes more at boot when it has more memory.
        Figure { limit: None, ..against(NAMES[4], &small.first_sleeps, &large.first_sleeps, "mvm instance sleep after a boot") },
    ])
}
