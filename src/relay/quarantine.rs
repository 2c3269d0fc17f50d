//! Events that a relay has taken out: look at them, send them again, or give them up.

use crate::delivery::types::{Change, Exception, ExceptionState};
use crate::error::{Error, Result};
use crate::event::RecordedEvent;
use crate::log::keys::{self, CursorId};
use crate::message::{Fault, FaultClass};
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::EXCEPTIONS;
use crate::store::Store;
use crate::store::cursor::ExceptionRow;
use crate::store::relays::RelayRequest;
use crate::time::Deadline;

/// An event in quarantine, and why.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
/// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
/// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
/// use onewrite::{FaultClass, Quarantined};
/// let entry: Quarantined = store.quarantine("rabbit")?.list(None, 1)?.remove(0);
/// assert_eq!((entry.seq, entry.key.as_deref()), (0, Some("alice")));
/// assert_eq!(entry.fault.class, FaultClass::Destination);
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quarantined {
    /// The event.
    pub seq: u64,
    /// Since when, Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Why.
    pub fault: Fault,
    /// Tries spent on message faults.
    pub attempts: u32,
    /// Tries spent on destination faults.
    pub destination_attempts: u32,
    /// The event's key.
    pub key: Option<String>,
    /// Whether later events of its key wait for it.
    pub holds_key: bool,
}

/// The quarantine of one relay, running or not. See [`Store::quarantine`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
/// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
/// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
/// let quarantine: onewrite::Quarantine = store.quarantine("rabbit")?;
/// for entry in quarantine.list(None, 100)? {
///     quarantine.discard(entry.seq)?;
/// }
/// assert!(quarantine.list(None, 100)?.is_empty());
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Quarantine {
    store: Store,
    relay: String,
    id: CursorId,
}

impl Store {
    /// The quarantine of the relay of this name.
    ///
    /// # Errors
    /// [`Error::NoSuchRelay`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// assert!(matches!(store.quarantine("nobody"), Err(Error::NoSuchRelay { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn quarantine(&self, relay: &str) -> Result<Quarantine> {
        self.core().owner.check()?;
        let id = self.core().tail().cursors.get(relay).map(|cursor| cursor.id);
        let id = id.ok_or_else(|| Error::NoSuchRelay { name: relay.to_owned() })?;
        Ok(Quarantine { store: self.clone(), relay: relay.to_owned(), id })
    }
}

impl Quarantine {
    /// Quarantined events above `after`, in order, at most `limit`.
    ///
    /// # Errors
    /// What the storage engine says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// let quarantine = store.quarantine("rabbit")?;
    /// let page = quarantine.list(None, 100)?;
    /// assert_eq!(page[0].seq, 0);
    /// assert!(quarantine.list(Some(0), 100)?.is_empty()); // the next page
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<Quarantined>> {
        self.store.core().refuse_inside("Quarantine")?;
        self.store.flush_progress(Deadline::Never)?;
        self.store.core().reading(|tx| {
            let from = keys::exception(self.id, after.map_or(0, |after| after.saturating_add(1)));
            let to = keys::after_prefix(&self.id.to_be_bytes());
            let mut found = Vec::new();
            for row in tx.open_table(EXCEPTIONS)?.range(&from[..]..to.as_slice())? {
                if found.len() >= limit {
                    break;
                }
                let (at, row) = row?;
                let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
                found.extend(quarantined(seq, ExceptionRow::from_bytes(row.value())?));
            }
            Ok(found)
        })
    }

    /// One quarantined event with its record. The record is an error of its own where that is why it is here.
    ///
    /// # Errors
    /// [`Error::NotQuarantined`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// let (entry, record) = store.quarantine("rabbit")?.show(0)?;
    /// assert!(entry.holds_key);
    /// assert_eq!(record?.payload(), b"1");
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn show(&self, seq: u64) -> Result<(Quarantined, Result<RecordedEvent>)> {
        let entry = self.find(seq)?;
        let missing = || Error::Corrupt(crate::error::CorruptError { seq, what: "it is missing" });
        let record = self.store.read()?.event(seq).and_then(|record| record.ok_or_else(missing));
        Ok((entry, record))
    }

    /// Sends the event again, with all its attempts before it. When this returns `Ok` that is durable; a running relay
    /// publishes it at once, one that starts later then. Later events of its key still wait until it is confirmed.
    ///
    /// # Errors
    /// [`Error::NotQuarantined`]; [`Error::Corrupt`] if its record cannot be read: such an event can only be discarded.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// use std::time::Duration;
    /// broker.declare_queue("nowhere", Default::default()); // what was wrong is put right
    /// store.quarantine("rabbit")?.redrive(0)?;
    /// receipt.wait_confirmed(Duration::from_secs(5))?;
    /// assert_eq!(broker.queue_len("nowhere"), 1);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive(&self, seq: u64) -> Result<()> {
        let (entry, record) = self.show(seq)?;
        record?;
        let exception = Exception {
            state: ExceptionState::Retry { due_ms: self.store.core().settings.clock.now().wall_ms },
            attempts: 0,
            destination_attempts: 0,
            fault: Some(entry.fault.clone()),
        };
        let key = entry.key.as_deref().map(Into::into);
        self.change(Change::PutException { seq, key, exception })?;
        tracing::info!(relay = %self.relay, seq, "redriven");
        self.tell(RelayRequest::Redriven { seq, fault: entry.fault });
        Ok(())
    }

    /// Gives the event up, for ever; later events of its key go on without it. When this returns `Ok` that is durable.
    /// The event stays in the log for as long as retention says.
    ///
    /// # Errors
    /// [`Error::NotQuarantined`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").key("alice").to("", "nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// use onewrite::Error;
    /// let quarantine = store.quarantine("rabbit")?;
    /// quarantine.discard(0)?;
    /// assert!(matches!(quarantine.discard(0), Err(Error::NotQuarantined { seq: 0, .. })));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard(&self, seq: u64) -> Result<()> {
        let entry = self.find(seq)?;
        // Where the position is not past it yet, a row says so until it is: a restart would take the event for new.
        let fault = Some(entry.fault.clone());
        let state = ExceptionState::Discarded;
        let exception = Exception { state, attempts: 0, destination_attempts: 0, fault };
        self.change(Change::PutException { seq, key: None, exception })?;
        tracing::warn!(relay = %self.relay, seq, fault = %entry.fault, "discarded by request");
        self.tell(RelayRequest::Discarded { seq, key: entry.key });
        Ok(())
    }

    fn find(&self, seq: u64) -> Result<Quarantined> {
        self.store.core().refuse_inside("Quarantine")?;
        self.store.flush_progress(Deadline::Never)?;
        self.store.core().reading(|tx| {
            let row = tx.open_table(EXCEPTIONS)?.get(&keys::exception(self.id, seq)[..])?;
            let row = row.map(|row| ExceptionRow::from_bytes(row.value())).transpose()?;
            let found = row.and_then(|row| quarantined(seq, row));
            found.ok_or_else(|| Error::NotQuarantined { relay: self.relay.clone(), seq })
        })
    }

    fn change(&self, change: Change) -> Result<()> {
        self.store.core().progress().add(&self.relay, &mut vec![change], 0);
        self.store.flush_progress(Deadline::Never)
    }

    fn tell(&self, request: RelayRequest) {
        if let Some(port) = self.store.core().relays.port(&self.relay) {
            // A relay that is gone finds it in the file when it starts.
            let _ = port.requests.send(request);
        }
    }
}

fn quarantined(seq: u64, row: ExceptionRow) -> Option<Quarantined> {
    let ExceptionState::Quarantined { at_ms, holds_key } = row.exception.state else { return None };
    let unknown = || Fault::new(FaultClass::Undecodable, "no reason was recorded");
    Some(Quarantined {
        seq,
        since_ms: at_ms,
        fault: row.exception.fault.unwrap_or_else(unknown),
        attempts: row.exception.attempts,
        destination_attempts: row.exception.destination_attempts,
        key: row.key.map(|key| key.to_string()),
        holds_key,
    })
}
