//! The projection's thread: reads a piece of the log, applies it in one write closure, and moves
//! on.
//!
//! **Invariants.** A position moves only in the transaction that applies the events below it, or
//! past events that the filter lets pass. An event on which the handler fails is tried by itself,
//! so that the rest of its batch waits for one commit at most. The live track and a rebuild
//! alternate on this one thread, so that neither overtakes the other unseen.

mod swap;

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use self::swap::{Reach, Swapped};
use super::{Asked, FailurePolicy, Handler, ProjectionBuilder};
use crate::error::{Error, Result};
use crate::event::RecordedEvent;
use crate::printable::escaped;
use crate::projection::rows::{Stretch, read_stretch};
use crate::storage::tables::projection::{ProjectionRow, Which};
use crate::store::read::wanted::Wanted;
use crate::store::shared::log_pace::LogPace;
use crate::store::shared::notify::Listener;
use crate::store::shared::projections::RunningProjection;
use crate::store::shared::write_wait::Purpose;
use crate::store::{ProjectionState, Transaction};
use crate::time::{Deadline, Due, Look};
use crate::tuning::{PROJECTION_BATCH_BYTES_MAX, PROJECTION_SKIP_MAX};

/// How many batches a rebuild applies for each batch of the live track: the rebuild must be faster.
const REBUILD_BATCHES: usize = 8;

/// After this long, the worker writes its position past events that the filter has let pass,
/// regardless of other events. The log is not trimmed before.
const SKIPPED_AFTER: Duration = Duration::from_secs(1);

/// The progress of one track, as the thread sees it.
#[derive(Debug)]
struct Line {
    /// Every event below is done with, but perhaps not written yet if the filter let it pass.
    next: u64,
    /// The position that is durable.
    durable: u64,
    /// Failed tries of the event at `next`, and when the next try is due.
    attempts: u32,
    retry_at: Option<Due>,
    /// Whether the track stands still for good.
    stopped: bool,
    /// How many events the next batch may hold. After a failure this is one.
    batch: usize,
}

impl Line {
    fn at(position: u64, batch: usize) -> Self {
        Self { next: position, durable: position, attempts: 0, retry_at: None, stopped: false, batch }
    }
}

fn lines_ahead(live: &Line, rebuild: Option<&Line>) -> bool {
    std::iter::once(live).chain(rebuild).any(|line| line.next > line.durable)
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There may be more to do at once.
    Moved,
    /// The track is at the end of the log.
    AtEnd,
    /// The track waits for its next try, or stands still.
    Waits,
}

pub(super) struct Worker {
    /// The purpose of the worker's writes.
    purpose: Purpose,
    settings: ProjectionBuilder,
    wanted: Wanted,
    handler: Arc<Handler>,
    shared: Arc<RunningProjection>,
    asked: Arc<Asked>,
    listener: Listener,
    live: Line,
    /// The live tables are of another version than the handler, and stay as they are.
    frozen: bool,
    rebuild: Option<Line>,
    /// The file still has a rebuild to a version other than the handler's.
    stale: bool,
    pace: LogPace,
    reach: Reach,
    /// The rebuild for this version was cancelled, and no new one was requested.
    cancelled: bool,
    /// The live track was at the end of the log at its last look.
    caught_up: bool,
    /// When to write that the filter has let events pass.
    unwritten: Option<Due>,
}

/// Why a batch was not committed.
enum Failed {
    /// The handler failed on the event at this place in the batch.
    At(usize, Error),
    /// The handler took all events, but the group that they were committed with failed.
    Commit(Error),
    /// The store is lost.
    Lost(Error),
}

impl Worker {
    pub(super) fn new(
        settings: ProjectionBuilder,
        wanted: Wanted,
        (row, cancelled): (ProjectionRow, bool),
        handler: Arc<Handler>,
        shared: Arc<RunningProjection>,
        asked: Arc<Asked>,
        listener: Listener,
    ) -> Self {
        let batch = settings.batch;
        let frozen = row.live.version != settings.version;
        // A rebuild to a version other than the handler's is of no use any more.
        let rebuild = row.rebuild.filter(|rebuild| rebuild.version == settings.version);
        let stale = row.rebuild.is_some() && rebuild.is_none();
        let purpose = Purpose::Handler("projection", settings.name.as_str().into());
        Self {
            purpose,
            wanted,
            handler,
            shared,
            asked,
            listener,
            live: Line::at(row.live.position, batch),
            frozen,
            rebuild: rebuild.map(|rebuild| Line::at(rebuild.position, batch)),
            stale,
            pace: LogPace::default(),
            reach: Reach::of(batch),
            cancelled,
            caught_up: false,
            unwritten: None,
            settings,
        }
    }

    /// Runs the thread from start to end.
    pub(super) fn run(mut self) {
        let span = tracing::info_span!("projection", projection = %self.settings.name);
        let _entered = span.enter();
        let ended = self.work();
        let state = match ended.and_then(|()| self.write_skipped()) {
            Ok(()) => ProjectionState::Ended,
            Err(error) => {
                tracing::error!(%error, "the projection can do nothing more");
                ProjectionState::Failed(error.to_string())
            }
        };
        self.shared.change(|status| status.state = state);
    }

    /// Works until a stop is requested. Fails only if the store is lost.
    fn work(&mut self) -> Result<()> {
        let name = self.settings.name.clone();
        if self.frozen && self.rebuild.is_none() && !self.cancelled {
            // This drops a stale rebuild too.
            self.begin_rebuild()?;
        } else if self.stale {
            // A version was withdrawn. Its rebuild will not go on, and the log would wait for it
            // for ever.
            self.write(move |tx| tx.cancel_rebuild(&name))?;
        }
        while !self.stops() {
            self.settings.store.ready()?;
            if self.asked.pause.load(Ordering::Acquire) {
                self.rest();
                continue;
            }
            if self.asked.rebuild.load(Ordering::Acquire) {
                self.begin_rebuild()?;
                // Cleared only now: a caller that waits for the rebuild always sees it requested or
                // under way.
                self.asked.rebuild.store(false, Ordering::Release);
            }
            let live = if self.frozen { Step::Waits } else { self.step(Which::Live)? };
            let rebuild = self.step_rebuild()?;
            self.show(live);
            if self.skipped_due().is_some_and(|due| due.has_come(self.look())) {
                self.write_skipped()?;
            }
            if live != Step::Moved && rebuild != Step::Moved {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// Sleeps during a pause, and shows the pause in the status.
    fn rest(&self) {
        let mut before = None;
        self.shared.change(|status| before = Some(mem::replace(&mut status.state, ProjectionState::Paused)));
        while self.asked.pause.load(Ordering::Acquire) && !self.stops() && self.settings.store.ready().is_ok()
        {
            self.listener.signal.wait_until(Deadline::Never);
        }
        self.shared.change(|status| status.state = before.take().unwrap_or_default());
    }

    fn stops(&self) -> bool {
        self.asked.stop.load(Ordering::Acquire)
    }

    /// Sleeps until the log has grown or a try is due.
    fn wait(&mut self) -> Result<()> {
        let lines = std::iter::once(&self.live).chain(&self.rebuild);
        let due = lines.filter_map(|line| line.retry_at.filter(|_| !line.stopped)).min();
        let skipped_due = self.skipped_due();
        let wake_at = due.into_iter().chain(skipped_due).map(Due::wake_at).min();
        let notified = self.listener.signal.wait_until(wake_at.unwrap_or(Deadline::Never));
        if notified && !self.stops() && !self.settings.delay.is_zero() {
            // Let more events gather. An urgent request also notifies, and ends the next sleep.
            let gathered = self.look().delayed(self.settings.delay);
            while !self.stops() && self.settings.store.ready().is_ok() && !gathered.has_come(self.look()) {
                std::thread::sleep(gathered.wake_at().left_or_max().min(Duration::from_millis(20)));
            }
        }
        Ok(())
    }

    /// When to write down events that the filter let pass. Only the write moves this time.
    fn skipped_due(&mut self) -> Option<Due> {
        let look = lines_ahead(&self.live, self.rebuild.as_ref()).then(|| self.look());
        self.unwritten = look.map(|look| self.unwritten.unwrap_or_else(|| look.delayed(SKIPPED_AFTER)));
        self.unwritten
    }

    fn look(&self) -> Look {
        Look::at(&*self.settings.store.core().settings.clock)
    }

    fn show(&self, live: Step) {
        let (position, rebuilding) = (self.live.next, self.rebuild.as_ref().map(|line| line.next));
        self.shared.change(|status| {
            status.position = position;
            status.rebuilding = rebuilding;
            match (live, &status.state) {
                (_, ProjectionState::Stopped { .. }) if self.live.stopped => {}
                (Step::Waits, ProjectionState::Stopped { .. }) => {}
                (Step::Waits, _) if self.cancelled && self.frozen => {
                    status.state = ProjectionState::Cancelled
                }
                (Step::Waits, _) if self.frozen => status.state = ProjectionState::Rebuilding,
                (Step::Waits, _) => {}
                (Step::AtEnd, _) => status.state = ProjectionState::Live,
                (Step::Moved, ProjectionState::Live) => {}
                // The track was at the end at its last look. Writers that never pause do not change
                // that.
                (Step::Moved, _) if self.caught_up => status.state = ProjectionState::Live,
                (Step::Moved, _) => status.state = ProjectionState::CatchingUp,
            }
        });
    }

    fn line(&mut self, which: Which) -> Option<&mut Line> {
        match which {
            Which::Live => Some(&mut self.live),
            Which::Rebuild => self.rebuild.as_mut(),
        }
    }

    fn begin_rebuild(&mut self) -> Result<()> {
        let (name, version) = (self.settings.name.clone(), self.settings.version);
        tracing::info!(version, "rebuilding");
        let trimmed_to = self.settings.store.core().tail().trimmed_to;
        if trimmed_to > 0 {
            tracing::warn!(
                trimmed_to,
                "events below that no stream keeps are trimmed, and not in the rebuilt tables"
            );
        }
        self.write(move |tx| {
            tx.begin_rebuild(&name, version)?;
            Ok(())
        })?;
        self.rebuild = Some(Line::at(0, self.settings.batch));
        self.reach = Reach::of(self.settings.batch);
        self.cancelled = false;
        let frozen = self.frozen;
        self.shared.change(|status| {
            status.rebuilding = Some(0);
            status.rebuild_stopped = None;
            if frozen {
                status.state = ProjectionState::Rebuilding;
            }
        });
        Ok(())
    }

    fn step_rebuild(&mut self) -> Result<Step> {
        let stepped = self.step_rebuild_on();
        // A failure that comes from a cancelled rebuild does not count.
        if self.note_cancelled() { Ok(Step::Moved) } else { stepped }
    }

    /// Drops a rebuild that was cancelled, here or through the store. Returns whether it was
    /// cancelled.
    fn note_cancelled(&mut self) -> bool {
        let row = self.settings.store.core().tail().projections.get(&self.settings.name).copied();
        if self.rebuild.is_none() || row.is_none_or(|row| row.rebuild.is_some()) {
            return false;
        }
        tracing::info!("the rebuild was cancelled");
        (self.rebuild, self.cancelled) = (None, true);
        let frozen = self.frozen;
        self.shared.change(|status| {
            status.rebuilding = None;
            status.rebuild_stopped = frozen.then(|| super::CANCELLED.into());
            if frozen {
                status.state = ProjectionState::Cancelled;
            }
        });
        true
    }

    fn step_rebuild_on(&mut self) -> Result<Step> {
        for _ in 0..REBUILD_BATCHES {
            if self.rebuild.is_none() || self.stops() {
                return Ok(Step::Waits);
            }
            match self.swap()? {
                Swapped::Done => return Ok(Step::Moved),
                Swapped::Waits => return Ok(Step::Waits),
                Swapped::NotYet => {}
            }
            match self.step(Which::Rebuild)? {
                Step::Waits => return Ok(Step::Waits),
                Step::Moved | Step::AtEnd => self.widen_reach(),
            }
        }
        Ok(Step::Moved)
    }

    /// Reads and applies one piece of the log.
    fn step(&mut self, which: Which) -> Result<Step> {
        let look = self.look();
        let Some(line) = self.line(which) else { return Ok(Step::Waits) };
        if line.stopped || line.retry_at.is_some_and(|due| !due.has_come(look)) {
            return Ok(Step::Waits);
        }
        let (next, batch) = (line.next, line.batch);
        let store = &self.settings.store;
        // A rebuild that does not gain on the writers takes more at a time.
        let widens = which == Which::Rebuild && batch == self.settings.batch;
        let batch = if widens { batch.max(self.reach.step()) } else { batch };
        let stretch = read_stretch(store, next, &self.wanted, batch, PROJECTION_BATCH_BYTES_MAX)?;
        let at_end = stretch.as_ref().is_none_or(|stretch| stretch.at_end);
        if which == Which::Live {
            self.caught_up = at_end;
        }
        let Some(stretch) = stretch else { return Ok(Step::AtEnd) };
        if stretch.events.is_empty() {
            return self.pass(which, &stretch);
        }
        let position = stretch.position;
        match self.apply(which, stretch.events.clone(), position) {
            Ok(()) => self.moved(which, position, stretch.events.len()),
            Err(Failed::Lost(error)) => return Err(error),
            Err(Failed::Commit(error)) => return Ok(self.commit_failed(which, &error)),
            Err(Failed::At(0, error)) => {
                let seq = stretch.events.first().map_or(next, |event| event.seq());
                return self.failed(which, seq, &error);
            }
            Err(Failed::At(at, error)) => {
                tracing::debug!(%error, "the batch is applied up to the event that fails");
                let good: Vec<_> = stretch.events.into_iter().take(at).collect();
                let Some(position) = good.last().map(|event| event.seq() + 1) else { return Ok(Step::Moved) };
                let applied = good.len();
                match self.apply(which, good, position) {
                    Ok(()) => self.moved(which, position, applied),
                    Err(Failed::Lost(error)) => return Err(error),
                    // Another event fails now: from here on the worker applies one event at a time.
                    Err(Failed::At(..)) => {}
                    Err(Failed::Commit(error)) => return Ok(self.commit_failed(which, &error)),
                }
                if let Some(line) = self.line(which) {
                    line.batch = 1;
                }
            }
        }
        Ok(Step::Moved)
    }

    /// Moves past events that the filter lets pass. Stands before a record that cannot be read.
    fn pass(&mut self, which: Which, stretch: &Stretch) -> Result<Step> {
        let batch = self.settings.batch;
        let Some(line) = self.line(which) else { return Ok(Step::Waits) };
        line.next = stretch.position;
        if let Some((seq, error)) = &stretch.damaged {
            // Another try heals no record.
            line.attempts = u32::MAX - 1;
            return self.failed(which, *seq, error);
        }
        // An event with a due try may be gone because its stream was truncated. Then nothing is due
        // any more.
        (line.attempts, line.retry_at, line.batch) = (0, None, batch);
        if line.next - line.durable >= PROJECTION_SKIP_MAX {
            self.write_position(which)?;
        }
        Ok(Step::Moved)
    }

    fn moved(&mut self, which: Which, position: u64, applied: usize) {
        let batch = self.settings.batch;
        if let Some(line) = self.line(which) {
            *line = Line::at(position, batch);
        }
        let live = which == Which::Live;
        self.shared.change(|status| {
            status.applied += applied as u64;
            if live {
                status.position = position;
            } else {
                status.rebuilding = Some(position);
            }
        });
    }

    /// Handles a handler's failure on the first event of a batch, or a damaged record.
    fn failed(&mut self, which: Which, seq: u64, error: &Error) -> Result<Step> {
        let (policy, backoff) = (self.settings.policy, self.settings.backoff);
        let Some(line) = self.line(which) else { return Ok(Step::Waits) };
        line.attempts = line.attempts.saturating_add(1);
        line.batch = 1;
        let attempts = line.attempts;
        let reason = escaped(error.to_string());
        self.shared.change(|status| status.failed_tries += 1);
        if attempts < policy.attempts() {
            let wait = backoff.0.saturating_mul(1 << (attempts - 1).min(16)).min(backoff.1);
            let due = self.look().after(wait);
            if let Some(line) = self.line(which) {
                line.retry_at = Some(due);
            }
            tracing::warn!(seq, attempts, %reason, "an event is tried again later");
            if which == Which::Live {
                self.shared.change(|status| status.state = ProjectionState::Retrying { seq, reason });
            }
            return Ok(Step::Waits);
        }
        match policy {
            FailurePolicy::Stop { .. } => {
                tracing::error!(seq, %reason, "the projection stands still");
                if let Some(line) = self.line(which) {
                    line.stopped = true;
                }
                let frozen = self.frozen;
                self.shared.change(|status| {
                    if which == Which::Rebuild {
                        status.rebuild_stopped = Some(format!("event {seq}: {reason}"));
                    }
                    if which == Which::Live || frozen {
                        status.state = ProjectionState::Stopped { seq, reason };
                    }
                });
                Ok(Step::Waits)
            }
            FailurePolicy::Quarantine { .. } => {
                let now_ms = self.settings.store.core().settings.clock.now().mono_ms;
                match self.pace.admit(now_ms) {
                    Some(held_back) => {
                        tracing::error!(seq, %reason, held_back, "the projection goes on without an event");
                    }
                    None => tracing::debug!(seq, %reason, "the projection goes on without an event"),
                }
                let name = self.settings.name.clone();
                // A damaged record had one try.
                let attempts = if attempts == u32::MAX { 1 } else { attempts };
                self.write(move |tx| tx.give_up_event(&name, which, seq, attempts, &reason))?;
                self.moved(which, seq + 1, 0);
                self.shared.change(|status| status.quarantined += 1);
                Ok(Step::Moved)
            }
        }
    }

    /// Applies a batch in one write closure. Applies all of it, or returns the place where the
    /// handler failed.
    fn apply(&self, which: Which, events: Vec<Arc<RecordedEvent>>, position: u64) -> Result<(), Failed> {
        let (at, count) = (Arc::new(AtomicUsize::new(0)), events.len());
        let (handler, reached) = (Arc::clone(&self.handler), Arc::clone(&at));
        let (name, owned) = (self.settings.name.clone(), self.settings.owned.clone());
        let applied = self.write(move |tx| {
            let tables = tx.projecting(&name, &owned, which)?;
            for (index, event) in events.iter().enumerate() {
                reached.store(index, Ordering::Relaxed);
                handler(event, &tables)?;
            }
            reached.store(events.len(), Ordering::Relaxed);
            tx.move_projection(&name, which, position)
        });
        applied.map_err(|error| match at.load(Ordering::Relaxed) {
            // The handler may have met another store that is closed.
            _ if self.settings.store.ready().is_err() => Failed::Lost(error),
            all if all == count => Failed::Commit(error),
            at => Failed::At(at, error),
        })
    }

    /// No event is to blame: the whole batch is tried again after a while, and no attempt is spent.
    fn commit_failed(&mut self, which: Which, error: &Error) -> Step {
        tracing::warn!(%error, "a group could not be committed; its events are applied again");
        let due = self.look().after(self.settings.backoff.0);
        if let Some(line) = self.line(which) {
            line.retry_at = Some(due);
        }
        Step::Waits
    }

    /// Writes the position up to which the filter has let everything pass.
    fn write_position(&mut self, which: Which) -> Result<()> {
        let Some(line) = self.line(which) else { return Ok(()) };
        let (position, name) = (line.next, self.settings.name.clone());
        self.write(move |tx| tx.move_projection(&name, which, position))?;
        if let Some(line) = self.line(which) {
            line.durable = position;
        }
        Ok(())
    }

    /// Writes the positions past events that the filter let pass, so that none is read again.
    fn write_skipped(&mut self) -> Result<()> {
        for which in [Which::Live, Which::Rebuild] {
            if self.line(which).is_some_and(|line| line.next > line.durable) {
                let written = self.write_position(which);
                if !self.note_cancelled() {
                    written?;
                }
            }
        }
        self.unwritten = None;
        Ok(())
    }

    /// Queues a write among the application's own writes. A group takes it along.
    fn write<T: Send + 'static>(
        &self,
        write: impl FnMut(&Transaction) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = &self.settings.store;
        let submitted = store.submit(&self.purpose, write)?;
        store.answer(submitted).map(crate::store::Receipt::into_value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{StartAt, Store};

    /// Goal: a try that is no longer due wakes no thread. Method: an event has failed, and at its
    /// next try it is gone (its stream was truncated, and it was trimmed). Then nothing is due, and
    /// the next batch is a whole one.
    #[test]
    fn a_try_that_is_gone_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("a.redb")).unwrap();
        let row = store.projection_row("p", 1, StartAt::Oldest).unwrap();
        let (shared, asked) = (Arc::default(), Arc::default());
        let listener = store.core().notifier.subscribe(None);
        let wanted = Wanted::all(&store.core().settings.upcasts);
        let mut worker = Worker::new(
            store.projection("p"),
            wanted,
            (row, false),
            Arc::new(|_, _| Ok(())),
            shared,
            asked,
            listener,
        );
        worker.failed(Which::Live, 0, &Error::app("it cannot be applied")).unwrap();
        assert!(worker.live.retry_at.is_some());
        let stretch = Stretch { position: 1, ..Stretch::default() };
        assert_eq!(worker.pass(Which::Live, &stretch).unwrap(), Step::Moved);
        let Line { next, attempts, retry_at, batch, .. } = worker.live;
        assert_eq!((next, attempts, retry_at, batch), (1, 0, None, worker.settings.batch));
    }
}
