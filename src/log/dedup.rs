//! Deduplication by the lane numbers of a producer: the rule, and the bytes of its rows. Pure.
//!
//! Each lane has one *high-water mark*. Every number from `next` on is new. Every number below
//! `next` has come, except the open *gaps*. So a lane takes one row and one more per open gap,
//! however many deliveries come. A late delivery that fills a gap is still distinguished from a
//! repeat.
//!
//! For numbers that have come, the rows keep the hash of the content. The latest hashes are with
//! the high-water mark. Earlier hashes are in *chunks* of 64 numbers, of which a lane keeps
//! [`LANE_CHUNKS_MAX`].
//!
//! ```text
//! high-water mark   2 u8 │ next u64 │ gaps u64 │ chunks u64 │ before u64 │ newest ms u64, or the age if before is 0 │ checksum u32 × 16, if before > 0 │
//!        (number u64, hash u64) × recent │ crc32 u32
//! gap   end u64 │ crc32 u32                              (its start stands in the key)
//! chunk  (number u64, hash u64) × sums │ crc32 u32        (numbers from 64 × that of its key on)
//! ```
//!
//! Little-endian. The CRC-32 (IEEE) covers the row's key and everything before it, because a wrong
//! row could drop a delivery in silence. The highest bit of a number says that its delivery was
//! refused.
//!
//! **A repeat is not taken on trust.** Any sender that may publish may write any number. A known
//! number is a repeat only if its content is the same. If the content is not known any more, the
//! delivery is a conflict. A delivery that a handler refused does not settle its number: another
//! message of the number is new.
//!
//! **Files before format 5** knew checksums of the newest 16 numbers, and the latest time that the
//! lane had shown. These count for the numbers that had come then, which are those below `before`.

use super::wire_bytes::{Malformed, Reader};
use crate::message::Message;
use crate::tuning::LANE_CHUNKS_MAX;

/// The number of hashes that a high-water row keeps. Once twice as many are there, the older half
/// goes to chunks.
const RECENT: usize = 16;

/// The numbers that a chunk covers.
const CHUNK: u64 = 64;

/// The number of newest checksums in a high-water row of an earlier format.
const RING: u64 = 16;

/// The length of a high-water row of an earlier format.
const OLD_HIGH_WATER: usize = 24 + 4 * RING as usize;

/// The first byte of a high-water row. It makes the row's length odd, which it was in no earlier
/// format.
const VERSION: u8 = 2;

/// The flag in a number's highest bit. No number uses that bit, because headers carry signed
/// integers.
const REFUSED: u64 = 1 << 63;

/// The kept content of a number that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum {
    number: u64,
    hash: u64,
    /// The handler refused the delivery, and no effect of it was committed.
    refused: bool,
}

/// The state of one lane.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct HighWater {
    /// The high-water mark: no number from here on has come.
    pub(crate) next: u64,
    /// The number of open gaps. Without any, no gap is looked for.
    pub(crate) gaps: u64,
    /// The number of chunk rows.
    pub(crate) chunks: u64,
    /// The latest hashes.
    recent: Vec<Sum>,
    before: Before,
}

/// The state of a lane from a file of an earlier format.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Before {
    next: u64,
    /// The latest time that a message of the lane carried, in Unix milliseconds. For a lane that no
    /// earlier format knew: the store age at the lane's last message.
    newest_ms: u64,
    ring: [u32; RING as usize],
}

/// Numbers below `next` that have not come, from `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// Hashes of numbers that lie near each other, in order of numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Chunk(Vec<Sum>);

/// A message with the number that it claims in its lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The number. It is below `1 << 63`, because headers carry signed integers.
    pub(crate) number: u64,
    /// The keyed hash of the content.
    pub(crate) hash: u64,
    /// The message's identity in an earlier format, if lanes may date from one.
    pub(crate) before: Option<AsBefore>,
}

/// The identity of a message in an earlier format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AsBefore {
    /// The checksum of the content.
    pub(crate) checksum: u32,
    /// The earliest time of the append that the message claims, in Unix milliseconds.
    pub(crate) time_ms: Option<u64>,
    /// The bound on times that lanes had shown by the end of an earlier format. It is needed
    /// because a sender may write any time.
    pub(crate) before_ms: u64,
}

/// The decision about an arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The message is new. The update records that its number has come.
    First(LaneUpdate),
    Repeat,
    /// The number has come with another message, or may have. The text says how that is known.
    Conflict(&'static str),
}

/// The change of a lane's rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LaneUpdate {
    pub(crate) high_water: HighWater,
    /// The start of a gap that no longer exists.
    pub(crate) remove: Option<u64>,
    /// Gaps that are new, or have another end.
    pub(crate) put: [Option<Gap>; 2],
    sum: Sum,
}

/// The rows besides the high-water mark, which the rule reads only if needed.
pub(crate) trait Rows {
    type Error;
    /// Returns the gap with the highest start at or before a number.
    fn gap_below(&self, number: u64) -> Result<Option<Gap>, Self::Error>;
    fn chunk(&self, chunk: u64) -> Result<Option<Chunk>, Self::Error>;
}

/// Decides what an arrival is.
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
    // The remainder at the old start replaces the old row.
    let remove = rest.first().is_some_and(Option::is_none).then_some(gap.start);
    Ok(Decision::First(LaneUpdate { high_water: after, remove, put: rest, sum }))
}

impl LaneUpdate {
    /// Marks that the handler refused the delivery, so another message of its number is new.
    pub(crate) fn refused(mut self) -> Self {
        self.sum.refused = true;
        self
    }

    /// Returns the high-water mark with the new hash, and the older hashes that move to chunks, by
    /// chunk.
    pub(crate) fn settle(self) -> (HighWater, Vec<(u64, Vec<Sum>)>) {
        let Self { mut high_water, sum, .. } = self;
        let spilled = high_water.note(sum);
        (high_water, spilled)
    }
}

impl HighWater {
    /// Returns the update after a refused message was applied after all; `None` if this message was
    /// not refused.
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

    /// Returns what the rows keep of a number.
    fn sum<R: Rows>(&self, number: u64, rows: &R) -> Result<Option<Sum>, R::Error> {
        match self.recent.iter().find(|sum| sum.number == number) {
            Some(sum) => Ok(Some(*sum)),
            None if self.chunks > 0 => Ok(rows.chunk(number / CHUNK)?.and_then(|chunk| chunk.get(number))),
            None => Ok(None),
        }
    }

    /// Keeps a hash. Returns the hashes without room, by chunk.
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

    /// Notes the store age at the lane's latest message.
    pub(crate) fn came_at(&mut self, age_ms: u64) {
        if self.before.next == 0 {
            self.before.newest_ms = age_ms;
        }
    }

    /// Whether nothing has come for `idle_ms`. For a lane from before `since_ms`, the time of its
    /// last message is unknown, so `since_ms` counts. A lane from a format earlier than 5 is never
    /// idle, and such lanes do not increase.
    pub(crate) fn is_idle(&self, since_ms: u64, age_ms: u64, idle_ms: u64) -> bool {
        self.before.next == 0 && self.before.newest_ms.max(since_ms).saturating_add(idle_ms) <= age_ms
    }

    /// Counts a new chunk. Returns whether the lane's first chunk must go.
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

    /// Reads a row; `None` if it is damaged.
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
    /// Distinguishes a repeat from another message of the same number, as well as the earlier
    /// format allowed.
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

    /// Reads hashes up to the end.
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

    /// Adds newer hashes.
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

    /// Reads a row; `None` if it is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        Sum::read_all(Reader(unsealed(key, bytes)?)).ok().map(Self)
    }
}

impl Gap {
    pub(crate) fn to_bytes(self, key: &[u8]) -> Vec<u8> {
        sealed(key, self.end.to_le_bytes().to_vec())
    }

    /// Reads a row; `None` if it is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let end = u64::from_le_bytes(unsealed(key, bytes)?.try_into().ok()?);
        let start = super::keys::last_seq(key)?;
        (start < end).then_some(Self { start, end })
    }
}

/// Returns the checksum by which files before format 5 distinguish messages. It covers id, type and
/// payload.
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

/// Appends the checksum over the key and the row.
pub(super) fn sealed(key: &[u8], mut row: Vec<u8>) -> Vec<u8> {
    let crc = seal(key, &row);
    row.extend_from_slice(&crc.to_le_bytes());
    row
}

/// Returns the row without its checksum if the checksum is right.
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
