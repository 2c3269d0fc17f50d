//! Captured tables at open: reads their rows, and switches new ones on.

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable};

use crate::error::{Result, SettingError};
use crate::log::keys;
use crate::storage::errors::damaged_row;
use crate::storage::tables::capture::{CaptureRow, SnapshotState};
use crate::storage::tables::schema::{CAPTURES, CHANGES};
use crate::store::settings::capture_types::Captures;
use crate::store::shared::captures::{CaptureRegistry, Known, PendingCaptures};
use crate::store::shared::tail::Tail;
use crate::store::transaction::captures::write;

/// Reads the captures that the file knows.
pub(crate) fn recover(tx: &ReadTransaction) -> Result<CaptureRegistry> {
    let mut registry = CaptureRegistry::default();
    let changes = tx.open_table(CHANGES)?;
    for entry in tx.open_table(CAPTURES)?.iter()? {
        let (name, row) = entry?;
        let row = CaptureRow::from_bytes(row.value()).ok_or_else(|| damaged_row("capture"))?;
        let from = row.id.to_be_bytes();
        let to = keys::after_prefix(&from);
        let mut waiting = 0;
        for row in changes.range(&from[..]..to.as_slice())? {
            row?;
            waiting += 1;
        }
        registry.0.insert(name.value().to_owned(), Known { row, waiting });
    }
    Ok(registry)
}

/// Records in the file each capture that this process has registered, if the capture is new to the
/// file or has another mode.
pub(crate) fn switch_on(
    db: &Database,
    captures: &Captures,
    tail: &mut Tail,
) -> Result<Result<(), SettingError>> {
    let registry = &mut tail.captures;
    let mut changed = PendingCaptures::default();
    let tx = db.begin_read()?;
    let known = registry.0.values().map(|known| known.row.id).max().unwrap_or_default();
    let mut next_id = known.max(crate::store::open::cleanup::last_capture(&tx)?) + 1;
    for capture in captures.iter() {
        if let Err(error) = capture.check_table(&tx)? {
            return Ok(Err(error));
        }
        let row = match registry.get(capture.name()) {
            Some(known) if known.row.mode == capture.mode() => continue,
            Some(known) => CaptureRow { mode: capture.mode(), ..known.row.clone() },
            None => {
                let begins = capture.wants_snapshot();
                let snapshot = if begins { SnapshotState::ToBegin } else { SnapshotState::None };
                let row = CaptureRow { id: next_id, mode: capture.mode(), snapshot };
                next_id += 1;
                registry.0.insert(capture.name().to_owned(), Known { row: row.clone(), waiting: 0 });
                row
            }
        };
        changed.rows.insert(capture.name().to_owned(), row);
    }
    drop(tx);
    if !changed.rows.is_empty() {
        let tx = db.begin_write()?;
        let counts = write(&tx, &changed)?;
        tx.commit()?;
        registry.settle(&changed, &counts);
    }
    Ok(Ok(()))
}
