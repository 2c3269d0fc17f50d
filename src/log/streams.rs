//! Streams: the state of each stream, and the sequence numbers of its revisions.
//!
//! The index (stream, revision) → sequence number is derived from the log. Its newest part is in
//! memory. The rest is in *chunks*, one per stream and bulk write, each a run of contiguous
//! revisions. An index row per event would cost a random page write per event.

use std::collections::HashMap;

use super::write_back::WriteBackCache;
use crate::tuning::REVISION_GAPS_MAX;

/// The state of a stream apart from its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StreamState {
    /// The revision of its next event.
    pub(crate) next: u64,
    /// The first revision that still exists.
    pub(crate) first: u64,
    /// Whether the stream is deleted for good. Then nothing of it can be read or appended.
    pub(crate) deleted: bool,
}

impl StreamState {
    pub(crate) fn to_bytes(self) -> [u8; 17] {
        let mut bytes = [0; 17];
        let numbers = self.next.to_le_bytes().into_iter().chain(self.first.to_le_bytes());
        let all = numbers.chain([u8::from(self.deleted)]);
        bytes.iter_mut().zip(all).for_each(|(slot, byte)| *slot = byte);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (next, rest) = bytes.split_first_chunk::<8>()?;
        let (first, deleted) = rest.split_first_chunk::<8>()?;
        let (next, first) = (u64::from_le_bytes(*next), u64::from_le_bytes(*first));
        match deleted {
            [deleted @ (0 | 1)] => Some(Self { next, first, deleted: *deleted == 1 }),
            _ => None,
        }
    }

    /// Returns the readable revisions.
    pub(crate) fn readable(self) -> std::ops::Range<u64> {
        if self.deleted { 0..0 } else { self.first.min(self.next)..self.next }
    }

    /// Whether the event of this revision is still needed.
    pub(crate) fn wants(self, revision: u64) -> bool {
        !self.deleted && revision >= self.first
    }
}

/// The newest event that a snapshot includes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SnapshotOf {
    pub(crate) seq: u64,
    /// The checksum of its record.
    pub(crate) crc: u32,
}

/// The application's snapshot of the state that a stream adds up to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotRow {
    /// The version of its bytes' form.
    pub(crate) version: u32,
    /// The newest revision in the snapshot.
    pub(crate) revision: u64,
    /// The event of that revision. Rows of format 3 name none.
    pub(crate) of: Option<SnapshotOf>,
    pub(crate) bytes: Vec<u8>,
}

impl SnapshotRow {
    /// Writes the value of this stream's row. The checksum covers the stream's name and what
    /// follows it.
    pub(crate) fn to_bytes(&self, stream: &[u8]) -> Vec<u8> {
        let mut checked = [&self.version.to_le_bytes()[..], &self.revision.to_le_bytes()].concat();
        if let Some(of) = self.of {
            checked.extend(of.seq.to_le_bytes());
            checked.extend(of.crc.to_le_bytes());
        }
        checked.extend(&self.bytes);
        [&snapshot_checksum(stream, &checked, self.of.is_some()).to_le_bytes()[..], &checked].concat()
    }

    /// Reads a row; `None` if it is damaged, or another stream's.
    pub(crate) fn from_bytes(stream: &[u8], bytes: &[u8]) -> Option<Self> {
        let (crc, checked) = bytes.split_first_chunk::<4>()?;
        let holds = |is_named| u32::from_le_bytes(*crc) == snapshot_checksum(stream, checked, is_named);
        let is_named = holds(true);
        if !is_named && !holds(false) {
            return None;
        }
        let (version, rest) = checked.split_first_chunk::<4>()?;
        let (revision, mut bytes) = rest.split_first_chunk::<8>()?;
        let mut of = None;
        if is_named {
            let (seq, rest) = bytes.split_first_chunk::<8>()?;
            let (crc, rest) = rest.split_first_chunk::<4>()?;
            of = Some(SnapshotOf { seq: u64::from_le_bytes(*seq), crc: u32::from_le_bytes(*crc) });
            bytes = rest;
        }
        let (version, revision) = (u32::from_le_bytes(*version), u64::from_le_bytes(*revision));
        Some(Self { version, revision, of, bytes: bytes.to_vec() })
    }
}

/// Returns the row's checksum. A row that names its event has another checksum, so that neither
/// form is read as the other.
fn snapshot_checksum(stream: &[u8], checked: &[u8], is_named: bool) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    if is_named {
        hasher.update(b"named\0");
    }
    hasher.update(stream);
    hasher.update(checked);
    hasher.finalize()
}

/// The number in a run for a revision whose record was damaged when the index was rebuilt.
pub(crate) const NO_SEQ: u64 = u64::MAX;

/// A run of contiguous revisions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Run {
    /// The revision of the first event.
    pub(crate) first: u64,
    /// The sequence numbers of the events.
    pub(crate) seqs: Vec<u64>,
}

impl Run {
    pub(crate) fn starting_at(first: u64) -> Self {
        Self { first, seqs: Vec::new() }
    }

    /// Returns the sequence number of this revision if the run has it.
    pub(crate) fn get(&self, revision: u64) -> Option<u64> {
        let at = usize::try_from(revision.checked_sub(self.first)?).ok()?;
        self.seqs.get(at).copied()
    }

    /// Notes the sequence number of the next revision. An earlier revision is known already.
    pub(crate) fn put(&mut self, revision: u64, seq: u64) {
        let is_put = self.put_behind(revision, seq, &mut Gaps::from(0));
        debug_assert!(is_put, "what is appended has no gap");
    }

    /// Notes the sequence number of a later revision. The revisions between get [`NO_SEQ`], and
    /// count against `gaps`. Returns `false`, and notes nothing, if they exceed `gaps`.
    pub(crate) fn put_behind(&mut self, revision: u64, seq: u64, gaps: &mut Gaps) -> bool {
        if self.seqs.is_empty() {
            self.first = revision;
        }
        let Some(missing) = revision.saturating_sub(self.first).checked_sub(self.seqs.len() as u64) else {
            return true;
        };
        let Some(left) = gaps.left.checked_sub(missing) else { return false };
        gaps.left = left;
        self.seqs.extend((0..missing).map(|_| NO_SEQ));
        self.seqs.push(seq);
        true
    }

    /// Returns the run without the revisions below this one.
    pub(crate) fn from(mut self, first: u64) -> Self {
        let gone =
            usize::try_from(first.saturating_sub(self.first)).unwrap_or(usize::MAX).min(self.seqs.len());
        self.seqs.drain(..gone);
        self.first += gone as u64;
        self
    }

    /// Writes the value of a chunk. Its key has the first revision.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.seqs.iter().flat_map(|seq| seq.to_le_bytes()).collect()
    }

    pub(crate) fn from_bytes(first: u64, bytes: &[u8]) -> Option<Self> {
        let (seqs, []) = bytes.as_chunks::<8>() else { return None };
        Some(Self { first, seqs: seqs.iter().map(|seq| u64::from_le_bytes(*seq)).collect() })
    }
}

/// The revisions that may be missing from runs that are read from the log: one for each missing or
/// damaged record.
///
/// A checksum says that a record is as it was written, not that this library wrote it. So no number
/// in a record becomes a length in memory.
#[derive(Debug)]
pub(crate) struct Gaps {
    left: u64,
    /// The sequence number that comes next.
    expected: u64,
}

impl Gaps {
    pub(crate) fn from(seq: u64) -> Self {
        Self { left: 0, expected: seq }
    }

    /// Notes a record that was read. Returns `false` if another record was expected.
    pub(crate) fn pass(&mut self, seq: u64) -> bool {
        let missing = seq.abs_diff(self.expected);
        self.expected = seq.saturating_add(1);
        self.add(missing);
        missing == 0
    }

    /// Notes a record that is unreadable or impossible.
    pub(crate) fn damaged(&mut self) {
        self.add(1);
    }

    fn add(&mut self, missing: u64) {
        self.left = self.left.saturating_add(missing).min(REVISION_GAPS_MAX);
    }
}

/// All streams that are in memory.
#[derive(Debug, Default)]
pub(crate) struct StreamCache {
    pub(crate) states: WriteBackCache<StreamState>,
    /// The events appended since the last bulk write.
    pub(crate) recent: HashMap<Box<[u8]>, Run>,
}

impl StreamCache {
    /// Notes the events that a committed transaction appended to a stream.
    pub(crate) fn appended(&mut self, stream: &[u8], state: StreamState, run: &Run) {
        self.states.change(stream.into(), state);
        if !run.seqs.is_empty() {
            let recent = self.recent.entry(stream.into()).or_default();
            (run.first..).zip(&run.seqs).for_each(|(revision, seq)| recent.put(revision, *seq));
        }
    }

    /// Notes that the bulk write is durable.
    pub(crate) fn written(&mut self) {
        self.states.written();
        self.recent.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_round_trip() {
        for deleted in [false, true] {
            let state = StreamState { next: 7, first: 3, deleted };
            assert_eq!(StreamState::from_bytes(&state.to_bytes()), Some(state));
        }
        assert_eq!(StreamState::from_bytes(&[2; 17]), None);
        let run = Run { first: 3, seqs: vec![9, 11, 400] };
        assert_eq!(Run::from_bytes(3, &run.to_bytes()), Some(run.clone()));
        assert_eq!((run.get(2), run.get(3), run.get(5), run.get(6)), (None, Some(9), Some(400), None));
        assert_eq!(Run::from_bytes(0, &[1; 9]), None);
        assert_eq!(run.clone().from(4), Run { first: 4, seqs: vec![11, 400] });
        assert_eq!(run.clone().from(1), run);
        assert!(run.from(9).seqs.is_empty());
        let (mut gapped, mut gaps) = (Run::default(), Gaps::from(0));
        assert!(gaps.pass(0) && !gaps.pass(3) && gaps.left == 2);
        gaps.damaged();
        assert!(gapped.put_behind(5, 50, &mut gaps) && gapped.put_behind(7, 70, &mut gaps));
        assert!(gapped.put_behind(6, 60, &mut gaps), "it is known already");
        assert!(!gapped.put_behind(11, 110, &mut gaps) && !gapped.put_behind(u64::MAX, 110, &mut gaps));
        assert_eq!((gapped, gaps.left), (Run { first: 5, seqs: vec![50, NO_SEQ, 70] }, 2));
        assert!(!gaps.pass(u64::MAX) && gaps.left == REVISION_GAPS_MAX);
    }

    #[test]
    fn a_damaged_snapshot_is_none() {
        for of in [None, Some(SnapshotOf { seq: 12, crc: 0xdead_beef })] {
            let row = SnapshotRow { version: 2, revision: 9, of, bytes: b"state".to_vec() };
            let bytes = row.to_bytes(b"a");
            assert_eq!(SnapshotRow::from_bytes(b"a", &bytes), Some(row));
            assert_eq!(SnapshotRow::from_bytes(b"b", &bytes), None);
            for at in 0..bytes.len() {
                let mut bytes = bytes.clone();
                bytes[at] ^= 1;
                assert_eq!(SnapshotRow::from_bytes(b"a", &bytes), None, "byte {at}");
            }
        }
    }

    #[test]
    fn runs_join() {
        let mut cache = StreamCache::default();
        let state = StreamState { next: 2, ..StreamState::default() };
        cache.appended(b"a", state, &Run { first: 1, seqs: vec![5] });
        cache.appended(b"a", StreamState { next: 4, ..state }, &Run { first: 2, seqs: vec![6, 8] });
        assert_eq!(cache.recent.get(&b"a"[..]), Some(&Run { first: 1, seqs: vec![5, 6, 8] }));
        assert_eq!(cache.states.get(b"a").map(|state| state.next), Some(4));
        cache.written();
        assert!(cache.recent.is_empty(), "memory does not grow with the log");
    }
}
