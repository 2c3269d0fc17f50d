//! Whoever can commit a state row and an event: onewrite and its peers, alike.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use onewrite::redb::{ReadableTableMetadata, TableDefinition};
use onewrite::{Event, Store};

use crate::peer::Failure;
use crate::peer::disk::Disk;
use crate::peer::fjall::{Fjall, How};
use crate::peer::redb::Redb;
use crate::peer::sqlite::Sqlite;

pub(crate) const ROW: [u8; 100] = [7; 100];
pub(crate) const PAYLOAD: [u8; 256] = [8; 256];
/// Of every store's pages or blocks.
pub(crate) const CACHE_BYTES: usize = 32 << 20;
const JOURNAL_BYTES: usize = 8 << 20;
const KEYS: u64 = 1000;
const STATE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("state");

/// Commits, one by one, from any number of threads.
pub(crate) trait Side: Sync {
    /// A state row and an event in one transaction, durable when this returns. `id` comes once.
    fn write(&self, writer: usize, id: u64) -> Result<(), Failure>;

    /// State rows and events that are there.
    fn counts(&self) -> Result<[u64; 2], Failure>;
}

pub(crate) struct Ours {
    store: Store,
    keyed: bool,
}

impl Ours {
    pub(crate) fn open(path: &Path, keyed: bool, journal_bytes: usize) -> Result<Self, Failure> {
        let builder = Store::builder().cache_bytes(CACHE_BYTES).journal_bytes(journal_bytes);
        Ok(Self { store: builder.open(path)?, keyed })
    }
}

impl Side for Ours {
    fn write(&self, _: usize, id: u64) -> Result<(), Failure> {
        let keyed = self.keyed;
        self.store.write(move |tx| {
            tx.open_table(STATE)?.insert(id, &ROW[..])?;
            let event = Event::bytes("payment.completed", PAYLOAD).to("payments", "completed");
            tx.append(if keyed { event.key((id % KEYS).to_string()) } else { event })
        })?;
        Ok(())
    }

    fn counts(&self) -> Result<[u64; 2], Failure> {
        Ok([self.store.read()?.open_table(STATE)?.len()?, self.store.stats()?.backlog_events])
    }
}

impl Side for Redb {
    fn write(&self, _: usize, id: u64) -> Result<(), Failure> {
        Redb::write(self, id, &ROW, &PAYLOAD)
    }

    fn counts(&self) -> Result<[u64; 2], Failure> {
        Redb::counts(self)
    }
}

/// One connection for all writers, or one for each.
pub(crate) struct SharedSqlite {
    path: PathBuf,
    connections: Vec<Mutex<Sqlite>>,
}

impl SharedSqlite {
    pub(crate) fn open(path: &Path, connections: usize) -> Result<Self, Failure> {
        let connections = (0..connections).map(|_| Sqlite::open(path).map(Mutex::new));
        Ok(Self { path: path.to_owned(), connections: connections.collect::<Result<_, _>>()? })
    }
}

impl Side for SharedSqlite {
    fn write(&self, writer: usize, id: u64) -> Result<(), Failure> {
        let connection = self.connections.get(writer % self.connections.len()).ok_or("no connection")?;
        let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(connection.write(id, &ROW, "completed", &PAYLOAD)?)
    }

    fn counts(&self) -> Result<[u64; 2], Failure> {
        let connection = rusqlite::Connection::open(&self.path)?;
        let count = |table| {
            let rows: i64 =
                connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0))?;
            Ok::<_, Failure>(rows.cast_unsigned())
        };
        Ok([count("state")?, count("outbox")?])
    }
}

impl Side for Fjall {
    fn write(&self, _: usize, id: u64) -> Result<(), Failure> {
        Fjall::write(self, id, &ROW, &PAYLOAD)
    }

    fn counts(&self) -> Result<[u64; 2], Failure> {
        Fjall::counts(self)
    }
}

impl Side for Disk {
    fn write(&self, _: usize, id: u64) -> Result<(), Failure> {
        Ok(Disk::write(self, id, &ROW, &PAYLOAD)?)
    }

    fn counts(&self) -> Result<[u64; 2], Failure> {
        Ok([self.count(); 2])
    }
}

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Keyless,
    Keyed,
    Journaled,
    Redb,
    SqliteShared,
    SqliteEach,
    Fjall(How),
    Disk,
}

/// In the order in which they are reported.
pub(crate) const KINDS: [Kind; 11] = [
    Kind::Keyless,
    Kind::Keyed,
    Kind::Journaled,
    Kind::Redb,
    Kind::SqliteShared,
    Kind::SqliteEach,
    Kind::Fjall(How::Batch),
    Kind::Fjall(How::Persist),
    Kind::Fjall(How::Transaction),
    Kind::Fjall(How::Grouped),
    Kind::Disk,
];

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Keyless => "onewrite",
            Self::Keyed => "onewrite, keyed",
            Self::Journaled => "onewrite, behind a journal",
            Self::Redb => "redb by hand",
            Self::SqliteShared => "SQLite, one connection",
            Self::SqliteEach => "SQLite, one connection each",
            Self::Fjall(How::Batch) => "fjall, durable batch",
            Self::Fjall(How::Persist) => "fjall, batch then persist",
            Self::Fjall(How::Transaction) => "fjall, single-writer transaction",
            Self::Fjall(How::Grouped) => "(fjall, group commit by hand)",
            Self::Disk => "fdatasync alone",
        }
    }

    /// A configuration that SQLite itself has.
    pub(crate) fn is_sqlite(self) -> bool {
        matches!(self, Self::SqliteShared | Self::SqliteEach)
    }

    /// A configuration that fjall itself has.
    pub(crate) fn is_fjall(self) -> bool {
        matches!(self, Self::Fjall(how) if how != How::Grouped)
    }

    /// A fresh one for so many writers.
    pub(crate) fn make(self, folder: &Path, writers: usize) -> Result<Box<dyn Side>, Failure> {
        let path = folder.join(format!("{self:?}-{writers}"));
        Ok(match self {
            Self::Keyless | Self::Keyed => Box::new(Ours::open(&path, self == Self::Keyed, 0)?),
            Self::Journaled => Box::new(Ours::open(&path, false, JOURNAL_BYTES)?),
            Self::Redb => Box::new(Redb::open(&path, CACHE_BYTES)?),
            Self::SqliteShared => Box::new(SharedSqlite::open(&path, 1)?),
            Self::SqliteEach => Box::new(SharedSqlite::open(&path, writers)?),
            Self::Fjall(how) => Box::new(Fjall::open(&path, how, CACHE_BYTES as u64)?),
            Self::Disk => Box::new(Disk::create(&path)?),
        })
    }
}
