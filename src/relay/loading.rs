//! What the relay reads from the log and from its own rows.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::expired::{FoundExpired, find_expired};
use super::prepare::{Met, hold};
use super::rows;
use super::worker::{Search, Worker};
use crate::delivery::types::{Input, Key, Loaded};
use crate::error::Result;
use crate::store::read::records::{self, Read};

impl Worker {
    pub(super) fn load(&mut self, from: u64, events_max: usize, bytes_max: usize) -> Result<()> {
        let core = Arc::clone(self.registered.store.core());
        let tail = core.tail().next_seq;
        let reads = records::read_log(&core, from, tail, events_max, bytes_max)?;
        // Positions without a record have been trimmed; only a relay that starts late meets them.
        let to = reads.last().map_or(tail, |(seq, _)| seq + 1);
        let exceptions = self.exceptions(from, to)?;
        let events = reads
            .into_iter()
            .map(|read| match read {
                (seq, _) if exceptions.contains(&seq) => Loaded::Exception { seq },
                read => hold(read, Met::First, &mut self.form, &mut self.names, &mut self.held),
            })
            .collect();
        self.step(Input::Tail(tail));
        self.step(Input::Loaded { to, events });
        Ok(())
    }

    /// The events of `from..to` that have an exception, from an earlier run or from a scan.
    pub(super) fn exceptions(&mut self, from: u64, to: u64) -> Result<BTreeSet<u64>> {
        if self.rows_ahead_waiting {
            self.flush_rows()?;
        }
        let core = self.registered.store.core();
        let any =
            core.tail().cursors.get(&self.registered.name).is_some_and(|cursor| cursor.rows.any_exception());
        if any { rows::exceptions_between(core, self.cursor.id, from, to) } else { Ok(BTreeSet::new()) }
    }

    /// One piece of the search for expired events.
    pub(super) fn search(&mut self) -> Result<()> {
        let Some(Search { at, until_ms, events_max }) = self.search.take() else { return Ok(()) };
        self.flush_rows()?;
        let core = self.registered.store.core();
        let FoundExpired { found, next, to, earliest_ms } =
            find_expired(core, self.cursor.id, at, until_ms, events_max)?;
        self.rows_ahead_waiting |= !found.is_empty();
        self.step(Input::FoundExpired { found, next, to, earliest_ms });
        self.work()
    }

    pub(super) fn load_due(
        &mut self,
        after: Option<(u64, u64)>,
        until_ms: u64,
        events_max: usize,
    ) -> Result<()> {
        self.flush_rows()?;
        let core = Arc::clone(self.registered.store.core());
        let found = rows::read_due(&core, self.cursor.id, after, until_ms, events_max)?;
        // Events in memory are not read again.
        let due: Vec<_> = found.due.into_iter().filter(|(seq, _)| !self.held.contains_key(seq)).collect();
        let reads = records::read_records(&core, due.iter().map(|(seq, _)| *seq))?;
        let due = self
            .hold_all(reads, Met::Again)
            .into_iter()
            .zip(due.into_iter().map(|(_, exception)| exception))
            .collect();
        self.step(Input::LoadedDue { due, resume: found.resume, next_due_ms: found.next_due_ms });
        Ok(())
    }

    pub(super) fn load_parked(&mut self, key: Key, events_max: usize) -> Result<()> {
        self.flush_rows()?;
        let core = Arc::clone(self.registered.store.core());
        let (seqs, more) = rows::read_parked(&core, self.cursor.id, &key, events_max)?;
        let new = seqs.into_iter().filter(|seq| !self.held.contains_key(seq));
        let reads = records::read_records(&core, new)?;
        let events = self.hold_all(reads, Met::Again);
        self.step(Input::LoadedParked { key, events, more });
        Ok(())
    }

    pub(super) fn hold_all(&mut self, reads: Vec<Read>, met: Met) -> Vec<Loaded> {
        reads
            .into_iter()
            .map(|read| hold(read, met, &mut self.form, &mut self.names, &mut self.held))
            .collect()
    }
}
