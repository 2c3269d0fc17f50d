//! What the tests of the store share: a wait with a bound, a broker, events whose every byte follows from one number, copies of a file that is in
//! use (what a crash would leave), and child processes, which are this test binary run again for one test.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Aggregate, Event, RecordedEvent, Relay, RelayState, Snapshot, Store};
use tracing_subscriber::layer::{Context, Layer};

/// The state of most tests: what was written, by number.
pub(crate) const STATE: TableDefinition<'_, u64, u64> = TableDefinition::new("state");

/// Looks until it holds; fails after 20 s.
pub(crate) fn until(what: &str, holds: impl FnMut() -> bool) {
    until_within(Duration::from_secs(20), what, holds);
}

/// Waits until something holds; fails after `limit`.
pub(crate) fn until_within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {limit:?} for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Pauses a relay. From here on it publishes nothing that is appended.
pub(crate) fn pause(relay: &Relay) {
    relay.pause();
    until("the relay has heard of the pause", || relay.status().state == RelayState::Paused);
}

/// A broker with a tap, whose exchange `e` feeds the queue `q`.
pub(crate) fn broker() -> MemoryBroker {
    let broker = MemoryBroker::with_tap();
    broker.declare_exchange("e", ExchangeKind::Fanout);
    broker.declare_queue("q", QueueOptions::default());
    broker.bind("q", "e", "").unwrap();
    broker
}

/// The payload of event `n`: of odd lengths, and unlike that of any other.
pub(crate) fn payload(n: u64) -> Vec<u8> {
    let len = 8 + usize::try_from(n * 37 % 300).unwrap();
    n.to_le_bytes().into_iter().chain((0..len).map(|at| (n as usize * 31 + at) as u8)).collect()
}

/// Event `n`, in one of three lanes.
pub(crate) fn event(n: u64) -> Event {
    Event::bytes(format!("counted.{n}"), payload(n)).key(format!("key-{}", n % 3)).to("", "orders")
}

/// The number of an event made by [`event`]; panics where it differs from what was appended in any way.
pub(crate) fn number_of(recorded: &RecordedEvent) -> u64 {
    let n = u64::from_le_bytes(recorded.payload()[..8].try_into().unwrap());
    assert_eq!(recorded.payload(), payload(n), "the payload of event {} is another", recorded.seq());
    assert_eq!(recorded.event_type(), format!("counted.{n}"));
    assert_eq!(recorded.key(), Some(&*format!("key-{}", n % 3)));
    assert_eq!(recorded.content_type(), Some("application/octet-stream"));
    n
}

/// Writes `n` to the state and its event to the log, in one.
pub(crate) fn put(store: &Store, n: u64) -> onewrite::Result<onewrite::Receipt> {
    store.write(move |tx| {
        tx.open_table(STATE)?.insert(n, n)?;
        tx.append(event(n))?;
        Ok(())
    })
}

/// All events, in order; panics on a damaged one.
pub(crate) fn events(snapshot: &Snapshot) -> Vec<RecordedEvent> {
    snapshot.events(0).unwrap().collect::<onewrite::Result<_>>().unwrap()
}

/// The numbers in the state.
pub(crate) fn state(snapshot: &Snapshot) -> Vec<u64> {
    match snapshot.open_table(STATE) {
        Ok(table) => table.iter().unwrap().map(|row| row.unwrap().0.value()).collect(),
        Err(_) => Vec::new(),
    }
}

/// State and log hold the same, the sequence has no gap, and neither has any lane. Returns the numbers, sorted.
pub(crate) fn audit(store: &Store) -> Vec<u64> {
    let snapshot = store.read().unwrap();
    let events = events(&snapshot);
    let mut lanes: HashMap<(String, u64), u64> = HashMap::new();
    let mut numbers = Vec::new();
    for (at, recorded) in events.iter().enumerate() {
        assert_eq!(recorded.seq(), at as u64, "the sequence has a gap");
        let lane = recorded.lane().unwrap();
        let next = lanes.entry((recorded.key().unwrap().to_owned(), lane.id)).or_default();
        assert_eq!(lane.number, *next, "the lane of event {at} has a gap");
        *next += 1;
        numbers.push(number_of(recorded));
    }
    assert!(lanes.len() <= 3, "a lane began anew");
    numbers.sort_unstable();
    assert_eq!(numbers, state(&snapshot), "log and state differ: a write was done by half");
    assert_eq!(store.stats().unwrap().next_seq, numbers.len() as u64);
    numbers
}

/// Copies the file of a store that is in use: what would be there had the process died now.
pub(crate) fn crash_copy(store: &Store, folder: &Path) -> PathBuf {
    static COPIES: AtomicU64 = AtomicU64::new(0);
    let to = folder.join(format!("crashed-{}.redb", COPIES.fetch_add(1, Ordering::Relaxed)));
    std::fs::copy(store.path(), &to).unwrap();
    to
}

/// A small generator, so that a failure's seed says everything (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

const TASK: &str = "ONEWRITE_TEST_TASK";
const ARGUMENT: &str = "ONEWRITE_TEST_ARGUMENT";

/// This test binary, to be run for the one test `task` (its full path), which finds `path` and `argument` by [`task`].
pub(crate) fn child(task: &str, path: &Path, argument: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    into_child(&mut command, task, path, argument);
    command
}

/// As [`child`], behind another program: `program args… this-binary …`.
pub(crate) fn child_under(program: &[&str], task: &str, path: &Path, argument: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).arg(std::env::current_exe().unwrap());
    into_child(&mut command, task, path, argument);
    command
}

fn into_child(command: &mut Command, task: &str, path: &Path, argument: impl AsRef<OsStr>) {
    command.args(["--exact", task, "--nocapture", "--quiet", "--test-threads=1"]);
    // Children meet panics on purpose; a backtrace of each would take most of the time.
    command.env(TASK, path).env(ARGUMENT, argument).env("RUST_BACKTRACE", "0");
}

/// Inside a child: what it was given. `None` in an ordinary run of all tests, where a child's test does nothing.
pub(crate) fn task() -> Option<(PathBuf, String)> {
    Some((std::env::var_os(TASK)?.into(), std::env::var(ARGUMENT).ok()?))
}

/// Whether a program can be run here at all.
pub(crate) fn can_run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// What the library logs at WARN or above, with its fields.
#[derive(Debug, Clone, Default)]
pub(crate) struct Warnings(pub(crate) Arc<Mutex<Vec<String>>>);

struct Line(String);

impl tracing::field::Visit for Line {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl<S: tracing::Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let about = event.metadata();
        if *about.level() <= tracing::Level::WARN && about.target().starts_with("onewrite") {
            let mut line = Line(String::new());
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }
    }
}

/// An aggregate that counts its events.
#[derive(Debug, Default)]
pub(crate) struct Count(u64);

impl Aggregate for Count {
    const CATEGORY: &'static str = "count";
    type Event = ();
    fn encode((): &()) -> onewrite::Result<Event> {
        Ok(Event::bytes("counted", ""))
    }
    fn decode(_: &RecordedEvent) -> onewrite::Result<()> {
        Ok(())
    }
    fn apply(&mut self, (): &()) {
        self.0 += 1;
    }
}
