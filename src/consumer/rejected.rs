//! Deliveries that a consumer has rejected: look at them, redrive them, or give them up.
//!
//! ```text
//! (scope)              → next number u64, rows u64, their bytes u64, dropped u64      (rejected_room.rs)
//! (scope, 0, number)   → the delivery (log/rejected.rs), in pieces where it is long (pieces.rs)
//! (scope, 1, number)   → ()           it is to be driven again
//! ```
//!
//! **Invariants.** A row is written in the transaction that records its delivery for deduplication,
//! before the broker is notified. After a crash in between, the consumer recognises the redelivery.
//! A number is never given twice. A row goes in the transaction of its handler's effects.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use redb::ReadableTable;

use crate::error::{Error, Result};
use crate::limits::SHORT_STRING_BYTES_MAX;
use crate::log::keys;
use crate::log::rejected::RejectedRow;
use crate::message::Message;
use crate::quarantine_filter::{Entry, Facts, QuarantineFilter, change_all, list_matching};
use crate::storage::errors::damaged_row;
use crate::storage::tables::ids::check_id;
use crate::storage::tables::pieces::{self, Of, Pieces};
use crate::storage::tables::rejected::RejectedTotals;
use crate::storage::tables::schema::{REJECTED, scopes};
use crate::store::Store;
use crate::store::transaction::Transaction;
use crate::time::wall_time;

/// A rejected delivery, and why.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # broker.declare_queue("credit", Default::default());
/// # broker.publish("", "credit", onewrite::Message { message_id: Some("m-1".into()), ..Default::default() })?;
/// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
/// # while consumer.status().rejected == 0 { std::thread::yield_now() }
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
    /// The number of the delivery within its scope. A number is never given twice.
    pub number: u64,
    /// When the delivery was rejected, in Unix milliseconds by the wall clock.
    pub since_ms: u64,
    /// Tries, including those after a redrive.
    pub attempts: u32,
    /// Why the delivery was rejected last. It holds no payload, unless the handler's own error
    /// quotes some.
    pub reason: String,
    /// Whether the delivery waits for the consumer to hand it to its handler again.
    pub redriven: bool,
    /// The exchange that the delivery was published to.
    pub exchange: String,
    /// The routing key that the delivery was published with.
    pub routing_key: String,
    /// The delivery's `message_id`.
    pub message_id: Option<String>,
    /// The delivery's `type`.
    pub event_type: Option<String>,
    /// The damage of the row. Then nothing else is known of the delivery, and it can only be
    /// discarded.
    pub damaged: Option<&'static str>,
}

impl RejectedDelivery {
    /// Returns when the delivery was rejected, by the wall clock. [`since_ms`](Self::since_ms) is
    /// the same as a number.
    ///
    /// ```
    /// use onewrite::RejectedDelivery;
    /// assert_eq!(RejectedDelivery::default().since(), std::time::UNIX_EPOCH);
    /// ```
    #[must_use]
    pub fn since(&self) -> SystemTime {
        wall_time(self.since_ms)
    }
}

impl Entry for RejectedDelivery {
    fn number(&self) -> u64 {
        self.number
    }

    fn facts(&self) -> Facts<'_> {
        if self.damaged.is_some() {
            return Facts::default();
        }
        Facts {
            event_type: self.event_type.as_deref(),
            exchange: Some(&self.exchange),
            routing_key: Some(&self.routing_key),
            reason: Some(&self.reason),
            attempts: Some(self.attempts),
        }
    }
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
    /// Returns the quarantine of the consumer of this scope.
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
    /// Lists rejected deliveries above `after`, in order of their numbers, at most `limit`. Damaged
    /// ones are listed and marked.
    ///
    /// # Errors
    /// Errors of the storage engine. A row whose key names no delivery is damage too.
    /// [`discard_unnamed`](Self::discard_unnamed) removes such rows.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message { message_id: Some("m-1".into()), ..Default::default() })?;
    /// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.status().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let rejected = store.rejected("credit-service");
    /// assert_eq!(rejected.list(None, 100)?[0].number, 0);
    /// assert!(rejected.list(Some(0), 100)?.is_empty()); // the next page
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<RejectedDelivery>> {
        let (found, unnamed) = self.page(after, limit)?;
        if unnamed && found.len() < limit { Err(damaged_row("rejected")) } else { Ok(found) }
    }

    /// Lists deliveries as [`list`](Self::list) does, but only those that the filter selects. It
    /// reads all of them.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// let often = QuarantineFilter::all().attempts_min(10);
    /// assert!(store.rejected("credit-service").list_matching(&often, None, 100)?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list_matching(
        &self,
        filter: &QuarantineFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<RejectedDelivery>> {
        list_matching(filter, after, limit, |after, limit| self.list(after, limit))
    }

    /// Reads rejected deliveries, and whether a row whose key names no delivery stands among them
    /// or behind the last.
    fn page(&self, after: Option<u64>, limit: usize) -> Result<(Vec<RejectedDelivery>, bool)> {
        let Some(from) = after.map_or(Some(0), |after| after.checked_add(1)) else {
            return Ok((Vec::new(), false));
        };
        self.reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let (from, to) = (self.row(from), self.row(u64::MAX));
            let (mut found, mut unnamed) = (Vec::new(), false);
            for row in rejected.range(from.as_slice()..=to.as_slice())? {
                if found.len() >= limit {
                    break;
                }
                let (key, row) = row?;
                let Some(number) = keys::split_numbered(&self.scope, key.value()) else {
                    unnamed = true;
                    continue;
                };
                let redriven = rejected.get(keys::redriven(&self.scope, number).as_slice())?.is_some();
                let row = pieces::whole(tx, Of::Rejected, key.value(), row.value())?;
                found.push(entry(number, redriven, RejectedRow::from_bytes(key.value(), &row)));
            }
            Ok((found, unnamed))
        })
    }

    /// Returns one rejected delivery with its message.
    ///
    /// # Errors
    /// [`Error::NotRejected`]; [`Error::DamagedDelivery`] if its row fails its check.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message { payload: b"100".to_vec(), ..Default::default() })?;
    /// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.status().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let (entry, message) = store.rejected("credit-service").get(0)?;
    /// assert_eq!((entry.routing_key.as_str(), message.payload.as_slice()), ("credit", &b"100"[..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn get(&self, number: u64) -> Result<(RejectedDelivery, Message)> {
        self.reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let row = read_row(tx, &rejected, &self.scope, number)?.ok_or_else(|| self.missing(number))?;
            let row = row.map_err(|what| damaged(&self.scope, number, what))?;
            let redriven = rejected.get(keys::redriven(&self.scope, number).as_slice())?.is_some();
            let message = row.message.clone();
            Ok((entry(number, redriven, Ok(row)), message))
        })
    }

    /// Hands the delivery to the consumer's handler again, with all its attempts. When this returns
    /// `Ok`, the request is durable.
    ///
    /// A running consumer of the scope redrives the delivery at once; a consumer that starts later
    /// does it then. One transaction commits the effects and removes the delivery from quarantine.
    /// A delivery that is rejected again keeps its number.
    ///
    /// # Errors
    /// [`Error::NotRejected`]; [`Error::DamagedDelivery`]: such a delivery can only be discarded.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message::default())?;
    /// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.status().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// let rejected = store.rejected("credit-service");
    /// rejected.redrive(0)?;
    /// assert!(rejected.list(None, 1)?[0].redriven); // no consumer runs yet
    /// let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Ok(()))?;
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
        self.store.core().redrives.notify(&self.scope);
        Ok(())
    }

    /// Redrives, as [`redrive`](Self::redrive) does, all present deliveries that the filter selects
    /// and that are not damaged. Returns how many, without those that waited for a redrive already.
    ///
    /// # Errors
    /// Errors of the storage engine. Deliveries before the error are redriven all the same. A row
    /// whose key names no delivery is an error too, after all others are redriven.
    /// [`discard_unnamed`](Self::discard_unnamed) removes such rows.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # broker.declare_queue("credit", Default::default());
    /// # broker.publish("", "credit", onewrite::Message::default())?;
    /// # let consumer = store.consumer("credit-service").spawn(broker.source("credit"), |_, _| Err(onewrite::Error::reject("no such account")))?;
    /// # while consumer.status().rejected == 0 { std::thread::yield_now() }
    /// # let _ = consumer.stop(std::time::Duration::from_secs(5));
    /// use onewrite::QuarantineFilter;
    /// let all = QuarantineFilter::all();
    /// assert_eq!(store.rejected("credit-service").redrive_all(&all)?, 1);
    /// assert_eq!(store.rejected("credit-service").redrive_all(&all)?, 0); // it waits for its consumer
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        let (scope, redrives) = (&self.scope, &self.store.core().redrives);
        self.for_all(filter, |entries| {
            let wanted = entries.iter().filter(|entry| entry.damaged.is_none() && !entry.redriven);
            let numbers: Vec<u64> = wanted.map(|entry| entry.number).collect();
            if numbers.is_empty() {
                return Ok(0);
            }
            let marked = self.write(move |tx, scope| {
                let marked = numbers.iter().map(|number| tx.mark_redriven(scope, *number));
                marked.sum::<Result<u64>>()
            })?;
            redrives.notify(scope);
            Ok(marked)
        })
    }

    /// Changes the present deliveries. Rows whose keys name no delivery are an error, once all
    /// others are changed.
    fn for_all(
        &self,
        filter: &QuarantineFilter,
        change: impl Fn(Vec<RejectedDelivery>) -> Result<u64>,
    ) -> Result<u64> {
        let end = self.reading(|tx| {
            Ok(RejectedTotals::of(&tx.open_table(REJECTED)?, &keys::rejected(&self.scope))?.next)
        })?;
        let mut unnamed = false;
        let page = |after, limit| {
            let (page, passed) = self.page(after, limit)?;
            unnamed |= passed;
            Ok(page)
        };
        let changed = change_all(filter, end, page, change)?;
        if unnamed { Err(damaged_row("rejected")) } else { Ok(changed) }
    }

    /// Gives the delivery up for good. When this returns `Ok`, that is durable. A delivery that its
    /// handler rejected stays recorded: the consumer only acknowledges a repeat.
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
        let bytes = self.write(move |tx, scope| {
            tx.remove_rejected(scope, number)?.ok_or_else(|| missing(scope, number))
        })?;
        self.store.core().discarded.fetch_add(bytes, Ordering::Relaxed);
        tracing::warn!(scope = self.scope, number, "a rejected delivery is discarded by request");
        // A consumer may wait for the room.
        self.store.core().redrives.notify(&self.scope);
        Ok(())
    }

    /// Discards, as [`discard`](Self::discard) does, all present deliveries that the filter
    /// selects. Returns how many. [`all`](QuarantineFilter::all) selects damaged ones too.
    ///
    /// # Errors
    /// Errors of the storage engine. Deliveries before the error are given up all the same. A row
    /// whose key names no delivery is an error too, after all others are given up.
    /// [`discard_unnamed`](Self::discard_unnamed) removes such rows.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// let unknown = QuarantineFilter::all().reason_contains("no such account");
    /// assert_eq!(store.rejected("credit-service").discard_all(&unknown)?, 0); // there is none
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        self.for_all(filter, |entries| {
            let removed = self.write(move |tx, scope| {
                // A delivery may have been applied or discarded since it was read.
                let remove = |entry: &RejectedDelivery| tx.remove_rejected(scope, entry.number).transpose();
                entries.iter().filter_map(remove).collect::<Result<Vec<u64>>>()
            })?;
            let (count, bytes) = (removed.len() as u64, removed.iter().sum());
            self.store.core().discarded.fetch_add(bytes, Ordering::Relaxed);
            tracing::warn!(scope = self.scope, count, "rejected deliveries are discarded by request");
            // A consumer may wait for the room.
            self.store.core().redrives.notify(&self.scope);
            Ok(count)
        })
    }

    /// Removes rows whose keys name no delivery, and counts the rows anew. Only damage makes such
    /// rows. Returns how many were removed. When this returns `Ok`, that is durable. Deliveries
    /// with numbers stay, also damaged ones: [`discard`](Self::discard) removes those.
    ///
    /// **Cost.** It reads the keys of all rows of the scope.
    ///
    /// # Errors
    /// Errors of the storage engine.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert_eq!(store.rejected("credit-service").discard_unnamed()?, 0); // nothing is damaged
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard_unnamed(&self) -> Result<u64> {
        let removed = self.write(|tx, scope| tx.remove_unnamed(scope))?;
        if removed > 0 {
            tracing::warn!(
                scope = self.scope,
                removed,
                "rows among rejected deliveries that name none are discarded by request"
            );
            self.store.core().redrives.notify(&self.scope);
        }
        Ok(removed)
    }

    /// Returns how many rejected deliveries there are.
    ///
    /// # Errors
    /// Errors of the storage engine.
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
            Ok(RejectedTotals::of(&tx.open_table(REJECTED)?, &key)?.rows)
        })
    }

    /// Whether there are no rejected deliveries.
    ///
    /// # Errors
    /// Errors of the storage engine.
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
        self.store.core().refuse_reentrant("Rejected")?;
        self.store.core().reading(read)
    }

    fn write<T: Send + 'static>(
        &self,
        mut write: impl FnMut(&Transaction, &str) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        check_id("the scope", self.scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        let scope = self.scope.clone();
        Ok(self.store.write(move |tx| write(tx, &scope))?.into_value())
    }

    fn row(&self, number: u64) -> Vec<u8> {
        keys::rejected_row(&self.scope, number)
    }

    fn missing(&self, number: u64) -> Error {
        missing(&self.scope, number)
    }
}

type Row = &'static [u8];

pub(crate) fn read_row(
    tx: &impl Pieces,
    rejected: &impl ReadableTable<Row, Row>,
    scope: &str,
    number: u64,
) -> Result<Option<std::result::Result<RejectedRow, &'static str>>> {
    let key = keys::rejected_row(scope, number);
    let Some(row) = rejected.get(key.as_slice())? else { return Ok(None) };
    Ok(Some(RejectedRow::from_bytes(&key, &pieces::whole(tx, Of::Rejected, &key, row.value())?)))
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
            event_type: row.message.event_type.map(String::from),
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

pub(crate) fn damaged(scope: &str, number: u64, what: &'static str) -> Error {
    Error::DamagedDelivery { scope: scope.to_owned(), number, what }
}

/// A delivery to redrive: its number, and the delivery or the damage of its row.
pub(crate) type Redriven = (u64, std::result::Result<RejectedRow, &'static str>);

impl Store {
    /// Reads deliveries to redrive, above `after`, at most `limit`.
    pub(crate) fn redriven(&self, scope: &str, after: Option<u64>, limit: usize) -> Result<Vec<Redriven>> {
        let Some(from) = after.map_or(Some(0), |after| after.checked_add(1)) else { return Ok(Vec::new()) };
        self.core().reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let (from, to) = (keys::redriven(scope, from), keys::redriven(scope, u64::MAX));
            let mut found = Vec::new();
            for row in rejected.range(from.as_slice()..=to.as_slice())? {
                // A row that names no delivery belongs to no consumer, and must not hold up the
                // rest.
                let Some(number) = keys::split_numbered(scope, row?.0.value()) else { continue };
                let row = read_row(tx, &rejected, scope, number)?.unwrap_or(Err("it is missing"));
                found.push((number, row));
                if found.len() == limit {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Reads how much the rejected deliveries of each scope take.
    pub(crate) fn rejected_totals(&self) -> Result<BTreeMap<String, RejectedTotals>> {
        self.core().reading(|tx| {
            let rejected = tx.open_table(REJECTED)?;
            let mut of_scopes = BTreeMap::new();
            for scope in scopes(&rejected, "rejected")? {
                let totals = RejectedTotals::of(&rejected, &keys::rejected(&scope))?;
                of_scopes.insert(scope, totals);
            }
            Ok(of_scopes)
        })
    }
}
