//! Which numbers of a producer's lane have been seen: the rule, and the bytes of its rows. Pure.
//!
//! Per lane one *head*: every number from `next` on is new; those below have been seen, but for the open *holes*. So a
//! lane takes one row and one more per open hole, for ever, however many deliveries come, and a late one that fills a
//! hole is still told from a repeat.
//!
//! ```text
//! head   next u64 │ newest ms u64 │ holes u64 │ checksum u32 × 16 │ crc32 u32
//! hole   end u64 │ crc32 u32                              (its start stands in the key)
//! ```
//!
//! Little-endian. The CRC-32 (IEEE) is over the row's key and what is before it: a row that cannot be trusted would let
//! a delivery be dropped in silence. The ring of checksums is of the newest 16 numbers, by number modulo 16. A slot is asked
//! only for a number that has been seen while it was among those, and that wrote it then: what stands in the slots of the
//! others means nothing.
//!
//! **A repeat is not taken on trust.** A number that has been seen comes again with other content where a producer was
//! restored from a backup and gives its numbers a second time. Two things tell: the checksum, for the newest 16
//! numbers; and the message's time, since a true repeat is never newer than everything seen.

use super::wire_bytes::{Malformed, Reader};
use crate::message::Message;

/// How many of the newest numbers of a lane are remembered with their checksum.
pub(crate) const RING: u64 = 16;

/// What is known of one lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Head {
    /// No number from here on has been seen.
    pub(crate) next: u64,
    /// The latest time that a message of the lane carried, in Unix milliseconds.
    pub(crate) newest_ms: u64,
    /// Rows of open holes: where there is none, none is looked for.
    pub(crate) holes: u64,
    ring: [u32; RING as usize],
}

/// Numbers below `next` that have not been seen: `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hole {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

/// A message that says which number of its lane it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Below `u64::MAX`: headers carry signed integers.
    pub(crate) number: u64,
    /// See [`checksum`].
    pub(crate) checksum: u32,
    /// When it was appended: no earlier and no later than these, in Unix milliseconds.
    pub(crate) time_ms: Option<(u64, u64)>,
}

/// What an arrival is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// New. These rows say that it is seen.
    First(Mark),
    Repeat,
    /// Its number has been seen, but not this message; and how that is known.
    Conflict(&'static str),
}

/// How the rows of a lane change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) head: Head,
    /// The start of a hole that is no more.
    pub(crate) remove: Option<u64>,
    /// Holes that are new, or have another end.
    pub(crate) put: [Option<Hole>; 2],
}

/// The rule. `hole_below` finds the hole that starts last at or before a number; it is asked only where it matters.
pub(crate) fn decide<E>(
    head: &Head,
    arrival: &Arrival,
    hole_below: impl FnOnce(u64) -> Result<Option<Hole>, E>,
) -> Result<Decision, E> {
    let number = arrival.number;
    if number >= head.next {
        let gap = (number > head.next).then_some(Hole { start: head.next, end: number });
        let mut after = Head { next: number.saturating_add(1), ..*head };
        after.note(arrival);
        after.holes += u64::from(gap.is_some());
        return Ok(Decision::First(Mark { head: after, remove: None, put: [gap, None] }));
    }
    let hole = if head.holes > 0 { hole_below(number)? } else { None };
    let Some(hole) = hole.filter(|hole| (hole.start..hole.end).contains(&number)) else {
        return Ok(head.compare(arrival));
    };
    let left = Hole { end: number, ..hole };
    let right = Hole { start: number + 1, ..hole };
    let rest = [left, right].map(|hole| (hole.start < hole.end).then_some(hole));
    let mut after = *head;
    after.note(arrival);
    after.holes = (head.holes - 1) + rest.iter().flatten().count() as u64;
    // What is left at the old start takes the place of the old row.
    let remove = rest.first().is_some_and(Option::is_none).then_some(hole.start);
    Ok(Decision::First(Mark { head: after, remove, put: rest }))
}

impl Head {
    fn note(&mut self, arrival: &Arrival) {
        if self.in_ring(arrival.number)
            && let Some(slot) = self.ring.get_mut(slot_of(arrival.number))
        {
            *slot = arrival.checksum;
        }
        let latest = arrival.time_ms.map_or(0, |(_, latest)| latest);
        self.newest_ms = self.newest_ms.max(latest);
    }

    /// Tells a repeat from another message of the same number.
    fn compare(&self, arrival: &Arrival) -> Decision {
        let known = self.ring.get(slot_of(arrival.number)).filter(|_| self.in_ring(arrival.number));
        if known.is_some_and(|known| *known != arrival.checksum) {
            return Decision::Conflict("its content differs");
        }
        if arrival.time_ms.is_some_and(|(earliest, _)| earliest > self.newest_ms) {
            return Decision::Conflict("it is newer than all that this lane has shown");
        }
        Decision::Repeat
    }

    fn in_ring(&self, number: u64) -> bool {
        number.saturating_add(RING) >= self.next
    }

    pub(crate) fn to_bytes(self, key: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(92);
        for number in [self.next, self.newest_ms, self.holes] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for checksum in self.ring {
            out.extend_from_slice(&checksum.to_le_bytes());
        }
        sealed(key, out)
    }

    /// `None` for a row that is damaged.
    pub(crate) fn from_bytes(key: &[u8], bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(unsealed(key, bytes)?);
        let mut read = || -> Result<Self, Malformed> {
            let (next, newest_ms, holes) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let mut ring = [0; RING as usize];
            for slot in &mut ring {
                *slot = reader.u32()?;
            }
            reader.end()?;
            Ok(Self { next, newest_ms, holes, ring })
        };
        read().ok()
    }
}

fn slot_of(number: u64) -> usize {
    (number % RING) as usize
}

impl Hole {
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

/// What tells a message from another: id, type and payload. Two events with one payload have two ids.
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
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// The rows of one lane as they would stand in the table.
    #[derive(Default)]
    struct Rows {
        head: Head,
        holes: BTreeMap<u64, u64>,
    }

    impl Rows {
        fn arrive(&mut self, arrival: &Arrival) -> Decision {
            let below = |number| {
                let below = self.holes.range(..=number).next_back();
                Ok::<_, Infallible>(below.map(|(start, end)| Hole { start: *start, end: *end }))
            };
            let Ok(decision) = decide(&self.head, arrival, below);
            if let Decision::First(mark) = &decision {
                // Through its bytes, as the file would have it.
                self.head = Head::from_bytes(b"k", &mark.head.to_bytes(b"k")).unwrap();
                assert!(mark.remove.is_none_or(|start| self.holes.remove(&start).is_some()));
                for hole in mark.put.into_iter().flatten() {
                    self.holes.insert(hole.start, hole.end);
                }
            }
            decision
        }
    }

    /// Remembers every message that it has seen.
    #[derive(Default)]
    struct Naive(HashMap<u64, (u32, u64)>);

    impl Naive {
        fn arrive(&mut self, arrival: &Arrival) -> &'static str {
            let time = arrival.time_ms.map_or(0, |(time, _)| time);
            let next = self.0.keys().max().map_or(0, |number| number + 1);
            let newest = self.0.values().map(|(_, time)| *time).max().unwrap_or(0);
            match self.0.get(&arrival.number) {
                None => {
                    self.0.insert(arrival.number, (arrival.checksum, time));
                    "first"
                }
                Some((checksum, _)) if arrival.number + 16 >= next && *checksum != arrival.checksum => {
                    "conflict"
                }
                Some(_) if arrival.time_ms.is_some() && time > newest => "conflict",
                Some(_) => "repeat",
            }
        }

        fn holes(&self) -> BTreeMap<u64, u64> {
            let next = self.0.keys().max().map_or(0, |number| number + 1);
            let mut holes = BTreeMap::new();
            let mut at = 0;
            while at < next {
                let start = at;
                while at < next && !self.0.contains_key(&at) {
                    at += 1;
                }
                if start < at {
                    holes.insert(start, at);
                }
                at += 1;
            }
            holes
        }
    }

    fn word(decision: &Decision) -> &'static str {
        match decision {
            Decision::First(_) => "first",
            Decision::Repeat => "repeat",
            Decision::Conflict(_) => "conflict",
        }
    }

    fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
        // Near each other, so that holes are split and filled; now and then far off.
        let number = prop_oneof![6 => 0..40_u64, 3 => 0..400_u64, 1 => Just(1 << 40)];
        let time = prop::option::of(0..50_u64).prop_map(|time| time.map(|time| (time, time)));
        let one = (number, 0..3_u32, time).prop_map(|(number, checksum, time_ms)| Arrival {
            number,
            checksum,
            time_ms,
        });
        prop::collection::vec(one, 1..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Goal: the rule says what somebody says who remembers everything, and keeps one row per open hole. Method: the same
        /// arrivals to both (over 100,000 a run); after each the same word, and at the end the same holes.
        #[test]
        fn it_agrees_with_a_perfect_memory(arrivals in arrivals()) {
            let (mut rows, mut naive) = (Rows::default(), Naive::default());
            for arrival in &arrivals {
                prop_assert_eq!(word(&rows.arrive(arrival)), naive.arrive(arrival), "{:?}", arrival);
                prop_assert_eq!(rows.head.holes, rows.holes.len() as u64);
            }
            if naive.0.keys().all(|number| *number < 1 << 40) {
                prop_assert_eq!(rows.holes, naive.holes());
            }
        }
    }

    fn at(number: u64, checksum: u32, time: u64) -> Arrival {
        Arrival { number, checksum, time_ms: Some((time, time)) }
    }

    #[test]
    fn in_order_only_the_head_changes() {
        let mut rows = Rows::default();
        for number in 0..100 {
            let Decision::First(mark) = rows.arrive(&at(number, 1, number)) else { panic!("{number}") };
            assert_eq!((mark.remove, mark.put), (None, [None, None]));
        }
        assert_eq!(rows.head.next, 100);
    }

    /// A checksum of zero is one, and a number that was skipped has none.
    #[test]
    fn an_unknown_checksum_is_not_zero() {
        let mut rows = Rows::default();
        rows.arrive(&at(0, 0, 5));
        assert_eq!(word(&rows.arrive(&at(0, 1, 5))), "conflict");
        rows.arrive(&at(9, 7, 5)); // 1 to 8 are a hole
        assert_eq!(word(&rows.arrive(&at(3, 0, 5))), "first");
        assert_eq!(word(&rows.arrive(&at(3, 0, 5))), "repeat");
    }

    /// The time in whole seconds stands for any moment of its second: a repeat that tells it more exactly is no conflict.
    #[test]
    fn a_coarse_time_is_a_range() {
        let mut rows = Rows::default();
        rows.arrive(&Arrival { number: 0, checksum: 1, time_ms: Some((5000, 5999)) });
        assert_eq!(word(&rows.arrive(&at(0, 1, 5123))), "repeat");
        assert_eq!(word(&rows.arrive(&at(0, 1, 6000))), "conflict");
    }

    #[test]
    fn the_highest_number_does_not_overflow() {
        let mut rows = Rows::default();
        assert_eq!(word(&rows.arrive(&at(i64::MAX as u64, 1, 5))), "first");
        assert_eq!(word(&rows.arrive(&at(i64::MAX as u64, 1, 5))), "repeat");
        assert_eq!(word(&rows.arrive(&at(0, 1, 5))), "first");
        assert_eq!(rows.holes, BTreeMap::from([(1, i64::MAX as u64)]));
    }

    /// Goal: no changed byte and no row of another place is believed.
    #[test]
    fn a_damaged_row_is_none() {
        let mut rows = Rows::default();
        rows.arrive(&at(3, 9, 5));
        let key = 7_u64.to_be_bytes();
        let hole = Hole { start: 7, end: 9 };
        assert_eq!(Hole::from_bytes(&key, &hole.to_bytes(&key)), Some(hole));
        for (good, is_some) in [
            (
                rows.head.to_bytes(&key),
                (|bytes| Head::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()) as fn(&[u8]) -> bool,
            ),
            (hole.to_bytes(&key), |bytes| Hole::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()),
        ] {
            assert!(is_some(&good));
            for byte in 0..good.len() {
                let mut bad = good.clone();
                bad[byte] ^= 0x10;
                assert!(!is_some(&bad), "byte {byte}");
            }
            assert!(!is_some(&good[..good.len() - 1]));
        }
        assert_eq!(Head::from_bytes(&8_u64.to_be_bytes(), &rows.head.to_bytes(&key)), None);
    }

    /// Two payments of the same amount are two messages.
    #[test]
    fn the_checksum_is_of_the_message_not_of_the_payload_alone() {
        let of = |id: &str, event_type: &str, payload: &[u8]| {
            checksum(&Message {
                message_id: Some(id.into()),
                event_type: Some(event_type.into()),
                payload: payload.to_vec(),
                ..Message::default()
            })
        };
        let all = [
            of("a", "t", b"100"),
            of("b", "t", b"100"),
            of("a", "u", b"100"),
            of("a", "t", b"200"),
            of("at", "", b"100"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(!all[..at].contains(one), "{at}");
        }
    }
}
