//! One piece of work at one size, for a simulator that counts instructions.
//!
//! `scripts/instructions` builds this, runs it at two sizes under callgrind and holds the difference against budgets. By itself it
//! measures nothing: `instructions <work> <events>`. `relay-to-rabbitmq` takes the broker's address from `AMQP_URL`.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a benchmark; the tests of the same works use what this does not"
)]

mod works;

use works::{EVENTS, Works};

type Work = fn(&mut Works, u64);

const WORKS: &[(&str, Work)] = &[
    ("append", Works::append),
    ("append-singly", Works::append_singly),
    ("command", Works::command),
    ("encode", Works::encode),
    ("relay-to-nothing", Works::relay_to_nothing),
    ("relay-to-memory", Works::relay_to_memory),
    #[cfg(feature = "rabbitmq")]
    ("relay-to-rabbitmq", relay_to_rabbitmq),
    ("replay", Works::replay),
    ("events", Works::events),
];

#[cfg(feature = "rabbitmq")]
fn relay_to_rabbitmq(works: &mut Works, events: u64) {
    let url = std::env::var("AMQP_URL").expect("AMQP_URL says where the broker is");
    works.relay_to(works::node::publisher(&url), events);
}

fn main() {
    // `cargo bench` says `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let asked = match arguments.as_slice() {
        [name, events] => WORKS.iter().find(|(known, _)| known == name).zip(events.parse().ok()),
        _ => None,
    };
    let Some(((_, work), events)) = asked else {
        let names: Vec<_> = WORKS.iter().map(|(name, _)| *name).collect();
        eprintln!(
            "counted by scripts/instructions; by hand: instructions <work> <events>; works: {}",
            names.join(", ")
        );
        return;
    };
    let mut works = Works::new();
    // The same for every work and size, so it cancels out: as many events as any work reads, known keys, warm caches.
    works.append(2 * EVENTS);
    work(&mut works, events);
}
