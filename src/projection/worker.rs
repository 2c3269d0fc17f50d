//! The projection's thread: reads a stretch of the log, applies it in one write closure, moves on.
//!
//! **Invariants.** A position moves only in the transaction that applies what it passes, or past what the filter lets pass.
//! An event on which the handler fails is tried by itself, so that nothing else of its batch waits for it longer than
//! one commit. The live track and a rebuild alternate on this one thread, so that neither overtakes the other unseen.

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

/// Batches that a rebuild applies for one of the live track: it has to become the faster one.
const REBUILD_BATCHES: usize = 8;

/// What a filter has let pass is written down for its own sake after so long, whatever else happens meanwhile: the log is not
/// trimmed before.
const SKIPPED_AFTER: Duration = Duration::from_secs(1);

/// One line of progress, as the thread sees it.
#[derive(Debug)]
struct Line {
    /// Everything below is done with, though perhaps not written yet where the filter let it pass.
    next: u64,
    /// The position that is durable.
    durable: u64,
    /// Tries of the event at `next` that failed, and when the next one is due.
    attempts: u32,
    retry_at: Option<Due>,
    /// It stands still for good.
    stopped: bool,
    /// How many events the next batch may hold: one, after a failure.
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

/// What a step has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// There may be more to do at once.
    Moved,
    /// It is at the end of the log.
    AtEnd,
    /// It waits for its next try, or stands still.
    Waits,
}

pub(super) struct Worker {
    /// What its writes are for.
    purpose: Purpose,
    settings: ProjectionBuilder,
    wanted: Wanted,
    handler: Arc<Handler>,
    shared: Arc<RunningProjection>,
    asked: Arc<Asked>,
    listener: Listener,
    live: Line,
    /// The live tables are of another version than the handler: they stay as they are.
    frozen: bool,
    rebuild: Option<Line>,
    /// The file still knows a rebuild to another version than ours.
    stale: bool,
    pace: LogPace,
    reach: Reach,
    /// The rebuild for this version was cancelled, and none was asked for since.
    cancelled: bool,
    /// The live track had read to the end of the log when it last looked.
    caught_up: bool,
    /// What the filter has let pass waits to be written.
    unwritten: Option<Due>,
}

/// Why a batch was not committed.
enum Failed {
    /// The handler failed on the event of this place in the batch.
    At(usize, Error),
    /// The handler took them all; the group that they were committed with failed.
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
        // A rebuild to another version than ours is of no use any more.
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

    /// The thread's whole life.
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

    /// Goes on until it is asked to stop. Fails only if the store is lost.
    fn work(&mut self) -> Result<()> {
        let name = self.settings.name.clone();
        if self.frozen && self.rebuild.is_none() && !self.cancelled {
            // Which drops a stale one too.
            self.begin_rebuild()?;
        } else if self.stale {
            // A version was taken back. Nobody goes on with its rebuild, and the log would wait for it for ever.
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
                // Only now: who waits for the rebuild sees it asked for, or under way, at any time.
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

    /// Sleeps for as long as it is paused, and shows that meanwhile.
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
            // Let more gather; what asks for haste notifies too, and is heard by the sleeper next.
            let gathered = self.look().delayed(self.settings.delay);
            while !self.stops() && self.settings.store.ready().is_ok() && !gathered.has_come(self.look()) {
                std::thread::sleep(gathered.wake_at().left_or_max().min(Duration::from_millis(20)));
            }
        }
        Ok(())
    }

    /// When what was let pass is to be written down. Only writing it moves this.
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
                // It was at the end when it last looked; writers that never pause are no reason to say otherwise.
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
        // What failed because the rebuild is gone has not failed.
        if self.note_cancelled() { Ok(Step::Moved) } else { stepped }
    }

    /// Lets go of a rebuild that was cancelled, here or through the store; whether it was.
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

    /// Reads and applies one stretch.
    fn step(&mut self, which: Which) -> Result<Step> {
        let look = self.look();
        let Some(line) = self.line(which) else { return Ok(Step::Waits) };
        if line.stopped || line.retry_at.is_some_and(|due| !due.has_come(look)) {
            return Ok(Step::Waits);
        }
        let (next, batch) = (line.next, line.batch);
        let store = &self.settings.store;
        // A rebuild that does not gain on its writers takes more at a time.
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
                    // It fails on another now: from here on one by one.
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

    /// Goes past what the filter lets pass; stands before a record that cannot be read.
    fn pass(&mut self, which: Which, stretch: &Stretch) -> Result<Step> {
        let batch = self.settings.batch;
        let Some(line) = self.line(which) else { return Ok(Step::Waits) };
        line.next = stretch.position;
        if let Some((seq, error)) = &stretch.damaged {
            // Trying again heals no record.
            line.attempts = u32::MAX - 1;
            return self.failed(which, *seq, error);
        }
        // An event that was to be tried again may be gone, its stream truncated: then nothing is due any more.
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

    /// The handler fails on this event, which is the first of its batch; or its record is damaged.
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
                // Of a damaged record there was one try.
                let attempts = if attempts == u32::MAX { 1 } else { attempts };
                self.write(move |tx| tx.give_up_event(&name, which, seq, attempts, &reason))?;
                self.moved(which, seq + 1, 0);
                self.shared.change(|status| status.quarantined += 1);
                Ok(Step::Moved)
            }
        }
    }

    /// One write closure for a batch: all of it, or the place in it where the handler failed.
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
            // A handler may have met another store that is closed.
            _ if self.settings.store.ready().is_err() => Failed::Lost(error),
            all if all == count => Failed::Commit(error),
            at => Failed::At(at, error),
        })
    }

    /// Nobody's event is to blame: all of it is tried again after a while, and no attempt is spent.
    fn commit_failed(&mut self, which: Which, error: &Error) -> Step {
        tracing::warn!(%error, "a group could not be committed; its events are applied again");
        let due = self.look().after(self.settings.backoff.0);
        if let Some(line) = self.line(which) {
            line.retry_at = Some(due);
        }
        Step::Waits
    }

    /// Writes how far the filter has let everything pass.
    fn write_position(&mut self, which: Which) -> Result<()> {
        let Some(line) = self.line(which) else { return Ok(()) };
        let (position, name) = (line.next, self.settings.name.clone());
        self.write(move |tx| tx.move_projection(&name, which, position))?;
        if let Some(line) = self.line(which) {
            line.durable = position;
        }
        Ok(())
    }

    /// At the end: what was let pass need not be looked at again.
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

    /// A write among the application's own, in the queue: a group takes it along.
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

    /// Goal: a try that is no longer due keeps nobody awake. Method: an event has failed, and at its next try it is gone (its
    /// stream was truncated, and it was trimmed); then nothing is due, and the next batch is a whole one.
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
