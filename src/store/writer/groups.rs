//! Groups of writes: which writes share a commit, and what is done when one of them fails.
//!
//! **A closure that fails leaves no trace.** What it gathered in memory (events, inbox entries) is rolled back in place.
//! If it opened a table for writing, redb cannot roll back it alone: the group is rolled back and the others run again
//! without it. That shows readers nothing early, which a `Durability::None` commit per closure would; see docs/decisions for
//! the figures. It is why closures are `FnMut`.
//!
//! **A failure costs the others little, whatever fails and however often.** What had succeeded before it runs again by
//! itself. It is committed before anything that was not tried yet. One that was rolled back a second time (another
//! that had succeeded has failed meanwhile) is a group of its own. So nothing runs more than [`RUNS_MAX`] times, and work
//! grows with the number of writes, not with its square.
//!
//! **Nobody waits for many handlers.** A group ends once its closures have run for a while, sooner where handlers run in it. The writes of handlers stand in a line of their own; where they are slow, or fail, the two lines take
//! turns. So a write of the application waits for one group, which ends behind the handler that exceeds the time.

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
    /// How often it succeeded and was rolled back for another's sake.
    undone: u8,
}

impl Queued {
    fn new(write: Box<dyn Write>) -> Self {
        Self { write, undone: 0 }
    }

    /// It runs by itself: should another fail behind it, it would run too often.
    fn is_alone(&self) -> bool {
        self.undone + 1 >= RUNS_MAX
    }
}

type Line = Vec<Queued>;

/// What waits for a group, in two lines, each in the order in which it came.
#[derive(Default)]
pub(in crate::store) struct Backlog {
    writes: VecDeque<Queued>,
    handlers: VecDeque<Queued>,
    /// Handlers have kept the writes of others waiting: the lines take turns.
    alternate: bool,
    /// The handlers are next.
    handlers_next: bool,
}

impl Backlog {
    pub(in crate::store) fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.handlers.is_empty()
    }

    /// Those of handlers do not count: their threads wait for them, so each has a batch here at most.
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

    /// What a group has not come to is first again. Those who are still to be woken.
    pub(in crate::store) fn take_back(&mut self, ran: Ran) -> Option<Arc<WakeChain>> {
        let of_handlers = ran.handlers > 0;
        let left_handlers = ran.rest.iter().any(|queued| queued.write.is_handler());
        self.alternate = match of_handlers {
            true => ran.cut,
            // They were to run in it, and it ended before.
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

/// What a group has come to.
pub(in crate::store) struct Ran {
    /// What it has not come to.
    rest: Line,
    /// It ended before its end: its time was over, or one of it failed.
    cut: bool,
    /// Handlers that have run in it.
    handlers: usize,
    wake_chain: Option<Arc<WakeChain>>,
}

/// Runs a write that skips the queue, on its caller's thread.
pub(crate) fn run_alone(core: &Arc<Core>, write: Box<dyn Write>, wait: &mut Wait) {
    // A group of one has no rest.
    run(core, vec![Queued::new(write)], Some(wait), |_, _| false);
}

/// Runs these writes to their end, in as many groups as it takes; `between` runs between two of them.
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

/// Runs a group and commits what succeeds of it, up to where it ends.  `chain` says
/// whether those of the group are woken in a chain, of the number of writers and the time of a sync.
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
    /// They have failed by themselves, or their callers have given up.
    done: Line,
    rest: Line,
    cut: bool,
    handlers: usize,
}

enum Attempt {
    Ended,
    /// What is left succeeded before, and was rolled back.
    Again,
}

impl Group<'_> {
    fn attempt(&mut self, wait: &mut Wait) -> Result<Attempt> {
        let mut tx = Transaction::begin_after(self.core, wait)?;
        let began = (self.live.len() > 1).then(Instant::now);
        let (mut at, mut tried_before) = (0, false);
        while let Some(queued) = self.live.get_mut(at) {
            // What was not tried yet may fail: never behind what was rolled back for another already.
            if at > 0 && (queued.is_alone() || (tried_before && queued.undone == 0)) {
                self.end_before(at);
                break;
            }
            if !queued.write.claim() {
                // Its caller has given up. It is dropped once the write lock is released: what it captured is foreign.
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

    /// What stands from here on is not of this group.
    fn end_before(&mut self, at: usize) {
        let mut behind = self.live.split_off(at);
        self.cut |= !behind.is_empty();
        behind.append(&mut self.rest);
        self.rest = behind;
    }

    /// Closures have run in it for long enough.
    fn is_over(&self, ran: Duration) -> bool {
        let longest = if self.handlers > 0 { HANDLERS_MS_MAX } else { GROUP_MS_MAX };
        ran >= Duration::from_millis(longest)
    }
}

/// Reports to each of a group what has become of it.
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
            // One commit, one outcome: where it is unknown, it is unknown for each of them.
            for queued in live {
                quietly(|| queued.write.failed(same(&error)));
            }
            // They failed by themselves; that the others could not be committed changes nothing for them.
            done.into_iter().for_each(report);
        }
    }
}

/// The same answer again, for another of the same group.
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
