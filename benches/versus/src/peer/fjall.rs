//! fjall: a keyspace of state and a keyspace of events, big-endian keys, 32 MiB of block cache, its defaults for everything else.
//! Durable per commit is [`PersistMode::SyncData`]: `fdatasync` of its journal. What its documentation offers for that:
//!
//! - [`Batch`](How::Batch): an atomic batch with that durability; threads share the database.
//! - [`Persist`](How::Persist): an atomic batch into the journal's buffer, then `Database::persist`; of several threads that have
//!   committed the first makes all of it durable, and the others sync a journal without news.
//! - [`Transaction`](How::Transaction): a transaction of `SingleWriterTxDatabase` with that durability; what serialises and can read what it writes.
//!
//! fjall syncs while it holds its journal, so nobody commits meanwhile.
//!
//! [`Grouped`](How::Grouped) is none of its own: group commit, which the application writes around `Persist`. It is reported beside the
//! others and not counted as fjall's: what it takes is what onewrite is there for.

use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};

use fjall::{
    Database, Keyspace, KeyspaceCreateOptions, PersistMode, SingleWriterTxDatabase, SingleWriterTxKeyspace,
};

use super::Failure;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    Batch,
    Persist,
    Transaction,
    Grouped,
}

pub(crate) enum Fjall {
    Plain {
        database: Database,
        state: Keyspace,
        outbox: Keyspace,
        how: How,
        group: Group,
    },
    Transactional {
        database: SingleWriterTxDatabase,
        state: SingleWriterTxKeyspace,
        outbox: SingleWriterTxKeyspace,
    },
}

impl Fjall {
    /// Opens the folder, or makes it.
    pub(crate) fn open(folder: &Path, how: How, cache_bytes: u64) -> fjall::Result<Self> {
        let options = KeyspaceCreateOptions::default;
        if how == How::Transaction {
            let database = SingleWriterTxDatabase::builder(folder).cache_size(cache_bytes).open()?;
            let (state, outbox) =
                (database.keyspace("state", options)?, database.keyspace("outbox", options)?);
            return Ok(Self::Transactional { database, state, outbox });
        }
        // Whoever persists needs no flush to the operating system before.
        let by_hand = how != How::Batch;
        let builder = Database::builder(folder).cache_size(cache_bytes).manual_journal_persist(by_hand);
        let database = builder.open()?;
        let (state, outbox) = (database.keyspace("state", options)?, database.keyspace("outbox", options)?);
        Ok(Self::Plain { database, state, outbox, how, group: Group::default() })
    }

    /// A state row and an event, durable when this returns.
    pub(crate) fn write(&self, id: u64, row: &[u8], payload: &[u8]) -> Result<(), Failure> {
        let key = id.to_be_bytes();
        match self {
            Self::Transactional { database, state, outbox } => {
                let mut transaction = database.write_tx().durability(Some(PersistMode::SyncData));
                transaction.insert(state, key, row);
                transaction.insert(outbox, key, payload);
                transaction.commit()?;
            }
            Self::Plain { database, state, outbox, how, group } => {
                let mut batch = database.batch();
                if *how == How::Batch {
                    batch = batch.durability(Some(PersistMode::SyncData));
                }
                batch.insert(state, key, row);
                batch.insert(outbox, key, payload);
                batch.commit()?;
                match how {
                    How::Batch | How::Transaction => {}
                    How::Persist => database.persist(PersistMode::SyncData)?,
                    How::Grouped => group.wait_until_durable(|| database.persist(PersistMode::SyncData))?,
                }
            }
        }
        Ok(())
    }

    /// State rows, and events.
    pub(crate) fn counts(&self) -> Result<[u64; 2], Failure> {
        let [state, outbox] = match self {
            Self::Plain { state, outbox, .. } => [state.len()?, outbox.len()?],
            Self::Transactional { state, outbox, .. } => [state.inner().len()?, outbox.inner().len()?],
        };
        Ok([state as u64, outbox as u64])
    }
}

/// Group commit: whoever finds nobody syncing syncs for all that have committed until then.
#[derive(Default)]
pub(crate) struct Group {
    rounds: Mutex<Rounds>,
    over: Condvar,
}

#[derive(Default)]
struct Rounds {
    /// Syncs that have begun, and that are over.
    begun: u64,
    over: u64,
    failed: bool,
}

impl Group {
    fn wait_until_durable(&self, sync: impl Fn() -> fjall::Result<()>) -> Result<(), Failure> {
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        // The next one to begin has what was committed before this call.
        let wanted = rounds.begun + 1;
        loop {
            if rounds.failed {
                return Err("another thread could not sync".into());
            }
            if rounds.over >= wanted {
                return Ok(());
            }
            if rounds.begun > rounds.over {
                rounds = self.over.wait(rounds).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            rounds.begun += 1;
            drop(rounds);
            let synced = sync();
            rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
            rounds.over += 1;
            rounds.failed |= synced.is_err();
            self.over.notify_all();
            synced?;
        }
    }
}
