//! Numbers from repetitions.

use std::time::{Duration, Instant};

/// Measurements of one thing, in milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a measurement.
    pub fn add(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1000.0);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The value that as many lie below as above.
    pub fn median(&self) -> f64 {
        quantile(&self.0, 0.5)
    }

    /// The median with the quartiles around it, in words.
    pub fn words(&self) -> String {
        format!("{:.1} ms ({:.1} to {:.1})", self.median(), quantile(&self.0, 0.25), quantile(&self.0, 0.75))
    }
}

/// Measurements of two things that were taken in turn.
#[derive(Debug, Clone, Default)]
pub struct Pairs {
    /// Of mvm.
    pub ours: Samples,
    /// Of the bare thing.
    pub bare: Samples,
}

impl Pairs {
    /// Measures both once more, each the other's neighbour in time, and each as often first as second.
    pub fn round(
        &mut self,
        ours: impl FnOnce() -> Result<Duration, String>,
        bare: impl FnOnce() -> Result<Duration, String>,
    ) -> Result<(), String> {
        if self.ours.len().is_multiple_of(2) {
            self.ours.add(ours()?);
            self.bare.add(bare()?);
        } else {
            self.bare.add(bare()?);
            self.ours.add(ours()?);
        }
        Ok(())
    }

    /// The median over the pairs of how many times as long ours took.
    pub fn ratio(&self) -> f64 {
        self.each(|ours, bare| ours / bare)
    }

    /// The median over the pairs of how much longer ours took, in milliseconds.
    pub fn difference(&self) -> f64 {
        self.each(|ours, bare| ours - bare)
    }

    /// Both medians, in words.
    pub fn words(&self) -> String {
        format!("mvm {}, bare {}", self.ours.words(), self.bare.words())
    }

    fn each(&self, combine: impl Fn(f64, f64) -> f64) -> f64 {
        let all: Vec<f64> = self.ours.0.iter().zip(&self.bare.0).map(|(ours, bare)| combine(*ours, *bare)).collect();
        quantile(&all, 0.5)
    }
}

/// The value that this share of the others lies below, between neighbours by their distance.
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    below + (above - below) * place.fract()
}

/// Tells how long something took.
pub fn timed<T>(work: impl FnOnce() -> Result<T, String>) -> Result<(Duration, T), String> {
    let begun = Instant::now();
    let result = work()?;
    Ok((begun.elapsed(), result))
}
