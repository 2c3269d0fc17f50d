//! Clean-up: deleted or forgotten data is marked at once, and its rows are removed in bounded
//! pieces.
//!
//! The transaction that deletes something writes a row, a *task*. It removes the first piece
//! itself, so a small deletion leaves no task. The writer thread does the rest: a piece in each
//! group, and single pieces while the store is idle. A task is in the file until it is done. After
//! a crash or a close, the next opening continues the task.
//!
//! **Invariants.** One transaction removes at most `CLEAN_STEP` rows, or one table. No task names a
//! thing that can be made anew. A deleted stream takes no events, and a truncated stream gives no
//! revision twice. A new capture gets no id that a task names.

use redb::ReadableTable;

use crate::error::Result;
use crate::log::keys::CursorId;
use crate::storage::tables::cleanup::{Revisions, Task};
use crate::storage::tables::schema::CLEANUP;
use crate::store::shared::projections::shadow_prefix;
use crate::store::transaction::Transaction;

pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Returns the tasks for the failures and tables of an abandoned rebuild.
pub(crate) fn rebuild_tasks(id: CursorId) -> [Task; 2] {
    [Task::Failures(id), Task::Tables(shadow_prefix(id))]
}

impl Transaction {
    /// Marks something as to be removed, and removes a first piece of it.
    pub(crate) fn leave(&self, task: &Task) -> Result<()> {
        self.touch();
        let was_there = self.redb().open_table(CLEANUP)?.insert(task.key().as_slice(), &[][..])?.is_some();
        self.pending.borrow_mut().cleanup.tasks += i64::from(!was_there);
        // A table is removed as a whole, in a transaction of its own.
        if matches!(task, Task::Tables(_)) { Ok(()) } else { self.clean_within_budget(task) }
    }

    /// Works as [`leave`](Self::leave), for these revisions of a stream.
    pub(in crate::store) fn leave_revisions(&self, stream: &[u8], gone: std::ops::Range<u64>) -> Result<()> {
        self.touch();
        let task = Task::Stream(stream.to_vec());
        {
            let mut table = self.redb().open_table(CLEANUP)?;
            let key = task.key();
            let before = table.get(key.as_slice())?.map(|row| Revisions::from_bytes(row.value()));
            let known = before.flatten();
            let next = known.map_or(gone.start, |known| known.next);
            let left = Revisions { next, end: known.map_or(0, |known| known.end).max(gone.end) };
            table.insert(key.as_slice(), left.to_bytes().as_slice())?;
            let change = &mut self.pending.borrow_mut().cleanup;
            change.tasks += i64::from(before.is_none());
            change.events += signed(left.len()) - signed(known.map_or(0, Revisions::len));
        }
        self.clean_within_budget(&task)
    }

    /// Removes a piece within the transaction's budget: clean-up inside the application's
    /// transaction is bounded too.
    fn clean_within_budget(&self, task: &Task) -> Result<()> {
        let mut budget = self.cleaning_budget.get();
        if budget > 0 {
            self.clean(task, &mut budget)?;
            self.cleaning_budget.set(budget);
        }
        Ok(())
    }
}
