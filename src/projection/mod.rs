//! Projections: tables of the application that a handler keeps up to date from the log, one event
//! after another.
//!
//! The position is written in the transaction that writes the tables, so each event is in them
//! exactly once. Catching up and following are the same loop. A rebuild writes tables of its own,
//! from the beginning of the log. One transaction then puts them in the place of the old tables.

mod failures;
mod handle;
mod policy;
mod rows;
mod transaction;
mod worker;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use redb::{MultimapTableHandle, TableHandle};

use self::handle::Registered;
use self::worker::Worker;
use crate::error::{Error, Result, SettingError, caught};
use crate::event::RecordedEvent;
use crate::filter::EventFilter;
use crate::limits::{
    BACKOFF_MS_DEFAULT, PROJECTION_BATCH_DEFAULT, PROJECTION_DELAY_MS_DEFAULT, SHORT_STRING_BYTES_MAX,
};
use crate::oneshot;
use crate::store::handle::cancelled::cancelled_version;
use crate::store::read::wanted::Wanted;
use crate::store::shared::projections::OwnedTables;
use crate::store::{ProjectionState, StartAt, Store};

pub use self::failures::ProjectionFailures;
pub(crate) use self::handle::Asked;
pub use self::handle::Projection;
pub use self::policy::FailurePolicy;
pub use self::rows::ProjectionFailure;
pub use self::transaction::ProjectionTransaction;

/// Why a projection whose rebuild was cancelled stands still.
const CANCELLED: &str = "its rebuild was cancelled";

pub(crate) type Handler = dyn Fn(&RecordedEvent, &ProjectionTransaction<'_>) -> Result<()> + Send + Sync;

/// Settings of a projection, before it runs. See [`Store::projection`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{EventFilter, ProjectionBuilder};
/// let builder: ProjectionBuilder = store.projection("balances").filter(EventFilter::all().category("account")).batch(64);
/// let projection = builder.spawn(|_, _| Ok(()))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `spawn` is called"]
pub struct ProjectionBuilder {
    store: Store,
    name: String,
    owned: OwnedTables,
    version: u32,
    start: StartAt,
    filter: EventFilter,
    batch: usize,
    delay: Duration,
    policy: FailurePolicy,
    backoff: (Duration, Duration),
}

impl Store {
    /// Creates a projection of the log into tables of this store.
    ///
    /// The name keeps its position in the file. Choose a name that stays the same.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::{Event, EventFilter, ExpectedRevision, Store, redb::{ReadableTable, TableDefinition}};
    /// const BALANCES: TableDefinition<&str, u64> = TableDefinition::new("balances");
    /// # let folder = tempfile::tempdir()?;
    /// let store = Store::open(folder.path().join("bank.redb"))?;
    /// let balances = store.projection("balances")
    ///     .table(BALANCES)
    ///     .filter(EventFilter::all().category("account").event_type("deposited"))
    ///     .spawn(|event, tx| {
    ///         let cents: u64 = onewrite::codec::from_json(event.payload())?;
    ///         let mut balances = tx.open_table(BALANCES)?;
    ///         let account = event.stream().unwrap_or_default();
    ///         let balance = balances.get(account)?.map_or(0, |row| row.value());
    ///         balances.insert(account, balance + cents)?;
    ///         Ok(())
    ///     })?;
    /// let receipt = store.write(|tx| {
    ///     tx.stream("account-7").append([Event::json("deposited", &100)?], ExpectedRevision::Any)
    /// })?;
    /// balances.wait_for_position(receipt.seqs()[0], Duration::from_secs(5))?; // to read one's own write
    /// assert_eq!(store.read()?.open_table(BALANCES)?.get("account-7")?.map(|row| row.value()), Some(100));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn projection(&self, name: impl Into<String>) -> ProjectionBuilder {
        ProjectionBuilder {
            store: self.clone(),
            name: name.into(),
            owned: OwnedTables::default(),
            version: 1,
            start: StartAt::Oldest,
            filter: EventFilter::all(),
            batch: PROJECTION_BATCH_DEFAULT,
            delay: Duration::from_millis(PROJECTION_DELAY_MS_DEFAULT),
            policy: FailurePolicy::default(),
            backoff: (
                Duration::from_millis(BACKOFF_MS_DEFAULT.0),
                Duration::from_millis(BACKOFF_MS_DEFAULT.1),
            ),
        }
    }
}

impl ProjectionBuilder {
    /// Declares a table that the handler writes. A rebuild replaces the table, so no other code
    /// should write it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::redb::TableDefinition;
    /// const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
    /// let projection = store.projection("counts").table(COUNTS).spawn(|event, tx| {
    ///     tx.open_table(COUNTS)?.insert(event.event_type(), 1)?;
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn table(mut self, definition: impl TableHandle) -> Self {
        self.owned.plain.push(definition.name().to_owned());
        self
    }

    /// Declares a multimap table that the handler writes. See [`table`](Self::table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::redb::MultimapTableDefinition;
    /// const BY_TYPE: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("by type");
    /// let projection = store.projection("by type").multimap_table(BY_TYPE).spawn(|event, tx| {
    ///     tx.open_multimap_table(BY_TYPE)?.insert(event.event_type(), event.seq())?;
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn multimap_table(mut self, definition: impl MultimapTableHandle) -> Self {
        self.owned.multimap.push(definition.name().to_owned());
        self
    }

    /// Sets the version of the handler. The default is 1. If the tables are of another version, the
    /// projection rebuilds them from the beginning of the log. The old tables stay as they are,
    /// readable, until the new tables have caught up.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, redb::{ReadableTable, TableDefinition}};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// const SIZES: TableDefinition<u64, u64> = TableDefinition::new("sizes");
    /// store.write(|tx| tx.append(Event::bytes("paid", "100").unpublished()))?;
    /// let run = |version: u32, factor: u64| store.projection("sizes").table(SIZES).version(version).spawn(move |event, tx| {
    ///     tx.open_table(SIZES)?.insert(event.seq(), event.payload().len() as u64 * factor)?;
    ///     Ok(())
    /// });
    /// let first = run(1, 1)?;
    /// first.wait_until_live(Duration::from_secs(5))?;
    /// first.stop(Duration::from_secs(5));
    /// let second = run(2, 8)?; // in bits from now on
    /// second.wait_until_live(Duration::from_secs(5))?;
    /// assert_eq!(store.read()?.open_table(SIZES)?.get(0)?.map(|row| row.value()), Some(24));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Sets where a new projection begins. The default is the oldest event that the log holds.
    ///
    /// A log that trims confirmed events no longer has them; streams keep their events. The setting
    /// has no effect on a projection that has a position already. A rebuild begins at the oldest
    /// event in any case.
    ///
    /// A new projection does not look at the contents of its tables. If you
    /// [forget](Store::forget_projection) a projection and create it anew over the same tables,
    /// they hold everything twice. Delete the tables first.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, StartAt};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let projection = store.projection("counts").start_at(StartAt::Newest).spawn(|_, _| Ok(()))?;
    /// projection.wait_until_live(Duration::from_secs(5))?;
    /// assert_eq!((projection.status().position, projection.status().applied), (1, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn start_at(mut self, start: StartAt) -> Self {
        self.start = start;
        self
    }

    /// Sets which events the handler receives. The default is all. Events that it does not receive
    /// cost no commit.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, EventFilter};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let refunds = store.projection("refunds").filter(EventFilter::all().event_type("refunded")).spawn(|_, _| Ok(()))?;
    /// refunds.wait_for_position(0, Duration::from_secs(5))?;
    /// assert_eq!(refunds.status().applied, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn filter(mut self, filter: EventFilter) -> Self {
        self.filter = filter;
        self
    }

    /// Sets how many events one commit applies at most. The default is 256. A rebuild that does not
    /// gain on the writers takes more, up to 65,536 in its last transaction.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert!(store.projection("counts").batch(0).spawn(|_, _| Ok(())).is_err());
    /// let projection = store.projection("counts").batch(16).spawn(|_, _| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn batch(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }

    /// Sets how long events may gather after the first one before they are applied. The default is
    /// 5 ms.
    ///
    /// Each commit of a projection is an fsync that the application's writes share or wait for. A
    /// projection that followed each write at once would take half of what the disk can do. With
    /// `Duration::MAX`, events gather until the projection is stopped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").batch_delay(Duration::from_millis(100)).spawn(|_, _| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn batch_delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// Sets what happens to an event on which the handler fails. By default, the projection stands
    /// still there after 10 tries.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Error, Event, FailurePolicy};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let policy = FailurePolicy::Quarantine { attempts: 1 };
    /// let projection = store.projection("counts").on_failure(policy).spawn(|_, _| Err(Error::app("cannot count")))?;
    /// projection.wait_for_position(0, Duration::from_secs(5))?; // it has gone on
    /// assert_eq!(projection.failures().list(None, 10)?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Sets the first and the longest wait between tries of one event. The defaults are 100 ms and
    /// 30 s.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").backoff(Duration::from_millis(10), Duration::from_secs(1)).spawn(|_, _| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        self.backoff = (first, longest);
        self
    }

    fn check(&self) -> Result<(), SettingError> {
        let fail = |setting, reason: &str| Err(SettingError::new(setting, reason));
        let unfit = |name: &&String| name.is_empty() || name.starts_with("onewrite.");
        match () {
            () if self.name.is_empty() || self.name.len() > SHORT_STRING_BYTES_MAX => {
                fail("name", "a projection's name is 1 to 255 bytes long")
            }
            () if self.batch == 0 => fail("batch", "it must be at least 1"),
            () if self.backoff.0 > self.backoff.1 => {
                fail("backoff", "the first wait must not be above the longest")
            }
            () if self.policy.attempts() == 0 => fail("on_failure", "at least one attempt is made"),
            () => match (self.owned.names().find(unfit), self.owned.twice()) {
                (Some(name), _) => {
                    let rule = "a table's name is not empty and does not begin with `onewrite.`";
                    Err(SettingError::new("table", format!("`{}`: {rule}", name.escape_debug())))
                }
                // A rebuild would swap such a table twice, and the second swap would replace the
                // new table with nothing.
                (None, Some(name)) => Err(SettingError::new("table", format!("`{name}` is declared twice"))),
                (None, None) => Ok(()),
            },
        }
    }

    /// Starts the projection. `handler` receives the events that the filter takes, in order, each
    /// exactly once in effect.
    ///
    /// The handler's writes commit together with the position. Like every write closure, the
    /// handler may run more than once before that. If it fails or panics, nothing of that event is
    /// written, and the projection tries again after a while.
    ///
    /// # Errors
    /// - [`Error::Setting`] for a setting that cannot work.
    /// - [`Error::ProjectionRunning`] for a name that runs already.
    /// - [`Error::CapturedTable`] for a table whose changes are captured.
    /// - [`Error::ProjectionTable`] for a table that another running projection has declared.
    /// - Errors of the store.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let projection = store.projection("counts").spawn(|_, _| Ok(()))?;
    /// assert!(matches!(store.projection("counts").spawn(|_, _| Ok(())), Err(Error::ProjectionRunning { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn spawn<F>(self, handler: F) -> Result<Projection>
    where
        F: Fn(&RecordedEvent, &ProjectionTransaction<'_>) -> Result<()> + Send + Sync + 'static,
    {
        self.check()?;
        let wanted = Wanted::new(self.filter.clone(), &self.store.core().settings.upcasts)?;
        let store = self.store.clone();
        let core = store.core();
        core.refuse_reentrant("ProjectionBuilder::spawn")?;
        // Writes to a captured table would bypass the capture, and a rebuild would replace the
        // table under it.
        let captured = |name: &&String| core.tail().captures.holds(name);
        if let Some(name) = self.owned.names().find(captured) {
            return Err(Error::CapturedTable { name: name.clone() });
        }
        let shared = core.projections.register(&self.name, &self.owned)?;
        // From here on the name is taken. Dropping this frees the name.
        let registered = Registered { store: store.clone(), name: self.name.clone() };
        let row = store.projection_row(&self.name, self.version, self.start)?;
        let resumed = row.rebuild.filter(|rebuild| rebuild.version == self.version);
        let old = row.live.version != self.version;
        let stays =
            core.reading(|tx| cancelled_version(tx, &self.name))? == Some(self.version) && resumed.is_none();
        shared.change(|status| {
            status.position = row.live.position;
            // Set before the thread begins, so that a caller that waits for the rebuild does not
            // miss it.
            status.rebuilding = resumed.map(|rebuild| rebuild.position).or((old && !stays).then_some(0));
            if old && stays {
                status.state = ProjectionState::Cancelled;
                status.rebuild_stopped = Some(CANCELLED.into());
            } else if old {
                status.state = ProjectionState::Rebuilding;
            }
        });
        let listener = core.notifier.subscribe(None);
        let signal = Arc::clone(&listener.signal);
        let asked = Arc::<Asked>::default();
        let handler: Arc<Handler> = Arc::new(handler);
        let projection_handler = Arc::clone(&handler);
        let (name, version, owned) = (self.name.clone(), self.version, self.owned.clone());
        let worker = Worker::new(
            self,
            wanted,
            (row, stays),
            handler,
            Arc::clone(&shared),
            Arc::clone(&asked),
            listener,
        );
        let panicked = Arc::clone(&shared);
        let (report, ended) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("onewrite-projection".into())
            .spawn(move || {
                // Waiting callers must learn of the end, and the status must not go on saying that
                // the projection lives.
                if caught(move || worker.run()).is_err() {
                    panicked.change(|status| status.state = ProjectionState::Failed("it panicked".into()));
                }
                drop(registered);
                report.send(());
            })
            .map_err(|source| Error::Thread { what: "projection", cause: source })?;
        Ok(Projection {
            store,
            name,
            version,
            owned,
            handler: projection_handler,
            shared,
            asked,
            signal,
            ended: Some(ended),
            thread: thread.thread().id(),
        })
    }
}
