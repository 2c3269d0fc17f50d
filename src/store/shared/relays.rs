//! The relays that run in this process: how to reach them, and their states.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;

use crate::delivery::types::SuspendCause;
use crate::error::{Error, Result};
use crate::message::Fault;
use crate::oneshot;
use crate::time::Deadline;

/// A request of another thread to a relay.
#[derive(Debug)]
pub(crate) enum RelayRequest {
    /// Answer when all of these events are confirmed, or when one of them is quarantined.
    Await { seqs: Vec<u64>, reply: oneshot::Sender<Awaited> },
    /// Answer once all earlier requests have been received.
    Echo { reply: oneshot::Sender<()> },
    /// A person has durably redriven this event.
    Redriven { seq: u64, fault: Fault },
    /// A person has durably discarded this event.
    Discarded { seq: u64, key: Option<String> },
    /// Drop expired events: a write wants room under the backlog quota.
    LetExpiredGo,
    /// Publish nothing new.
    Pause,
    /// Publish again.
    Resume,
    /// End by this deadline, and report.
    Stop { deadline: Deadline },
}

/// The answer to `Await`.
#[derive(Debug)]
pub(crate) enum Awaited {
    Confirmed,
    Quarantined {
        seq: u64,
        fault: Fault,
    },
    /// Reading the file failed.
    Failed(Error),
}

/// The state of a relay.
///
/// ```
/// use onewrite::RelayState;
/// fn is_well(state: &RelayState) -> bool {
///     matches!(state, RelayState::Connecting | RelayState::Connected)
/// }
/// assert!(is_well(&RelayState::default()));
/// assert!(!is_well(&RelayState::Paused));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RelayState {
    /// No connection has been made yet.
    #[default]
    Connecting,
    /// Publishing, or waiting for something to publish.
    Connected,
    /// The broker blocks publishers (a memory or disk alarm). Nothing is lost, and no attempts are
    /// consumed.
    Blocked,
    /// There is no connection; the publisher goes on trying.
    Disconnected(Fault),
    /// Paused by the application.
    Paused,
    /// The relay can do nothing any more: its store is poisoned or cannot be read.
    Failed(String),
    /// Stopped.
    Stopped,
}

/// A relay's state and figures. Counters count from the relay's start.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// let status: onewrite::RelayStatus = relay.status();
/// assert_eq!((status.in_flight, status.quarantined), (0, 0));
/// assert!(!status.stalled);
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RelayStatus {
    /// The state.
    pub state: RelayState,
    /// Every event below this position is confirmed, except for deferred and quarantined events.
    pub position: u64,
    /// Events published and not yet confirmed.
    pub in_flight: usize,
    /// Payload bytes of the events in flight.
    pub in_flight_bytes: usize,
    /// Events in memory.
    pub in_memory: usize,
    /// Events in memory that wait for their next try after a fault of their own.
    pub retrying: usize,
    /// Keys held behind a quarantined event, or waiting on disk.
    pub held_keys: usize,
    /// The relay has stopped reading, since too many keys are held: redrive or discard the
    /// quarantined events.
    pub stalled: bool,
    /// Confirms.
    pub confirmed: u64,
    /// Publishes of events that may have been published before.
    pub retried: u64,
    /// Events sent to quarantine.
    pub quarantined: u64,
    /// Connections made after the first.
    pub reconnects: u64,
    /// Destinations that the relay has suspended, 16 at most.
    pub suspended: Vec<SuspendedDestination>,
    /// The last fault of the connection or of one publish, also when it has healed.
    pub last_fault: Option<Fault>,
}

/// A destination that the relay has suspended, as a circuit breaker does. The events of the
/// destination wait, and the relay publishes one at a time as a trial. The wait between two trials
/// grows. The first success resumes the destination. Trials spend no attempt.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
/// for suspended in relay.status().suspended {
///     println!("`{}` of `{}`: {}", suspended.routing_key, suspended.exchange, suspended.cause);
/// }
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SuspendedDestination {
    /// The exchange; empty for the default exchange. Control characters are escaped.
    pub exchange: String,
    /// The routing key. Control characters are escaped.
    pub routing_key: String,
    /// The reason.
    pub cause: SuspendCause,
    /// Events in memory that wait for the destination.
    pub waiting: usize,
    /// Trials that have failed since the destination was suspended.
    pub trials: u32,
}

/// The channels and the status of one running relay.
#[derive(Debug, Clone)]
pub(crate) struct RelayPort {
    pub(crate) status: Arc<Mutex<RelayStatus>>,
    /// Signals that the log has grown. Holds one notification at most.
    pub(crate) grown: Sender<()>,
    pub(crate) requests: Sender<RelayRequest>,
}

/// How far a relay lets captured tables go on, in rising order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Pace {
    /// No relay runs: none was started, or each has stopped or failed.
    None,
    Paused,
    /// The broker is away, or blocks publishers.
    Away,
    Flows,
}

impl Pace {
    fn of(state: &RelayState) -> Self {
        match state {
            RelayState::Failed(_) | RelayState::Stopped => Self::None,
            RelayState::Paused => Self::Paused,
            RelayState::Connecting | RelayState::Blocked | RelayState::Disconnected(_) => Self::Away,
            RelayState::Connected => Self::Flows,
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Relays {
    running: Mutex<BTreeMap<String, RelayPort>>,
}

impl Relays {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, RelayPort>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn register(&self, name: &str, port: RelayPort) -> Result<()> {
        let mut running = self.lock();
        if running.contains_key(name) {
            return Err(Error::RelayRunning { name: name.to_owned() });
        }
        running.insert(name.to_owned(), port);
        Ok(())
    }

    pub(crate) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    pub(crate) fn port(&self, name: &str) -> Option<RelayPort> {
        self.lock().get(name).cloned()
    }

    /// The pace of the best running relay. A relay that is not started counts as none, even if the
    /// file knows it.
    pub(crate) fn pace(&self) -> Pace {
        let running = self.lock();
        let states = running
            .values()
            .map(|port| Pace::of(&port.status.lock().unwrap_or_else(PoisonError::into_inner).state));
        states.max().unwrap_or(Pace::None)
    }

    /// The pace of one relay.
    pub(crate) fn pace_of(&self, name: &str) -> Pace {
        let port = self.port(name);
        port.map_or(Pace::None, |port| {
            Pace::of(&port.status.lock().unwrap_or_else(PoisonError::into_inner).state)
        })
    }

    /// The only relay, or `None` if there is none or more than one.
    pub(crate) fn only(&self) -> Option<RelayPort> {
        let running = self.lock();
        let mut ports = running.values();
        let first = ports.next().cloned();
        if ports.next().is_some() { None } else { first }
    }

    pub(crate) fn notify_all(&self) {
        for port in self.lock().values() {
            // A full channel holds a notification already.
            let _ = port.grown.try_send(());
        }
    }
}
