//! The fault matrix: what each fault of the broker, the network and the consumer must lead to, on the whole path
//! (store → relay → RabbitMQ → raw tap). One test per row, named after it; docs/failure-modes.md links here.
//!
//! | file | rows |
//! |---|---|
//! | `outage` | B1, B2, B8 to B11: the broker blocks, dies, is away, slow, silent |
//! | `network` | B7, B11, B18: half-open links, blackholes, names, in namespaces of their own |
//! | `destination` | B3, B5, B6: nowhere to go, or no room there |
//! | `config` | B4, B14 to B16: refused |
//! | `message` | B12, B13, B20: what cannot be carried, or not be read |
//! | `clock` | B19 |
//! | `hostile` | B21 |
//! | `reconnects` | B22 |
//! | `consumer` | C1 to C9 |
//! | `order` | order through all of it at once |
//! | `secrets` | a canary through all of it |
//! | `table` | that docs/failure-modes.md names tests that exist |

mod clock;
mod config;
mod consumer;
mod destination;
mod hostile;
mod judge;
mod message;
mod network;

mod order;
mod outage;
mod reconnects;
mod secrets;
mod table;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use onewrite::broker::RabbitMq;
use onewrite::{Appended, Event, Fault, FaultClass, Receipt, Relay, RelayBuilder, RelayState, Store};

use self::judge::{Judge, payload};
use crate::support::rabbit::RabbitNode;
use crate::support::tap::{Raw, Tap};

const SOON: Duration = Duration::from_secs(60);

/// No write takes longer, whatever the broker does. A commit is a few milliseconds; the rest is for a busy machine.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "waited {SOON:?} for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A broker for those who block, freeze or kill it, one after the other. It is handed over running.
fn rough_node() -> MutexGuard<'static, RabbitNode> {
    static NODE: OnceLock<Mutex<RabbitNode>> = OnceLock::new();
    let node = NODE.get_or_init(|| Mutex::new(RabbitNode::start()));
    let mut guard = node.lock().unwrap_or_else(|poisoned| {
        // Whoever failed may have left it in any state.
        let mut guard = poisoned.into_inner();
        guard.restart();
        guard
    });
    guard.ensure_running();
    guard
}

/// Quick to come back, quick to notice.
fn rabbit(url: &str) -> RabbitMq {
    RabbitMq::new(url)
        .unwrap()
        .heartbeat(Duration::from_secs(1))
        .reconnect_backoff(Duration::from_millis(50), Duration::from_millis(200))
        .allow_plaintext_credentials()
}

/// A store and its relay, to a queue of that name on the default exchange.
///
/// The relay has one attempt of each kind, so an event that is charged for anything is in quarantine at once.
struct Line {
    _folder: tempfile::TempDir,
    store: Store,
    relay: Relay,
    queue: String,
    /// Events appended, by key.
    appended: BTreeMap<String, u64>,
}

impl Line {
    fn to(url: &str, queue: &str) -> Self {
        Self::with(queue, |relay| relay, rabbit(url))
    }

    fn with(queue: &str, settings: impl FnOnce(RelayBuilder) -> RelayBuilder, publisher: RabbitMq) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let relay = store
            .relay("rabbit")
            .attempts(1)
            .destination_attempts(1)
            .backoff(Duration::from_millis(20), Duration::from_millis(200));
        let relay = settings(relay).spawn(publisher).unwrap();
        Self { _folder: folder, store, relay, queue: queue.to_owned(), appended: BTreeMap::new() }
    }

    /// The next event of a key.
    fn append(&mut self, key: &str) -> Receipt<Appended> {
        let queue = self.queue.clone();
        self.append_to(key, "", &queue)
    }

    /// So many events of five keys, in one write, which takes no longer than any other.
    fn append_at_once(&mut self, count: u64) {
        let mut events = Vec::new();
        for n in 0..count {
            let key = format!("k{}", n % 5);
            let number = self.appended.entry(key.clone()).or_default();
            events.push(Event::bytes("matrix", payload(&key, *number)).key(key).to("", &*self.queue));
            *number += 1;
        }
        self.store
            .write(move |tx| events.iter().try_for_each(|event| tx.append(event.clone()).map(drop)))
            .unwrap();
    }

    /// The next event of a key, to some exchange. The write must not wait for any broker (P7).
    fn append_to(&mut self, key: &str, exchange: &str, routing_key: &str) -> Receipt<Appended> {
        let number = self.appended.entry(key.to_owned()).or_default();
        let event = Event::bytes("matrix", payload(key, *number)).key(key).to(exchange, routing_key);
        *number += 1;
        let began = Instant::now();
        let receipt = self.store.write(move |tx| tx.append(event.clone())).unwrap();
        assert!(began.elapsed() < WRITE_LIMIT, "a write took {:?}", began.elapsed());
        receipt
    }

    /// So many events over five keys.
    fn append_many(&mut self, count: u64) {
        for n in 0..count {
            self.append(&format!("k{}", n % 5));
        }
    }

    fn state(&self) -> RelayState {
        self.relay.status().state
    }

    /// Waits until the relay says that it is not connected, and why.
    fn until_down(&self) -> Fault {
        let mut why = None;
        until("the relay to be disconnected", || match self.state() {
            RelayState::Disconnected(fault) => {
                why = Some(fault);
                true
            }
            _ => false,
        });
        why.unwrap()
    }

    fn until_outage(&self) -> Fault {
        let fault = self.until_down();
        assert_eq!(fault.class, FaultClass::Outage, "{fault}");
        fault
    }

    fn until_connected(&self) {
        until("the relay to be connected", || self.state() == RelayState::Connected);
    }

    fn until_empty(&self) {
        let deadline = Instant::now() + SOON;
        while self.store.stats().unwrap().backlog_events != 0 {
            assert!(Instant::now() < deadline, "after {SOON:?} still waiting: {:?}", self.relay.status());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Nobody was charged for anything.
    fn assert_unspent(&self) {
        let relay = &self.store.stats().unwrap().relays["rabbit"];
        assert_eq!((relay.quarantined, relay.retrying), (0, 0));
        assert!(self.store.quarantine("rabbit").unwrap().list(None, 10).unwrap().is_empty());
    }

    /// Waits for the relay to be done, and judges what lies in the queue: all of it, in order per key, and nobody was charged.
    /// Returns how many arrived more than once.
    fn assert_all_arrived(&self, tap: &Tap) -> u64 {
        self.until_empty();
        self.assert_unspent();
        self.assert_complete(&tap.drain(&self.queue))
    }

    fn assert_complete(&self, raw: &[Raw]) -> u64 {
        let judge = Judge::of(raw).unwrap();
        judge.complete(&self.appended).unwrap();
        judge.repeats
    }

    /// A stop that has nothing to wait for.
    fn stop(self) {
        let report = self.relay.stop(Duration::from_secs(10));
        assert!(report.clean && report.backlog_events == 0, "{report:?}");
    }
}
