//! Events that a relay has quarantined: look at them, send them again, or give them up.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use crate::delivery::types::{Exception, ExceptionState};
use crate::error::{Error, Result};
use crate::event::{Destination, RecordedEvent};
use crate::log::keys::{self, CursorId};
use crate::message::{Fault, FaultClass};
use crate::quarantine_filter::{Entry, Facts, QuarantineFilter, change_all, list_matching, readable};
use crate::storage::errors::damaged_row;
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::EXCEPTIONS;
use crate::store::Store;
use crate::store::shared::progress::Leave;
use crate::store::shared::relays::RelayRequest;
use crate::time::{Deadline, wall_time};

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
    /// When the event was quarantined, in Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Why the event was quarantined.
    pub fault: Fault,
    /// Tries spent on message faults.
    pub attempts: u32,
    /// Tries spent on destination faults.
    pub destination_attempts: u32,
    /// The event's key.
    pub key: Option<String>,
    /// The event's type; `None` if its record cannot be read.
    pub event_type: Option<String>,
    /// Where the event was to go; `None` if its record cannot be read.
    pub destination: Option<Destination>,
    /// Whether later events of its key wait for this event.
    pub holds_key: bool,
}

impl Quarantined {
    /// Returns when the event was quarantined, by the wall clock. [`since_ms`](Self::since_ms) is
    /// the same as a number.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to_queue("nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// let entry = store.quarantine("rabbit")?.list(None, 1)?.remove(0);
    /// assert!(entry.since() <= std::time::SystemTime::now());
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn since(&self) -> SystemTime {
        wall_time(self.since_ms)
    }

    fn show_record(&mut self, record: Option<&RecordedEvent>) {
        self.event_type = record.map(|record| record.event_type().to_owned());
        self.destination = record.map(|record| record.destination().clone());
    }
}

impl Entry for Quarantined {
    fn number(&self) -> u64 {
        self.seq
    }

    fn facts(&self) -> Facts<'_> {
        let facts = Facts {
            event_type: self.event_type.as_deref(),
            reason: Some(&self.fault.text),
            attempts: Some(self.attempts.saturating_add(self.destination_attempts)),
            ..Facts::default()
        };
        facts.to(self.destination.as_ref())
    }
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
    /// Returns the quarantine of the relay of this name.
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
    /// Lists quarantined events above `after`, in order, at most `limit`.
    ///
    /// # Errors
    /// Errors of the storage engine.
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
        self.look()?;
        self.page(after, limit)
    }

    /// Lists events as [`list`](Self::list) does, but only those that the filter selects. It reads
    /// all of them.
    ///
    /// # Errors
    /// Errors of the storage engine.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to_queue("nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// use onewrite::QuarantineFilter;
    /// let quarantine = store.quarantine("rabbit")?;
    /// let of_type = |name: &str| quarantine.list_matching(&QuarantineFilter::all().event_type(name), None, 100);
    /// assert_eq!((of_type("paid")?.len(), of_type("refunded")?.len()), (1, 0));
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list_matching(
        &self,
        filter: &QuarantineFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Quarantined>> {
        self.look()?;
        list_matching(filter, after, limit, |after, limit| self.page(after, limit))
    }

    /// Makes the file show what is in quarantine from here on.
    fn look(&self) -> Result<()> {
        self.store.core().refuse_reentrant("Quarantine")?;
        self.store.flush_progress(Deadline::Never)
    }

    fn page(&self, after: Option<u64>, limit: usize) -> Result<Vec<Quarantined>> {
        let mut found = self.store.core().reading(|tx| {
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
        })?;
        if !found.is_empty() {
            // The records stay for as long as their rows do.
            let snapshot = self.store.read()?;
            for entry in &mut found {
                entry.show_record(readable(snapshot.event(entry.seq))?.as_ref());
            }
        }
        Ok(found)
    }

    /// Returns one quarantined event with its record. The record is itself an error if that is why
    /// the event is quarantined.
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
    /// let (entry, record) = store.quarantine("rabbit")?.get(0)?;
    /// assert!(entry.holds_key);
    /// assert_eq!(record?.payload(), b"1");
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn get(&self, seq: u64) -> Result<(Quarantined, Result<RecordedEvent>)> {
        let mut entry = self.find(seq)?;
        let missing = || Error::Corrupt(crate::error::CorruptError { seq, what: "it is missing" });
        let record = self.store.read()?.event(seq).and_then(|record| record.ok_or_else(missing));
        entry.show_record(record.as_ref().ok());
        Ok((entry, record))
    }

    /// Sends the event again with all its attempts. When this returns `Ok`, the request is durable.
    ///
    /// A running relay publishes the event at once; a relay that starts later publishes it then.
    /// Later events of its key still wait until it is confirmed.
    ///
    /// # Errors
    /// [`Error::NotQuarantined`]; [`Error::Corrupt`] if the record cannot be read. Such an event
    /// can only be discarded.
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
        let (entry, record) = self.get(seq)?;
        record?;
        let redriven = self.redrive_these(vec![entry])?;
        if redriven == 0 { Err(self.missing(seq)) } else { Ok(()) }
    }

    /// Redrives, as [`redrive`](Self::redrive) does, all readable events that the filter selects.
    /// Returns how many.
    ///
    /// # Errors
    /// Errors of the storage engine. Events before the error are sent again all the same.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to_queue("nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// use std::time::Duration;
    /// use onewrite::QuarantineFilter;
    /// broker.declare_queue("nowhere", Default::default()); // what was wrong is put right
    /// let no_route = QuarantineFilter::all().reason_contains("NO_ROUTE");
    /// assert_eq!(store.quarantine("rabbit")?.redrive_all(&no_route)?, 1);
    /// receipt.wait_confirmed(Duration::from_secs(5))?;
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        self.for_all(filter, |mut entries| {
            entries.retain(|entry| entry.event_type.is_some());
            self.redrive_these(entries)
        })
    }

    /// Discards, as [`discard`](Self::discard) does, all events that the filter selects. Returns
    /// how many.
    ///
    /// # Errors
    /// Errors of the storage engine. Events before the error are given up all the same.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
    /// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to_queue("nowhere")))?;
    /// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
    /// use onewrite::QuarantineFilter;
    /// let quarantine = store.quarantine("rabbit")?;
    /// assert_eq!(quarantine.discard_all(&QuarantineFilter::all())?, 1);
    /// assert!(quarantine.is_empty()?);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        self.for_all(filter, |entries| self.discard_these(entries))
    }

    /// Returns how many events there are. It reads all their rows.
    ///
    /// # Errors
    /// Errors of the storage engine.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// assert_eq!(store.quarantine("rabbit")?.len()?, 0);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn len(&self) -> Result<u64> {
        self.look()?;
        self.store.core().reading(|tx| {
            let (from, to) = (keys::exception(self.id, 0), keys::after_prefix(&self.id.to_be_bytes()));
            let mut count = 0;
            for row in tx.open_table(EXCEPTIONS)?.range(&from[..]..to.as_slice())? {
                let state = ExceptionRow::from_bytes(row?.1.value())?.exception.state;
                count += u64::from(matches!(state, ExceptionState::Quarantined { .. }));
            }
            Ok(count)
        })
    }

    /// Whether the quarantine is empty.
    ///
    /// # Errors
    /// Errors of the storage engine.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// assert!(store.quarantine("rabbit")?.is_empty()?);
    /// # let _ = relay.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.list(None, 1)?.is_empty())
    }

    fn for_all(
        &self,
        filter: &QuarantineFilter,
        change: impl Fn(Vec<Quarantined>) -> Result<u64>,
    ) -> Result<u64> {
        self.look()?;
        let end = self.store.core().tail().next_seq;
        change_all(filter, end, |after, limit| self.page(after, limit), change)
    }

    fn redrive_these(&self, entries: Vec<Quarantined>) -> Result<u64> {
        let due_ms = self.store.core().settings.clock.now().wall_ms;
        let left = self.leave(entries, ExceptionState::Retry { due_ms }, true)?;
        let count = left.len() as u64;
        for Quarantined { seq, fault, .. } in left {
            tracing::info!(relay = %self.relay, seq, "redriven");
            self.notify(RelayRequest::Redriven { seq, fault });
        }
        Ok(count)
    }

    fn discard_these(&self, entries: Vec<Quarantined>) -> Result<u64> {
        // Until the position is past the event, a row keeps a restart from taking the event for
        // new.
        let left = self.leave(entries, ExceptionState::Discarded, false)?;
        let count = left.len() as u64;
        for Quarantined { seq, fault, key, .. } in left {
            tracing::warn!(relay = %self.relay, seq, %fault, "discarded by request");
            self.notify(RelayRequest::Discarded { seq, key });
        }
        Ok(count)
    }

    /// Takes these entries out of quarantine, into another state, durably. Returns the entries that
    /// were still in quarantine.
    fn leave(
        &self,
        mut entries: Vec<Quarantined>,
        state: ExceptionState,
        keeps_key: bool,
    ) -> Result<Vec<Quarantined>> {
        let left = Arc::default();
        let leaves = entries.iter().map(|entry| Leave {
            seq: entry.seq,
            key: entry.key.as_deref().filter(|_| keeps_key).map(Into::into),
            exception: Exception {
                state,
                attempts: 0,
                destination_attempts: 0,
                fault: Some(entry.fault.clone()),
            },
            left: Arc::clone(&left),
        });
        self.store.core().progress().add_leaves(&self.relay, leaves.collect());
        self.store.flush_progress(Deadline::Never)?;
        let left: BTreeSet<u64> = std::mem::take(&mut *left.lock().unwrap_or_else(PoisonError::into_inner));
        entries.retain(|entry| left.contains(&entry.seq));
        Ok(entries)
    }

    /// Gives the event up for good. When this returns `Ok`, that is durable.
    ///
    /// Later events of its key go on without it. The event stays in the log for as long as
    /// retention keeps it.
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
        let discarded = self.discard_these(vec![entry])?;
        if discarded == 0 { Err(self.missing(seq)) } else { Ok(()) }
    }

    fn find(&self, seq: u64) -> Result<Quarantined> {
        self.look()?;
        self.store.core().reading(|tx| {
            let row = tx.open_table(EXCEPTIONS)?.get(&keys::exception(self.id, seq)[..])?;
            let row = row.map(|row| ExceptionRow::from_bytes(row.value())).transpose()?;
            row.and_then(|row| quarantined(seq, row)).ok_or_else(|| self.missing(seq))
        })
    }

    fn missing(&self, seq: u64) -> Error {
        Error::NotQuarantined { relay: self.relay.clone(), seq }
    }

    fn notify(&self, request: RelayRequest) {
        if let Some(port) = self.store.core().relays.port(&self.relay) {
            // A relay that has ended finds the change in the file when it starts.
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
        event_type: None,
        destination: None,
        holds_key,
    })
}
