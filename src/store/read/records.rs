//! Reads records of the log by number.

use crate::error::{CorruptError, Result};
use crate::event::RecordedEvent;
use crate::log::record;
use crate::storage::tables::schema::LOG;
use crate::store::read::hidden::Hidden;
use crate::store::read::state::read_state;
use crate::store::shared::core::Core;

/// A record as read: whole, or with its error.
pub(crate) type Read = (u64, std::result::Result<RecordedEvent, CorruptError>);

/// Reads the records of `from..to`, as many as fit (but at least one). Below the trimmed edge, a
/// position without a record was trimmed. From the edge on, such a position is reported as damaged,
/// since a damaged page can hide records or show others.
pub(crate) fn read_log(
    core: &Core,
    from: u64,
    to: u64,
    events_max: usize,
    bytes_max: usize,
) -> Result<Vec<Read>> {
    core.reading(|tx| {
        let trimmed_to = read_state(tx)?.trimmed_to;
        let log = tx.open_table(LOG)?;
        let hidden = if from < trimmed_to { Hidden::of(tx)? } else { None };
        let mut read = Vec::new();
        let mut bytes = 0;
        let mut next = from;
        for row in log.range(from..to)? {
            let (seq, frame) = row?;
            let seq = seq.value();
            if !(next..to).contains(&seq) {
                continue; // A record of another place: the record of this place is missing.
            }
            if seq < trimmed_to && hidden.as_ref().is_some_and(|hidden| hidden.hides(seq, frame.value())) {
                next = seq + 1;
                continue;
            }
            report_missing(next.max(trimmed_to)..seq, events_max, &mut read);
            bytes += frame.value().len();
            if read.len() >= events_max || (bytes > bytes_max && !read.is_empty()) {
                return Ok(read);
            }
            read.push((seq, record::decode(seq, frame.value())));
            next = seq + 1;
        }
        report_missing(next.max(trimmed_to)..to, events_max, &mut read);
        Ok(read)
    })
}

fn report_missing(seqs: std::ops::Range<u64>, events_max: usize, read: &mut Vec<Read>) {
    let room = events_max.saturating_sub(read.len());
    read.extend(seqs.take(room).map(|seq| (seq, Err(CorruptError { seq, what: "it is missing" }))));
}

/// Reads the records of these sequence numbers. A record that is gone is reported as damaged: an
/// exception never outlives its record.
pub(crate) fn read_records(core: &Core, seqs: impl Iterator<Item = u64>) -> Result<Vec<Read>> {
    core.reading(|tx| {
        let log = tx.open_table(LOG)?;
        seqs.map(|seq| {
            let frame = log.get(seq)?;
            let gone = Err(CorruptError { seq, what: "it is missing" });
            Ok((seq, frame.map_or(gone, |frame| record::decode(seq, frame.value()))))
        })
        .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Event;
    use crate::store::Store;

    /// Goal: a read of the log keeps its bound of bytes, and always makes progress. Method: records
    /// of 100 bytes and more, read with bounds below one, between one and two, and above all.
    #[test]
    fn a_read_is_bounded_and_comes_further() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        for _ in 0..3 {
            store.write(|tx| tx.append(Event::bytes("paid", [7; 100]).to("", "q"))).unwrap();
        }
        let read = |bytes_max| read_log(store.core(), 0, 3, 10, bytes_max).unwrap().len();
        assert_eq!([read(1), read(100), read(300), read(10_000)], [1, 1, 1, 3]);
    }
}
