//! Deliveries that a consumer has rejected: look at them, hand them to its handler again, or give them up.
//!
//! ```text
//! (scope)              → next number u64, rows u64
//! (scope, 0, number)   → the delivery (log/rejected.rs)
//! (scope, 1, number)   → ()           it is to be driven again
//! ```
//!
//! **Invariants.** A row is written in the transaction that marks its delivery as seen, before the broker is told
//! anything: a crash in between leaves a redelivery that is recognised. A number is never given twice. A row goes in the
//! transaction of the effects of its handler.

use std::collections::BTreeMap;

use redb::ReadableTable;

use super::Store;
use super::failure::damaged_row;
use super::schema::{REJECTED, read_u64s, u64s};
use super::seen::{Identity, fingerprint};
use super::transaction::{REJECT_SCOPE, Transaction, check_id};
use crate::error::{Error, EventError, Result};
use crate::limits::{REASON_BYTES_MAX, REDRIVE_STEP, SHORT_STRING_BYTES_MAX};
use crate::log::keys;
use crate::log::rejected::RejectedRow;
use crate::message::Message;
use crate::printable::escaped;
use crate::publish::Delivery;

/// A rejected delivery, and why.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::publish::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// # broker.publish("", "credit", onewrite::Message { message_id: Some("m-1".into()), ..Default::default() })?;
/// # let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
/// # while consumer.stats().rejected == 0 { std::thread::yield_now() }
/// # let _ = consumer.stop(std::time::Duration::from_secs(5));
/// use onewrite::RejectedDelivery;
/// let entry: RejectedDelivery = store.rejected("credit-service").list(None, 1)?.remove(0);
/// assert_eq!((entry.number, entry.message_id.as_deref()), (0, Some("m-1")));
/// assert_eq!((entry.attempts, entry.reason.as_str()), (1, "rejected: no such account"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RejectedDelivery {
    /// Names it within its scope; never given twice.
    pub number: u64,
    /// Since when, Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Tries, those after a redrive included.
    pub attempts: u32,
    /// Why it was rejected last. Holds no payload, but for what the handler's own error says.
    pub reason: String,
    /// It waits for the consumer to hand it to its handler again.
    pub redriven: bool,
    /// The exchange it was published to.
    pub exchange: String,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Its `message_id`.
    pub message_id: Option<String>,
    /// What is wrong with its row. Nothing else of it is known then, and it can only be discarded.
    pub damaged: Option<&'static str>,
}

/// The deliveries that the consumer of one scope has rejected, running or not. See [`Store::rejected`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let rejected: onewrite::Rejected = store.rejected("credit-service");
/// for entry in rejected.list(None, 100)? {
///     rejected.discard(entry.number)?;
/// }
/// assert!(rejected.is_empty()?);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Rejected {
    store: Store,
    scope: String,
}

impl Store {
    /// The quarantine of the consumer of this scope.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.rejected("credit-service").len()?, 0); // nothing was rejected
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn rejected(&self, scope: impl Into<String>) -> Rejected {
        Rejected { store: self.clone(), scope: scope.into() }
    }
}

impl Rejected {
    /// Rejected deliveries above `after`, in order of their numbers, at most `limit`. One that is damaged is among them,
    /// and says so.
    ///
    /// # Errors
    /// What the storage engine says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message { message_id: Some("m-1".into()), ..Default::default() })?;
    /// # let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.stats().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let rejected = store.rejected("credit-service");
    /// assert_eq!(rejected.list(None, 100)?[0].number, 0);
    /// assert!(rejected.list(Some(0), 100)?.is_empty()); // the next page
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<RejectedDelivery>> {
        let Some(from) = after.map_or(Some(0), |after| after.checked_add(1)) else { return Ok(Vec::new()) };
        self.reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let (from, to) = (self.row(from), self.row(u64::MAX));
            let mut found = Vec::new();
            for row in rejected.range(from.as_slice()..=to.as_slice())?.take(limit) {
                let (key, row) = row?;
                let number =
                    keys::split_numbered(&self.scope, key.value()).ok_or_else(|| damaged_row("rejected"))?;
                let redriven = rejected.get(keys::redriven(&self.scope, number).as_slice())?.is_some();
                found.push(entry(number, redriven, RejectedRow::from_bytes(key.value(), row.value())));
            }
            Ok(found)
        })
    }

    /// One rejected delivery with its message.
    ///
    /// # Errors
    /// [`Error::NotRejected`]; [`Error::DamagedDelivery`] if its row fails its check.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message { payload: b"100".to_vec(), ..Default::default() })?;
    /// # let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.stats().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let (entry, message) = store.rejected("credit-service").get(0)?;
    /// assert_eq!((entry.routing_key.as_str(), message.payload.as_slice()), ("credit", &b"100"[..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn get(&self, number: u64) -> Result<(RejectedDelivery, Message)> {
        self.reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let row = read_row(&rejected, &self.scope, number)?.ok_or_else(|| self.missing(number))?;
            let row = row.map_err(|what| damaged(&self.scope, number, what))?;
            let redriven = rejected.get(keys::redriven(&self.scope, number).as_slice())?.is_some();
            let message = row.message.clone();
            Ok((entry(number, redriven, Ok(row)), message))
        })
    }

    /// Hands it to the consumer's handler again, with all its attempts before it. When this returns `Ok` that is durable; a
    /// running consumer of the scope does it at once, one that starts later then. Its effects and its leaving the quarantine
    /// are one transaction; if it is rejected again it comes back under the same number.
    ///
    /// # Errors
    /// [`Error::NotRejected`]; [`Error::DamagedDelivery`]: such a delivery can only be discarded.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message::default())?;
    /// # let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.stats().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let rejected = store.rejected("credit-service");
    /// rejected.redrive(0)?;
    /// assert!(rejected.list(None, 1)?[0].redriven); // no consumer runs yet
    /// let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Ok(()))?;
    /// while !rejected.is_empty()? {
    ///     std::thread::yield_now();
    /// }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive(&self, number: u64) -> Result<()> {
        self.write(move |tx, scope| {
            let row = tx.rejected_row(scope, number)?.ok_or_else(|| missing(scope, number))?;
            row.map_err(|what| damaged(scope, number, what))?;
            tx.mark_redriven(scope, number)
        })?;
        tracing::info!(scope = self.scope, number, "a rejected delivery is driven again");
        self.store.core().redrives.ring(&self.scope);
        Ok(())
    }

    /// As [`redrive`](Self::redrive), for all that are rejected now and are not damaged. Says how many, those that waited for
    /// it already not counted.
    ///
    /// # Errors
    /// What the storage engine says; those before the error are driven again all the same.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::publish::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message::default())?;
    /// # let consumer = store.consumer("credit-service").run(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.stats().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// assert_eq!(store.rejected("credit-service").redrive_all()?, 1);
    /// assert_eq!(store.rejected("credit-service").redrive_all()?, 0); // it waits for its consumer
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive_all(&self) -> Result<u64> {
        let (mut after, mut redriven) = (None, 0);
        loop {
            let page = self.list(after, REDRIVE_STEP)?;
            let Some(last) = page.last() else { return Ok(redriven) };
            after = Some(last.number);
            let wanted = |entry: &RejectedDelivery| entry.damaged.is_none() && !entry.redriven;
            let numbers: Vec<_> =
                page.iter().filter(|entry| wanted(entry)).map(|entry| entry.number).collect();
            redriven += numbers.len() as u64;
            self.write(move |tx, scope| {
                numbers.iter().try_for_each(|number| tx.mark_redriven(scope, *number))
            })?;
            self.store.core().redrives.ring(&self.scope);
        }
    }

    /// Gives it up, for ever. When this returns `Ok` that is durable. What a handler has rejected stays seen: a repeat of it is
    /// only acknowledged.
    ///
    /// # Errors
    /// [`Error::NotRejected`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let rejected = store.rejected("credit-service");
    /// assert!(matches!(rejected.discard(0), Err(Error::NotRejected { number: 0, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard(&self, number: u64) -> Result<()> {
        self.write(
            move |tx, scope| {
                if tx.remove_rejected(scope, number)? { Ok(()) } else { Err(missing(scope, number)) }
            },
        )?;
        tracing::warn!(scope = self.scope, number, "a rejected delivery is discarded by request");
        Ok(())
    }

    /// How many there are.
    ///
    /// # Errors
    /// What the storage engine says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.rejected("credit-service").len()?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn len(&self) -> Result<u64> {
        self.reading(|tx| {
            let key = keys::rejected(&self.scope);
            Ok(Book::of(&tx.open_table(REJECTED)?, &key)?.rows)
        })
    }

    /// Whether there are none.
    ///
    /// # Errors
    /// What the storage engine says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert!(store.rejected("credit-service").is_empty()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    fn reading<T>(&self, read: impl FnOnce(&redb::ReadTransaction) -> Result<T>) -> Result<T> {
        check_id("the scope", self.scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        self.store.core().refuse_inside("Rejected")?;
        self.store.core().reading(read)
    }

    fn write(&self, mut write: impl FnMut(&Transaction, &str) -> Result<()> + Send + 'static) -> Result<()> {
        check_id("the scope", self.scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        let scope = self.scope.clone();
        self.store.write(move |tx| write(tx, &scope))?;
        Ok(())
    }

    fn row(&self, number: u64) -> Vec<u8> {
        keys::rejected_row(&self.scope, number)
    }

    fn missing(&self, number: u64) -> Error {
        missing(&self.scope, number)
    }
}

// --- rows -----------------------------------------------------------------------------------------------------------

type Row = &'static [u8];

/// The row of a scope: the number that comes next, and how many rows there are.
#[derive(Debug, Clone, Copy, Default)]
struct Book {
    next: u64,
    rows: u64,
}

impl Book {
    fn of(rejected: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Self> {
        let Some(row) = rejected.get(key)? else { return Ok(Self::default()) };
        let [next, rows] = read_u64s(row.value()).ok_or_else(|| damaged_row("rejected"))?;
        Ok(Self { next, rows })
    }

    fn to_bytes(self) -> Vec<u8> {
        u64s([self.next, self.rows])
    }
}

fn read_row(
    rejected: &impl ReadableTable<Row, Row>,
    scope: &str,
    number: u64,
) -> Result<Option<std::result::Result<RejectedRow, &'static str>>> {
    let key = keys::rejected_row(scope, number);
    Ok(rejected.get(key.as_slice())?.map(|row| RejectedRow::from_bytes(&key, row.value())))
}

fn entry(
    number: u64,
    redriven: bool,
    row: std::result::Result<RejectedRow, &'static str>,
) -> RejectedDelivery {
    match row {
        Ok(row) => RejectedDelivery {
            number,
            redriven,
            since_ms: row.since_ms,
            attempts: row.attempts,
            reason: row.reason,
            exchange: row.exchange,
            routing_key: row.routing_key,
            message_id: row.message.message_id.map(String::from),
            damaged: None,
        },
        Err(what) => {
            RejectedDelivery { number, redriven, damaged: Some(what), ..RejectedDelivery::default() }
        }
    }
}

fn missing(scope: &str, number: u64) -> Error {
    Error::NotRejected { scope: scope.to_owned(), number }
}

fn damaged(scope: &str, number: u64, what: &'static str) -> Error {
    Error::DamagedDelivery { scope: scope.to_owned(), number, what }
}

/// Why a delivery is rejected.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) attempts: u32,
    /// The handler has seen it. Else it is not marked as seen: what it claims to be was not believed, or is taken.
    pub(crate) handled: bool,
    /// What was refused may be let in one day: whoever drives it again must look whether it came by itself meanwhile.
    pub(crate) recheck: bool,
    /// Its number or id is that of another message.
    pub(crate) conflict: bool,
}

impl Refusal {
    pub(crate) fn new(error: &Error, attempts: u32, by_handler: bool) -> Self {
        if by_handler && !matches!(error, Error::Storage(_)) {
            return Self { reason: reason(error), attempts, handled: true, recheck: false, conflict: false };
        }
        let unbelieved = matches!(error, Error::LaneHeader { .. } | Error::BadId { .. });
        let conflict = matches!(error, Error::LaneConflict { .. } | Error::IdConflict { .. });
        // Of a lane whose rows are damaged nobody knows what it has shown.
        let recheck = matches!(
            error,
            Error::UnknownProducer { .. }
                | Error::NotAuthentic { .. }
                | Error::InboxFull { .. }
                | Error::Storage(_)
        );
        let handled = !(unbelieved || conflict || recheck);
        Self { reason: reason(error), attempts, handled, recheck, conflict }
    }
}

/// The error's text, bounded, without control characters. What a decoder says may quote the payload, so it is left out.
pub(crate) fn reason(error: &Error) -> String {
    let mut text = match error {
        Error::Event(EventError::Decode { format, .. }) => {
            format!("the payload cannot be decoded as {format}")
        }
        error => escaped(error.to_string()),
    };
    let end = (0..=REASON_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

impl Transaction {
    /// Writes a rejected delivery, and marks it as rejected. `false` if that was done before.
    pub(crate) fn reject_delivery(
        &self,
        scope: &str,
        identity: Option<&Identity>,
        delivery: &Delivery,
        refusal: &Refusal,
    ) -> Result<bool> {
        if let Some(identity) = identity.filter(|_| refusal.handled)
            && !self.mark_refused(scope, identity)?
        {
            return Ok(false);
        }
        if let Some(name) = fingerprint(&self.core.identity, scope, identity, delivery)
            && !self.mark_once(keys::inbox(REJECT_SCOPE, &name))?
        {
            return Ok(false);
        }
        self.touch();
        let key = keys::rejected(scope);
        // The clock is the application's code: nothing is open while it is read.
        let since_ms = self.core.settings.clock.now().wall_ms;
        let mut rejected = self.redb().open_table(REJECTED)?;
        let Book { next: number, rows } = Book::of(&rejected, &key)?;
        let row = RejectedRow {
            since_ms,
            attempts: refusal.attempts,
            recheck: refusal.recheck,
            reason: refusal.reason.clone(),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
            message: delivery.message.clone(),
        };
        put_row(&mut rejected, scope, number, &row)?;
        rejected.insert(key.as_slice(), Book { next: number + 1, rows: rows + 1 }.to_bytes().as_slice())?;
        Ok(true)
    }

    /// A delivery that was driven again is rejected again, under its number. Nothing happens if it is gone meanwhile.
    pub(crate) fn reject_again(&self, scope: &str, number: u64, refusal: &Refusal) -> Result<()> {
        let Some(Ok(mut row)) = self.rejected_row(scope, number)? else { return Ok(()) };
        row.attempts = row.attempts.saturating_add(refusal.attempts);
        row.reason.clone_from(&refusal.reason);
        row.since_ms = self.core.settings.clock.now().wall_ms;
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        put_row(&mut rejected, scope, number, &row)?;
        rejected.remove(keys::redriven(scope, number).as_slice())?;
        Ok(())
    }

    fn rejected_row(
        &self,
        scope: &str,
        number: u64,
    ) -> Result<Option<std::result::Result<RejectedRow, &'static str>>> {
        read_row(&self.redb().open_table(REJECTED)?, scope, number)
    }

    fn mark_redriven(&self, scope: &str, number: u64) -> Result<()> {
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        // One that has gone meanwhile stays gone.
        if rejected.get(keys::rejected_row(scope, number).as_slice())?.is_some() {
            rejected.insert(keys::redriven(scope, number).as_slice(), &[][..])?;
        }
        Ok(())
    }

    /// It is not driven again after all.
    pub(crate) fn unmark_redriven(&self, scope: &str, number: u64) -> Result<()> {
        self.touch();
        self.redb().open_table(REJECTED)?.remove(keys::redriven(scope, number).as_slice())?;
        Ok(())
    }

    pub(crate) fn is_redriven(&self, scope: &str, number: u64) -> Result<bool> {
        Ok(self.redb().open_table(REJECTED)?.get(keys::redriven(scope, number).as_slice())?.is_some())
    }

    /// It leaves the quarantine. `false` if it was not there.
    pub(crate) fn remove_rejected(&self, scope: &str, number: u64) -> Result<bool> {
        self.touch();
        let key = keys::rejected(scope);
        let mut rejected = self.redb().open_table(REJECTED)?;
        if rejected.remove(keys::rejected_row(scope, number).as_slice())?.is_none() {
            return Ok(false);
        }
        rejected.remove(keys::redriven(scope, number).as_slice())?;
        let book = Book::of(&rejected, &key)?;
        let book = Book { rows: book.rows.saturating_sub(1), ..book };
        rejected.insert(key.as_slice(), book.to_bytes().as_slice())?;
        Ok(true)
    }
}

fn put_row(
    rejected: &mut redb::Table<'_, Row, Row>,
    scope: &str,
    number: u64,
    row: &RejectedRow,
) -> Result<()> {
    let key = keys::rejected_row(scope, number);
    rejected.insert(key.as_slice(), row.to_bytes(&key).as_slice())?;
    Ok(())
}

/// What a consumer is to hand to its handler again: the number, and the delivery or what is wrong with its row.
pub(crate) type Redriven = (u64, std::result::Result<RejectedRow, &'static str>);

impl Store {
    /// Deliveries that are to be driven again, above `after`, at most `limit`.
    pub(crate) fn redriven(&self, scope: &str, after: Option<u64>, limit: usize) -> Result<Vec<Redriven>> {
        let Some(from) = after.map_or(Some(0), |after| after.checked_add(1)) else { return Ok(Vec::new()) };
        self.core().reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let (from, to) = (keys::redriven(scope, from), keys::redriven(scope, u64::MAX));
            let mut found = Vec::new();
            for row in rejected.range(from.as_slice()..=to.as_slice())?.take(limit) {
                let number =
                    keys::split_numbered(scope, row?.0.value()).ok_or_else(|| damaged_row("rejected"))?;
                let row = read_row(&rejected, scope, number)?.unwrap_or(Err("it is missing"));
                found.push((number, row));
            }
            Ok(found)
        })
    }

    /// How many deliveries each scope has rejected.
    pub(super) fn rejected_counts(&self) -> Result<BTreeMap<String, u64>> {
        self.core().reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let mut counts = BTreeMap::new();
            let mut from = Vec::new();
            while let Some(row) = rejected.range(from.as_slice()..)?.next() {
                let (key, _) = row?;
                let scope = keys::scope_of(key.value()).ok_or_else(|| damaged_row("rejected"))?.to_owned();
                let key = keys::rejected(&scope);
                counts.insert(scope, Book::of(&rejected, &key)?.rows);
                // From one scope straight to the next.
                from = keys::after_prefix(&key);
                if from.is_empty() {
                    break;
                }
            }
            Ok(counts)
        })
    }
}
