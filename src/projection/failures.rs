//! The events that a projection has given up: look at them, redrive them, or forget them.

use std::sync::Arc;
use std::time::SystemTime;

use super::handle::Projection;
use super::rows::{ProjectionFailure, not_rebuilt};
use crate::error::{CorruptError, Error, Result};
use crate::event::RecordedEvent;
use crate::quarantine_filter::{Entry, Facts, QuarantineFilter, change_all, list_matching, readable};
use crate::storage::tables::projection::Which;
use crate::store::read::snapshot::Snapshot;
use crate::time::wall_time;
use crate::tuning::REDRIVE_STEP;

/// The events that a running projection has given up. See [`Projection::failures`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{ProjectionFailures, QuarantineFilter};
/// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
/// let failures: ProjectionFailures<'_> = projection.failures();
/// assert_eq!(failures.discard_all(&QuarantineFilter::all())?, 0); // there are none
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct ProjectionFailures<'a> {
    pub(super) projection: &'a Projection,
}

impl Projection {
    /// Returns the events that the projection has given up: look at them, redrive them, or forget
    /// them.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(projection.failures().is_empty()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn failures(&self) -> ProjectionFailures<'_> {
        ProjectionFailures { projection: self }
    }
}

impl ProjectionFailure {
    /// Returns when the event became a failure, by the wall clock. [`since_ms`](Self::since_ms) is
    /// the same as a number.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use std::time::{Duration, SystemTime};
    /// # use onewrite::{Error, Event, FailurePolicy};
    /// # store.write(|tx| tx.append(Event::bytes("paid", "not a number").unpublished()))?;
    /// # let projection = store.projection("balances").on_failure(FailurePolicy::Quarantine { attempts: 1 })
    /// #     .spawn(|_, _| Err(Error::app("not a number")))?;
    /// # projection.wait_for_position(0, Duration::from_secs(5))?;
    /// let failure = projection.failures().list(None, 10)?.remove(0);
    /// assert!(failure.since() <= SystemTime::now());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn since(&self) -> SystemTime {
        wall_time(self.since_ms)
    }

    fn show_record(&mut self, snapshot: &Snapshot) -> Result<()> {
        let record = readable(snapshot.event(self.seq))?;
        self.event_type = record.as_ref().map(|record| record.event_type().to_owned());
        self.destination = record.as_ref().map(|record| record.destination().clone());
        Ok(())
    }
}

impl Entry for ProjectionFailure {
    fn number(&self) -> u64 {
        self.seq
    }

    fn facts(&self) -> Facts<'_> {
        let facts = Facts {
            event_type: self.event_type.as_deref(),
            reason: Some(&self.reason),
            attempts: Some(self.attempts),
            ..Facts::default()
        };
        facts.to(self.destination.as_ref())
    }
}

impl ProjectionFailures<'_> {
    /// Lists failures above sequence number `after`, in order, at most `limit`.
    ///
    /// # Errors
    /// Errors of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(projection.failures().list(None, 100)?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list(&self, after: Option<u64>, limit: usize) -> Result<Vec<ProjectionFailure>> {
        let store = &self.projection.store;
        let mut found = store.failures(&self.projection.name, after, limit)?;
        if !found.is_empty() {
            // The records stay for as long as their rows do.
            let snapshot = store.read()?;
            found.iter_mut().try_for_each(|failure| failure.show_record(&snapshot))?;
        }
        Ok(found)
    }

    /// Lists failures as [`list`](Self::list) does, but only those that the filter selects. It
    /// reads all of them.
    ///
    /// # Errors
    /// Errors of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// let paid = QuarantineFilter::all().event_type("paid");
    /// assert!(projection.failures().list_matching(&paid, None, 100)?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn list_matching(
        &self,
        filter: &QuarantineFilter,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Vec<ProjectionFailure>> {
        list_matching(filter, after, limit, |after, limit| self.list(after, limit))
    }

    /// Returns one failure with its record. The record is itself an error if that is why the event
    /// was given up.
    ///
    /// # Errors
    /// [`Error::NoSuchFailure`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(matches!(projection.failures().get(7), Err(Error::NoSuchFailure { seq: 7, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn get(&self, seq: u64) -> Result<(ProjectionFailure, Result<RecordedEvent>)> {
        let missing = || Error::NoSuchFailure { name: self.projection.name.clone(), seq };
        let failure = match seq.checked_sub(1) {
            None => self.list(None, 1)?,
            before => self.list(before, 1)?,
        };
        let failure = failure.into_iter().next().filter(|failure| failure.seq == seq).ok_or_else(missing)?;
        let gone = || Error::Corrupt(CorruptError { seq, what: "it is missing" });
        let record = self.projection.store.read()?.event(seq).and_then(|record| record.ok_or_else(gone));
        Ok((failure, record))
    }

    /// Gives a failed event to the handler once more, after all events that came since. If the
    /// handler succeeds, the event is no longer among the failures. When this returns `Ok`, that is
    /// durable.
    ///
    /// # Errors
    /// The handler's own error; [`Error::NoSuchFailure`]; [`Error::Corrupt`] if the record is
    /// damaged. [`Error::ProjectionStopped`] while the tables are of another version than the
    /// handler.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
    /// use std::time::Duration;
    /// use onewrite::{Error, Event, FailurePolicy};
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let broken = Arc::new(AtomicBool::new(true));
    /// let is_broken = Arc::clone(&broken);
    /// let projection = store.projection("counts").on_failure(FailurePolicy::Quarantine { attempts: 1 })
    ///     .spawn(move |_, _| if is_broken.load(Ordering::Relaxed) { Err(Error::app("broken")) } else { Ok(()) })?;
    /// projection.wait_for_position(0, Duration::from_secs(5))?;
    /// broken.store(false, Ordering::Relaxed);
    /// projection.failures().redrive(0)?;
    /// assert!(projection.failures().is_empty()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive(&self, seq: u64) -> Result<()> {
        let Projection { store, name, owned, handler, version, .. } = self.projection;
        store.core().owner.check()?;
        let (name, owned, handler, version) = (name.clone(), owned.clone(), Arc::clone(handler), *version);
        // An early check for the plain case, since a write would wait for the write lock first.
        if let Some(live) = store.core().tail().projections.get(&name).map(|row| row.live)
            && live.version != version
        {
            return Err(not_rebuilt(&name, live));
        }
        let redrive = move |tx: &crate::store::Transaction| {
            // Checked in the transaction: until a rebuild is done, the tables belong to another
            // handler.
            tx.require_version(&name, version)?;
            // The event is read first, because its record stays only as long as the failure does.
            let event = tx.event(seq);
            tx.drop_failure(&name, seq)?;
            let event = event?.ok_or(CorruptError { seq, what: "it is missing" })?;
            handler(&event, &tx.projecting(&name, &owned, Which::Live)?)
        };
        store.write(redrive).map(drop)
    }

    /// Redrives, as [`redrive`](Self::redrive) does, all failures that the filter selects, in
    /// order, each in a transaction of its own. Failures whose handler fails again, or whose
    /// records cannot be read, stay. Returns how many have gone.
    ///
    /// # Errors
    /// Errors of the storage engine, or [`Error::ProjectionStopped`]. Events before the error are
    /// done all the same.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert_eq!(projection.failures().redrive_all(&QuarantineFilter::all())?, 0); // there are none
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        self.for_all(filter, |seq| match self.redrive(seq) {
            Ok(()) => Ok(true),
            Err(
                error @ (Error::ProjectionStopped { .. }
                | Error::Storage(_)
                | Error::Poisoned { .. }
                | Error::CommitUnknown { .. }
                | Error::Closed { .. }
                | Error::Forked { .. }
                | Error::InsideTransaction { .. }
                | Error::WriteTimeout { .. }),
            ) => Err(error),
            Err(error) => {
                tracing::warn!(projection = %self.projection.name, seq, %error, "driven again in vain");
                Ok(false)
            }
        })
    }

    /// Forgets an event that was given up. When this returns `Ok`, that is durable.
    ///
    /// # Errors
    /// [`Error::NoSuchFailure`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Error;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(matches!(projection.failures().discard(7), Err(Error::NoSuchFailure { seq: 7, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard(&self, seq: u64) -> Result<()> {
        let name = self.projection.name.clone();
        self.projection.store.write(move |tx| tx.drop_failure(&name, seq)).map(drop)
    }

    /// Discards, as [`discard`](Self::discard) does, all failures that the filter selects. Returns
    /// how many.
    ///
    /// # Errors
    /// Errors of the storage engine. Events before the error are forgotten all the same.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert_eq!(projection.failures().discard_all(&QuarantineFilter::all())?, 0); // there are none
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard_all(&self, filter: &QuarantineFilter) -> Result<u64> {
        self.for_all(filter, |seq| match self.discard(seq) {
            Ok(()) => Ok(true),
            Err(Error::NoSuchFailure { .. }) => Ok(false),
            Err(error) => Err(error),
        })
    }

    /// Returns how many failures there are. It reads all their rows.
    ///
    /// # Errors
    /// Errors of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert_eq!(projection.failures().len()?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn len(&self) -> Result<u64> {
        let (mut after, mut count) = (None, 0);
        loop {
            let page = self.projection.store.failures(&self.projection.name, after, REDRIVE_STEP)?;
            let Some(last) = page.last() else { return Ok(count) };
            after = Some(last.seq);
            count += page.len() as u64;
        }
    }

    /// Whether there are no failures.
    ///
    /// # Errors
    /// Errors of redb.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(projection.failures().is_empty()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.projection.store.failures(&self.projection.name, None, 1)?.is_empty())
    }

    fn for_all(&self, filter: &QuarantineFilter, change: impl Fn(u64) -> Result<bool>) -> Result<u64> {
        let end = self.projection.store.core().tail().next_seq;
        let change_each = |failures: Vec<ProjectionFailure>| {
            failures.iter().map(|failure| change(failure.seq).map(u64::from)).sum::<Result<u64>>()
        };
        change_all(filter, end, |after, limit| self.list(after, limit), change_each)
    }
}
