//! Rows of any length, in the tables of rejected and parked deliveries. A row that fits into a page
//! is stored as it is. A longer row is stored in pieces that fill pages (`log/pieces.rs`).
//!
//! ```text
//! onewrite.pieces   (table u8, the row's key, piece u32) → bytes       (made when it is first needed)
//! ```
//!
//! **Invariant.** Pieces are written and removed in the transaction that writes or removes their
//! row. No length in the file becomes a length in memory: a read takes as much memory as the pieces
//! have bytes.

use std::borrow::Cow;

use redb::{ReadTransaction, ReadableTable, Table, TableError, WriteTransaction};

use super::schema::PIECES;
use crate::error::Result;
use crate::log::pieces::{is_stub, piece_len, stub, stubbed_len};

type Row = &'static [u8];

/// The owner of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    Rejected,
    Parked,
}

impl Of {
    fn key(self, key: &[u8], piece: u32) -> Vec<u8> {
        let table = match self {
            Self::Rejected => 0,
            Self::Parked => 1,
        };
        [&[table][..], key, &piece.to_be_bytes()].concat()
    }
}

/// The source of pieces.
pub(crate) trait Pieces {
    fn pieces(&self) -> Result<Option<impl ReadableTable<Row, Row>>>;
}

impl Pieces for ReadTransaction {
    fn pieces(&self) -> Result<Option<impl ReadableTable<Row, Row>>> {
        match self.open_table(PIECES) {
            Ok(table) => Ok(Some(table)),
            Err(TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Pieces for WriteTransaction {
    fn pieces(&self) -> Result<Option<impl ReadableTable<Row, Row>>> {
        Ok(Some(self.open_table(PIECES)?))
    }
}

/// Returns the row of a value. If pieces are missing, the row is too short, and its checksum
/// detects that.
pub(crate) fn whole<'a>(tx: &impl Pieces, of: Of, key: &[u8], value: &'a [u8]) -> Result<Cow<'a, [u8]>> {
    let Some(len) = stubbed_len(key, value) else { return Ok(value.into()) };
    let Some(pieces) = tx.pieces()? else { return Ok(value.into()) };
    let (from, to) = (of.key(key, 0), of.key(key, u32::MAX));
    let mut row = Vec::new();
    for piece in pieces.range(from.as_slice()..=to.as_slice())? {
        row.extend_from_slice(piece?.1.value());
        if row.len() as u64 >= len {
            break;
        }
    }
    Ok(row.into())
}

/// Returns the length of the row of a value.
pub(crate) fn len(key: &[u8], value: &[u8]) -> u64 {
    stubbed_len(key, value).unwrap_or(value.len() as u64)
}

/// Writes a row, and replaces an earlier row.
pub(crate) fn put(
    tx: &WriteTransaction,
    rows: &mut Table<'_, Row, Row>,
    of: Of,
    key: &[u8],
    row: &[u8],
) -> Result<()> {
    remove(tx, rows, of, key)?;
    if row.len() <= piece_len(key.len()) {
        rows.insert(key, row)?;
        return Ok(());
    }
    rows.insert(key, stub(key, row.len()).as_slice())?;
    let mut pieces = tx.open_table(PIECES)?;
    for (number, piece) in (0..).zip(row.chunks(piece_len(of.key(key, 0).len()))) {
        pieces.insert(of.key(key, number).as_slice(), piece)?;
    }
    Ok(())
}

/// Removes a row. Returns its length if it was there.
pub(crate) fn remove(
    tx: &WriteTransaction,
    rows: &mut Table<'_, Row, Row>,
    of: Of,
    key: &[u8],
) -> Result<Option<u64>> {
    let Some(gone) = rows.remove(key)? else { return Ok(None) };
    if is_stub(gone.value()) {
        let (from, to) = (of.key(key, 0), of.key(key, u32::MAX));
        tx.open_table(PIECES)?.retain_in(from.as_slice()..=to.as_slice(), |_, _| false)?;
    }
    Ok(Some(len(key, gone.value())))
}
