//! When clean-up runs: the writer thread cleans up with each group that it commits, and while it
//! has nothing else to do.
//!
//! **Invariants.** One piece runs at a time, and the tasks take turns: a task that fails holds up
//! no other. Memory holds only whether there is anything to do, and after which task the next piece
//! begins. The remaining work is in the file.

use std::sync::Arc;
use std::time::Duration;

use redb::ReadableTable;

use crate::error::{Error, Result, caught};
use crate::oneshot::WakeChain;
use crate::storage::tables::cleanup::Task;
use crate::storage::tables::schema::CLEANUP;
use crate::store::shared::core::Core;
use crate::store::shared::write_wait::Purpose;
use crate::store::transaction::Transaction;
use crate::store::transaction::write::Write;
use crate::time::Deadline;
use crate::tuning::{CLEAN_PAUSE_MS, CLEAN_RETRY_MS, CLEAN_STEP};

/// A piece of clean-up, as the writer thread runs it.
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

    fn done(self: Box<Self>, _: &Arc<Core>, _: Option<&Arc<WakeChain>>) {
        let Self { core, outcome } = *self;
        note(&core, outcome.unwrap_or_else(|| Err(Error::Closed { path: core.path.clone() })));
    }

    fn failed(self: Box<Self>, error: Error) {
        note(&self.core, Err(error));
    }
}

/// Does a piece: one task after the other, until the budget is spent. Returns the key of the last
/// task.
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
            // A table is removed in a piece of its own: the next piece begins with the table.
            break;
        }
        at.clone_from(&key);
        tx.core.cleaning.lock().at.clone_from(&key);
        if let Some(task) = task {
            // The rest of the task waits for the task's next piece.
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
            // The next piece is for another task.
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
