//! Deduplication by the numbers of a producer's lane: the rule, and the bytes of its rows. Pure.
//!
//! Per lane one *high-water mark*: every number from `next` on is new; those below have come, but for the open *gaps*. So a
//! lane takes one row and one more per open gap, however many deliveries come, and a late one that fills a
//! gap is still distinguished from a repeat. Of what has come, the hash of its content is kept: the latest with the high-water mark, those before
//! in *chunks* of 64 numbers, of which a lane keeps [`LANE_CHUNKS_MAX`].
//!
//! ```text
//! high-water mark   2 u8 │ next u64 │ gaps u64 │ chunks u64 │ before u64 │ newest ms u64, or the age if before is 0 │ checksum u32 × 16, if before > 0 │
//!        (number u64, hash u64) × recent │ crc32 u32
//! gap   end u64 │ crc32 u32                              (its start stands in the key)
//! chunk  (number u64, hash u64) × sums │ crc32 u32        (numbers from 64 × that of its key on)
//! ```
//!
//! Little-endian. The CRC-32 (IEEE) is over the row's key and what is before it: a row that cannot be trusted would let
//! a delivery be dropped in silence. The highest bit of a number says that its delivery was refused.
//!
//! **A repeat is not taken on trust.** Whoever may publish may write any number. A number that has come before is a repeat only
//! where its content is the same; where that is not known any more, it is a conflict. What a handler has refused says
//! nothing of its number: another message of it is new.
//!
//! **Files of before format 5** knew checksums of the newest 16 numbers, and the latest time that the lane had shown. They
//! speak for the numbers that had come then: those below `before`.

use super::wire_bytes::{Malformed, Reader};
use crate::message::Message;
use crate::tuning::LANE_CHUNKS_MAX;

/// Hashes that a high-water row keeps. Twice as many are there before some go to a chunk.
const RECENT: usize = 16;

/// Numbers of a chunk.
const CHUNK: u64 = 64;

/// The newest numbers whose checksum a high-water row of an earlier format knew.
const RING: u64 = 16;

/// The length of such a row.
const OLD_HIGH_WATER: usize = 24 + 4 * RING as usize;

/// The first byte of a high-water row. With it the row has an odd length, which those of an earlier format have not.
const VERSION: u8 = 2;

/// In the place of a number's highest bit, which no number has: headers carry signed integers.
const REFUSED: u64 = 1 << 63;

/// What is kept of a number that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum {
    number: u64,
    hash: u64,
    /// No effect of it was committed: its handler has refused it.
    refused: bool,
}

/// What is known of one lane.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct HighWater {
    /// The high-water mark: no number from here on has come.
    pub(crate) next: u64,
    /// Rows of open gaps: where there is none, none is looked for.
    pub(crate) gaps: u64,
    /// Rows of chunks.
    pub(crate) chunks: u64,
    /// The latest that came.
    recent: Vec<Sum>,
    before: Before,
}

/// What a file of an earlier format knew of a lane.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Before {
    next: u64,
    /// The latest time that a message of the lane carried, in Unix milliseconds. Of a lane that no earlier format knew: the store age when a
    /// message of it came last.
    newest_ms: u64,
    ring: [u32; RING as usize],
}

/// Numbers below `next` that have not come: `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Hashes of numbers that lie near each other, in order of numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chunk(Vec<Sum>);

/// A message that says which number of its lane it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Below `1 << 63`: headers carry signed integers.
    pub(crate) number: u64,
    /// Keyed, of its content.
    pub(crate) hash: u64,
    /// What an earlier format knew it by, where lanes may date from one.
    pub(crate) before: Option<AsBefore>,
}

/// What an earlier format knew a message by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AsBefore {
    /// Of its content.
    pub(crate) checksum: u32,
    /// When it was appended, as it says: no earlier than this, in Unix milliseconds.
    pub(crate) time_ms: Option<u64>,
    /// What lanes had shown by the end of an earlier format can be no later than this: whoever publishes writes any time.
    pub(crate) before_ms: u64,
}

/// What an arrival is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// New. These rows record that it has come.
    First(LaneUpdate),
    Repeat,
    /// Its number has come with another message, or may have been; and how that is known.
    Conflict(&'static str),
}

/// How the rows of a lane change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LaneUpdate {
    pub(crate) high_water: HighWater,
    /// The start of a gap that is no more.
    pub(crate) remove: Option<u64>,
    /// Gaps that are new, or have another end.
    pub(crate) put: [Option<Gap>; 2],
    sum: Sum,
}

/// What the rule asks of the rows besides the high-water mark, where it matters.
pub(crate) trait Rows {
    type Error;
    /// The gap that starts last at or before a number.
    fn gap_below(&self, number: u64) -> Result<Option<Gap>, Self::Error>;
    fn chunk(&self, chunk: u64) -> Result<Option<Chunk>, Self::Error>;
}

/// The rule.
pub(crate) fn decide<R: Rows>(
    high_water: &HighWater,
    arrival: &Arrival,
    rows: &R,
) -> Result<Decision, R::Error> {
    let number = arrival.number;
    let sum = Sum { number, hash: arrival.hash, refused: false };
    if number >= high_water.next {
        let gap = (number > high_water.next).then_some(Gap { start: high_water.next, end: number });
        let mut after = HighWater { next: number.saturating_add(1), ..high_water.clone() };
        after.gaps += u64::from(gap.is_some());
        return Ok(Decision::First(LaneUpdate { high_water: after, remove: None, put: [gap, None], sum }));
    }
    let gap = if high_water.gaps > 0 { rows.gap_below(number)? } else { None };
    let Some(gap) = gap.filter(|gap| (gap.start..gap.end).contains(&number)) else {
        return Ok(match high_water.sum(number, rows)? {
            Some(known) if known.hash == arrival.hash => Decision::Repeat,
            Some(known) if known.refused => Decision::First(LaneUpdate {
                high_water: high_water.clone(),
                remove: None,
                put: [None, None],
                sum,
            }),
            Some(_) => Decision::Conflict("it was seen before with another content"),
            None if number < high_water.before.next => high_water.before.compare(arrival),
            None => Decision::Conflict("it was seen so long ago that its content is not known any more"),
        });
    };
    let left = Gap { end: number, ..gap };
    let right = Gap { start: number + 1, ..gap };
    let rest = [left, right].map(|gap| (gap.start < gap.end).then_some(gap));
    let mut after = high_water.clone();
    after.gaps = (high_water.gaps - 1) + rest.iter().flatten().count() as u64;
    // What is left at the old start takes the place of the old row.
    let remove = rest.first().is_some_and(Option::is_none).then_some(gap.start);
    Ok(Decision::First(LaneUpdate { high_water: after, remove, put: rest, sum }))
}

impl LaneUpdate {
    /// Its handler has refused it: another message of its number is new.
    pub(crate) fn refused(mut self) -> Self {
        self.sum.refused = true;
        self
    }

    /// The high-water mark with the new hash; and what of the older ones is to be written into chunks, by chunk.
    pub(crate) fn settle(self) -> (HighWater, Vec<(u64, Vec<Sum>)>) {
        let Self { mut high_water, sum, .. } = self;
        let spilled = high_water.note(sum);
        (high_water, spilled)
    }
}

impl HighWater {
    /// The update that says that a number has been applied whose message was refused before; `None` if that is not so.
    pub(crate) fn applied<R: Rows>(
        &self,
        arrival: &Arrival,
        rows: &R,
    ) -> Result<Option<LaneUpdate>, R::Error> {
        let known = self.sum(arrival.number, rows)?;
        let known = known.filter(|known| known.refused && known.hash == arrival.hash);
        Ok(known.map(|known| {
            let sum = Sum { refused: false, ..known };
            LaneUpdate { high_water: self.clone(), remove: None, put: [None, None], sum }
        }))
    }

    /// What is kept of a number.
    fn sum<R: Rows>(&self, number: u64, rows: &R) -> Result<Option<Sum>, R::Error> {
        match self.recent.iter().find(|sum| sum.number == number) {
            Some(sum) => Ok(Some(*sum)),
            None if self.chunks > 0 => Ok(rows.chunk(number / CHUNK)?.and_then(|chunk| chunk.get(number))),
            None => Ok(None),
        }
    }

    /// Keeps a hash; what there is no room for any more, by chunk.
    fn note(&mut self, sum: Sum) -> Vec<(u64, Vec<Sum>)> {
        self.recent.retain(|known| known.number != sum.number);
        self.recent.push(sum);
        if self.recent.len() < 2 * RECENT {
            return Vec::new();
        }
        let mut spilled: Vec<_> = self.recent.drain(..RECENT).collect();
        spilled.sort_by_key(|sum| sum.number);
        let chunks = spilled.chunk_by(|a, b| a.number / CHUNK == b.number / CHUNK);
        chunks.filter_map(|sums| Some((sums.first()?.number / CHUNK, sums.to_vec()))).collect()
    }

    /// A message of it has come at this store age.
    pub(crate) fn came_at(&mut self, age_ms: u64) {
        if self.before.next == 0 {
            self.before.newest_ms = age_ms;
        }
    }

    /// Nothing has come for so long. Of lanes before `since_ms` it is not known when something came. Of a lane that dates from an earlier format than
    /// 5 nobody knows, and such lanes are no more than they were.
    pub(crate) fn is_idle(&self, since_ms: u64, age_ms: u64, idle_ms: u64) -> bool {
        self.before.next == 0 && self.before.newest_ms.max(since_ms).saturating_add(idle_ms) <= age_ms
    }

    /// A chunk is new. Whether the first of the lane has to go for it.
    pub(crate) fn count_chunk(&mut self) -> bool {
        self.chunks += 1;
        let over = self.chunks > LANE_CHUNKS_MAX;
        self.chunks -= u64::from(over);
        over
    }

    pub(crate) fn to_bytes(&self, key: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(44 + OLD_HIGH_WATER + 16 * self.recent.len());
        let Before { next: before, newest_ms, ring } = self.before;
        out.push(VERSION);
        for number in [self.next, self.gaps, self.chunks, before, newest_ms] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        if before > 0 {
            ring.iter().for_each(|checksum| out.extend_from_slice(&checksum.to_le_bytes()));
        }
        self.recent.iter().for_each(|sum| sum.put(&mut out));
        sealed(key, out)
    }

    /// `None` for a row that is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let row = unsealed(key, bytes)?;
        let is_old = row.len() == OLD_HIGH_WATER;
        let mut reader = Reader(row);
        let read = || -> Result<Self, Malformed> {
            let mut ring = [0; RING as usize];
            let mut read_ring = |reader: &mut Reader<'_>| {
                ring.iter_mut().try_for_each(|slot| {
                    *slot = reader.u32()?;
                    Ok(())
                })
            };
            if is_old {
                let (next, newest_ms, gaps) = (reader.u64()?, reader.u64()?, reader.u64()?);
                read_ring(&mut reader)?;
                let before = Before { next, newest_ms, ring };
                return Ok(Self { next, gaps, before, ..Self::default() });
            }
            if reader.u8()? != VERSION {
                return Err(Malformed("it is of no known form"));
            }
            let (next, gaps, chunks) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let (before, newest_ms) = (reader.u64()?, reader.u64()?);
            if before > 0 {
                read_ring(&mut reader)?;
            }
            let recent = Sum::read_all(reader)?;
            Ok(Self { next, gaps, chunks, recent, before: Before { next: before, newest_ms, ring } })
        };
        read().ok()
    }
}

impl Before {
    /// Distinguishes a repeat from another message of the same number, as well as was possible then.
    fn compare(&self, arrival: &Arrival) -> Decision {
        let (number, Some(as_before)) = (arrival.number, arrival.before) else {
            return Decision::Conflict("it was seen before, and nothing is known of its content");
        };
        let in_ring = number.saturating_add(RING) >= self.next;
        let known = self.ring.get((number % RING) as usize).filter(|_| in_ring);
        if known.is_some_and(|known| *known != as_before.checksum) {
            return Decision::Conflict("it was seen before with another content");
        }
        if as_before.time_ms.is_some_and(|time| time > self.newest_ms.min(as_before.before_ms)) {
            return Decision::Conflict(
                "it was seen before, and this message is newer than all that its lane had shown",
            );
        }
        Decision::Repeat
    }
}

impl Sum {
    fn put(self, out: &mut Vec<u8>) {
        let number = if self.refused { self.number | REFUSED } else { self.number };
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&self.hash.to_le_bytes());
    }

    /// Up to the end.
    fn read_all(mut reader: Reader<'_>) -> Result<Vec<Self>, Malformed> {
        let mut sums = Vec::with_capacity(reader.0.len() / 16);
        while !reader.0.is_empty() {
            let (number, hash) = (reader.u64()?, reader.u64()?);
            sums.push(Self { number: number & !REFUSED, hash, refused: number & REFUSED > 0 });
        }
        Ok(sums)
    }
}

impl Chunk {
    fn get(&self, number: u64) -> Option<Sum> {
        self.0.iter().find(|sum| sum.number == number).copied()
    }

    /// Takes newer hashes in.
    pub(crate) fn put(&mut self, sums: Vec<Sum>) {
        self.0.retain(|known| sums.iter().all(|sum| sum.number != known.number));
        self.0.extend(sums);
        self.0.sort_by_key(|sum| sum.number);
    }

    pub(crate) fn to_bytes(&self, key: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 * self.0.len() + 4);
        self.0.iter().for_each(|sum| sum.put(&mut out));
        sealed(key, out)
    }

    /// `None` for a row that is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        Sum::read_all(Reader(unsealed(key, bytes)?)).ok().map(Self)
    }
}

impl Gap {
    pub(crate) fn to_bytes(self, key: &[u8]) -> Vec<u8> {
        sealed(key, self.end.to_le_bytes().to_vec())
    }

    /// `None` for a row that is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let end = u64::from_le_bytes(unsealed(key, bytes)?.try_into().ok()?);
        let start = super::keys::last_seq(key)?;
        (start < end).then_some(Self { start, end })
    }
}

/// What files of before format 5 distinguish a message from another by: id, type and payload.
pub(crate) fn checksum(message: &Message) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for text in [&message.message_id, &message.event_type] {
        let text = text.as_deref().unwrap_or_default();
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.update(&message.payload);
    hasher.finalize()
}

/// A row with the checksum over its key and itself at its end.
pub(super) fn sealed(key: &[u8], mut row: Vec<u8>) -> Vec<u8> {
    let crc = seal(key, &row);
    row.extend_from_slice(&crc.to_le_bytes());
    row
}

/// The row without its checksum, if that is right.
pub(super) fn unsealed<'a>(key: &[u8], bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (row, crc) = bytes.split_last_chunk::<4>()?;
    (u32::from_le_bytes(*crc) == seal(key, row)).then_some(row)
}

fn seal(key: &[u8], row: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes());
    hasher.update(key);
    hasher.update(row);
    hasher.finalize()
}

#[cfg(test)]
mod tests;
