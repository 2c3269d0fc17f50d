use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;

use proptest::prelude::*;

use super::*;

/// The rows of one lane, as in the table.
#[derive(Default)]
struct Table {
    high_water: HighWater,
    gaps: BTreeMap<u64, u64>,
    chunks: RefCell<BTreeMap<u64, Vec<u8>>>,
}

impl Rows for Table {
    type Error = Infallible;

    fn gap_below(&self, number: u64) -> Result<Option<Gap>, Infallible> {
        let below = self.gaps.range(..=number).next_back();
        Ok(below.map(|(start, end)| Gap { start: *start, end: *end }))
    }

    fn chunk(&self, chunk: u64) -> Result<Option<Chunk>, Infallible> {
        Ok(self.chunks.borrow().get(&chunk).map(|row| Chunk::from_bytes(b"k", row).unwrap()))
    }
}

impl Table {
    /// Delivers an arrival. With `refused`, its handler refuses it if it gets it.
    fn arrive(&mut self, arrival: &Arrival, refused: bool) -> Decision {
        let Ok(decision) = decide(&self.high_water, arrival, self);
        if let Decision::First(update) = &decision {
            self.write(if refused { update.clone().refused() } else { update.clone() });
        }
        decision
    }

    fn write(&mut self, update: LaneUpdate) {
        assert!(update.remove.is_none_or(|start| self.gaps.remove(&start).is_some()));
        for gap in update.put.into_iter().flatten() {
            self.gaps.insert(gap.start, gap.end);
        }
        let (mut high_water, spilled) = update.settle();
        let mut chunks = self.chunks.borrow_mut();
        for (number, sums) in spilled {
            let known = chunks.get(&number).map(|row| Chunk::from_bytes(b"k", row).unwrap());
            if known.is_none() && high_water.count_chunk() {
                chunks.pop_first();
            }
            let mut chunk = known.unwrap_or_default();
            chunk.put(sums);
            chunks.insert(number, chunk.to_bytes(b"k"));
        }
        assert_eq!(high_water.chunks, chunks.len() as u64);
        // The row goes through its bytes, as in the file.
        self.high_water = HighWater::from_bytes(b"k", &high_water.to_bytes(b"k")).unwrap();
    }
}

/// A perfect memory: each message's hash, and whether it was refused.
#[derive(Default)]
struct Naive(HashMap<u64, (u64, bool)>);

impl Naive {
    fn arrive(&mut self, arrival: &Arrival, refused: bool) -> &'static str {
        match self.0.get(&arrival.number) {
            Some((hash, _)) if *hash == arrival.hash => "repeat",
            Some((_, false)) => "conflict",
            _ => {
                self.0.insert(arrival.number, (arrival.hash, refused));
                "first"
            }
        }
    }

    fn gaps(&self) -> BTreeMap<u64, u64> {
        let next = self.0.keys().max().map_or(0, |number| number + 1);
        let mut gaps = BTreeMap::new();
        let mut at = 0;
        while at < next {
            let start = at;
            while at < next && !self.0.contains_key(&at) {
                at += 1;
            }
            if start < at {
                gaps.insert(start, at);
            }
            at += 1;
        }
        gaps
    }
}

fn word(decision: &Decision) -> &'static str {
    match decision {
        Decision::First(_) => "first",
        Decision::Repeat => "repeat",
        Decision::Conflict(_) => "conflict",
    }
}

fn arrivals() -> impl Strategy<Value = Vec<(Arrival, bool)>> {
    // Most numbers are near each other, so that gaps are split and filled; a few are far away.
    let number = prop_oneof![6 => 0..40_u64, 3 => 0..400_u64, 1 => Just(1 << 40)];
    let one = (number, 0..3_u64, prop::bool::weighted(0.3))
        .prop_map(|(number, hash, refused)| (at(number, hash), refused));
    prop::collection::vec(one, 1..120)
}

fn at(number: u64, hash: u64) -> Arrival {
    Arrival { number, hash, before: None }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: the rule agrees with a perfect memory, and keeps one row per open gap. Method: the
    /// same arrivals to both (over 100,000 a run), some of them refused by their handlers. After
    /// each arrival the same decision, and at the end the same gaps.
    #[test]
    fn it_agrees_with_a_perfect_memory(arrivals in arrivals()) {
        let (mut rows, mut naive) = (Table::default(), Naive::default());
        for (arrival, refused) in &arrivals {
            let said = word(&rows.arrive(arrival, *refused));
            prop_assert_eq!(said, naive.arrive(arrival, *refused), "{:?}", arrival);
            prop_assert_eq!(rows.high_water.gaps, rows.gaps.len() as u64);
        }
        if naive.0.keys().all(|number| *number < 1 << 40) {
            prop_assert_eq!(rows.gaps, naive.gaps());
        }
    }
}

#[test]
fn in_order_only_the_head_changes_and_now_and_then_a_chunk() {
    let mut rows = Table::default();
    for number in 0..100 {
        let Decision::First(update) = rows.arrive(&at(number, 1), false) else { panic!("{number}") };
        assert_eq!((update.remove, update.put), (None, [None, None]));
    }
    assert_eq!((rows.high_water.next, rows.chunks.borrow().len()), (100, 2));
}

/// Goal: a number of unknown content is never a repeat in silence, the newest 16,384 are known, and
/// the rows stay bounded. Method: more numbers than are kept. After each of the last 200, the
/// oldest that must be known; then all of them.
#[test]
fn what_is_not_known_any_more_is_a_conflict() {
    let mut rows = Table::default();
    let numbers = LANE_CHUNKS_MAX * CHUNK + 1_000;
    for number in 0..numbers {
        assert_eq!(word(&rows.arrive(&at(number, number), false)), "first");
        if number >= numbers - 200 {
            let oldest = number + 1 - 16_384;
            assert_eq!(word(&rows.arrive(&at(oldest, oldest), false)), "repeat", "{oldest} after {number}");
        }
    }
    assert_eq!(rows.chunks.borrow().len() as u64, LANE_CHUNKS_MAX);
    for number in [0, numbers - 16_384 - 100] {
        assert_eq!(word(&rows.arrive(&at(number, number), false)), "conflict", "{number}");
    }
    for number in numbers - 16_384..numbers {
        assert_eq!(word(&rows.arrive(&at(number, number), false)), "repeat", "{number}");
    }
}

/// Goal: hashes are kept in the order of arrival, so a far number removes none. Method: 40 forged
/// numbers and a far one; each of the 40 again with other content.
#[test]
fn a_far_number_hides_nothing() {
    let mut rows = Table::default();
    (0..40).for_each(|number| _ = rows.arrive(&at(number, 1), false));
    rows.arrive(&at(i64::MAX as u64, 1), false);
    for number in 0..40 {
        assert_eq!(word(&rows.arrive(&at(number, 2), false)), "conflict", "{number}");
    }
    assert_eq!(word(&rows.arrive(&at(40, 1), false)), "first");
}

/// Goal: a refused message is marked as applied only if that very message was applied after all.
#[test]
fn a_refused_one_may_be_applied_after_all() {
    let mut rows = Table::default();
    (0..50).for_each(|number| _ = rows.arrive(&at(number, 1), true));
    for number in [0, 49] {
        let Ok(none) = rows.high_water.applied(&at(number, 2), &rows);
        assert_eq!(none, None);
        let Ok(update) = rows.high_water.applied(&at(number, 1), &rows);
        rows.write(update.unwrap());
        assert_eq!(word(&rows.arrive(&at(number, 2), false)), "conflict");
        assert_eq!(word(&rows.arrive(&at(number, 1), false)), "repeat");
    }
    assert_eq!(word(&rows.arrive(&at(7, 2), false)), "first");
}

#[test]
fn the_highest_number_does_not_overflow() {
    let mut rows = Table::default();
    assert_eq!(word(&rows.arrive(&at(i64::MAX as u64, 1), false)), "first");
    assert_eq!(word(&rows.arrive(&at(i64::MAX as u64, 1), false)), "repeat");
    assert_eq!(word(&rows.arrive(&at(0, 1), false)), "first");
    assert_eq!(rows.gaps, BTreeMap::from([(1, i64::MAX as u64)]));
}

/// A high-water row as format 4 wrote it: numbers 0 to 99 had come, the newest 16 with checksum 7,
/// the latest time 5,000.
fn old_high_water() -> HighWater {
    let mut row = Vec::new();
    [100_u64, 5_000, 0].iter().for_each(|number| row.extend_from_slice(&number.to_le_bytes()));
    (0..16).for_each(|_| row.extend_from_slice(&7_u32.to_le_bytes()));
    HighWater::from_bytes(b"k", &sealed(b"k", row)).unwrap()
}

/// Goal: rows of format 4 are read, and count only for what was seen then. A forged time binds
/// nothing. Method: numbers within and before the ring, with times around the lane's latest and
/// around a bound; then new numbers, through the new form.
#[test]
fn rows_of_an_earlier_format_speak_for_what_was_seen_then() {
    let mut rows = Table { high_water: old_high_water(), ..Table::default() };
    let bounded = |number, checksum, time_ms, before_ms| Arrival {
        before: Some(AsBefore { checksum, time_ms, before_ms }),
        ..at(number, 1)
    };
    let old = |number, checksum, time_ms| bounded(number, checksum, time_ms, 1_000_000);
    let cases = [
        (old(99, 7, Some(5_000)), "repeat"),
        (old(99, 8, Some(5_000)), "conflict"),
        (old(99, 7, Some(5_001)), "conflict"),
        (old(3, 8, Some(5_000)), "repeat"),
        (old(3, 8, None), "repeat"),
        (old(3, 8, Some(5_001)), "conflict"),
        (bounded(3, 8, Some(4_000), 4_000), "repeat"),
        (bounded(3, 8, Some(4_001), 4_000), "conflict"),
        (old(100, 8, Some(9_000)), "first"),
        (old(100, 8, Some(9_000)), "repeat"),
        (old(3, 8, Some(9_000)), "conflict"),
    ];
    for (arrival, expected) in cases {
        assert_eq!(word(&rows.arrive(&arrival, false)), expected, "{arrival:?}");
    }
}

/// Goal: gaps that were open in format 4 stay open. Method: a high-water row with one, and its late
/// number, twice.
#[test]
fn gaps_of_an_earlier_format_stay_open() {
    let mut row = Vec::new();
    [100_u64, 5_000, 1].iter().for_each(|number| row.extend_from_slice(&number.to_le_bytes()));
    (0..16).for_each(|_| row.extend_from_slice(&7_u32.to_le_bytes()));
    let high_water = HighWater::from_bytes(b"k", &sealed(b"k", row)).unwrap();
    let mut rows = Table { high_water, gaps: BTreeMap::from([(7, 8)]), ..Table::default() };
    assert_eq!(word(&rows.arrive(&at(7, 1), false)), "first");
    assert_eq!(word(&rows.arrive(&at(7, 1), false)), "repeat");
    assert!(rows.gaps.is_empty());
}

/// Goal: no changed byte and no row of another place is believed.
#[test]
fn a_damaged_row_is_none() {
    let mut rows = Table::default();
    (0..40).for_each(|number| _ = rows.arrive(&at(number, 9), false));
    let key = 7_u64.to_be_bytes();
    let gap = Gap { start: 7, end: 9 };
    assert_eq!(Gap::from_bytes(&key, &gap.to_bytes(&key)), Some(gap));
    let mut chunk = Chunk::default();
    chunk.put(vec![Sum { number: 3, hash: 4, refused: true }]);
    for (good, is_some) in [
        (
            rows.high_water.to_bytes(&key),
            (|bytes| HighWater::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()) as fn(&[u8]) -> bool,
        ),
        (old_high_water().to_bytes(&key), |bytes| {
            HighWater::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()
        }),
        (gap.to_bytes(&key), |bytes| Gap::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()),
        (chunk.to_bytes(&key), |bytes| Chunk::from_bytes(&7_u64.to_be_bytes(), bytes).is_some()),
    ] {
        assert!(is_some(&good));
        for byte in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[byte] ^= 1 << bit;
                assert!(!is_some(&bad), "byte {byte}, bit {bit}");
            }
        }
        assert!(!is_some(&good[..good.len() - 1]));
    }
    assert_eq!(HighWater::from_bytes(&8_u64.to_be_bytes(), &rows.high_water.to_bytes(&key)), None);
}
