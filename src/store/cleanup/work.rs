//! Who cleans up, and when: the writer thread, with each group that it commits and while it has nothing else to do.
//!
//! **Invariants.** One piece at a time, and the tasks take turns: a task that fails holds no other. Memory says only whether there is
//! anything to do, and after which task the next piece begins; what is left stands in the file.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redb::ReadableTable;

use super::Task;
use crate::error::{Error, Result, caught};
use crate::oneshot::Wakes;
use crate::storage::tables::schema::CLEANUP;
use crate::store::core::Core;
use crate::store::transaction::Transaction;
use crate::store::write_wait::Purpose;
use crate::store::writer::Write;
use crate::time::Deadline;
use crate::tuning::{CLEAN_PAUSE_MS, CLEAN_RETRY_MS, CLEAN_STEP};

#[derive(Debug)]
struct State {
    /// The next piece is of the first task behind this one, round and round.
    after: Vec<u8>,
    /// The task that the piece at work has come to.
    at: Vec<u8>,
    due: Deadline,
    /// A piece is under way, or stands in the line of writes.
    begun: bool,
    fails: u32,
}

/// What is remembered from one piece to the next. Lost with the process.
#[derive(Debug)]
pub(crate) struct Cleaning {
    is_left: AtomicBool,
    state: Mutex<State>,
}

impl Default for Cleaning {
    fn default() -> Self {
        let state = State { after: Vec::new(), at: Vec::new(), due: Deadline::now(), begun: false, fails: 0 };
        Self { is_left: AtomicBool::new(false), state: Mutex::new(state) }
    }
}

impl Cleaning {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many tasks are left. `true` if there were none before.
    pub(in crate::store) fn note_left(&self, tasks: u64) -> bool {
        !self.is_left.swap(tasks > 0, Ordering::SeqCst) && tasks > 0
    }

    /// When the next piece is due; `None` if nothing is left, or if a piece is under way.
    pub(in crate::store) fn due_at(&self) -> Option<Deadline> {
        if !self.is_left.load(Ordering::SeqCst) {
            return None;
        }
        let state = self.lock();
        (!state.begun).then_some(state.due)
    }

    /// Begins a piece, if one is due.
    pub(in crate::store) fn begin_if_due(&self) -> bool {
        let is_due = self.due_at().is_some_and(Deadline::is_over);
        if is_due {
            self.lock().begun = true;
        }
        is_due
    }
}

/// A piece, as the writer thread runs it.
pub(crate) struct CleanUp {
    core: Arc<Core>,
    outcome: Option<Result<Vec<u8>>>,
}

impl CleanUp {
    pub(in crate::store) fn new(core: &Arc<Core>) -> Self {
        Self { core: Arc::clone(core), outcome: None }
    }
}

impl Write for CleanUp {
    fn purpose(&self) -> &Purpose {
        static CLEAN_UP: Purpose = Purpose::Own("cleaning up");
        &CLEAN_UP
    }

    fn run(&mut self, tx: &Transaction) -> bool {
        let outcome = tx.within_own_bounds(|| caught(|| piece(tx)));
        let outcome = outcome.unwrap_or_else(|_| Err(Error::app("it panicked")));
        if let Err(error) = &outcome {
            tx.core.suspect(error);
        }
        let good = outcome.is_ok();
        self.outcome = Some(outcome);
        good
    }

    fn done(self: Box<Self>, _: &Arc<Core>, _: Option<&Arc<Wakes>>) {
        let Self { core, outcome } = *self;
        note(&core, outcome.unwrap_or_else(|| Err(Error::Closed { path: core.path.clone() })));
    }

    fn failed(self: Box<Self>, error: Error) {
        note(&self.core, Err(error));
    }
}

/// Does a piece: of one task after the other, until the budget is spent. The key of the last.
fn piece(tx: &Transaction) -> Result<Vec<u8>> {
    let mut budget = CLEAN_STEP;
    let mut at = tx.core.cleaning.lock().after.clone();
    let mut wrapped = false;
    while budget > 0 {
        let next = {
            let tasks = tx.redb().open_table(CLEANUP)?;
            let from = [&at[..], &[0]].concat();
            let row = tasks.range(from.as_slice()..)?.next().transpose()?;
            row.map(|(key, _)| key.value().to_vec())
        };
        let Some(key) = next else {
            if wrapped {
                break;
            }
            (wrapped, at) = (true, Vec::new());
            continue;
        };
        let task = Task::from_key(&key);
        if matches!(task, Some(Task::Tables(_))) && budget < CLEAN_STEP {
            // A table is removed by itself: the next piece begins with it.
            break;
        }
        at.clone_from(&key);
        tx.core.cleaning.lock().at.clone_from(&key);
        if let Some(task) = task {
            // What is left of it waits for its next turn.
            tx.clean(&task, &mut budget)?;
        }
    }
    Ok(at)
}

/// Notes how a piece has ended.
fn note(core: &Core, outcome: Result<Vec<u8>>) {
    let mut state = core.cleaning.lock();
    state.begun = false;
    match outcome {
        Ok(after) => {
            state.after = after;
            state.fails = 0;
            state.due = Deadline::after(Duration::from_millis(CLEAN_PAUSE_MS));
        }
        Err(error) => {
            // The next turn is another task's.
            state.after = state.at.clone();
            let (first, longest) = CLEAN_RETRY_MS;
            let delay = first.saturating_mul(1 << state.fails.min(16)).min(longest);
            state.fails += 1;
            state.due = Deadline::after(Duration::from_millis(delay));
            drop(state);
            tracing::error!(%error, "clean-up has failed; it is tried again");
        }
    }
}
