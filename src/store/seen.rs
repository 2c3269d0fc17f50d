//! Deliveries that have been seen: by the producer's lane where a message names one, else by its id.
//!
//! A lane takes one row and one per open hole (the rule and the rows: `log/seen.rs`), and is remembered for ever. An id
//! takes a row of the inbox, and is remembered for the inbox age.
//!
//! **Ids by number.** Where the store remembers so many ids at most, each id of a delivery gets the next number of its scope
//! (counted in the row `(scope)`), which stands in its inbox row; one that is too far behind counts as never seen, and the
//! sweep of the inbox removes it in passing.
//!
//! **Invariant.** Looking writes nothing: a closure that looks and then fails leaves the transaction clean. Marking a
//! lane writes its table, so it comes last.

use redb::{ReadableTable, WriteTransaction};

use super::Store;
use super::failure::damaged_row;
use super::gathered::Amount;
use super::schema::{InboxRow, SEEN, read_u64s, u64s};
use super::transaction::{Transaction, check_id, content_of};
use crate::error::{Error, Result};
use crate::event::{LaneOf, uuid_text};
use crate::limits::{INBOX_ID_BYTES_MAX, SHORT_STRING_BYTES_MAX};
use crate::log::seen::{Arrival, Decision, Head, Hole, Mark, checksum, decide};
use crate::log::{keys, record};
use crate::message::Message;
use crate::wire;

/// What a message is told from others by, within a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Its number in a lane of the store that produced it.
    Lane { lane: LaneOf, head: Vec<u8>, arrival: Arrival },
    /// The id that a foreign producer gave it.
    Id { id: String, key: Vec<u8>, content: (u32, u32) },
    /// Nothing: it is new at every delivery.
    Nameless,
}

impl Identity {
    pub(crate) fn of(scope: &str, message: &Message) -> Result<Self> {
        check_id("the scope", scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        if let Some(reason) = message.header(wire::UNREADABLE) {
            let reason = reason.as_text().unwrap_or("it does not say why").to_owned();
            return Err(Error::Unreadable { reason });
        }
        if let Some((lane, number)) = wire::lane_of(message)? {
            let arrival = Arrival { number, checksum: checksum(message), time_ms: wire::time_ms(message) };
            return Ok(Self::Lane { lane, head: keys::seen_head(scope, lane), arrival });
        }
        let Some(id) = message.message_id.as_ref().filter(|id| !id.is_empty()) else {
            return Ok(Self::Nameless);
        };
        check_id("the id", id.as_bytes(), INBOX_ID_BYTES_MAX)?;
        let key = keys::inbox(scope, id.as_bytes());
        Ok(Self::Id { id: id.as_str().to_owned(), key, content: content_of(&message.payload) })
    }

    /// The lane and the number in it.
    pub(crate) fn place(&self) -> Option<(LaneOf, u64)> {
        match self {
            Self::Lane { lane, arrival, .. } => Some((*lane, arrival.number)),
            _ => None,
        }
    }
}

impl Transaction {
    /// Whether this message is seen for the first time within `scope`, and marks it as seen. The mark is durable with this
    /// transaction, so that whatever else it does happens once for this message. It is what a
    /// [consumer](crate::Store::consumer) does, for those who have a consuming loop of their own.
    ///
    /// A message from a `onewrite` store is known by its lane and its number there, for ever, in whatever order it comes. One
    /// of another producer is known by its `message_id`, for the store's inbox age at least; one without an id is new at
    /// every delivery. The broker's `redelivered` flag plays no part.
    ///
    /// Call it last: what is marked can be rolled back only with the whole group of writes, which then runs again.
    ///
    /// # Errors
    /// [`Error::LaneConflict`] or [`Error::IdConflict`] if its number or id was seen with another message;
    /// [`Error::LaneHeader`] for headers of a lane that are there by half; [`Error::BadId`] for a scope of 0 or over 255
    /// bytes or an id over 512.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::{Error, Message};
    /// let message = |text: &str| Message { message_id: Some("m-1".into()), payload: text.into(), ..Message::default() };
    /// let tx = store.begin()?;
    /// assert!(tx.first_delivery("credit-service", &message("100"))?);
    /// assert!(!tx.first_delivery("credit-service", &message("100"))?);
    /// assert!(matches!(tx.first_delivery("credit-service", &message("999")), Err(Error::IdConflict { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn first_delivery(&self, scope: &str, message: &Message) -> Result<bool> {
        self.mark_delivery(scope, &Identity::of(scope, message)?)
    }

    /// As [`first_delivery`](Self::first_delivery), without marking it.
    pub(crate) fn is_first_delivery(&self, scope: &str, identity: &Identity) -> Result<bool> {
        match identity {
            Identity::Nameless => Ok(true),
            Identity::Id { id, key, content } => match self.remembered(scope, key)? {
                None => Ok(true),
                Some(row) if (row.crc, row.len) == *content => Ok(false),
                Some(_) => Err(Error::IdConflict { scope: scope.to_owned(), id: id.clone() }),
            },
            Identity::Lane { lane, head, arrival } => Ok(self.decide(scope, *lane, head, arrival)?.is_some()),
        }
    }

    pub(crate) fn mark_delivery(&self, scope: &str, identity: &Identity) -> Result<bool> {
        match identity {
            Identity::Nameless => Ok(true),
            Identity::Id { key, content, .. } => {
                let first = self.is_first_delivery(scope, identity)?;
                if first {
                    let number = self.next_id(scope)?;
                    self.mark_id(key.clone(), *content, number)?;
                }
                Ok(first)
            }
            Identity::Lane { lane, head, arrival } => {
                let Some(mark) = self.decide(scope, *lane, head, arrival)? else { return Ok(false) };
                self.admit(Amount::mark(head.len()))?;
                self.touch();
                write(self.redb(), head, &mark)?;
                Ok(true)
            }
        }
    }

    /// The row of an id, unless so many have come since that it is forgotten.
    fn remembered(&self, scope: &str, key: &[u8]) -> Result<Option<InboxRow>> {
        let row = self.seen(key)?;
        let Some(row) = row.filter(|row| row.count == NUMBERED) else { return Ok(row) };
        let Some(max) = self.core.settings.inbox_ids_max else { return Ok(Some(row)) };
        let next = ids_next(&self.redb().open_table(SEEN)?, scope)?;
        Ok(Some(row).filter(|row| !is_forgotten(row, next, max)))
    }

    /// The number of a new id, where ids have one.
    fn next_id(&self, scope: &str) -> Result<Option<u64>> {
        if self.core.settings.inbox_ids_max.is_none() {
            return Ok(None);
        }
        self.touch();
        let mut seen = self.redb().open_table(SEEN)?;
        let number = ids_next(&seen, scope)?;
        seen.insert(keys::inbox(scope, &[]).as_slice(), u64s([number + 1]).as_slice())?;
        Ok(Some(number))
    }

    /// The rows that mark it as seen; `None` for a repeat.
    fn decide(&self, scope: &str, lane: LaneOf, head: &[u8], arrival: &Arrival) -> Result<Option<Mark>> {
        self.owned()?;
        let seen = self.redb().open_table(SEEN)?;
        let known = read_head(&seen, head)?.unwrap_or_default();
        match decide(&known, arrival, |number| hole_below(&seen, head, number))? {
            Decision::First(mark) => Ok(Some(mark)),
            Decision::Repeat => Ok(None),
            Decision::Conflict(how) => Err(Error::LaneConflict {
                scope: scope.to_owned(),
                producer: uuid_text(lane.store).into(),
                epoch: lane.epoch,
                lane: lane.id,
                number: arrival.number,
                how,
            }),
        }
    }
}

type Row = &'static [u8];

/// The count of an inbox row whose `first` is the number of its id: no closure leads to so many events.
pub(super) const NUMBERED: u32 = u32::MAX;

/// The number that the scope's next id gets.
pub(super) fn ids_next(seen: &impl ReadableTable<Row, Row>, scope: &str) -> Result<u64> {
    let Some(row) = seen.get(keys::inbox(scope, &[]).as_slice())? else { return Ok(0) };
    let [next] = read_u64s(row.value()).ok_or_else(|| damaged_row("seen"))?;
    Ok(next)
}

/// Whether at least `max` ids have come since.
pub(super) fn is_forgotten(row: &InboxRow, next: u64, max: u64) -> bool {
    row.count == NUMBERED && row.first.saturating_add(max) < next
}

fn read_head(seen: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Option<Head>> {
    let Some(row) = seen.get(key)? else { return Ok(None) };
    Head::from_bytes(key, row.value()).map(Some).ok_or_else(|| damaged_row("seen"))
}

/// The hole that starts last at or before `number`.
fn hole_below(seen: &impl ReadableTable<Row, Row>, head: &[u8], number: u64) -> Result<Option<Hole>> {
    let (from, to) = (keys::seen_hole(head, 0), keys::seen_hole(head, number));
    let Some(row) = seen.range(from.as_slice()..=to.as_slice())?.next_back() else { return Ok(None) };
    let (key, row) = row?;
    Hole::from_bytes(key.value(), row.value()).map(Some).ok_or_else(|| damaged_row("seen"))
}

fn write(tx: &WriteTransaction, head: &[u8], mark: &Mark) -> Result<()> {
    let mut seen = tx.open_table(SEEN)?;
    if let Some(start) = mark.remove {
        seen.remove(keys::seen_hole(head, start).as_slice())?;
    }
    for hole in mark.put.iter().flatten() {
        let key = keys::seen_hole(head, hole.start);
        seen.insert(key.as_slice(), hole.to_bytes(&key).as_slice())?;
    }
    seen.insert(head, mark.head.to_bytes(head).as_slice())?;
    Ok(())
}

impl Store {
    /// The first number of each of these lanes that is new, as of the last commit. The keys are of their heads. One whose
    /// row is damaged has none: whoever takes a delivery of it is told.
    pub(crate) fn lanes_next<'a>(&self, heads: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<u64>> {
        let seen = self.core().begin_read()?.open_table(SEEN)?;
        let next = |key: &[u8]| -> Result<u64> {
            let row = seen.get(key)?;
            let head = row.map(|row| Head::from_bytes(key, row.value()));
            Ok(head.map_or(0, |head| head.map_or(u64::MAX, |head| head.next)))
        };
        heads.into_iter().map(next).collect()
    }
}

/// Names one message among those that were never marked as seen, so that it is not rejected twice. `None` if nothing
/// names it.
pub(super) fn fingerprint(scope: &str, identity: Option<&Identity>, message: &Message) -> Option<Vec<u8>> {
    let mut name = [&[u8::try_from(scope.len()).ok()?][..], scope.as_bytes()].concat();
    match identity {
        Some(Identity::Lane { head, arrival, .. }) => {
            name.push(0);
            name.extend_from_slice(head);
            name.extend_from_slice(&arrival.number.to_be_bytes());
        }
        _ => {
            let id =
                message.message_id.as_ref().filter(|id| (1..=SHORT_STRING_BYTES_MAX).contains(&id.len()))?;
            name.push(1);
            name.extend_from_slice(id.as_bytes());
        }
    }
    name.extend_from_slice(&checksum(message).to_be_bytes());
    name.extend_from_slice(&record::body_checksum(&message.payload).to_be_bytes());
    name.extend_from_slice(&(message.payload.len() as u64).to_be_bytes());
    // What is left of two messages may be the same; what is said of them then is not.
    if let Some(note) = message.header(wire::UNREADABLE).and_then(|note| note.as_text()) {
        name.extend_from_slice(&record::body_checksum(note.as_bytes()).to_be_bytes());
    }
    Some(name)
}
