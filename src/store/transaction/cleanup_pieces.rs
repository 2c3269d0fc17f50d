//! A piece of a task, within a budget of rows.

use redb::{MultimapTableHandle, ReadableTable, TableDefinition, TableHandle};

use crate::error::Result;
use crate::log::keys;
use crate::log::streams::{NO_SEQ, Run};
use crate::printable::printable;
use crate::storage::tables::cleanup::{Revisions, Task};
use crate::storage::tables::schema::{CHANGES, CHUNKS, CLEANUP, DUE, EXCEPTIONS, FAILURES, PARKED};
use crate::store::transaction::Transaction;
use crate::store::transaction::cleanup::signed;
use crate::store::transaction::projections::delete_any;
use crate::tuning::CLEAN_STEP;

type Bytes = &'static [u8];

/// How many rows a piece may still remove.
pub(in crate::store) type Budget = usize;

/// How many skipped references cost as much as one removed record. A reference is skipped if
/// trimming removes its record.
const SKIPPED_PER_ROW: usize = 16;

impl Transaction {
    /// Removes a piece of the task, and the task's row once nothing is left. Returns whether
    /// something is left.
    pub(in crate::store) fn clean(&self, task: &Task, budget: &mut Budget) -> Result<bool> {
        self.touch();
        let key = task.key();
        let left = match task {
            Task::Stream(name) => self.clean_stream(name, &key, budget)?,
            Task::Failures(id) => self.clean_rows(FAILURES, &id.to_be_bytes(), budget)?,
            Task::Relay(id) => {
                let mut left = false;
                for table in [EXCEPTIONS, DUE, PARKED] {
                    left = left || self.clean_rows(table, &id.to_be_bytes(), budget)?;
                }
                left
            }
            Task::DirtyKeys(id) => self.clean_keys(CHANGES, &id.to_be_bytes(), budget)?.1,
            Task::Tables(prefix) => self.clean_table(prefix, budget)?,
        };
        if !left && self.redb().open_table(CLEANUP)?.remove(key.as_slice())?.is_some() {
            self.pending.borrow_mut().cleanup.tasks -= 1;
        }
        Ok(left)
    }

    /// Removes rows whose keys begin with `prefix` and end with a sequence number. Also removes the
    /// records that were kept only for these rows.
    fn clean_rows(
        &self,
        table: TableDefinition<'_, Bytes, Bytes>,
        prefix: &[u8],
        budget: &mut Budget,
    ) -> Result<bool> {
        let (gone, left) = self.clean_keys(table, prefix, budget)?;
        let seqs: Vec<_> = gone.iter().filter_map(|key| keys::last_seq(key)).collect();
        self.release(&seqs)?;
        Ok(left)
    }

    /// Removes rows whose keys begin with `prefix`. Returns their keys, and whether there are more.
    fn clean_keys(
        &self,
        table: TableDefinition<'_, Bytes, Bytes>,
        prefix: &[u8],
        budget: &mut Budget,
    ) -> Result<(Vec<Vec<u8>>, bool)> {
        let mut table = self.redb().open_table(table)?;
        let mut gone = Vec::new();
        let mut left = false;
        for row in table.range(prefix..)? {
            let (key, _) = row?;
            if !key.value().starts_with(prefix) {
                break;
            }
            if *budget == 0 {
                left = true;
                break;
            }
            *budget -= 1;
            gone.push(key.value().to_vec());
        }
        for key in &gone {
            table.remove(key.as_slice())?;
        }
        Ok((gone, left))
    }

    /// Removes records of a stream that trimming has passed, and the chunks that lead to them.
    /// Trimming itself removes the records that it has not passed yet: the stream's state does not
    /// want them any more.
    fn clean_stream(&self, name: &[u8], key: &[u8], budget: &mut Budget) -> Result<bool> {
        let row = self.redb().open_table(CLEANUP)?.get(key)?.map(|row| row.value().to_vec());
        let Some(row) = row else { return Ok(false) };
        let Some(before) = Revisions::from_bytes(&row) else {
            let stream = String::from_utf8_lossy(name);
            tracing::error!(stream = %printable(&stream), "a row of the clean-up is damaged; it is left out");
            return Ok(false);
        };
        let trimmed_to = self.core.tail().trimmed_to;
        let mut next = before.next;
        while *budget > 0 && next < before.end {
            let Some((key, run)) = self.first_chunk(name, before.end)? else {
                next = before.end;
                break;
            };
            *budget -= 1;
            let run_end = run.first.saturating_add(run.seqs.len() as u64);
            let from = next.max(run.first);
            let to = run_end.min(before.end);
            let (mut released, mut skipped) = (Vec::new(), 0);
            let mut at = from;
            for seq in (from..to).map_while(|revision| run.get(revision)) {
                if released.len() + skipped / SKIPPED_PER_ROW >= *budget {
                    break;
                }
                at += 1;
                match seq < trimmed_to && seq != NO_SEQ {
                    true => released.push(seq),
                    false => skipped += 1,
                }
            }
            *budget -= released.len() + skipped / SKIPPED_PER_ROW;
            self.release(&released)?;
            next = at.max(next);
            if at < to {
                break;
            }
            if run_end <= before.end {
                self.redb().open_table(CHUNKS)?.remove(key.as_slice())?;
            } else {
                // The chunk leads to later events too.
                next = before.end;
            }
        }
        let left = Revisions { next: next.min(before.end), ..before };
        self.pending.borrow_mut().cleanup.events -= signed(before.len()) - signed(left.len());
        if left.len() == 0 {
            return Ok(false);
        }
        self.redb().open_table(CLEANUP)?.insert(key, left.to_bytes().as_slice())?;
        Ok(true)
    }

    /// Returns the first chunk of a stream that begins below `end`. A chunk that cannot be read is
    /// removed: it leads nowhere.
    fn first_chunk(&self, name: &[u8], end: u64) -> Result<Option<(Vec<u8>, Run)>> {
        let mut chunks = self.redb().open_table(CHUNKS)?;
        let (from, to) = (keys::chunk(name, 0), keys::chunk(name, end));
        for _ in 0..CLEAN_STEP {
            let Some((key, run)) = ({
                let row = chunks.range(from.as_slice()..to.as_slice())?.next().transpose()?;
                row.map(|(key, row)| {
                    let first = keys::split_chunk(key.value());
                    (key.value().to_vec(), first.and_then(|(_, first)| Run::from_bytes(first, row.value())))
                })
            }) else {
                return Ok(None);
            };
            match run {
                Some(run) => return Ok(Some((key, run))),
                None => {
                    let stream = String::from_utf8_lossy(name);
                    tracing::error!(stream = %printable(&stream), "a damaged chunk of deleted events is removed");
                    chunks.remove(key.as_slice())?;
                }
            }
        }
        Ok(None)
    }

    /// Removes one table whose name begins with `prefix`. That frees the table's pages, and redb
    /// removes a table as a whole.
    fn clean_table(&self, prefix: &str, budget: &mut Budget) -> Result<bool> {
        let tx = self.redb();
        let plain = tx.list_tables()?.map(|table| TableHandle::name(&table).to_owned());
        let multimap = tx.list_multimap_tables()?.map(|it| MultimapTableHandle::name(&it).to_owned());
        let left: Vec<_> = plain.chain(multimap).filter(|table| table.starts_with(prefix)).take(2).collect();
        let Some(table) = left.first() else { return Ok(false) };
        *budget = 0;
        delete_any(tx, table)?;
        Ok(left.len() > 1)
    }
}
