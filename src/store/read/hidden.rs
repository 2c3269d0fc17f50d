//! Records of deleted stretches of streams that clean-up has not reached yet. Readers of the log do
//! not see these records.

use redb::{ReadOnlyTable, ReadTransaction, ReadableTableMetadata, TableError};

use crate::error::Result;
use crate::log::view::view;
use crate::storage::tables::cleanup::{Revisions, Task};
use crate::storage::tables::schema::CLEANUP;

type Bytes = &'static [u8];

/// The records that are hidden below the trimmed edge, as of one snapshot.
pub(crate) struct Hidden(ReadOnlyTable<Bytes, Bytes>);

impl Hidden {
    /// `None` if clean-up has nothing left: then nothing is hidden.
    pub(in crate::store) fn of(tx: &ReadTransaction) -> Result<Option<Self>> {
        let table = match tx.open_table(CLEANUP) {
            Err(TableError::TableDoesNotExist(_)) => return Ok(None),
            table => table?,
        };
        Ok(if table.is_empty()? { None } else { Some(Self(table)) })
    }

    /// Whether this record below the trimmed edge is of a deleted stretch. A record about which
    /// nothing is known is not hidden.
    pub(in crate::store) fn hides(&self, seq: u64, frame: &[u8]) -> bool {
        let Ok(view) = view(seq, frame) else { return false };
        let (Some(stream), Some(revision)) = (view.stream(frame), view.revision(frame)) else { return false };
        let key = Task::Stream(stream.as_bytes().to_vec()).key();
        let row = redb::ReadableTable::get(&self.0, key.as_slice()).ok().flatten();
        let left = row.and_then(|row| Revisions::from_bytes(row.value()));
        left.is_some_and(|left| (left.next..left.end).contains(&revision))
    }
}
