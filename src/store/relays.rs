//! Who is to be told of a commit: the relays that run in this process.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crossbeam_channel::Sender;

use crate::error::{Error, Result};
use crate::message::Fault;
use crate::oneshot;

/// What a relay is asked for by other threads.
#[derive(Debug)]
pub(crate) enum RelayRequest {
    /// Answer when all of these are confirmed, or one of them is quarantined.
    Await { seqs: Vec<u64>, reply: oneshot::Sender<Awaited> },
    /// A person has durably redriven this event.
    Redriven { seq: u64 },
    /// A person has durably discarded this event.
    Discarded { seq: u64, key: Option<String> },
    /// Publish nothing new.
    Pause,
    /// Go on.
    Resume,
    /// End by this deadline, and report.
    Stop { deadline: std::time::Instant },
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

/// How to reach one running relay.
#[derive(Debug, Clone)]
pub(crate) struct RelayPort {
    /// Holds one ring at most.
    pub(crate) doorbell: Sender<()>,
    pub(crate) requests: Sender<RelayRequest>,
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

    /// The only relay, or `None` if there is none or more than one.
    pub(crate) fn only(&self) -> Option<RelayPort> {
        let running = self.lock();
        let mut ports = running.values();
        let first = ports.next().cloned();
        if ports.next().is_some() { None } else { first }
    }

    pub(crate) fn ring_all(&self) {
        for port in self.lock().values() {
            // A full doorbell has been rung already.
            let _ = port.doorbell.try_send(());
        }
    }
}
