//! How a store is opened: the builder, the recovery of the state in memory from the file, and the
//! start of the writer thread.
//!
//! The highest layer of the store.

pub(crate) mod builder;
pub(crate) mod builder_inbox;
pub(crate) mod captures;
pub(crate) mod cleanup;
pub(crate) mod cursors;
pub(crate) mod recover;
pub(crate) mod streams;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::bounded;

use crate::error::{Error, Result};
use crate::limits::WRITE_QUEUE_MAX;
use crate::oneshot;
use crate::process::keep;
use crate::storage::journal::JournalOptions;
use crate::storage::{database, file, place};
use crate::store::handle::jumps::Jumps;
use crate::store::handle::{Shared, Store};
use crate::store::open::builder::StoreBuilder;
use crate::store::settings::Settings;
use crate::store::shared::core::Core;
use crate::store::writer::thread;

impl Store {
    /// Opens the store at `path` with default settings, creating it if there is none. See
    /// [`StoreBuilder::open`].
    ///
    /// # Errors
    /// [`Error::Open`], naming the file.
    ///
    /// ```
    /// use onewrite::Store;
    /// # let folder = tempfile::tempdir()?;
    /// let store = Store::open(folder.path().join("payments.redb"))?;
    /// assert!(Store::open(store.path()).is_err()); // one owner
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path)
    }

    /// Returns a builder, to change settings before opening.
    ///
    /// ```
    /// use onewrite::Store;
    /// # let folder = tempfile::tempdir()?;
    /// let store = Store::builder().cache_bytes(4 << 20).open(folder.path().join("payments.redb"))?;
    /// assert_eq!(store.stats()?.next_seq, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder() -> StoreBuilder {
        StoreBuilder::default()
    }

    pub(crate) fn open_with(given: PathBuf, settings: Settings) -> Result<Self> {
        // A later change of the process's working directory must not change what the path means.
        let path = std::path::absolute(&given).unwrap_or_else(|_| given.clone());
        let initialise = |db: &redb::Database| recover::initialise(&path, db);
        let options = database::Options {
            cache_bytes: settings.cache_bytes,
            journal: JournalOptions { bytes: settings.journal_bytes, abandon: settings.abandon_journal },
            create: settings.create,
            overwrite_empty: settings.overwrite_empty,
            sync_folder: place::sync_handle,
        };
        let opened = file::open_or_create(&given, options, &initialise)?;
        Self::start(path.clone(), opened, settings).map_err(|error| match error {
            Error::Open(error) => error.named_as(&path, &given).into(),
            error => error,
        })
    }

    /// Recovers what the database holds, and starts the writer thread.
    pub(crate) fn start(path: PathBuf, opened: file::Opened, settings: Settings) -> Result<Self> {
        let recovered = file::guarded(&path, || {
            let mut identity = recover::identify(&path, &opened.db, settings.adopt)?;
            let mut tail = recover::recover(&opened.db, &mut identity, opened.unclean)?;
            cleanup::recover(&opened.db, &mut tail)?;
            let switched = captures::switch_on(&opened.db, &settings.captures, &mut tail)?;
            Ok(switched.map(|()| (identity, tail)))
        });
        let recovered = recovered.map_err(Error::from).and_then(|recovered| recovered.map_err(Error::from));
        let (identity, tail) = match recovered {
            Ok(recovered) => recovered,
            Err(error) => {
                // The error is already reported.
                let _ = file::close(opened.db);
                return Err(error);
            }
        };
        tracing::info!(
            path = %path.display(), next_seq = tail.next_seq, epoch = identity.epoch(), unclean = opened.unclean,
            "store opened"
        );
        let core = Arc::new(Core::new(path, opened, settings, identity, tail));
        let jumps = Jumps::listen(&core);
        let (jobs, queue) = bounded(WRITE_QUEUE_MAX);
        let (ended, has_ended) = oneshot::channel();
        let for_writer = Arc::clone(&core);
        let writer = std::thread::Builder::new()
            .name("onewrite-writer".into())
            .spawn(move || {
                thread::run(&for_writer, &queue);
                ended.send(());
                if for_writer.owner.is_elsewhere() {
                    keep(&for_writer);
                    keep(&queue);
                }
            })
            .map_err(|source| Error::Thread { what: "writer", cause: source })?;
        let writer = std::sync::Mutex::new(Some((writer, has_ended)));
        Ok(Self { shared: Arc::new(Shared { core, jobs, writer, _jumps: jumps }) })
    }
}
