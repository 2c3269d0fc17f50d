//! The keys of the tables around the log. They are big-endian, so that byte order is number order.
//!
//! **Invariant.** A key that can be read is written as the same key; a key of another length is
//! damage. So a loop that continues behind the last key read always advances. Nothing has the
//! number `u64::MAX`.
//!
//! ```text
//! exception   cursor u32 │ seq u64
//! due         cursor u32 │ due ms u64 │ seq u64
//! parked      cursor u32 │ key len u16 │ key │ seq u64
//! lane        exchange len u8 │ exchange │ routing key len u8 │ routing key │ key        (key may be empty: no key)
//! inbox       scope len u8 │ scope │ id
//! chunk       stream len u8 │ stream │ first revision u64
//! seen        scope len u8 │ scope [│ store 16 │ epoch u64 │ lane id u64 │ 0 for the high-water mark, or 1 │ start of a gap u64, or 2 │ chunk u64]
//! lanes kept  scope len u8 │ scope [│ store 16 │ epoch u64]
//! rejected    scope len u8 │ scope [│ 0 for a row, 1 for one that is driven again │ number u64]
//! in hand     scope len u8 │ scope [│ 0 │ number u64 of a parked delivery, or │ 1 │ name of its tries]
//! ```

use crate::event::{Destination, LaneOf};

/// The id of a cursor in keys. A cursor gets it when it is made, and no id is reused.
pub(crate) type CursorId = u32;

pub(crate) fn exception(cursor: CursorId, seq: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key.first_chunk_mut::<4>().expect("12 bytes").copy_from_slice(&cursor.to_be_bytes());
    key.last_chunk_mut::<8>().expect("12 bytes").copy_from_slice(&seq.to_be_bytes());
    key
}

pub(crate) fn due(cursor: CursorId, due_ms: u64, seq: u64) -> [u8; 20] {
    let mut key = [0; 20];
    key.first_chunk_mut::<12>().expect("20 bytes").copy_from_slice(&exception(cursor, due_ms));
    key.last_chunk_mut::<8>().expect("20 bytes").copy_from_slice(&seq.to_be_bytes());
    key
}

/// Returns the due time and the sequence number of a due key.
pub(crate) fn split_due(key: &[u8]) -> Option<(u64, u64)> {
    let due_ms = u64::from_be_bytes(key.get(4..12)?.try_into().ok()?);
    Some((due_ms, number_behind(key, 12)?))
}

/// Returns the sequence number in the key of an exception or of a projection's failure.
pub(crate) fn split_exception(key: &[u8]) -> Option<u64> {
    number_behind(key, 4)
}

/// Returns the number that is the whole rest behind so many bytes.
fn number_behind(key: &[u8], bytes: usize) -> Option<u64> {
    let number = u64::from_be_bytes(key.get(bytes..)?.try_into().ok()?);
    (number != u64::MAX).then_some(number)
}

/// Returns the bytes at the place of a sequence number in an exception, due or parked key. A key of
/// another form has bytes there too, so no loop may continue from this number.
pub(crate) fn last_seq(key: &[u8]) -> Option<u64> {
    key.last_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes))
}

pub(crate) fn parked(cursor: CursorId, key: &str, seq: u64) -> Vec<u8> {
    let len = u16::try_from(key.len()).expect("validated: at most KEY_BYTES_MAX");
    [&cursor.to_be_bytes()[..], &len.to_be_bytes(), key.as_bytes(), &seq.to_be_bytes()].concat()
}

/// Returns the ordering key and the sequence number in a parked key.
pub(crate) fn split_parked(key: &[u8]) -> Option<(&str, u64)> {
    let len = usize::from(u16::from_be_bytes(key.get(4..6)?.try_into().ok()?));
    Some((std::str::from_utf8(key.get(6..6 + len)?).ok()?, number_behind(key, 6 + len)?))
}

/// Writes the lane's key into `out`. Returns `false` for an unpublished event.
pub(crate) fn lane(destination: Option<&Destination>, key: Option<&str>, out: &mut Vec<u8>) -> bool {
    out.clear();
    let Some(Destination::Exchange { exchange, routing_key }) = destination else { return false };
    for text in [exchange, routing_key] {
        out.push(u8::try_from(text.len()).expect("validated: at most SHORT_STRING_BYTES_MAX"));
        out.extend_from_slice(text.as_bytes());
    }
    out.extend_from_slice(key.unwrap_or_default().as_bytes());
    true
}

pub(crate) fn inbox(scope: &str, id: &[u8]) -> Vec<u8> {
    let len = u8::try_from(scope.len()).expect("checked: at most SHORT_STRING_BYTES_MAX");
    [&[len][..], scope.as_bytes(), id].concat()
}

/// The key of a lane's high-water mark in a scope.
pub(crate) fn dedup_high_water(scope: &str, lane: LaneOf) -> Vec<u8> {
    let lane = [&lane.store[..], &lane.epoch.to_be_bytes(), &lane.id.to_be_bytes(), &[0]].concat();
    inbox(scope, &lane)
}

/// The key of a gap of the lane whose high-water mark has this key.
pub(crate) fn dedup_gap(key: &[u8], start: u64) -> Vec<u8> {
    let lane = key.split_last().map_or(key, |(_, lane)| lane);
    [lane, &[1], &start.to_be_bytes()].concat()
}

/// The key of a chunk of hashes of the lane whose high-water mark has this key.
pub(crate) fn dedup_chunk(key: &[u8], chunk: u64) -> Vec<u8> {
    let lane = key.split_last().map_or(key, |(_, lane)| lane);
    [lane, &[2], &chunk.to_be_bytes()].concat()
}

/// The key of a scope's count of lanes.
pub(crate) fn lanes_kept(scope: &str) -> Vec<u8> {
    inbox(scope, &[])
}

/// The key of the forgotten lanes of this lane's producer and epoch, in a scope.
pub(crate) fn lanes_forgotten(scope: &str, lane: LaneOf) -> Vec<u8> {
    inbox(scope, &[&lane.store[..], &lane.epoch.to_be_bytes()].concat())
}

/// The kind of a key among the lanes of a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DedupKey {
    HighWater,
    Gap,
    Other,
}

/// The length of store, epoch and lane.
const LANE_LEN: usize = 16 + 8 + 8;

/// Returns the kind of a key; `None` for a key without a scope.
pub(crate) fn dedup_kind(key: &[u8]) -> Option<DedupKey> {
    let rest = key.get(1 + scope_of(key)?.len()..)?;
    let kind = rest.get(LANE_LEN).filter(|_| rest.len() == LANE_LEN + 1 || rest.len() == LANE_LEN + 9);
    Some(match (kind, rest.len()) {
        (Some(0), len) if len == LANE_LEN + 1 => DedupKey::HighWater,
        (Some(1), len) if len == LANE_LEN + 9 => DedupKey::Gap,
        _ => DedupKey::Other,
    })
}

/// Returns the common prefix of all rows of the lane whose high-water mark has this key.
pub(crate) fn dedup_lane(key: &[u8]) -> &[u8] {
    key.split_last().map_or(key, |(_, lane)| lane)
}

/// Returns the key of the producer's forgotten lanes, and the lane's id.
pub(crate) fn split_high_water(key: &[u8]) -> Option<(&[u8], u64)> {
    let (producer, id) = dedup_lane(key).split_last_chunk::<8>()?;
    Some((producer, u64::from_be_bytes(*id)))
}

/// The key of the totals of a scope's rejected deliveries.
pub(crate) fn rejected(scope: &str) -> Vec<u8> {
    inbox(scope, &[])
}

/// The key of a rejected delivery.
pub(crate) fn rejected_row(scope: &str, number: u64) -> Vec<u8> {
    inbox(scope, &[&[0][..], &number.to_be_bytes()].concat())
}

/// The key of the request to redrive a rejected delivery.
pub(crate) fn redriven(scope: &str, number: u64) -> Vec<u8> {
    inbox(scope, &[&[1][..], &number.to_be_bytes()].concat())
}

/// Returns the number of a rejected, parked or redriven delivery of this scope.
pub(crate) fn split_numbered(scope: &str, key: &[u8]) -> Option<u64> {
    number_behind(key, 1 + scope.len() + 1)
}

/// Returns the range of all keys of one kind of numbered rows of a scope: from, and up to.
pub(crate) fn numbered_range(scope: &str, kind: u8) -> (Vec<u8>, Vec<u8>) {
    let from = inbox(scope, &[kind]);
    let to = after_prefix(&from);
    (from, to)
}

/// The key of the totals of a scope's deliveries in hand.
pub(crate) fn in_hand(scope: &str) -> Vec<u8> {
    inbox(scope, &[])
}

/// The key of a parked delivery.
pub(crate) fn parked_delivery(scope: &str, number: u64) -> Vec<u8> {
    inbox(scope, &[&[0][..], &number.to_be_bytes()].concat())
}

/// The key of a delivery's tries.
pub(crate) fn tries(scope: &str, name: &[u8]) -> Vec<u8> {
    inbox(scope, &[&[1][..], name].concat())
}

/// Returns the scope at the front of a key.
pub(crate) fn scope_of(key: &[u8]) -> Option<&str> {
    let (len, rest) = key.split_first()?;
    std::str::from_utf8(rest.get(..usize::from(*len))?).ok()
}

/// The key of a chunk of the stream index.
pub(crate) fn chunk(stream: &[u8], first: u64) -> Vec<u8> {
    let len = u8::try_from(stream.len()).expect("checked: at most SHORT_STRING_BYTES_MAX");
    [&[len][..], stream, &first.to_be_bytes()].concat()
}

/// Returns the stream and the first revision of a chunk's key.
pub(crate) fn split_chunk(key: &[u8]) -> Option<(&[u8], u64)> {
    let (len, rest) = key.split_first()?;
    let stream = rest.get(..usize::from(*len))?;
    (rest.len() == stream.len() + 8).then_some((stream, last_seq(key)?))
}

/// Returns a bound above the largest key that begins with `prefix`.
pub(crate) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_and_split() {
        assert!(exception(1, 255) < exception(1, 256));
        assert!(exception(1, u64::MAX) < exception(2, 0));
        assert_eq!(split_due(&due(1, 77, 9)), Some((77, 9)));
        let key = parked(1, "alice", 9);
        assert_eq!((split_parked(&key), last_seq(&key)), (Some(("alice", 9)), Some(9)));
        assert!(parked(1, "alice", 9) < parked(1, "alice", 10));
        assert!(chunk(b"a", 255) < chunk(b"a", 256));
        assert_eq!(split_chunk(&chunk(b"a", 7)), Some((&b"a"[..], 7)));
        assert_eq!(split_chunk(b"\x02a\0\0\0\0\0\0\0\x07"), None);
        let lane = LaneOf { store: [7; 16], epoch: 1, id: 2 };
        let key = dedup_high_water("a", lane);
        assert!(key < dedup_gap(&key, 0) && dedup_gap(&key, 255) < dedup_gap(&key, 256));
        assert!(dedup_gap(&key, u64::MAX) < dedup_chunk(&key, 0));
        assert!(dedup_chunk(&key, u64::MAX) < dedup_high_water("a", LaneOf { id: 3, ..lane }));
        assert!(rejected("a") < rejected_row("a", 0) && rejected_row("a", u64::MAX) < redriven("a", 0));
        assert!(redriven("a", u64::MAX) < rejected("b"));
        assert!(in_hand("a") < parked_delivery("a", 0) && parked_delivery("a", u64::MAX) < tries("a", &[]));
        assert!(
            parked_delivery("a", 255) < parked_delivery("a", 256) && tries("a", &[255; 9]) < in_hand("b")
        );
        assert_eq!(scope_of(&redriven("credit", 7)), Some("credit"));
        assert_eq!(after_prefix(&[1, 255]), vec![2]);
        assert!(after_prefix(&[255]).is_empty());
    }

    /// Goal: no key is read that would not be written the same, because a loop that continues
    /// behind it would meet it again. Method: each form, longer, shorter, and with the number that
    /// nothing has.
    #[test]
    fn a_key_of_another_length_is_none() {
        type Read = fn(&[u8]) -> Option<u64>;
        let forms: [(Vec<u8>, Read); 5] = [
            (exception(1, 7).to_vec(), split_exception),
            (due(1, 5, 7).to_vec(), |key| split_due(key).map(|(_, seq)| seq)),
            (parked(1, "alice", 7), |key| split_parked(key).map(|(_, seq)| seq)),
            (rejected_row("scope", 7), |key| split_numbered("scope", key)),
            (parked_delivery("scope", 7), |key| split_numbered("scope", key)),
        ];
        for (key, read) in forms {
            assert_eq!(read(&key), Some(7));
            for bytes in [&[0][..], &[255], &[255; 8], &[0; 300]] {
                assert_eq!(read(&[&key[..], bytes].concat()), None, "{key:?}");
            }
            for len in 0..key.len() {
                assert_eq!(read(&key[..len]), None, "{key:?}");
            }
            let last = [&key[..key.len() - 8], &[255; 8]].concat();
            assert_eq!(read(&last), None, "{key:?}");
        }
    }

    /// Goal: lanes that differ anywhere have different keys, also if their texts run into each
    /// other.
    #[test]
    fn lanes_do_not_run_together() {
        let to = |e: &str, r: &str| Destination::Exchange { exchange: e.into(), routing_key: r.into() };
        let of = |d: &Destination, k: Option<&str>| {
            let mut out = Vec::new();
            assert!(lane(Some(d), k, &mut out));
            out
        };
        assert_ne!(of(&to("a", "b"), Some("c")), of(&to("a", "bc"), None));
        assert_ne!(of(&to("ab", ""), None), of(&to("a", "b"), None));
        assert!(!lane(Some(&Destination::Unpublished), Some("k"), &mut Vec::new()));
    }
}
