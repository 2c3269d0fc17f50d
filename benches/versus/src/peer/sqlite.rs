//! SQLite with an outbox table: write-ahead log, `synchronous=FULL` (a transaction that returned survives a power cut, as with
//! onewrite), `BEGIN IMMEDIATE`, prepared statements, 32 MiB of page cache. The outbox's key is the rowid, so that it is appended to; who polls reads a batch in
//! order and deletes what was confirmed in one transaction.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, Result, TransactionBehavior, params};

const CACHE_KIB: i64 = 32 << 10;

/// One connection. SQLite takes one writer at a time: threads either share this behind a mutex or have one each.
pub(crate) struct Sqlite(Connection);

/// A row of the outbox.
#[derive(Debug)]
pub(crate) struct Outboxed {
    pub(crate) seq: i64,
    pub(crate) payload: Vec<u8>,
}

impl Sqlite {
    /// Opens the file, and makes the tables if there are none.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(60))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY, row BLOB NOT NULL);
             CREATE TABLE IF NOT EXISTS outbox (seq INTEGER PRIMARY KEY, type TEXT NOT NULL, exchange TEXT NOT NULL,
                routing_key TEXT NOT NULL, payload BLOB NOT NULL);",
        )?;
        connection.set_prepared_statement_cache_capacity(16);
        Ok(Self(connection))
    }

    /// A state row and an event, durable when this returns.
    pub(crate) fn write(&mut self, id: u64, row: &[u8], routing_key: &str, payload: &[u8]) -> Result<()> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction
            .prepare_cached("INSERT INTO state (id, row) VALUES (?1, ?2)")?
            .execute(params![id.cast_signed(), row])?;
        transaction
            .prepare_cached(
                "INSERT INTO outbox (type, exchange, routing_key, payload) VALUES (?1, ?2, ?3, ?4)",
            )?
            .execute(params!["payment.completed", "", routing_key, payload])?;
        transaction.commit()
    }

    /// The oldest events, at most so many. Always from the first row on: SQLite numbers an emptied table from 1 again, and who asked
    /// for what is behind the last number seen would lose events.
    pub(crate) fn poll(&self, limit: usize) -> Result<Vec<Outboxed>> {
        let mut select = self.0.prepare_cached("SELECT seq, payload FROM outbox ORDER BY seq LIMIT ?1")?;
        let rows = select.query_map([i64::try_from(limit).unwrap_or(i64::MAX)], |row| {
            Ok(Outboxed { seq: row.get(0)?, payload: row.get(1)? })
        })?;
        rows.collect()
    }

    /// What was confirmed goes, durably.
    pub(crate) fn delete_through(&mut self, seq: i64) -> Result<()> {
        let transaction = self.0.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.prepare_cached("DELETE FROM outbox WHERE seq <= ?1")?.execute([seq])?;
        transaction.commit()
    }
}
