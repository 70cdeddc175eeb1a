//! What was measured against what it may be.

use mvm::infra::display::{OutputFormat, Row, Width, table};
use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// One figure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Figure {
    /// Its name, by which it is filtered: `wake/against-bare`.
    pub name: String,
    /// What was measured.
    pub measured: f64,
    /// What it is counted in.
    pub unit: Unit,
    /// What it may be; a figure without a limit is there to explain the others.
    pub limit: Option<Limit>,
    /// From how many measurements.
    pub samples: usize,
    /// What it was computed from, in words.
    pub detail: String,
}

/// A bound.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// What a figure is counted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Milliseconds.
    Ms,
    /// Microseconds.
    Us,
    /// So many times as much.
    Times,
    /// So many a second.
    PerSecond,
    /// So many.
    Count,
}

impl Figure {
    /// Tells whether it is within its limit.
    pub fn is_within(&self) -> bool {
        match self.limit {
            None => true,
            Some(Limit::AtMost(most)) => self.measured <= most,
            Some(Limit::AtLeast(least)) => self.measured >= least,
        }
    }
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Unit::Ms => format!("{value:.1} ms"),
            Unit::Us => format!("{value:.1} µs"),
            Unit::Times => format!("{value:.3} ×"),
            Unit::PerSecond => format!("{value:.0} /s"),
            Unit::Count => format!("{value:.0}"),
        }
    }
}

impl Row for Figure {
    const COLUMNS: &'static [(&'static str, Width)] = &[
        ("FIGURE", Width::Narrow),
        ("MEASURED", Width::Narrow),
        ("LIMIT", Width::Narrow),
        ("VERDICT", Width::Narrow),
        ("N", Width::Narrow),
        ("FROM", Width::Narrow),
    ];

    fn cells(&self) -> Vec<String> {
        let (limit, verdict) = match self.limit {
            None => ("-".to_owned(), "-"),
            Some(Limit::AtMost(most)) => (format!("<= {}", self.unit.show(most)), if self.is_within() { "ok" } else { "MISSED" }),
            Some(Limit::AtLeast(least)) => (format!(">= {}", self.unit.show(least)), if self.is_within() { "ok" } else { "MISSED" }),
        };
        let samples = self.samples.to_string();
        vec![self.name.clone(), self.unit.show(self.measured), limit, verdict.to_owned(), samples, self.detail.clone()]
    }
}

/// Everything that a run found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// Where.
    pub machine: Machine,
    /// Whether there were fewer repetitions than for the record.
    pub quick: bool,
    /// What.
    pub figures: Vec<Figure>,
}

impl Run {
    /// Tells whether every figure is within its limit.
    pub fn is_within(&self) -> bool {
        self.figures.iter().all(Figure::is_within)
    }

    /// Formats it for people.
    pub fn to_table(&self) -> String {
        format!("{}\n\n{}", self.machine, table(&self.figures, OutputFormat::Table))
    }
}
