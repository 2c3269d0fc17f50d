//! The end of a rebuild: one transaction applies the missing events and swaps the new tables for
//! the old ones.
//!
//! **Invariants.** That transaction holds the write lock, so the log does not grow while it runs.
//! Writers need not pause. The transaction applies no more than the reach, and only events that
//! were durable before it began. The new tables are never behind the old ones, so a reader of the
//! tables never goes back in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Line, Step, Worker};
use crate::error::Result;
use crate::projection::rows::read_stretch;
use crate::storage::tables::projection::Which;
use crate::store::{ProjectionState, Transaction};
use crate::tuning::{LOAD_EVENTS_MAX, PROJECTION_BATCH_BYTES_MAX, REBUILD_REACH_MAX};

/// How many records of the log a rebuild may leave to its last transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reach {
    records: usize,
    /// How many records were missing at the last look.
    missing: u64,
}

impl Reach {
    pub(super) fn of(batch: usize) -> Self {
        Self { records: batch.min(REBUILD_REACH_MAX), missing: u64::MAX }
    }

    /// How many events one transaction before the last applies at most.
    pub(super) fn step(self) -> usize {
        self.records.min(LOAD_EVENTS_MAX)
    }

    fn spans(self, missing: u64) -> bool {
        missing <= self.records as u64
    }

    /// Notes an applied batch. The reach doubles if the batch did not bring the rebuild nearer to
    /// the end.
    fn note(&mut self, missing: u64) {
        if missing > 0 && missing >= self.missing {
            self.records = self.records.saturating_mul(2).min(REBUILD_REACH_MAX);
        }
        self.missing = missing;
    }
}

/// The result of an attempt to end the rebuild.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swapped {
    Done,
    /// Too much is missing, or an event blocks the swap. The rebuild goes on batch by batch.
    NotYet,
    Waits,
}

/// What the last transaction has applied.
struct Applied {
    position: u64,
    events: usize,
    /// A record that cannot be read stands at the position, so the tables were not swapped.
    stopped: bool,
}

impl Worker {
    /// How many records the rebuild still lacks, if it can go on at once.
    fn missing(&mut self) -> Option<u64> {
        let look = self.look();
        let end = self.settings.store.core().tail().next_seq;
        let line = self.rebuild.as_ref()?;
        let waits = line.stopped || line.retry_at.is_some_and(|due| !due.has_come(look));
        // An event that has failed is tried by itself, and its tries are counted.
        (!waits && line.attempts == 0).then(|| end.saturating_sub(line.next))
    }

    pub(super) fn widen_reach(&mut self) {
        if let Some(missing) = self.missing() {
            self.reach.note(missing);
        }
    }

    /// Ends the rebuild if few enough records are missing.
    pub(super) fn swap(&mut self) -> Result<Swapped> {
        let Some(missing) = self.missing() else { return Ok(Swapped::NotYet) };
        let Some(from) = self.rebuild.as_ref().map(|line| line.next) else { return Ok(Swapped::NotYet) };
        if !self.reach.spans(missing) {
            return Ok(Swapped::NotYet);
        }
        let in_handler = Arc::new(AtomicBool::new(false));
        match self.write(self.last_transaction(from, Arc::clone(&in_handler))) {
            Ok(None) => Ok(Swapped::NotYet),
            Ok(Some(applied)) if applied.stopped => {
                if applied.position > from {
                    self.moved(Which::Rebuild, applied.position, applied.events);
                }
                Ok(Swapped::NotYet)
            }
            Ok(Some(applied)) => {
                self.rebuilt(&applied);
                Ok(Swapped::Done)
            }
            Err(error) if self.settings.store.ready().is_err() => Err(error),
            Err(error) if in_handler.load(Ordering::Relaxed) => {
                // All of it is rolled back. The failing event is found batch by batch, and the
                // policy decides about it.
                tracing::debug!(%error, "the last transaction of the rebuild failed in the handler");
                Ok(Swapped::NotYet)
            }
            Err(error) => match self.commit_failed(Which::Rebuild, &error) {
                Step::Waits => Ok(Swapped::Waits),
                Step::Moved | Step::AtEnd => Ok(Swapped::NotYet),
            },
        }
    }

    /// Applies the missing events and swaps the tables. Returns `None` if more is missing than the
    /// reach.
    fn last_transaction(
        &self,
        from: u64,
        in_handler: Arc<AtomicBool>,
    ) -> impl FnMut(&Transaction) -> Result<Option<Applied>> + Send + 'static {
        let (name, owned) = (self.settings.name.clone(), self.settings.owned.clone());
        let (store, wanted) = (self.settings.store.clone(), self.wanted.clone());
        let (handler, reach) = (Arc::clone(&self.handler), self.reach);
        move |tx| {
            in_handler.store(false, Ordering::Relaxed);
            // The end of the durable log: events of the same group may still be rolled back.
            let end = store.core().tail().next_seq;
            if !reach.spans(end.saturating_sub(from)) {
                return Ok(None);
            }
            let tables = tx.projecting(&name, &owned, Which::Rebuild)?;
            let mut applied = Applied { position: from, events: 0, stopped: false };
            while let Some(stretch) =
                read_stretch(&store, applied.position, &wanted, LOAD_EVENTS_MAX, PROJECTION_BATCH_BYTES_MAX)?
            {
                for event in &stretch.events {
                    in_handler.store(true, Ordering::Relaxed);
                    handler(event, &tables)?;
                    in_handler.store(false, Ordering::Relaxed);
                }
                applied.events += stretch.events.len();
                applied.position = stretch.position;
                if stretch.damaged.is_some() {
                    applied.stopped = true;
                    break;
                }
            }
            drop(tables);
            if applied.position > from {
                tx.move_projection(&name, Which::Rebuild, applied.position)?;
            }
            if !applied.stopped {
                tx.move_projection(&name, Which::Rebuild, applied.position.max(end))?;
                tx.finish_rebuild(&name, &owned)?;
            }
            Ok(Some(applied))
        }
    }

    fn rebuilt(&mut self, applied: &Applied) {
        let position = applied.position;
        tracing::info!(position, "rebuilt");
        self.live = Line::at(position, self.settings.batch);
        self.rebuild = None;
        self.frozen = false;
        self.shared.change(|status| {
            status.applied += applied.events as u64;
            status.state = ProjectionState::CatchingUp;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: the reach grows only if a rebuild does not gain, and has a bound. Method: gains,
    /// standstills and losses.
    #[test]
    fn the_reach_grows_where_nothing_is_gained() {
        let mut reach = Reach::of(1);
        for missing in [100, 50, 20] {
            reach.note(missing);
        }
        assert_eq!(reach.records, 1, "it gains");
        for (missing, records) in [(20, 2), (30, 4), (29, 4), (40, 8)] {
            reach.note(missing);
            assert_eq!(reach.records, records, "{missing}");
        }
        (0..100).for_each(|more| reach.note(1_000_000 + more));
        assert_eq!((reach.records, reach.step()), (REBUILD_REACH_MAX, LOAD_EVENTS_MAX));
        assert!(reach.spans(REBUILD_REACH_MAX as u64) && !reach.spans(REBUILD_REACH_MAX as u64 + 1));
    }
}
