//! Groups of writes: which writes share a commit, and what happens if one of them fails.
//!
//! **A closure that fails leaves no trace.** Everything that it gathered in memory (events, inbox
//! entries) is rolled back in place. If the closure opened a table for writing, redb cannot roll
//! back that closure alone. Then the group is rolled back, and the other closures run again without
//! the failed one. So readers see nothing early. With a `Durability::None` commit per closure they
//! would; see docs/decisions for the figures. The second run is the reason why closures are
//! `FnMut`.
//!
//! **A failure costs the other writes little, however many fail.** The writes that had succeeded
//! before the failure run again in a group of their own. They are committed before any write that
//! was not tried yet. A write that was rolled back a second time is a group of its own: another
//! write that had succeeded has failed meanwhile. So nothing runs more than [`RUNS_MAX`] times, and
//! the work grows with the number of writes, not with its square.
//!
//! **No write waits for many handlers.** A group ends once its closures have run for a while, and
//! sooner where handlers run in it. The writes of handlers wait in a line of their own. Where
//! handlers are slow, or fail, the two lines take turns. So a write of the application waits for
//! one group, which ends after the handler that exceeds the time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::error::{Error, Result, StorageFailure};
use crate::oneshot::WakeChain;
use crate::store::shared::core::{Core, or_poison};
use crate::store::shared::write_wait::{Purpose, Wait};
use crate::store::transaction::Transaction;
use crate::store::transaction::write::{Write, quietly};
use crate::tuning::{BATCH_WRITES_MAX, GROUP_MS_MAX, HANDLERS_MS_MAX, RUNS_MAX};

/// A write in the queue.
pub(in crate::store) struct Queued {
    write: Box<dyn Write>,
    /// How often the write succeeded and was rolled back for the sake of another write.
    undone: u8,
}

impl Queued {
    fn new(write: Box<dyn Write>) -> Self {
        Self { write, undone: 0 }
    }

    /// Whether the write must be a group of its own. If a write behind it failed, this write would
    /// run too often.
    fn is_alone(&self) -> bool {
        self.undone + 1 >= RUNS_MAX
    }
}

type Line = Vec<Queued>;

/// The writes that wait for a group, in two lines, each in order of arrival.
#[derive(Default)]
pub(in crate::store) struct Backlog {
    writes: VecDeque<Queued>,
    handlers: VecDeque<Queued>,
    /// Handlers have kept the writes of others waiting, so the lines take turns.
    alternate: bool,
    /// The line of handlers is next.
    handlers_next: bool,
}

impl Backlog {
    pub(in crate::store) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.handlers.is_empty()
    }

    /// Whether the application's line has room. Writes of handlers do not count: their threads wait
    /// for them, so each thread has at most one batch here.
    pub(in crate::store) fn has_room(&self) -> bool {
        self.writes.len() < BATCH_WRITES_MAX
    }

    pub(in crate::store) fn push(&mut self, write: Box<dyn Write>) {
        let line = if write.is_handler() { &mut self.handlers } else { &mut self.writes };
        line.push_back(Queued::new(write));
    }

    pub(in crate::store) fn next_group(&mut self) -> Line {
        let alternate = self.alternate && !self.writes.is_empty() && !self.handlers.is_empty();
        let (writes, handlers) = match (alternate, self.handlers_next) {
            (true, true) => (0, BATCH_WRITES_MAX),
            (true, false) => (BATCH_WRITES_MAX, 0),
            (false, _) => {
                let writes = self.writes.len().min(BATCH_WRITES_MAX);
                (writes, BATCH_WRITES_MAX - writes)
            }
        };
        let writes = self.writes.drain(..writes.min(self.writes.len()));
        let handlers = self.handlers.drain(..handlers.min(self.handlers.len()));
        writes.chain(handlers).collect()
    }

    /// Puts the rest of a group back at the front of the lines. Returns the chain of callers that
    /// are still to be woken.
    pub(in crate::store) fn take_back(&mut self, ran: Ran) -> Option<Arc<WakeChain>> {
        let of_handlers = ran.handlers > 0;
        let left_handlers = ran.rest.iter().any(|queued| queued.write.is_handler());
        self.alternate = match of_handlers {
            true => ran.cut,
            // The handlers were to run in this group, and the group ended before them.
            false => self.alternate || left_handlers,
        };
        self.handlers_next = !of_handlers;
        for queued in ran.rest.into_iter().rev() {
            let line = if queued.write.is_handler() { &mut self.handlers } else { &mut self.writes };
            line.push_front(queued);
        }
        ran.wake_chain
    }
}

/// The result of a group's run.
pub(in crate::store) struct Ran {
    /// The writes that the group did not reach.
    rest: Line,
    /// The group ended early: its time was over, or one of its writes failed.
    cut: bool,
    /// How many handlers have run in the group.
    handlers: usize,
    wake_chain: Option<Arc<WakeChain>>,
}

/// Runs a write that skips the queue, on its caller's thread.
pub(crate) fn run_alone(core: &Arc<Core>, write: Box<dyn Write>, wait: &mut Wait) {
    // A group of one write has no rest.
    run(core, vec![Queued::new(write)], Some(wait), |_, _| false);
}

/// Runs these writes to their end, in as many groups as necessary. `between` runs between two
/// groups.
#[cfg(test)]
pub(crate) fn run_all(core: &Arc<Core>, writes: Vec<Box<dyn Write>>, mut between: impl FnMut()) {
    let mut backlog = Backlog::default();
    writes.into_iter().for_each(|write| backlog.push(write));
    while !backlog.is_empty() {
        let group = backlog.next_group();
        backlog.take_back(run(core, group, None, |_, _| false));
        if !backlog.is_empty() {
            between();
        }
    }
}

/// Runs a group and commits the writes that succeed, up to the point where the group ends. The
/// closure `chain` gets the number of writers and the time of a sync. It decides whether the
/// group's callers are woken in a chain.
pub(in crate::store) fn run(
    core: &Arc<Core>,
    live: Line,
    wait: Option<&mut Wait>,
    chain: impl Fn(usize, Duration) -> bool,
) -> Ran {
    let purpose = live.first().map_or(Purpose::Own("a group"), |queued| queued.write.purpose().clone());
    let mut own = None;
    let wait = wait.unwrap_or_else(|| own.insert(Wait::new(purpose, None)));
    let writes = live.len();
    let mut group = Group { core, live, done: Vec::new(), rest: Vec::new(), cut: false, handlers: 0 };
    let outcome = or_poison(core, || {
        while let Attempt::Again = group.attempt(wait)? {
            core.counters.reruns.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    });
    let Group { live, done, rest, cut, handlers, .. } = group;
    let chained = rest.is_empty() && chain(core.queue.company(), core.io.sync_time());
    let wake_chain = chained.then(Arc::default);
    core.queue.leave(writes - rest.len());
    answer(core, outcome, live, done, wake_chain.as_ref());
    Ran { rest, cut, handlers, wake_chain }
}

struct Group<'a> {
    core: &'a Arc<Core>,
    live: Line,
    /// These writes have failed by themselves, or their callers have given up.
    done: Line,
    rest: Line,
    cut: bool,
    handlers: usize,
}

enum Attempt {
    Ended,
    /// The remaining writes succeeded before, and were rolled back.
    Again,
}

impl Group<'_> {
    fn attempt(&mut self, wait: &mut Wait) -> Result<Attempt> {
        let mut tx = Transaction::begin_after(self.core, wait)?;
        let began = (self.live.len() > 1).then(Instant::now);
        let (mut at, mut tried_before) = (0, false);
        while let Some(queued) = self.live.get_mut(at) {
            // A write that was not tried yet may fail. It never runs behind a write that was
            // already rolled back for another.
            if at > 0 && (queued.is_alone() || (tried_before && queued.undone == 0)) {
                self.end_before(at);
                break;
            }
            if !queued.write.claim() {
                // The caller has given up. The write is dropped once the write lock is released:
                // its captures are foreign.
                self.done.push(self.live.remove(at));
                continue;
            }
            if began.is_some() {
                tx.set_purpose(queued.write.purpose());
            }
            self.handlers += usize::from(queued.write.is_handler());
            let (is_alone, undone) = (queued.is_alone(), queued.undone);
            let savepoint = tx.savepoint();
            tx.begin_write();
            if queued.write.run(&tx) {
                at += 1;
                tried_before |= undone > 0;
                if is_alone || tx.is_full() {
                    self.end_before(at);
                }
            } else {
                let dirty = tx.is_dirty_since(&savepoint);
                tx.roll_back_to(&savepoint);
                self.done.push(self.live.remove(at));
                if dirty {
                    tx.abort()?;
                    self.end_before(at);
                    self.cut = true;
                    self.live.iter_mut().for_each(|queued| queued.undone += 1);
                    return Ok(if self.live.is_empty() { Attempt::Ended } else { Attempt::Again });
                }
            }
            if at < self.live.len() && began.is_some_and(|began| self.is_over(began.elapsed())) {
                self.end_before(at);
            }
        }
        if tx.is_empty() {
            tx.abort()?;
        } else {
            tx.finish(self.live.len() as u64)?;
        }
        Ok(Attempt::Ended)
    }

    /// Ends the group before the write at `at`: this write and all behind it are for a later group.
    fn end_before(&mut self, at: usize) {
        let mut behind = self.live.split_off(at);
        self.cut |= !behind.is_empty();
        behind.append(&mut self.rest);
        self.rest = behind;
    }

    /// Whether closures have run in the group for long enough.
    fn is_over(&self, ran: Duration) -> bool {
        let longest = if self.handlers > 0 { HANDLERS_MS_MAX } else { GROUP_MS_MAX };
        ran >= Duration::from_millis(longest)
    }
}

/// Reports to each write of a group how it ended.
fn answer(
    core: &Arc<Core>,
    outcome: Result<()>,
    live: Line,
    done: Line,
    wake_chain: Option<&Arc<WakeChain>>,
) {
    let report = |queued: Queued| quietly(|| queued.write.done(core, wake_chain));
    match outcome {
        Ok(()) => live.into_iter().chain(done).for_each(report),
        Err(error) => {
            // One commit has one outcome: if the outcome is unknown, it is unknown for each write.
            for queued in live {
                quietly(|| queued.write.failed(same(&error)));
            }
            // These writes failed by themselves. For them it does not matter that the others could
            // not be committed.
            done.into_iter().for_each(report);
        }
    }
}

/// Copies an error, for another write of the same group.
pub(in crate::store) fn same(error: &Error) -> Error {
    match error {
        Error::CommitUnknown { cause } => Error::CommitUnknown { cause: Arc::clone(cause) },
        Error::Poisoned { path, cause } => Error::Poisoned { path: path.clone(), cause: Arc::clone(cause) },
        Error::Closed { path } => Error::Closed { path: path.clone() },
        Error::Panicked { message } => Error::Panicked { message: message.clone() },
        Error::WriteTimeout { path, waited_ms, holder } => {
            Error::WriteTimeout { path: path.clone(), waited_ms: *waited_ms, holder: holder.clone() }
        }
        Error::Forked { path, owner, process } => {
            Error::Forked { path: path.clone(), owner: *owner, process: *process }
        }
        other => Error::Storage(StorageFailure {
            action: "committing the group",
            cause: other.to_string().into(),
            fatal: matches!(other, Error::Storage(failure) if failure.fatal),
        }),
    }
}
