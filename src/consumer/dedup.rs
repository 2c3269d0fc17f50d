//! Deduplication of deliveries: by the producer's lane if a message names one, else by its id.
//!
//! A lane takes one row, and one for each open gap (the rule and the rows: `log/dedup.rs`). An id
//! takes a row of the inbox, and is remembered for the inbox age.
//!
//! `lanes.rs` and `ids.rs` decide how many lanes, gaps and ids a store keeps.
//!
//! **A delivery that its handler refused** has come. It does not occupy its number or id: another
//! message with either is new.
//!
//! **Invariant.** Looking writes nothing: a closure that looks and then fails leaves the
//! transaction clean. Marking a lane writes its table, so it comes last.

use redb::ReadableTable;

use super::lanes::{LaneRoom, forget, is_forgotten, room_for_lane};
use crate::broker::Delivery;
use crate::error::{Error, Result};
use crate::event::{LaneOf, uuid_text};
use crate::limits::{INBOX_ID_BYTES_MAX, LANE_GAPS_MAX, LANE_GAPS_MIN, SHORT_STRING_BYTES_MAX};
use crate::log::dedup::{
    Arrival, AsBefore, Chunk, Decision, Gap, HighWater, LaneUpdate, Rows, checksum, decide,
};
use crate::log::keys;
use crate::message::Message;
use crate::storage::errors::damaged_row;
use crate::storage::tables::ids::{check_id, content_of};
use crate::storage::tables::lanes_kept::LaneCounts;
use crate::storage::tables::schema::{DEDUP, InboxRow, KEYED, LANES_KEPT};
use crate::store::Store;
use crate::store::shared::tail::Identity as StoreIdentity;
use crate::store::transaction::Transaction;
use crate::store::transaction::gathered::Amount;
use crate::wire;

/// What distinguishes a message from others within a scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Identity {
    /// The message's number in a lane of the store that produced it.
    Lane { lane: LaneOf, key: Vec<u8>, arrival: Arrival },
    /// The id that a foreign producer gave it.
    Id { id: String, key: Vec<u8>, content: Content },
    /// Nothing: the message is new at every delivery.
    Nameless,
}

/// The content of a message that has an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content {
    /// The keyed hash of the message.
    hash: u64,
    /// The keyed hash of exchange and routing key; 0 if they are not known.
    route: u32,
    /// The content as files before format 5 recorded it: CRC-32 and length of the payload.
    before: (u32, u64),
}

/// Marks that no effect of the delivery was committed, because its handler refused it.
const REFUSED: u64 = 1 << 62;

impl Content {
    fn row(&self, refused: bool) -> (u32, u64) {
        let refused = if refused { REFUSED } else { 0 };
        (self.route, (self.hash & (REFUSED - 1)) | KEYED | refused)
    }

    /// Whether a row is of this content.
    fn is_of(&self, row: &InboxRow) -> bool {
        if row.len & KEYED == 0 {
            return (row.crc, row.len) == self.before;
        }
        let same_route = row.crc == 0 || self.route == 0 || row.crc == self.route;
        same_route && row.len & (REFUSED - 1) == self.hash & (REFUSED - 1)
    }
}

fn is_refused(row: &InboxRow) -> bool {
    row.len & (KEYED | REFUSED) == KEYED | REFUSED
}

impl Identity {
    pub(crate) fn of_delivery(store: &StoreIdentity, scope: &str, delivery: &Delivery) -> Result<Self> {
        Self::of(store, scope, &delivery.message, Some((&delivery.exchange, &delivery.routing_key)))
    }

    /// `route` is the exchange and the routing key that the message was published with.
    pub(crate) fn of(
        store: &StoreIdentity,
        scope: &str,
        message: &Message,
        route: Option<(&str, &str)>,
    ) -> Result<Self> {
        check_id("the scope", scope.as_bytes(), SHORT_STRING_BYTES_MAX)?;
        if let Some(reason) = message.header(wire::UNREADABLE) {
            let reason = reason.as_text().unwrap_or("it does not say why").to_owned();
            return Err(Error::Unreadable { reason });
        }
        if let Some((lane, number)) = wire::lane_of(message)? {
            let before = store.dedup_before_ms.map(|before_ms| AsBefore {
                checksum: checksum(message),
                time_ms: wire::time_ms(message).map(|(earliest, _)| earliest),
                before_ms,
            });
            let arrival = Arrival { number, hash: store.content_key.hash(message), before };
            return Ok(Self::Lane { lane, key: keys::dedup_high_water(scope, lane), arrival });
        }
        let Some(id) = message.message_id.as_ref().filter(|id| !id.is_empty()) else {
            return Ok(Self::Nameless);
        };
        check_id("the id", id.as_bytes(), INBOX_ID_BYTES_MAX)?;
        let key = keys::inbox(scope, id.as_bytes());
        let content = Content {
            hash: store.content_key.hash(message),
            route: route.map_or(0, |(exchange, routing_key)| store.content_key.route(exchange, routing_key)),
            before: content_of(&message.payload),
        };
        Ok(Self::Id { id: id.as_str().to_owned(), key, content })
    }

    /// The message's lane, and its number in the lane.
    pub(crate) fn place(&self) -> Option<(LaneOf, u64)> {
        match self {
            Self::Lane { lane, arrival, .. } => Some((*lane, arrival.number)),
            _ => None,
        }
    }
}

impl Transaction {
    /// Returns whether this message is seen for the first time within `scope`, and records it for
    /// deduplication.
    ///
    /// The record is durable with this transaction, so the transaction's other effects happen once
    /// for this message. A [consumer](crate::Store::consumer) does the same; this call is for
    /// applications with a consuming loop of their own.
    ///
    /// A message from a `onewrite` store is known by its lane and its number there, in any order of
    /// arrival. That holds as long as its [lane is kept](crate::StoreBuilder::lanes_max), which is
    /// for ever by default. A message of another producer is known by its `message_id`, at least
    /// for the store's inbox age. A message without an id is new at every delivery. A message is a
    /// repeat if its content is the same too. The broker's `redelivered` flag plays no part.
    ///
    /// Call it last: a mark can be rolled back only with the whole group of writes, which then runs
    /// again.
    ///
    /// # Errors
    /// - [`Error::LaneConflict`] or [`Error::IdConflict`] if its number or id was seen with another
    ///   message, or may have been. The message may be too old to be distinguished from a repeat,
    ///   or its lane was forgotten.
    /// - [`Error::InboxFull`] for a new id, and [`Error::LanesFull`] for a new lane, if the maximum
    ///   is remembered already.
    /// - [`Error::Unreadable`] for a message that came with its reason for being unreadable.
    /// - [`Error::LaneHeader`] for a message with only some of a lane's headers.
    /// - [`Error::BadId`] for a scope of 0 or over 255 bytes, or an id over 512.
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
        self.mark_delivery(scope, &Identity::of(&self.core.identity, scope, message, None)?)
    }

    /// Checks as [`first_delivery`](Self::first_delivery) does, without marking the message.
    pub(crate) fn is_first_delivery(&self, scope: &str, identity: &Identity) -> Result<bool> {
        match identity {
            Identity::Nameless => Ok(true),
            Identity::Id { id, key, content } => match self.remembered(scope, key)? {
                None => self.admit_id(scope).map(|()| true),
                Some(row) if content.is_of(&row) => Ok(false),
                Some(row) if is_refused(&row) => Ok(true),
                Some(_) => Err(Error::IdConflict { scope: scope.to_owned(), id: id.clone() }),
            },
            Identity::Lane { lane, key, arrival } => Ok(self.decide(scope, *lane, key, arrival)?.is_some()),
        }
    }

    pub(crate) fn mark_delivery(&self, scope: &str, identity: &Identity) -> Result<bool> {
        self.mark_as(scope, identity, false)
    }

    /// Marks a delivery that its handler refused. It has come, and another message with its number
    /// or id is still new. Returns `false` if it was seen before.
    pub(crate) fn mark_refused(&self, scope: &str, identity: &Identity) -> Result<bool> {
        self.mark_as(scope, identity, true)
    }

    /// Marks that a delivery which its handler refused before has been applied after all.
    pub(crate) fn mark_applied(&self, scope: &str, identity: &Identity) -> Result<()> {
        match identity {
            Identity::Nameless => {}
            Identity::Id { key, content, .. } => {
                let row = self.remembered(scope, key)?;
                if let Some(row) = row.filter(|row| is_refused(row) && content.is_of(row)) {
                    self.mark_id_again(key.clone(), row, content.row(false))?;
                }
            }
            Identity::Lane { key, arrival, .. } => {
                let applied = self.engine(|| {
                    let dedup = self.redb().open_table(DEDUP)?;
                    let Some(known) = read_high_water(&dedup, key)? else { return Ok(None) };
                    let update = known.applied(arrival, &Lane { dedup: &dedup, key })?;
                    Ok(update.map(|update| New { update, known: Known::Lane { gaps: known.gaps } }))
                })?;
                if let Some(new) = applied {
                    self.touch();
                    self.engine(|| self.write_lane_update(scope, key, new))?;
                }
            }
        }
        Ok(())
    }

    fn mark_as(&self, scope: &str, identity: &Identity, refused: bool) -> Result<bool> {
        match identity {
            Identity::Nameless => Ok(true),
            Identity::Id { key, content, .. } => {
                if !self.is_first_delivery(scope, identity)? {
                    return Ok(false);
                }
                match self.remembered(scope, key)? {
                    Some(row) => self.mark_id_again(key.clone(), row, content.row(refused))?,
                    None => {
                        let number = self.next_id(scope, key)?;
                        self.mark_id(key.clone(), content.row(refused), number)?;
                    }
                }
                Ok(true)
            }
            Identity::Lane { lane, key, arrival } => {
                let Some(mut new) = self.decide(scope, *lane, key, arrival)? else { return Ok(false) };
                if refused {
                    new.update = new.update.refused();
                }
                self.admit(Amount::entry(key.len()))?;
                self.touch();
                self.engine(|| self.write_lane_update(scope, key, new))?;
                Ok(true)
            }
        }
    }

    /// Decides what to record for deduplication. Returns `None` for a repeat.
    fn decide(&self, scope: &str, lane: LaneOf, key: &[u8], arrival: &Arrival) -> Result<Option<New>> {
        self.owned()?;
        let (decision, known) = self.engine(|| {
            let dedup = self.redb().open_table(DEDUP)?;
            let (before, known) = match read_high_water(&dedup, key)? {
                Some(before) => {
                    let gaps = before.gaps;
                    (before, Known::Lane { gaps })
                }
                None => {
                    let kept = self.redb().open_table(LANES_KEPT)?;
                    if is_forgotten(&kept, scope, lane)? {
                        let how =
                            "its lane was idle for so long that it was forgotten, so it may be a repeat";
                        return Ok((Decision::Conflict(how), Known::Nothing(LaneRoom::Free)));
                    }
                    (HighWater::default(), Known::Nothing(self.room_for_lane(&dedup, &kept, scope)?))
                }
            };
            Ok((decide(&before, arrival, &Lane { dedup: &dedup, key })?, known))
        })?;
        match decision {
            Decision::First(update) => Ok(Some(New { update, known })),
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

/// Whether the error concerns only the delivery, which cannot be taken as new, and not the store.
pub(crate) fn is_of_the_delivery(error: &Error) -> bool {
    matches!(
        error,
        Error::LaneConflict { .. }
            | Error::IdConflict { .. }
            | Error::InboxFull { .. }
            | Error::LanesFull { .. }
    )
}

type Row = &'static [u8];

fn read_high_water(dedup: &impl ReadableTable<Row, Row>, key: &[u8]) -> Result<Option<HighWater>> {
    let Some(row) = dedup.get(key)? else { return Ok(None) };
    HighWater::from_bytes(key, row.value()).map(Some).ok_or_else(|| damaged_row("seen"))
}

/// A number that is seen for the first time.
struct New {
    update: LaneUpdate,
    known: Known,
}

/// What was known of the number's lane.
enum Known {
    Lane {
        gaps: u64,
    },
    /// The lane begins with this number, in this room.
    Nothing(LaneRoom),
}

/// The rows of one lane.
struct Lane<'a, T> {
    dedup: &'a T,
    key: &'a [u8],
}

impl<T: ReadableTable<Row, Row>> Lane<'_, T> {
    /// The start of the first gap.
    fn first_gap(&self) -> Result<Option<u64>> {
        let (from, to) = (keys::dedup_gap(self.key, 0), keys::dedup_gap(self.key, u64::MAX));
        let first = self.dedup.range(from.as_slice()..=to.as_slice())?.next().transpose()?;
        Ok(first.and_then(|(key, _)| keys::last_seq(key.value())))
    }
}

impl<T: ReadableTable<Row, Row>> Rows for Lane<'_, T> {
    type Error = Error;

    fn gap_below(&self, number: u64) -> Result<Option<Gap>> {
        let (from, to) = (keys::dedup_gap(self.key, 0), keys::dedup_gap(self.key, number));
        let Some(row) = self.dedup.range(from.as_slice()..=to.as_slice())?.next_back() else {
            return Ok(None);
        };
        let (key, row) = row?;
        if key.value().len() != from.len() {
            return Err(damaged_row("seen"));
        }
        Gap::from_bytes(key.value(), row.value()).map(Some).ok_or_else(|| damaged_row("seen"))
    }

    fn chunk(&self, chunk: u64) -> Result<Option<Chunk>> {
        let key = keys::dedup_chunk(self.key, chunk);
        let Some(row) = self.dedup.get(key.as_slice())? else { return Ok(None) };
        Chunk::from_bytes(&key, row.value()).map(Some).ok_or_else(|| damaged_row("seen"))
    }
}

impl Transaction {
    fn room_for_lane(
        &self,
        dedup: &impl ReadableTable<Row, Row>,
        kept: &impl ReadableTable<Row, Row>,
        scope: &str,
    ) -> Result<LaneRoom> {
        let core = &self.core;
        room_for_lane(dedup, kept, scope, &core.settings, &core.idle_search, core.age.newest_ms())
    }

    /// Records a number for deduplication. Counts a new lane or a changed number of gaps, and drops
    /// gaps beyond the maximum.
    fn write_lane_update(&self, scope: &str, key: &[u8], new: New) -> Result<()> {
        let mut dedup = self.redb().open_table(DEDUP)?;
        let New { mut update, known } = new;
        update.high_water.came_at(self.core.age.newest_ms());
        let (gaps, more_lanes) = match known {
            Known::Lane { gaps } if gaps == update.high_water.gaps => return write(&mut dedup, key, update),
            Known::Lane { gaps } => (gaps, 0),
            Known::Nothing(_) => (0, 1),
        };
        let mut kept = self.redb().open_table(LANES_KEPT)?;
        if let Known::Nothing(LaneRoom::Of(idle)) = known {
            forget(&mut dedup, &mut kept, scope, &idle)?;
        }
        let counts = LaneCounts::of(&kept, scope)?;
        let others = counts.gaps.saturating_sub(gaps);
        // A producer with many gaps leaves each other lane at least a few of its own.
        let of_scope = self.core.settings.gaps_max;
        let gaps_max = of_scope.saturating_sub(others).max(LANE_GAPS_MIN.min(of_scope)).min(LANE_GAPS_MAX);
        let lanes = counts.lanes + more_lanes;
        // The oldest gaps go.
        while update.high_water.gaps > gaps_max {
            let lane = Lane { dedup: &dedup, key };
            let oldest = lane.first_gap()?.filter(|start| update.remove != Some(*start));
            match oldest {
                Some(start) if update.put.iter().flatten().all(|gap| gap.start > start) => {
                    dedup.remove(keys::dedup_gap(key, start).as_slice())?;
                }
                _ => {
                    let put = update.put.iter_mut().find(|gap| gap.is_some()).and_then(Option::take);
                    let Some(gap) = put else { break };
                    // The gap may stand there with another end.
                    dedup.remove(keys::dedup_gap(key, gap.start).as_slice())?;
                }
            }
            update.high_water.gaps -= 1;
        }
        LaneCounts { lanes, gaps: others + update.high_water.gaps, ..counts }.put(&mut kept, scope)?;
        write(&mut dedup, key, update)
    }
}

fn write(dedup: &mut redb::Table<'_, Row, Row>, key: &[u8], update: LaneUpdate) -> Result<()> {
    if let Some(start) = update.remove {
        dedup.remove(keys::dedup_gap(key, start).as_slice())?;
    }
    for gap in update.put.iter().flatten() {
        let key = keys::dedup_gap(key, gap.start);
        dedup.insert(key.as_slice(), gap.to_bytes(&key).as_slice())?;
    }
    let (mut high_water, spilled) = update.settle();
    for (number, sums) in spilled {
        let known = Lane { dedup: &*dedup, key }.chunk(number)?;
        if known.is_none() && high_water.count_chunk() {
            let (from, to) = (keys::dedup_chunk(key, 0), keys::dedup_chunk(key, u64::MAX));
            let first = dedup.range(from.as_slice()..=to.as_slice())?.next().transpose()?;
            if let Some(first) = first.map(|(key, _)| key.value().to_vec()) {
                dedup.remove(first.as_slice())?;
            }
        }
        let mut chunk = known.unwrap_or_default();
        chunk.put(sums);
        let chunk_key = keys::dedup_chunk(key, number);
        dedup.insert(chunk_key.as_slice(), chunk.to_bytes(&chunk_key).as_slice())?;
    }
    dedup.insert(key, high_water.to_bytes(key).as_slice())?;
    Ok(())
}

impl Store {
    /// Returns the first new number of each of these lanes, as of the last commit. The keys are
    /// those of their high-water marks. A lane whose row is damaged has none: taking a delivery of
    /// that lane reports the damage.
    pub(crate) fn lanes_next<'a>(&self, keys: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<u64>> {
        self.core().reading(|tx| {
            let dedup = tx.open_table(DEDUP)?;
            let next = |key: &[u8]| -> Result<u64> {
                let row = dedup.get(key)?;
                let high_water = row.map(|row| HighWater::from_bytes(key, row.value()));
                Ok(high_water
                    .map_or(0, |high_water| high_water.map_or(u64::MAX, |high_water| high_water.next)))
            };
            keys.into_iter().map(next).collect()
        })
    }
}

/// Names one rejected message, so that it is not rejected twice. Returns `None` if nothing names
/// it.
pub(crate) fn fingerprint(
    store: &StoreIdentity,
    scope: &str,
    identity: Option<&Identity>,
    delivery: &Delivery,
) -> Option<Vec<u8>> {
    let message = &delivery.message;
    let mut name = [&[u8::try_from(scope.len()).ok()?][..], scope.as_bytes()].concat();
    match identity {
        Some(Identity::Lane { key, arrival, .. }) => {
            name.push(2);
            name.extend_from_slice(key);
            name.extend_from_slice(&arrival.number.to_be_bytes());
        }
        _ => {
            let id =
                message.message_id.as_ref().filter(|id| (1..=SHORT_STRING_BYTES_MAX).contains(&id.len()))?;
            name.push(3);
            name.extend_from_slice(id.as_bytes());
            let route = store.content_key.route(&delivery.exchange, &delivery.routing_key);
            name.extend_from_slice(&route.to_be_bytes());
            // Such a message may have claimed more than could be believed.
            name.extend_from_slice(&store.content_key.claims(message).to_be_bytes());
        }
    }
    name.extend_from_slice(&content_of_delivery(store, delivery).0.to_be_bytes());
    Some(name)
}

/// The keyed hash of the message, and of the place it was published to.
pub(crate) fn content_of_delivery(store: &StoreIdentity, delivery: &Delivery) -> (u64, u32) {
    let key = &store.content_key;
    (key.hash(&delivery.message), key.route(&delivery.exchange, &delivery.routing_key))
}
