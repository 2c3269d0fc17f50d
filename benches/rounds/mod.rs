//! What the benchmarks share: settings from the environment, and rounds in turn, of which the medians count. What one
//! machine does at one moment is no figure; two medians of one run make a ratio.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "each benchmark is a crate of its own, and none uses all of it"
)]

use std::time::Instant;

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// `cargo test` runs benchmarks too, once and without figures: only `cargo bench` says `--bench`.
pub fn is_test() -> bool {
    let given = |wanted: &str| std::env::args().any(|argument| argument == wanted);
    given("--test") || !given("--bench")
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One side of a comparison: does its work, and returns what it has read or written, which must not be nothing.
pub type Side<'a> = (&'a str, Box<dyn FnMut() -> u64 + 'a>);

/// Every side once per round, each round beginning with another, and every other one backwards; so many elements per second, by medians.
pub fn rates(rounds: u64, elements: u64, sides: &mut [Side<'_>]) -> Vec<f64> {
    let mut rates = vec![Vec::new(); sides.len()];
    for round in 0..rounds {
        for place in 0..sides.len() {
            let at = (round as usize + place) % sides.len();
            let at = if round % 2 == 0 { at } else { sides.len() - 1 - at };
            let (Some((name, work)), Some(rates)) = (sides.get_mut(at), rates.get_mut(at)) else { continue };
            let start = Instant::now();
            let seen = work();
            rates.push(elements as f64 / start.elapsed().as_secs_f64());
            assert!(seen > 0, "{name}: nothing was done");
        }
    }
    rates.into_iter().map(median).collect()
}
