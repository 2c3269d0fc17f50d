//! The part of a relay's scan that reads: it finds expired events on disk or in the log, a piece at
//! a time.

use redb::ReadTransaction;

use super::rows::exceptions_in;
use crate::delivery::types::{ExpiredEvent, ExpiredPlace, Key, ScanAt};
use crate::error::Result;
use crate::event::Destination;
use crate::log::keys::CursorId;
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::{DUE, EXCEPTIONS, LOG, PARKED};
use crate::store::shared::core::Core;

type Log = redb::ReadOnlyTable<u64, &'static [u8]>;

/// The result of one piece of the scan. See `Input::FoundExpired`.
#[derive(Debug, Default)]
pub(crate) struct FoundExpired {
    pub(crate) found: Vec<ExpiredEvent>,
    pub(crate) next: Option<ScanAt>,
    pub(crate) to: u64,
    pub(crate) earliest_ms: Option<u64>,
}

/// Finds events of a cursor that have expired by `until_ms`. Looks at `events_max` events at most,
/// from `at` on.
pub(crate) fn find_expired(
    core: &Core,
    id: CursorId,
    at: ScanAt,
    until_ms: u64,
    events_max: usize,
) -> Result<FoundExpired> {
    core.reading(|tx| {
        let mut search =
            Search { log: tx.open_table(LOG)?, until_ms, events_max, found: FoundExpired::default() };
        match at {
            ScanAt::Due(after) => search.due(tx, id, after)?,
            ScanAt::Parked(after) => search.parked(tx, id, after)?,
            ScanAt::Log(from) => search.log(tx, id, from)?,
        }
        Ok(search.found)
    })
}

struct Search {
    log: Log,
    until_ms: u64,
    events_max: usize,
    found: FoundExpired,
}

impl Search {
    fn due(&mut self, tx: &ReadTransaction, id: CursorId, after: Option<(u64, u64)>) -> Result<()> {
        let (due, exceptions) = (tx.open_table(DUE)?, tx.open_table(EXCEPTIONS)?);
        let (due_ms, seq) = after.map_or((0, 0), |(due_ms, seq)| (due_ms, seq.saturating_add(1)));
        let (from, to) = (keys::due(id, due_ms, seq), keys::after_prefix(&id.to_be_bytes()));
        let mut last = after;
        let mut rows = due.range(&from[..]..to.as_slice())?;
        for row in rows.by_ref().take(self.events_max) {
            last = keys::split_due(row?.0.value());
            let (_, seq) = last.ok_or_else(|| damaged_row("due"))?;
            self.look_up(seq, || {
                let row = exceptions.get(&keys::exception(id, seq)[..])?.ok_or_else(|| damaged_row("due"))?;
                Ok(ExpiredPlace::Exception(ExceptionRow::from_bytes(row.value())?.exception))
            })?;
        }
        let more = rows.next().is_some();
        self.found.next = Some(if more { ScanAt::Due(last) } else { ScanAt::Parked(None) });
        Ok(())
    }

    fn parked(&mut self, tx: &ReadTransaction, id: CursorId, after: Option<(Key, u64)>) -> Result<()> {
        let parked = tx.open_table(PARKED)?;
        let next = |(key, seq): &(Key, u64)| keys::parked(id, key, seq.saturating_add(1));
        let from = after.as_ref().map_or(id.to_be_bytes().to_vec(), next);
        let to = keys::after_prefix(&id.to_be_bytes());
        let mut last = after;
        let mut rows = parked.range(from.as_slice()..to.as_slice())?;
        for row in rows.by_ref().take(self.events_max) {
            let (at, _) = row?;
            let (key, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
            self.look_up(seq, || Ok(ExpiredPlace::Parked))?;
            last = Some((key.into(), seq));
        }
        let more = rows.next().is_some();
        self.found.next = Some(if more { ScanAt::Parked(last) } else { ScanAt::Log(0) });
        Ok(())
    }

    fn log(&mut self, tx: &ReadTransaction, id: CursorId, from: u64) -> Result<()> {
        let log = tx.open_table(LOG)?;
        let mut rows = log.range(from..)?;
        let mut read = Vec::new();
        self.found.to = from;
        for row in rows.by_ref().take(self.events_max) {
            let (seq, frame) = row?;
            self.found.to = seq.value().saturating_add(1);
            read.push((seq.value(), frame));
        }
        let exceptions = exceptions_in(tx, id, from, self.found.to)?;
        for (seq, frame) in read.iter().filter(|(seq, _)| !exceptions.contains(seq)) {
            self.look_at(*seq, frame.value(), || Ok(ExpiredPlace::Log))?;
        }
        self.found.next = rows.next().map(|_| ScanAt::Log(self.found.to));
        Ok(())
    }

    fn look_up(&mut self, seq: u64, place: impl FnOnce() -> Result<ExpiredPlace>) -> Result<()> {
        match self.log.get(seq)? {
            Some(frame) => self.look_at(seq, frame.value(), place),
            None => Ok(()),
        }
    }

    /// Skips a record that cannot be read: the relay reports it when it is to be published. An
    /// event without a destination, or with one from a relay's rule, also waits until it is to be
    /// published.
    fn look_at(
        &mut self,
        seq: u64,
        frame: &[u8],
        place: impl FnOnce() -> Result<ExpiredPlace>,
    ) -> Result<()> {
        let Ok(recorded) = record::decode(seq, frame) else { return Ok(()) };
        let Some(expires_ms) = recorded.event.expires_ms else { return Ok(()) };
        if matches!(recorded.destination(), Destination::Unpublished) {
            return Ok(());
        }
        if expires_ms > self.until_ms {
            self.found.earliest_ms = self.found.earliest_ms.into_iter().chain([expires_ms]).min();
            return Ok(());
        }
        let key = recorded.key().map(Key::from);
        self.found.found.push(ExpiredEvent { seq, key, place: place()? });
        Ok(())
    }
}
