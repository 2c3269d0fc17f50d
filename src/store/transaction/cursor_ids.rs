//! Ids and positions of new cursors.

use redb::ReadableTable;

use crate::error::{Result, SettingError};
use crate::log::keys::CursorId;
use crate::storage::errors::damaged_row;
use crate::storage::tables::schema::{META, META_NEXT_CURSOR};
use crate::store::transaction::Transaction;

/// Checks a position at which reading begins. Every reader uses this check. A position beyond the
/// end would skip the next events. The end itself is a valid position.
pub(crate) fn check_position(setting: &'static str, position: u64, next_seq: u64) -> Result<()> {
    if position > next_seq {
        let reason = format!("the log ends at {next_seq}, before {position}");
        return Err(SettingError::new(setting, reason).into());
    }
    Ok(())
}

/// Logs a warning if a reader begins below the trimmed edge. Relays and projections may begin
/// there, for the events that streams keep.
pub(crate) fn warn_trimmed(name: &str, position: u64, trimmed_to: u64) {
    if position < trimmed_to {
        tracing::warn!(
            reader = name,
            position,
            trimmed_to,
            "it begins where events that no stream keeps are trimmed"
        );
    }
}

/// Returns a new id that names a cursor, or a track of a projection, in keys. An id is never 0.
pub(crate) fn next_cursor_id(tx: &Transaction) -> Result<CursorId> {
    tx.engine(|| {
        let mut meta = tx.redb().open_table(META)?;
        let id =
            meta.get(META_NEXT_CURSOR)?.and_then(|row| row.value().try_into().ok().map(u32::from_le_bytes));
        let (id, next) =
            id.and_then(|id| Some((id, id.checked_add(1)?))).ok_or_else(|| damaged_row("cursor number"))?;
        meta.insert(META_NEXT_CURSOR, &next.to_le_bytes()[..])?;
        Ok(id)
    })
}
