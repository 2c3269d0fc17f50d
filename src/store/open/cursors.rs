//! Cursors at open: counts their rows.

use redb::{ReadTransaction, ReadableTable};

use crate::error::Result;
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::exception::ExceptionRow;
use crate::storage::tables::schema::{LOG, PARKED};
use crate::store::shared::cursor::{Cursor, RowCounts};
use crate::store::shared::parked::Parked;
use crate::store::transaction::apply_progress::record_bytes;

/// Counts a cursor's rows, once, when the store opens.
pub(crate) fn count_rows(
    exceptions: &impl ReadableTable<&'static [u8], &'static [u8]>,
    parked: &impl ReadableTable<&'static [u8], &'static [u8]>,
    log: &impl ReadableTable<u64, &'static [u8]>,
    cursor: &Cursor,
) -> Result<RowCounts> {
    let mut counts = RowCounts::default();
    let (from, to) = (cursor.id.to_be_bytes(), keys::after_prefix(&cursor.id.to_be_bytes()));
    for row in exceptions.range(&from[..]..to.as_slice())? {
        let (at, row) = row?;
        let seq = keys::split_exception(at.value()).ok_or_else(|| damaged_row("exception"))?;
        let state = ExceptionRow::from_bytes(row.value())?.exception.state;
        counts.count(state, seq, seq >= cursor.position, record_bytes(log, seq)?);
    }
    for row in parked.range(&from[..]..to.as_slice())? {
        let (at, _) = row?;
        let (_, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
        let bytes = record_bytes(log, seq)?;
        counts.parked += 1;
        counts.waiting_bytes += bytes;
        counts.bytes += bytes;
        if seq >= cursor.position {
            counts.ahead += 1;
            counts.ahead_bytes += bytes;
        }
    }
    Ok(counts)
}

/// Counts the parked rows of a cursor, when the store opens.
pub(crate) fn count_parked(tx: &ReadTransaction, cursor: &Cursor) -> Result<Parked> {
    let (from, to) = (cursor.id.to_be_bytes(), keys::after_prefix(&cursor.id.to_be_bytes()));
    let mut counted = Parked::default();
    let log = tx.open_table(LOG)?;
    for row in tx.open_table(PARKED)?.range(&from[..]..to.as_slice())? {
        let (at, _) = row?;
        let (key, seq) = keys::split_parked(at.value()).ok_or_else(|| damaged_row("parked"))?;
        let bytes = if seq < cursor.position {
            0
        } else {
            crate::store::transaction::apply_progress::record_bytes(&log, seq)?
        };
        counted.count(key, seq, cursor.position, bytes);
    }
    Ok(counted)
}
