//! Every history of a small world: two keys and five events. The broker confirms in any order,
//! refuses, returns, closes the channel and keeps ghosts. Connections are lost, and the process
//! dies between any two writes. The search is depth first, over all reachable states. A state is
//! the future of the world and the machine (`fingerprint`).
//!
//! `model_tests` draws long histories of a large world at random. This search leaves nothing out of
//! a small world.
//!
//! A debug build searches small budgets. `ONEWRITE_MODEL=full`, for a release build, searches the
//! budgets that docs/testing.md names.

mod fingerprint;
mod world;

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

use self::world::{Budget, Move, World};
use super::types::{PublishOrder, QuarantinePolicy, Settings};

/// One state of this number is healed, to see that everything settles from there.
const HEALED_EVERY: u64 = 101;

/// The keys of the events, in order of the log.
type Log = &'static [Option<u8>];
const A: Option<u8> = Some(0);
const B: Option<u8> = Some(1);
const LOG: Log = &[A, B, A, B, A];
const LOG_IN_RUNS: Log = &[A, A, B, B, A];

fn settings(ordering: PublishOrder) -> Settings {
    Settings {
        ordering,
        on_quarantine: QuarantinePolicy::HoldKey,
        window_events: 3,
        window_bytes: 1000,
        lookahead_events: 4,
        lookahead_bytes: 1000,
        load_events: 3,
        attempts_max: 2,
        destination_attempts_max: 2,
        backoff_first_ms: 1,
        backoff_max_ms: 1,
        retrying_max: 1,
        held_keys_max: 2,
        rate_limit: None,
        seed: 0,
    }
}

/// Fingerprints are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 are hashed");
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

struct Frame {
    world: World,
    moves: Vec<Move>,
}

#[derive(Debug, Default)]
struct Found {
    states: u64,
    steps: u64,
    healed: u64,
    depth: usize,
}

/// The moves that led to the present state. They are shown when something panics there.
struct Path(Vec<Move>);

impl Drop for Path {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("after: {:?}", self.0);
        }
    }
}

/// Visits every state once. The error is the violation, and the moves that lead to it.
fn search(start: World) -> Result<Found, String> {
    let mut seen: HashSet<u64, BuildHasherDefault<AsIs>> = HashSet::default();
    let mut found = Found { states: 1, ..Found::default() };
    let mut path = Path(Vec::new());
    seen.insert(start.fingerprint());
    let mut stack = vec![Frame { moves: start.moves(), world: start }];
    while let Some(frame) = stack.last_mut() {
        let Some(next) = frame.moves.pop() else {
            stack.pop();
            path.0.pop();
            continue;
        };
        let mut world = frame.world.clone();
        path.0.push(next.clone());
        found.steps += 1;
        world.take(&next).map_err(|text| format!("{text}, after {:?}", path.0))?;
        let fingerprint = world.fingerprint();
        if !seen.insert(fingerprint) {
            path.0.pop();
            continue;
        }
        found.states += 1;
        found.depth = found.depth.max(path.0.len());
        if fingerprint % HEALED_EVERY == 0 {
            found.healed += 1;
            world.clone().heal().map_err(|text| format!("{text}, healed after {:?}", path.0))?;
        }
        stack.push(Frame { moves: world.moves(), world });
    }
    Ok(found)
}

fn is_full() -> bool {
    std::env::var_os("ONEWRITE_MODEL").is_some_and(|value| value == "full")
}

fn explore(name: &str, log: Log, ordering: PublishOrder, small: &[Budget], full: Budget) {
    let budgets = if is_full() { vec![full] } else { small.to_vec() };
    for budget in budgets {
        let found = search(World::new(log, settings(ordering), budget)).unwrap();
        eprintln!("{name}: {found:?} with {budget:?}");
        assert!(found.healed > 0, "{found:?}");
    }
}

const NOTHING: Budget = Budget {
    connections: 1,
    nacks: 0,
    returns: 0,
    silences: 0,
    closes: 0,
    crashes: 0,
    redrives: 0,
    discards: 0,
    ghosts: 0,
};
const LOST_CONNECTION: Budget = Budget { connections: 2, nacks: 1, ghosts: 1, ..NOTHING };
const SILENCE: Budget = Budget { silences: 1, ghosts: 1, ..NOTHING };
const QUARANTINE: Budget = Budget { returns: 2, crashes: 1, redrives: 1, discards: 1, ..NOTHING };
const CLOSED_CHANNEL: Budget = Budget { connections: 2, returns: 1, closes: 2, redrives: 1, ..NOTHING };

/// P3, P5. Goal: whatever happens, in whatever order, nothing is lost and the first deliveries of a
/// key ascend without a gap. Method: all histories within the budgets; in full three reconnects, a
/// nack, a return, a ghost and a crash.
#[test]
fn every_history_per_key() {
    let full = Budget { connections: 4, nacks: 1, returns: 1, crashes: 1, ghosts: 1, ..NOTHING };
    explore(
        "per key",
        LOG,
        PublishOrder::PerKey,
        &[LOST_CONNECTION, SILENCE, QUARANTINE, CLOSED_CHANNEL],
        full,
    );
}

/// Goal: the same with runs of one key, so that queues and parked rows are longer, and with
/// operators that redrive and discard.
#[test]
fn every_history_in_runs() {
    let full = Budget { connections: 2, closes: 2, ..QUARANTINE };
    explore("in runs", LOG_IN_RUNS, PublishOrder::PerKey, &[LOST_CONNECTION, CLOSED_CHANNEL], full);
}

/// Goal: under total order the first deliveries of all events ascend.
#[test]
fn every_history_in_total_order() {
    let full = Budget { connections: 3, nacks: 1, closes: 2, ghosts: 1, ..QUARANTINE };
    explore("total", LOG, PublishOrder::Total, &[LOST_CONNECTION, SILENCE, QUARANTINE, CLOSED_CHANNEL], full);
}

/// Goal: the search can fail. Method: a key's events are pipelined, and one nack, or one lost
/// connection, is enough.
#[test]
fn without_strictness_order_is_lost() {
    for (nacks, connections) in [(1, 1), (0, 2)] {
        let budget = Budget {
            connections,
            nacks,
            returns: 0,
            silences: 0,
            closes: 0,
            crashes: 0,
            redrives: 0,
            discards: 0,
            ghosts: 1,
        };
        let error = search(World::new(LOG, settings(PublishOrder::Relaxed), budget)).unwrap_err();
        assert!(error.contains("before"), "{error}");
    }
}
