//! What an event costs in allocations, over all threads: figures that do not depend on the clock.
//!
//! Goal: no path of an event allocates more than its budget. Method: an allocator that counts, in a test binary of its own, since
//! there is one allocator in a process and whatever else ran would be counted too. Each work is done once to warm up, then at
//! one size and at twice that: the difference is what the events cost. One `#[test]`, so that nothing runs beside it.

#![allow(
    missing_docs,
    unsafe_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test; an allocator cannot be written without `unsafe`, and the library forbids it for itself"
)]

mod counting;
#[path = "../../benches/works/mod.rs"]
mod works;

use counting::{Counting, asked};
use works::{EVENTS, SINGLE_EVENTS, Works};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What an event may cost.
#[derive(Debug)]
struct Budget {
    path: &'static str,
    allocations: f64,
    bytes: f64,
}

/// What one event costs: (allocations, bytes).
fn cost(works: &mut Works, events: u64, work: impl Fn(&mut Works, u64)) -> (f64, f64) {
    let of = |works: &mut Works, events: u64| {
        let before = asked();
        work(works, events);
        let after = asked();
        (after.times - before.times, after.bytes - before.bytes)
    };
    of(works, events);
    let (once, twice) = (of(works, events), of(works, 2 * events));
    let per_event = |once: u64, twice: u64| (twice as f64 - once as f64) / events as f64;
    (per_event(once.0, twice.0), per_event(once.1, twice.1))
}

#[test]
fn an_event_allocates_no_more_than_its_budget() {
    let mut works = Works::new();
    let mut told = Vec::new();
    let mut measure = |path: &'static str, (allocations, bytes): (f64, f64)| {
        eprintln!("{path:<28} {allocations:>8.3} allocations {bytes:>10.1} bytes");
        told.push((path, allocations, bytes));
    };
    measure("append, 100 per commit", cost(&mut works, EVENTS, Works::append));
    measure("append, one per commit", cost(&mut works, SINGLE_EVENTS, Works::append_singly));
    measure("encode", cost(&mut works, EVENTS, Works::encode));
    measure("replay", cost(&mut works, EVENTS, Works::replay));
    measure("events", cost(&mut works, EVENTS, Works::events));
    measure("relay to nothing", cost(&mut works, EVENTS, Works::relay_to_nothing));
    measure("relay to memory", cost(&mut works, EVENTS, Works::relay_to_memory));
    #[cfg(feature = "rabbitmq")]
    {
        let node = works::node::Node::start();
        measure("relay to RabbitMQ", cost(&mut works, EVENTS, |works, events| works.relay_to(works::node::publisher(&node.url()), events)));
    }
}
