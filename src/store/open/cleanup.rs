//! The clean-up at open: counts its rows, and marks what a cancelled rebuild has left.

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableError};

use crate::error::Result;
use crate::log::keys::CursorId;
use crate::storage::tables::capture::CaptureId;
use crate::storage::tables::cleanup::{Revisions, Task};
use crate::storage::tables::schema::{CLEANUP, META, read_u64s, u64s};
use crate::store::shared::cleaning::Left;
use crate::store::shared::tail::Tail;
use crate::store::transaction::cleanup::rebuild_tasks;

/// Counts the clean-up tasks that the file holds.
pub(crate) fn left(tx: &ReadTransaction) -> Result<Left> {
    let mut left = Left::default();
    let table = match tx.open_table(CLEANUP) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(left),
        table => table?,
    };
    for row in table.iter()? {
        let (key, row) = row?;
        if Task::from_key(key.value()).is_none() {
            tracing::error!("a row of the clean-up is of an unknown kind; it stays");
            continue;
        }
        left.tasks += 1;
        let events = Revisions::from_bytes(row.value()).map_or(0, Revisions::len);
        left.events = left.events.saturating_add(events);
    }
    Ok(left)
}

/// The largest id of a capture whose dirty keys are left. No new capture may take that id.
pub(in crate::store) fn last_capture(tx: &ReadTransaction) -> Result<CaptureId> {
    let table = match tx.open_table(CLEANUP) {
        Err(TableError::TableDoesNotExist(_)) => return Ok(0),
        table => table?,
    };
    let (from, to) = (Task::DirtyKeys(0).key(), Task::DirtyKeys(CaptureId::MAX).key());
    let last = table.range(from.as_slice()..=to.as_slice())?.next_back().transpose()?;
    Ok(match last.and_then(|(key, _)| Task::from_key(key.value())) {
        Some(Task::DirtyKeys(id)) => id,
        _ => 0,
    })
}

/// Finds the clean-up that an opening has to go on with.
///
/// A release without clean-up kept the number of a cancelled rebuild until the next start of its
/// projection. Such a rebuild becomes a task here.
pub(in crate::store) fn recover(db: &Database, tail: &mut Tail) -> Result<()> {
    let tx = db.begin_read()?;
    let mut cancelled = Vec::new();
    for row in tx.open_table(META)?.range("cancelled."..)? {
        let (name, row) = row?;
        if !name.value().starts_with("cancelled.") {
            break;
        }
        if let Some([version, id]) = read_u64s(row.value()).filter(|[_, id]| *id != 0) {
            cancelled.push((name.value().to_owned(), version, CursorId::try_from(id).ok()));
        }
    }
    tail.cleanup = left(&tx)?;
    drop(tx);
    if cancelled.is_empty() {
        return Ok(());
    }
    let tx = db.begin_write()?;
    {
        let (mut meta, mut tasks) = (tx.open_table(META)?, tx.open_table(CLEANUP)?);
        for (name, version, id) in &cancelled {
            meta.insert(name.as_str(), u64s([*version, 0]).as_slice())?;
            for task in id.iter().flat_map(|id| rebuild_tasks(*id)) {
                tasks.insert(task.key().as_slice(), &[][..])?;
            }
        }
    }
    tx.commit()?;
    tail.cleanup = left(&db.begin_read()?)?;
    Ok(())
}
