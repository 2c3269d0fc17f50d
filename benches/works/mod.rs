//! The pieces of work that have a budget: what `tests/allocations` counts allocations of, and `scripts/instructions`
//! instructions.
//!
//! Each is done at any size, and what an event costs is the difference between twice the size and once, divided by the
//! size: opening, connecting and stopping cancel out. **Invariants.** Nothing depends on the clock: progress waits for
//! the end, nothing is trimmed. Events have 1,000 keys in turn, a payload of 256 bytes and the queue's destination.

#[cfg(feature = "rabbitmq")]
pub mod node;

use std::time::{Duration, Instant};

use onewrite::broker::{Epoch, MemoryBroker, Publisher, PublisherEvent, PublisherEvents, QueueOptions};
use onewrite::{
    Aggregate, Event, Outcome, Outgoing, RecordedEvent, Retention, SettingError, StartAt, Store, Transaction,
};

pub const QUEUE: &str = "budget";
/// The lanes of 4,096 events are written at the first commit that has as many behind it: of 100 events, the 41st.
pub const EVENTS: u64 = 4_100;
/// The same where each commit has one event.
pub const SINGLE_EVENTS: u64 = 4_096;
const BATCH: u64 = 100;
const KEYS: u64 = 1_000;
const PAYLOAD: [u8; 256] = [8; 256];
/// Longer than anything here takes, with everything made fifty times slower by a simulator.
const TIMEOUT: Duration = Duration::from_secs(600);

/// The n-th event. Its parts are the caller's: three allocations (type, payload, key), and one more of its destination.
pub fn event(n: u64) -> Event {
    Event::bytes("payment.completed", PAYLOAD).key(format!("account-{}", n % KEYS)).to("", QUEUE)
}

/// An account, and the sum that was paid to it. A snapshot with each second event keeps loading short.
#[derive(Debug, Default)]
struct Account {
    paid: u64,
}

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT_EVERY: u64 = 2;
    type Event = u64;

    fn encode(paid: &u64) -> onewrite::Result<Event> {
        Ok(Event::bytes("paid", paid.to_le_bytes()).unpublished())
    }

    fn decode(recorded: &RecordedEvent) -> onewrite::Result<u64> {
        Ok(number(recorded.payload()).expect("`encode` wrote eight bytes"))
    }

    fn apply(&mut self, paid: &u64) {
        self.paid += paid;
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some(self.paid.to_le_bytes().to_vec())
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        number(snapshot).map(|paid| Self { paid })
    }
}

fn number(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_le_bytes)
}

/// One store, in which the works are done.
#[derive(Debug)]
pub struct Works {
    store: Store,
    relays: u64,
    _folder: tempfile::TempDir,
}

impl Works {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // The page cache holds all of it; progress is written when a relay stops.
        let builder = Store::builder().retention(Retention::forever()).cache_bytes(1 << 30);
        let store = builder.progress_delay(TIMEOUT).open(folder.path().join("a.redb")).unwrap();
        Self { store, relays: 0, _folder: folder }
    }

    /// Appends and commits, 100 events in each transaction.
    pub fn append(&mut self, events: u64) {
        for first in (0..events).step_by(BATCH as usize) {
            let last = (first + BATCH).min(events);
            self.store.write(move |tx| append_all(tx, first..last)).unwrap();
        }
    }

    /// Appends and commits, one event in each transaction.
    pub fn append_singly(&mut self, events: u64) {
        for n in 0..events {
            self.store.write(move |tx| append_all(tx, n..n + 1)).unwrap();
        }
    }

    /// Commands without a competitor, one event each, to 1,000 aggregates in turn: load, decide, append, commit.
    pub fn command(&mut self, commands: u64) {
        for n in 0..commands {
            let account = self.store.aggregate::<Account>(n % KEYS);
            account.execute(|state| Ok(vec![state.paid + 1])).unwrap();
        }
    }

    /// Appends in transactions that are rolled back: checking, encoding, lane, checksum, and no file.
    pub fn encode(&mut self, events: u64) {
        for first in (0..events).step_by(BATCH as usize) {
            let tx = self.store.begin().unwrap();
            append_all(&tx, first..(first + BATCH).min(events)).unwrap();
            tx.rollback().unwrap();
        }
    }

    /// Reads the newest events where they lie.
    pub fn replay(&mut self, events: u64) {
        let (snapshot, from) = (self.store.read().unwrap(), self.from(events));
        let bytes: usize = snapshot.replay(from).unwrap().map(|event| event.unwrap().payload().len()).sum();
        assert_eq!(bytes as u64, events * PAYLOAD.len() as u64);
    }

    /// Reads the newest events, each by itself.
    pub fn events(&mut self, events: u64) {
        let (snapshot, from) = (self.store.read().unwrap(), self.from(events));
        let bytes: usize = snapshot.events(from).unwrap().map(|event| event.unwrap().payload().len()).sum();
        assert_eq!(bytes as u64, events * PAYLOAD.len() as u64);
    }

    /// A relay takes the newest events to a publisher that confirms at once: log, machine and progress, and no broker.
    pub fn relay_to_nothing(&mut self, events: u64) {
        self.relay_to(AtOnce::default(), events);
    }

    /// The same to the in-process broker, which keeps them.
    pub fn relay_to_memory(&mut self, events: u64) {
        let broker = MemoryBroker::new();
        broker.declare_queue(QUEUE, QueueOptions::default());
        self.relay_to(broker.publisher(), events);
        assert_eq!(broker.queue_len(QUEUE) as u64, events);
    }

    /// The same to any publisher.
    pub fn relay_to(&mut self, publisher: impl Publisher, events: u64) {
        self.relays += 1;
        let name = format!("relay-{}", self.relays);
        let start = StartAt::Position(self.from(events));
        let relay = self.store.relay(name).start_at(start).spawn(publisher).unwrap();
        let began = Instant::now();
        while relay.status().confirmed < events {
            assert!(began.elapsed() < TIMEOUT, "{:?}", relay.status());
            std::thread::sleep(Duration::from_millis(5));
        }
        let report = relay.stop(Duration::from_secs(60));
        assert!(report.clean, "{report:?}");
    }

    fn from(&self, newest: u64) -> u64 {
        let end = self.store.stats().unwrap().next_seq;
        end.checked_sub(newest).expect("as many have been appended")
    }
}

fn append_all(tx: &Transaction, numbers: std::ops::Range<u64>) -> onewrite::Result<()> {
    numbers.into_iter().try_for_each(|n| tx.append(event(n)).map(drop))
}

/// Confirms everything at once. Its own share is one allocation per event: the list that holds the outcome.
#[derive(Debug, Default)]
struct AtOnce(Option<PublisherEvents>);

impl Publisher for AtOnce {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        events.send(PublisherEvent::Up { epoch: Epoch(1) });
        self.0 = Some(events);
        Ok(())
    }

    fn publish(&mut self, _epoch: Epoch, outgoing: Outgoing) {
        let events = self.0.as_ref().expect("it was started");
        events.send(PublisherEvent::Outcomes(vec![(outgoing.ticket, Outcome::Confirmed)]));
    }

    fn stop(&mut self, _deadline: Duration) {}
}
