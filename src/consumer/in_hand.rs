//! The rows that a consumer keeps for longer than one try: the tries of a delivery, and deliveries
//! that are parked.
//!
//! A parked delivery is in the store instead of with the broker.
//!
//! ```text
//! (scope)              → next number u64, parked rows u64, their bytes u64
//! (scope, 0, number)   → a parked delivery              (log/in_hand.rs)
//! (scope, 1, name)     → the tries of a delivery
//! ```
//!
//! **Invariants.** A delivery is parked before the broker is notified that the delivery is settled.
//! After a crash in between, the consumer recognises the redelivery by its name and content. A
//! parked row goes in the transaction that applies the delivery, recognises it or quarantines it;
//! its row of tries goes with it. A number is never given twice.
//!
//! The table is made when it is first needed. A consumer whose deliveries all succeed at once never
//! opens it.

use std::collections::BTreeMap;
use std::sync::Arc;

use redb::{ReadTransaction, ReadableTable, TableError};

use super::dedup::{Identity, content_of_delivery, fingerprint};
use crate::broker::Delivery;
use crate::error::Result;
use crate::limits::REASON_BYTES_MAX;
use crate::log::in_hand::{ParkedRow, Tries, TriesRow};
use crate::log::keys;
use crate::log::rejected::RejectedRow;
use crate::storage::errors::damaged_row;
use crate::storage::tables::pieces::{self, Of, Pieces};
use crate::storage::tables::rejected::RejectedTotals;
use crate::storage::tables::schema::{IN_HAND, REJECTED, read_u64s, scopes, u64s};
use crate::store::Store;
use crate::store::shared::tail::Identity as StoreIdentity;
use crate::store::transaction::Transaction;
use crate::tuning::PARKING_STEP_BYTES;

type Row = &'static [u8];

/// The name of a delivery's tries within its scope.
pub(crate) type Name = Arc<[u8]>;

const BY_FINGERPRINT: u8 = 0;
const BY_CONTENT: u8 = 1;
const BY_PARKED_NUMBER: u8 = 2;
const BY_REJECTED_NUMBER: u8 = 3;

/// Returns the name of a delivery that the broker holds: its identity and its content, or its
/// content alone.
///
/// Several deliveries without an id may share a name; the row of the name then applies to each. The
/// name leaves out what the broker writes into a delivery, such as how often it has come.
pub(crate) fn name_of(
    store: &StoreIdentity,
    scope: &str,
    identity: Option<&Identity>,
    delivery: &Delivery,
) -> Name {
    let named = identity.filter(|identity| **identity != Identity::Nameless);
    if let Some(name) = named.and_then(|identity| fingerprint(store, scope, Some(identity), delivery)) {
        return [&[BY_FINGERPRINT][..], &name].concat().into();
    }
    let (hash, route) = content_of_delivery(store, delivery);
    [&[BY_CONTENT][..], &hash.to_be_bytes(), &route.to_be_bytes()].concat().into()
}

/// Returns the name of a delivery that was redriven from quarantine.
pub(crate) fn name_of_rejected(number: u64) -> Name {
    numbered(BY_REJECTED_NUMBER, number)
}

fn numbered(kind: u8, number: u64) -> Name {
    [&[kind][..], &number.to_be_bytes()].concat().into()
}

/// Whether the name is that of one delivery alone, and not of every delivery with the same content.
pub(crate) fn names_one(name: &[u8]) -> bool {
    name.first().is_some_and(|kind| *kind != BY_CONTENT)
}

/// The row of a scope: the next number, and how many deliveries are parked with how many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct ParkedTotals {
    next: u64,
    rows: u64,
    bytes: u64,
}

impl ParkedTotals {
    fn of(table: &impl ReadableTable<Row, Row>, scope: &str) -> Result<Self> {
        let Some(row) = table.get(keys::in_hand(scope).as_slice())? else { return Ok(Self::default()) };
        let [next, rows, bytes] = read_u64s(row.value()).ok_or_else(|| damaged_row("in_hand"))?;
        Ok(Self { next, rows, bytes })
    }

    fn put(self, table: &mut redb::Table<'_, Row, Row>, scope: &str) -> Result<()> {
        let row = u64s([self.next, self.rows, self.bytes]);
        table.insert(keys::in_hand(scope).as_slice(), row.as_slice())?;
        Ok(())
    }
}

/// A delivery that is to be parked.
#[derive(Debug, Clone)]
pub(crate) struct ToPark {
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) name: Name,
    pub(crate) tries: Tries,
    pub(crate) waited: bool,
    pub(crate) delivery: Arc<Delivery>,
}

/// The result of parking a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Parking {
    /// The delivery is parked under this number, and its tries now have this name.
    Parked { number: u64, name: Name, bytes: u64 },
    /// The delivery was applied or rejected before.
    Duplicate,
    /// The delivery is parked already.
    Again,
    /// There is no room.
    Full,
}

/// How much may be parked in a scope, in rows and bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ParkedRoom {
    pub(crate) max: (u64, u64),
    /// The bound for parked rows and quarantine together, if parked deliveries may have to go to
    /// the quarantine.
    pub(crate) max_with_rejected: Option<(u64, u64)>,
}

impl ParkedRoom {
    fn holds(
        &self,
        (rows, bytes): (u64, u64),
        rejected: impl FnOnce() -> Result<RejectedTotals>,
    ) -> Result<bool> {
        if rows > self.max.0 || bytes > self.max.1 {
            return Ok(false);
        }
        let Some((rows_max, bytes_max)) = self.max_with_rejected else { return Ok(true) };
        let rejected = rejected()?;
        let reasons = rows.saturating_mul(REASON_BYTES_MAX as u64);
        Ok(rejected.rows.saturating_add(rows) <= rows_max
            && rejected.bytes.saturating_add(bytes).saturating_add(reasons) <= bytes_max)
    }
}

impl Transaction {
    /// Parks a delivery within these bounds.
    pub(crate) fn park(&self, scope: &str, what: &ToPark, room: &ParkedRoom) -> Result<Parking> {
        // A conflict is reported when the delivery is tried.
        if let Some(identity) = &what.identity
            && matches!(self.is_first_delivery(scope, identity), Ok(false))
        {
            return Ok(Parking::Duplicate);
        }
        // The clock is the application's code, so nothing is open while it is read.
        let since_ms = self.core.settings.clock.now().wall_ms;
        let table = self.redb().open_table(IN_HAND)?;
        let totals = ParkedTotals::of(&table, scope)?;
        let known = tries_row(&table, scope, &what.name)?.and_then(|row| row.parked);
        let standing =
            known.map(|number| parked_row(self.redb(), &table, scope, number)).transpose()?.flatten();
        drop(table);
        // Such a name includes the content, without what the broker writes into a delivery each
        // time it comes.
        if matches!(standing, Some(Ok(_))) && names_one(&what.name) {
            return Ok(Parking::Again);
        }
        let number = totals.next;
        let by_number = standing.is_some() || !names_one(&what.name);
        let name = if by_number { numbered(BY_PARKED_NUMBER, number) } else { Arc::clone(&what.name) };
        let row = ParkedRow {
            waited: what.waited,
            name: name.to_vec(),
            delivery: row_of(&what.delivery, since_ms),
        };
        let key = keys::parked_delivery(scope, number);
        let row = row.to_bytes(&key);
        let totals =
            ParkedTotals { next: number + 1, rows: totals.rows + 1, bytes: totals.bytes + row.len() as u64 };
        let rejected = || RejectedTotals::of(&self.redb().open_table(REJECTED)?, &keys::rejected(scope));
        if !room.holds((totals.rows, totals.bytes), rejected)? {
            return Ok(Parking::Full);
        }
        self.touch();
        let mut table = self.redb().open_table(IN_HAND)?;
        pieces::put(self.redb(), &mut table, Of::Parked, &key, &row)?;
        if by_number && standing.is_none() {
            table.remove(keys::tries(scope, &what.name).as_slice())?;
        }
        let key = keys::tries(scope, &name);
        let tries = TriesRow { tries: what.tries, parked: Some(number) };
        table.insert(key.as_slice(), tries.to_bytes(&key).as_slice())?;
        totals.put(&mut table, scope)?;
        Ok(Parking::Parked { number, name, bytes: row.len() as u64 })
    }

    /// Records how often deliveries were tried.
    pub(crate) fn note_tries(&self, scope: &str, rows: &[(Name, TriesRow)]) -> Result<()> {
        self.touch();
        let mut table = self.redb().open_table(IN_HAND)?;
        for (name, row) in rows {
            let key = keys::tries(scope, name);
            table.insert(key.as_slice(), row.to_bytes(&key).as_slice())?;
        }
        Ok(())
    }

    /// Forgets how often deliveries were tried.
    pub(crate) fn forget_tries(&self, scope: &str, names: &[Name]) -> Result<()> {
        self.touch();
        let mut table = self.redb().open_table(IN_HAND)?;
        for name in names {
            table.remove(keys::tries(scope, name).as_slice())?;
        }
        Ok(())
    }

    pub(crate) fn is_parked(&self, scope: &str, number: u64) -> Result<bool> {
        let table = self.redb().open_table(IN_HAND)?;
        Ok(table.get(keys::parked_delivery(scope, number).as_slice())?.is_some())
    }

    /// Removes the rows of a delivery that is done with.
    pub(crate) fn leave_hand(&self, scope: &str, name: Option<&Name>, parked: Option<u64>) -> Result<()> {
        if name.is_none() && parked.is_none() {
            return Ok(());
        }
        self.touch();
        let mut table = self.redb().open_table(IN_HAND)?;
        if let Some(name) = name {
            table.remove(keys::tries(scope, name).as_slice())?;
        }
        let Some(number) = parked else { return Ok(()) };
        let key = keys::parked_delivery(scope, number);
        let Some(len) = pieces::remove(self.redb(), &mut table, Of::Parked, &key)? else { return Ok(()) };
        let totals = ParkedTotals::of(&table, scope)?;
        let (rows, bytes) = (totals.rows.saturating_sub(1), totals.bytes.saturating_sub(len));
        ParkedTotals { rows, bytes, ..totals }.put(&mut table, scope)
    }
}

fn row_of(delivery: &Delivery, since_ms: u64) -> RejectedRow {
    RejectedRow {
        since_ms,
        attempts: 0,
        recheck: false,
        reason: String::new(),
        exchange: delivery.exchange.clone(),
        routing_key: delivery.routing_key.clone(),
        message: delivery.message.clone(),
    }
}

/// A parked delivery as the file holds it, or the damage of its row.
pub(crate) type Parked = std::result::Result<ParkedRow, &'static str>;

/// A parked delivery's number, the length of its row, the row, and its tries.
pub(crate) type FoundParked = (u64, u64, Parked, Option<TriesRow>);

fn parked_row(
    tx: &impl Pieces,
    table: &impl ReadableTable<Row, Row>,
    scope: &str,
    number: u64,
) -> Result<Option<Parked>> {
    let key = keys::parked_delivery(scope, number);
    let Some(row) = table.get(key.as_slice())? else { return Ok(None) };
    Ok(Some(ParkedRow::from_bytes(&key, &pieces::whole(tx, Of::Parked, &key, row.value())?)))
}

/// Reads a row of tries. A damaged row counts as none: the next note takes its place.
fn tries_row(table: &impl ReadableTable<Row, Row>, scope: &str, name: &[u8]) -> Result<Option<TriesRow>> {
    let key = keys::tries(scope, name);
    Ok(table.get(key.as_slice())?.and_then(|row| TriesRow::from_bytes(&key, row.value())))
}

impl Store {
    /// Reads the table if there is one.
    fn in_hand<T: Default>(
        &self,
        read: impl FnOnce(&ReadTransaction, &redb::ReadOnlyTable<Row, Row>) -> Result<T>,
    ) -> Result<T> {
        self.core().reading(|tx| match tx.open_table(IN_HAND) {
            Ok(table) => read(tx, &table),
            Err(TableError::TableDoesNotExist(_)) => Ok(T::default()),
            Err(error) => Err(error.into()),
        })
    }

    /// Returns how many deliveries of each scope are parked, and their bytes.
    pub(crate) fn parked_totals(&self) -> Result<BTreeMap<String, (u64, u64)>> {
        self.in_hand(|_, table| {
            let mut of_scopes = BTreeMap::new();
            for scope in scopes(table, "in_hand")? {
                let totals = ParkedTotals::of(table, &scope)?;
                of_scopes.insert(scope, (totals.rows, totals.bytes));
            }
            Ok(of_scopes)
        })
    }

    /// Returns all rows of tries of a scope.
    pub(crate) fn all_tries(&self, scope: &str) -> Result<Vec<(Name, TriesRow)>> {
        self.in_hand(|_, table| {
            let from = keys::tries(scope, &[]);
            let to = keys::after_prefix(&from);
            let mut found = Vec::new();
            for row in table.range(from.as_slice()..)? {
                let (key, row) = row?;
                let key = key.value();
                if !to.is_empty() && key >= to.as_slice() {
                    break;
                }
                if let (Some(name), Some(row)) =
                    (key.get(from.len()..), TriesRow::from_bytes(key, row.value()))
                {
                    found.push((name.into(), row));
                }
            }
            Ok(found)
        })
    }

    /// Returns parked deliveries from number `from` on, about [`PARKING_STEP_BYTES`] of them.
    pub(crate) fn parked_from(&self, scope: &str, from: u64) -> Result<Vec<FoundParked>> {
        self.in_hand(|tx, table| {
            let (from, to) = (keys::parked_delivery(scope, from), keys::parked_delivery(scope, u64::MAX));
            let (mut found, mut bytes) = (Vec::new(), 0);
            for row in table.range(from.as_slice()..=to.as_slice())? {
                let (key, row) = row?;
                // A row that no number names belongs to no consumer, and must not hold up the rest.
                let Some(number) = keys::split_numbered(scope, key.value()) else {
                    tracing::error!(
                        scope,
                        "a row of a parked delivery has a key that names none: it is passed over"
                    );
                    continue;
                };
                let row = pieces::whole(tx, Of::Parked, key.value(), row.value())?;
                let (len, row) = (row.len(), ParkedRow::from_bytes(key.value(), &row));
                let tries =
                    row.as_ref().ok().map(|row| tries_row(table, scope, &row.name)).transpose()?.flatten();
                bytes += len;
                found.push((number, len as u64, row, tries));
                if bytes >= PARKING_STEP_BYTES {
                    break;
                }
            }
            Ok(found)
        })
    }

    /// Returns these parked deliveries, with `None` for one that is gone.
    pub(crate) fn parked(&self, scope: &str, numbers: &[u64]) -> Result<Vec<Option<Parked>>> {
        let find = |tx: &ReadTransaction, table: &redb::ReadOnlyTable<Row, Row>| {
            numbers.iter().map(|number| parked_row(tx, table, scope, *number)).collect::<Result<Vec<_>>>()
        };
        let mut found = self.in_hand(find)?;
        found.resize_with(numbers.len(), || None);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::{DeliveryTag, Epoch};
    use crate::message::{HeaderValue, Message};
    use crate::wire::ContentKey;

    /// Goal: a delivery without an id has the same name when it comes back, although the broker has
    /// counted in its headers. No other delivery has that name.
    #[test]
    fn what_the_broker_counts_is_not_in_a_name() {
        let store = StoreIdentity {
            store_id: [1; 16],
            epoch_starts: Vec::new(),
            content_key: ContentKey::new([7; 16]),
            dedup_before_ms: None,
        };
        let name = |payload: &str, count: Option<i64>, routing_key: &str| {
            let count = count.map(|count| ("x-delivery-count".into(), HeaderValue::from(count)));
            let delivery = Delivery {
                tag: DeliveryTag { epoch: Epoch(1), tag: 1 },
                exchange: String::new(),
                routing_key: routing_key.to_owned(),
                redelivered: count.is_some(),
                message: Message {
                    headers: count.into_iter().collect(),
                    payload: payload.into(),
                    ..Message::default()
                },
            };
            name_of(&store, "credit", Some(&Identity::Nameless), &delivery)
        };
        let first = name("1", None, "q");
        assert_eq!(first, name("1", Some(1), "q"));
        assert_eq!(first, name("1", Some(2), "q"));
        assert_ne!(first, name("2", Some(1), "q"));
        assert_ne!(first, name("1", Some(1), "r"));
        assert!(!names_one(&first), "another message may say the same");
    }
}
