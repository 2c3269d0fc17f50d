//! redb by hand: a table of state and a table of events, one transaction each, its default durability (one `fdatasync` per commit),
//! 32 MiB of page cache. redb takes one writer at a time; threads wait for the write lock in `begin_write`.

use std::path::Path;

use redb::{Database, ReadableDatabase, ReadableTableMetadata, TableDefinition};

use super::Failure;

const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");
const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");

pub(crate) struct Redb(Database);

impl Redb {
    /// Opens the file, or makes it.
    pub(crate) fn open(path: &Path, cache_bytes: usize) -> Result<Self, Failure> {
        Ok(Self(Database::builder().set_cache_size(cache_bytes).create(path)?))
    }

    /// A state row and an event, durable when this returns. The event's number is its state row's: as cheap as can be.
    pub(crate) fn write(&self, id: u64, row: &[u8], payload: &[u8]) -> Result<(), Failure> {
        let transaction = self.0.begin_write()?;
        transaction.open_table(STATE)?.insert(id, row)?;
        transaction.open_table(OUTBOX)?.insert(id, payload)?;
        Ok(transaction.commit()?)
    }

    /// State rows, and events.
    pub(crate) fn counts(&self) -> Result<[u64; 2], Failure> {
        let transaction = self.0.begin_read()?;
        Ok([transaction.open_table(STATE)?.len()?, transaction.open_table(OUTBOX)?.len()?])
    }
}
