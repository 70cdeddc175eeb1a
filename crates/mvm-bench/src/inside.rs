//! The inside: everything is measured here, one thing at a time.

use std::fs;
use std::path::Path;

use crate::figure::{Figure, Run};
use crate::machine::Machine;
use crate::outside::FIGURES;
use crate::{Selection, jailed, live, manifests, simulated};

/// Measures what is wanted and writes the figures into the directory.
pub fn run(dir: &Path, selection: &Selection) -> Result<(), String> {
    let mut machine = Machine::look(dir)?;
    let mut figures: Vec<Figure> = Vec::new();
    figures.extend(simulated::measure(&dir.join("simulated"), selection)?);
    figures.extend(manifests::measure(&dir.join("manifests"), selection)?);
    figures.extend(jailed::measure(&dir.join("firecracker"), selection)?);
    let (measured, acceleration) = live::measure(&dir.join("live"), selection)?;
    figures.extend(measured);
    machine.acceleration = acceleration;
    figures.retain(|figure| selection.wants(&figure.name));
    let run = Run { machine, quick: selection.quick, figures };
    let text = serde_json::to_vec(&run).map_err(|error| error.to_string())?;
    fs::write(dir.join(FIGURES), text).map_err(|error| format!("cannot write the figures: {error}"))
}

/// Says what is being measured.
pub fn tell(what: &str) {
    eprintln!("bench: {what}");
}
