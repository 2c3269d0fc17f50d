//! Rounds, medians, and the ratios that come out of them.

use std::fmt;
use std::time::{Duration, Instant};

/// The median. Of an even number the upper of the two in the middle.
///
/// # Panics
/// If there is none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value below which so large a share (0 to 1) lies.
///
/// # Panics
/// If there is none.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}

pub(crate) fn timed<T>(what: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = what();
    (start.elapsed(), result)
}

/// What is wanted of a ratio.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
    /// Reported, not judged.
    None,
}

impl Goal {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
            Self::None => true,
        }
    }
}

impl fmt::Display for Goal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "at least {bound}"),
            Self::AtMost(bound) => write!(f, "at most {bound}"),
            Self::None => write!(f, "-"),
        }
    }
}

#[derive(Debug)]
struct Row {
    key: &'static str,
    value: f64,
    goal: Goal,
    about: String,
}

/// The ratios of a run, in order.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Row>);

impl Report {
    /// `about` says in a few words what is divided by what, with the absolute figures.
    pub(crate) fn add(&mut self, key: &'static str, value: f64, goal: Goal, about: impl Into<String>) {
        self.0.push(Row { key, value, goal, about: about.into() });
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn json(&self) -> String {
        let object: serde_json::Map<_, _> = self
            .0
            .iter()
            .map(|row| (row.key.to_owned(), ((row.value * 1000.0).round() / 1000.0).into()))
            .collect();
        serde_json::Value::Object(object).to_string()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Row { key, value, goal, about } in &self.0 {
            let missed = if goal.holds(*value) { "" } else { "MISSED" };
            writeln!(f, "{key:<26} {value:>9.3}  {:<14} {missed:<7} {about}", goal.to_string())?;
        }
        Ok(())
    }
}
