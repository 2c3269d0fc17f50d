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
    dead_code,
    reason = "a test, which does not do all of the works; an allocator cannot be written without `unsafe`, and the library forbids it for itself"
)]

mod counting;
#[path = "../../benches/works/mod.rs"]
mod works;

use counting::{Counting, asked};
use works::{EVENTS, SINGLE_EVENTS, Works};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What one event may cost, as measured in a release build.
#[derive(Debug, Clone, Copy)]
struct Budget {
    allocations: f64,
    bytes: f64,
}

/// The caller's own parts of an event: type, payload, key, routing key. They are in every budget of appending.
const EVENT: Budget = Budget { allocations: 4.0, bytes: 294.0 };
/// The event's four; body, frame, three times the lane's key; one at commit; the rest is redb's.
const APPEND: Budget = Budget { allocations: 13.4, bytes: 3_690.0 };
/// A whole commit: redb's transaction, its tables opened, the path of pages to each changed row copied. It is shared by the group.
const APPEND_SINGLY: Budget = Budget { allocations: 277.8, bytes: 81_900.0 };
/// Appending without the commit.
const ENCODE: Budget = Budget { allocations: 9.3, bytes: 1_500.0 };
/// Views of the records in their places.
const REPLAY: Budget = Budget { allocations: 0.0, bytes: 0.0 };
/// Each event by itself: id, type, payload, key, routing key.
const EVENTS_READ: Budget = Budget { allocations: 5.0, bytes: 390.0 };
/// Those five, four of the message (itself, its list of headers, sequence and time; all other texts are shared), the list of outcomes, and the maps of worker and machine.
const RELAY_TO_NOTHING: Budget = Budget { allocations: 12.5, bytes: 3_120.0 };
/// The queue keeps the very message that the relay made.
const RELAY_TO_MEMORY: Budget = Budget { allocations: 12.5, bytes: 3_340.0 };
/// More than three times that again for lapin: names and values of properties and headers in its own types, frames, promises.
#[cfg(feature = "rabbitmq")]
const RELAY_TO_RABBITMQ: Budget = Budget { allocations: 60.0, bytes: 11_810.0 };

/// With debug assertions each record is read back as it is appended.
const READ_BACK: Budget =
    if cfg!(debug_assertions) { EVENTS_READ } else { Budget { allocations: 0.0, bytes: 0.0 } };

impl Budget {
    /// Less than one allocation on the paths of the relay: one more is seen.
    const ALLOCATIONS_SLACK: f64 = 1.025;
    /// Buffers grow by doubling, and what they hold at once differs from run to run.
    const BYTES_SLACK: f64 = 1.1;
    /// What may come on top where the budget is nothing: a snapshot has a few allocations of its own.
    const REST: Self = Self { allocations: 0.05, bytes: 16.0 };

    const fn and(self, more: Self) -> Self {
        Self { allocations: self.allocations + more.allocations, bytes: self.bytes + more.bytes }
    }

    fn holds(self, used: Self) -> bool {
        used.allocations <= self.allocations * Self::ALLOCATIONS_SLACK + Self::REST.allocations
            && used.bytes <= self.bytes * Self::BYTES_SLACK + Self::REST.bytes
    }
}

/// What has been asked for meanwhile.
fn asked_by(work: impl FnOnce()) -> Budget {
    let before = asked();
    work();
    let after = asked();
    Budget { allocations: (after.times - before.times) as f64, bytes: (after.bytes - before.bytes) as f64 }
}

/// What one event costs.
fn cost(works: &mut Works, events: u64, work: impl Fn(&mut Works, u64)) -> Budget {
    work(works, events / 8);
    let once = asked_by(|| work(works, events));
    let twice = asked_by(|| work(works, 2 * events));
    let each = |once: f64, twice: f64| (twice - once) / events as f64;
    Budget { allocations: each(once.allocations, twice.allocations), bytes: each(once.bytes, twice.bytes) }
}

/// Says what was used, and what is too much. All paths are measured before the test fails.
#[derive(Debug, Default)]
struct Verdicts(Vec<String>);

impl Verdicts {
    fn judge(&mut self, path: &str, budget: Budget, used: Budget) {
        eprintln!(
            "{path:<24} {:>7.2} allocations, budget {:>6.1} {:>8.0} bytes, budget {:>6.0}",
            used.allocations, budget.allocations, used.bytes, budget.bytes
        );
        if !budget.holds(used) {
            self.0.push(format!("{path} costs {used:?} per event, its budget is {budget:?}"));
        }
    }
}

#[test]
fn an_event_allocates_no_more_than_its_budget() {
    let (mut works, mut verdicts) = (Works::new(), Verdicts::default());
    let mut hold = |path, budget, events, work: &dyn Fn(&mut Works, u64)| {
        verdicts.judge(path, budget, cost(&mut works, events, work));
    };
    hold("the caller's event", EVENT, EVENTS, &|_, events| (0..events).for_each(|n| drop(works::event(n))));
    hold("append, 100 per commit", APPEND.and(READ_BACK), EVENTS, &Works::append);
    hold("append, one per commit", APPEND_SINGLY.and(READ_BACK), SINGLE_EVENTS, &Works::append_singly);
    hold("encode", ENCODE.and(READ_BACK), EVENTS, &Works::encode);
    hold("replay", REPLAY, EVENTS, &Works::replay);
    hold("events", EVENTS_READ, EVENTS, &Works::events);
    hold("relay to nothing", RELAY_TO_NOTHING, EVENTS, &Works::relay_to_nothing);
    hold("relay to memory", RELAY_TO_MEMORY, EVENTS, &Works::relay_to_memory);
    #[cfg(feature = "rabbitmq")]
    {
        let node = works::node::Node::start();
        let publish = |works: &mut Works, events| works.relay_to(works::node::publisher(&node.url()), events);
        hold("relay to RabbitMQ", RELAY_TO_RABBITMQ, EVENTS, &publish);
    }
    assert!(verdicts.0.is_empty(), "\n{}", verdicts.0.join("\n"));
}
