//! Projections: the application's own tables, kept by a handler that is given the events of the log one after another.
//!
//! The position is written in the transaction that writes the tables, so each event is in them exactly once. Catching up
//! and following are the same loop. A rebuild writes tables aside, from the beginning of the log, and takes the place of
//! the old ones in one transaction.

mod rows;
mod transaction;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ThreadId};
use std::time::Duration;

use redb::{MultimapTableHandle, TableHandle};

use crate::error::{Error, Result, SettingError, caught};
use crate::event::Recorded;
use crate::filter::EventFilter;
use crate::limits::{
    BACKOFF_MS_DEFAULT, PROJECTION_BATCH_DEFAULT, PROJECTION_DELAY_MS_DEFAULT, SHORT_STRING_BYTES_MAX,
};
use crate::oneshot;
use crate::projection::rows::not_rebuilt;
use crate::say::in_drop;
use crate::storage::tables::projection::Which;
use crate::store::bells::Bell;
use crate::store::cancelled::cancelled_version;
use crate::store::projections::{OwnedTables, RunningProjection};
use crate::store::wanted::Wanted;
use crate::store::{ProjectionState, ProjectionStatus, StartAt, Store};
use crate::time::Deadline;

pub use self::rows::ProjectionFailure;
pub use self::transaction::ProjectionTransaction;
use self::worker::Worker;

/// Why a projection whose rebuild was cancelled stands still.
const CANCELLED: &str = "its rebuild was cancelled";

pub(crate) type Handler = dyn Fn(&Recorded, &ProjectionTransaction<'_>) -> Result<()> + Send + Sync;

/// What a projection does with an event on which its handler fails again and again, or whose record is damaged.
///
/// ```
/// use onewrite::FailurePolicy;
/// assert_eq!(FailurePolicy::default(), FailurePolicy::Stop { attempts: 10 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// After so many tries it stands still before the event, and says so. The default, with 10: its tables are never wrong, only old.
    Stop {
        /// Tries.
        attempts: u32,
    },
    /// After so many tries the event is written down among the projection's failures, and the projection goes on without it.
    Quarantine {
        /// Tries.
        attempts: u32,
    },
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self::Stop { attempts: 10 }
    }
}

impl FailurePolicy {
    fn attempts(self) -> u32 {
        match self {
            Self::Stop { attempts } | Self::Quarantine { attempts } => attempts,
        }
    }
}

/// Settings of a projection, before it runs. See [`Store::projection`].
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{EventFilter, ProjectionBuilder};
/// let builder: ProjectionBuilder = store.projection("balances").filter(EventFilter::all().category("account")).batch(64);
/// let projection = builder.run(|_, _| Ok(()))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `run` is called"]
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
    /// A projection of the log into tables of this store. The name keeps its position in the file: give it one that stays.
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
    ///     .run(|event, tx| {
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
    /// balances.await_position(receipt.seqs()[0], Duration::from_secs(5))?; // to read one's own write
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
    /// A table that the handler writes. It is the projection's: a rebuild replaces it. Nobody else should write it.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::redb::TableDefinition;
    /// const COUNTS: TableDefinition<&str, u64> = TableDefinition::new("counts");
    /// let projection = store.projection("counts").table(COUNTS).run(|event, tx| {
    ///     tx.open_table(COUNTS)?.insert(event.event_type(), 1)?;
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn table(mut self, definition: impl TableHandle) -> Self {
        self.owned.plain.push(definition.name().to_owned());
        self
    }

    /// A multimap table that the handler writes. See [`table`](Self::table).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::redb::MultimapTableDefinition;
    /// const BY_TYPE: MultimapTableDefinition<&str, u64> = MultimapTableDefinition::new("by type");
    /// let projection = store.projection("by type").multimap_table(BY_TYPE).run(|event, tx| {
    ///     tx.open_multimap_table(BY_TYPE)?.insert(event.event_type(), event.seq())?;
    ///     Ok(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn multimap_table(mut self, definition: impl MultimapTableHandle) -> Self {
        self.owned.multimap.push(definition.name().to_owned());
        self
    }

    /// The version of the handler; 1 unless set. Where the tables are of another, they are rebuilt from the beginning of
    /// the log: the old ones stay as they are, readable, until the new ones have caught up.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, redb::{ReadableTable, TableDefinition}};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// const SIZES: TableDefinition<u64, u64> = TableDefinition::new("sizes");
    /// store.write(|tx| tx.append(Event::bytes("paid", "100").unpublished()))?;
    /// let run = |version: u32, factor: u64| store.projection("sizes").table(SIZES).version(version).run(move |event, tx| {
    ///     tx.open_table(SIZES)?.insert(event.seq(), event.payload().len() as u64 * factor)?;
    ///     Ok(())
    /// });
    /// let first = run(1, 1)?;
    /// first.await_live(Duration::from_secs(5))?;
    /// first.stop(Duration::from_secs(5));
    /// let second = run(2, 8)?; // in bits from now on
    /// second.await_live(Duration::from_secs(5))?;
    /// assert_eq!(store.read()?.open_table(SIZES)?.get(0)?.map(|row| row.value()), Some(24));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Where a new projection begins: at the oldest event that the log holds unless set. Of a log that trims what is
    /// confirmed, what is gone is gone; streams keep their events. It says nothing for one that has a position already, and a
    /// rebuild begins at the oldest event in any case.
    ///
    /// A new projection does not look at what is in its tables: of one that was [forgotten](Store::forget_projection), and is made
    /// anew over the same tables, they hold everything twice. Delete them first.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, StartAt};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let projection = store.projection("counts").start_at(StartAt::Newest).run(|_, _| Ok(()))?;
    /// projection.await_live(Duration::from_secs(5))?;
    /// assert_eq!((projection.status().position, projection.status().applied), (1, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn start_at(mut self, start: StartAt) -> Self {
        self.start = start;
        self
    }

    /// The events that the handler is given; all unless set. Those that it is not given cost no commit.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Event, EventFilter};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let refunds = store.projection("refunds").filter(EventFilter::all().event_type("refunded")).run(|_, _| Ok(()))?;
    /// refunds.await_position(0, Duration::from_secs(5))?;
    /// assert_eq!(refunds.status().applied, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn filter(mut self, filter: EventFilter) -> Self {
        self.filter = filter;
        self
    }

    /// Events that one commit applies at most; 256 unless set. A rebuild that does not gain on its writers takes more, up to
    /// [`REBUILD_REACH_MAX`](crate::limits::REBUILD_REACH_MAX) in its last transaction.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// assert!(store.projection("counts").batch(0).run(|_, _| Ok(())).is_err());
    /// let projection = store.projection("counts").batch(16).run(|_, _| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn batch(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }

    /// How long events may gather after the first one before they are applied; 5 ms unless set. Each commit of a projection
    /// is an fsync that the application's writes share or wait for: a projection that followed each of them at once
    /// would take half of what the disk can do. With `Duration::MAX` they gather until the projection is stopped.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").batch_delay(Duration::from_millis(100)).run(|_, _| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn batch_delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// What happens to an event on which the handler fails; it stands still there after 10 tries unless set.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use onewrite::{Error, Event, FailurePolicy};
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let policy = FailurePolicy::Quarantine { attempts: 1 };
    /// let projection = store.projection("counts").on_failure(policy).run(|_, _| Err(Error::app("cannot count")))?;
    /// projection.await_position(0, Duration::from_secs(5))?; // it has gone on
    /// assert_eq!(projection.failures(None, 10)?.len(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn on_failure(mut self, policy: FailurePolicy) -> Self {
        self.policy = policy;
        self
    }

    /// First and longest wait between tries of one event; 100 ms and 30 s unless set.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").backoff(Duration::from_millis(10), Duration::from_secs(1)).run(|_, _| Ok(()))?;
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
                // A rebuild would put it in its place twice: the second time nothing in the place of what is new.
                (None, Some(name)) => Err(SettingError::new("table", format!("`{name}` is declared twice"))),
                (None, None) => Ok(()),
            },
        }
    }

    /// Starts the projection. `handler` is given the events that the filter takes, in order, each exactly once in effect:
    /// what it writes commits together with the position. Like every write closure it may run more than once
    /// before that. When it fails or panics nothing of that event is written, and it is tried again after a while.
    ///
    /// # Errors
    /// [`Error::Setting`] for a setting that cannot work, [`Error::ProjectionRunning`] for a name that runs already,
    /// [`Error::CapturedTable`] for a table whose changes are captured, [`Error::ProjectionTable`] for one that another running
    /// projection has declared, or what the store says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Error;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert!(matches!(store.projection("counts").run(|_, _| Ok(())), Err(Error::ProjectionRunning { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn run<F>(self, handler: F) -> Result<Projection>
    where
        F: Fn(&Recorded, &ProjectionTransaction<'_>) -> Result<()> + Send + Sync + 'static,
    {
        self.check()?;
        let wanted = Wanted::new(self.filter.clone(), &self.store.core().settings.upcasts)?;
        let store = self.store.clone();
        let core = store.core();
        core.refuse_inside("ProjectionBuilder::run")?;
        // Its changes would go around the capture, and a rebuild would replace the table under it.
        let captured = |name: &&String| core.tail().captures.holds(name);
        if let Some(name) = self.owned.names().find(captured) {
            return Err(Error::CapturedTable { name: name.clone() });
        }
        let shared = core.projections.register(&self.name, &self.owned)?;
        // From here on the name is taken: it is free again when this goes.
        let registered = Registered { store: store.clone(), name: self.name.clone() };
        let row = store.projection_row(&self.name, self.version, self.start)?;
        let resumed = row.rebuild.filter(|rebuild| rebuild.version == self.version);
        let old = row.live.version != self.version;
        let stays =
            core.reading(|tx| cancelled_version(tx, &self.name))? == Some(self.version) && resumed.is_none();
        shared.change(|status| {
            status.position = row.live.position;
            // Said before the thread has begun: who waits for the rebuild must not miss it.
            status.rebuilding = resumed.map(|rebuild| rebuild.position).or((old && !stays).then_some(0));
            if old && stays {
                status.state = ProjectionState::Cancelled;
                status.rebuild_stopped = Some(CANCELLED.into());
            } else if old {
                status.state = ProjectionState::Rebuilding;
            }
        });
        let hung = core.bells.hang(None);
        let bell = Arc::clone(&hung.bell);
        let asked = Arc::<Asked>::default();
        let handler: Arc<Handler> = Arc::new(handler);
        let projection_handler = Arc::clone(&handler);
        let (name, version, owned) = (self.name.clone(), self.version, self.owned.clone());
        let worker =
            Worker::new(self, wanted, (row, stays), handler, Arc::clone(&shared), Arc::clone(&asked), hung);
        let panicked = Arc::clone(&shared);
        let (report, ended) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("onewrite-projection".into())
            .spawn(move || {
                // Who waits must hear of it, and the status must not go on saying that it lives.
                if caught(move || worker.run()).is_err() {
                    panicked.change(|status| status.state = ProjectionState::Failed("it panicked".into()));
                }
                drop(registered);
                report.send(());
            })
            .map_err(|source| Error::Thread { what: "projection", source })?;
        Ok(Projection {
            store,
            name,
            version,
            owned,
            handler: projection_handler,
            shared,
            asked,
            bell,
            ended: Some(ended),
            thread: thread.thread().id(),
        })
    }
}

/// Frees the projection's name when dropped.
#[derive(Debug)]
struct Registered {
    store: Store,
    name: String,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.store.core().projections.remove(&self.name);
    }
}

/// What the handle asks of the worker.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    pub(crate) stop: AtomicBool,
    pub(crate) rebuild: AtomicBool,
}

/// A running projection. Dropping it stops it, waiting 5 s at most.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use std::time::Duration;
/// let projection: onewrite::Projection = store.projection("counts").run(|_, _| Ok(()))?;
/// assert_eq!(projection.stop(Duration::from_secs(5)).position, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "dropping a projection stops it"]
pub struct Projection {
    store: Store,
    name: String,
    version: u32,
    owned: OwnedTables,
    handler: Arc<Handler>,
    shared: Arc<RunningProjection>,
    asked: Arc<Asked>,
    bell: Arc<Bell>,
    ended: Option<oneshot::Receiver<()>>,
    /// Its thread.
    thread: ThreadId,
}

impl std::fmt::Debug for Projection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Projection").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Projection {
    /// State and figures.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert_eq!(projection.status().failed_tries, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn status(&self) -> ProjectionStatus {
        let owner = &self.store.core().owner;
        if owner.is_elsewhere() {
            let state = ProjectionState::Failed(owner.refusal().to_string());
            return ProjectionStatus { state, ..ProjectionStatus::default() };
        }
        self.shared.status().clone()
    }

    /// Waits until event `seq` is done with: in the tables, let pass by the filter, or among the failures. To read one's own
    /// write.
    ///
    /// `Duration::MAX` waits for ever. `Duration::ZERO` asks without waiting: `Ok` if the event is done with already.
    ///
    /// # Errors
    /// [`Error::ProjectionBehind`] if that takes longer; [`Error::ProjectionStopped`] if it stands still before that.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::{Error, Event};
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// let receipt = store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// projection.await_position(receipt.seqs()[0], Duration::from_secs(5))?;
    /// let early = projection.await_position(receipt.seqs()[0] + 1, Duration::from_millis(10));
    /// assert!(matches!(early, Err(Error::ProjectionBehind { position: 1, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn await_position(&self, seq: u64, timeout: Duration) -> Result<()> {
        self.wait(timeout, |status| (status.position > seq).then_some(Ok(())))
    }

    /// Waits until it has done with all that is in the log now, and no rebuild is under way.
    ///
    /// # Errors
    /// As [`await_position`](Self::await_position).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// projection.await_live(Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn await_live(&self, timeout: Duration) -> Result<()> {
        self.store.core().owner.check()?;
        let asked = Arc::clone(&self.asked);
        let end = self.store.core().tail().next_seq;
        self.wait(timeout, move |status| {
            if asked.rebuild.load(Ordering::Acquire) {
                return None; // What is said of a rebuild is about an earlier one.
            }
            match &status.rebuild_stopped {
                Some(reason) => Some(Err(reason.clone())),
                None => (status.position >= end && status.rebuilding.is_none()).then_some(Ok(())),
            }
        })
    }

    fn wait(
        &self,
        timeout: Duration,
        done: impl Fn(&ProjectionStatus) -> Option<Result<(), String>>,
    ) -> Result<()> {
        self.store.core().owner.check()?;
        let stands = |position, reason: String| {
            Err(Error::ProjectionStopped { name: self.name.clone(), position, reason })
        };
        let waited = self.shared.wait(Deadline::after(timeout), |status| {
            if let Some(done) = done(status) {
                return Some(done.or_else(|reason| stands(status.position, reason)));
            }
            let asked = self.asked.rebuild.load(Ordering::Acquire);
            let mends = asked || (status.rebuilding.is_some() && status.rebuild_stopped.is_none());
            match &status.state {
                // A rebuild that goes on may lead past it.
                ProjectionState::Stopped { .. } if mends => None,
                ProjectionState::Stopped { seq, reason } => {
                    Some(stands(status.position, format!("event {seq}: {reason}")))
                }
                ProjectionState::Cancelled if !asked => Some(stands(status.position, CANCELLED.into())),
                ProjectionState::Failed(reason) => Some(stands(status.position, reason.clone())),
                ProjectionState::Ended => Some(stands(status.position, "it was ended".into())),
                _ => None,
            }
        });
        waited.unwrap_or_else(|| {
            let position = self.status().position;
            Err(Error::ProjectionBehind { name: self.name.clone(), position })
        })
    }

    /// Rebuilds the tables from the beginning of the log, beside the ones that are there, which go on being kept and read;
    /// when less than a batch is missing, one transaction applies the rest and puts the new ones in their place. So it ends
    /// beside writers that never pause. It goes on in the background, also after a restart. Cost: the whole log is read, and the space of the tables a second time. What the log has let go (events of no
    /// stream that were confirmed and trimmed, streams that were truncated) is not in the new tables: keep the log for as long as
    /// it has to be read ([`Retention`](crate::Retention)).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// projection.rebuild();
    /// projection.await_live(Duration::from_secs(5))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn rebuild(&self) {
        if self.store.core().owner.is_elsewhere() {
            return;
        }
        self.asked.rebuild.store(true, Ordering::Release);
        self.bell.ring();
    }

    /// Cancels the rebuild that is under way; whether there was one. See [`Store::cancel_rebuild`].
    ///
    /// # Errors
    /// As [`Store::cancel_rebuild`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert!(!projection.cancel_rebuild()?); // none is under way
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cancel_rebuild(&self) -> Result<bool> {
        self.store.cancel_rebuild(&self.name)
    }

    /// Events that it has given up, by sequence number, after `after`, at most `limit`.
    ///
    /// # Errors
    /// What redb says.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert!(projection.failures(None, 100)?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn failures(&self, after: Option<u64>, limit: usize) -> Result<Vec<ProjectionFailure>> {
        self.store.failures(&self.name, after, limit)
    }

    /// Gives the handler an event once more that was given up, after all that came since. If it succeeds the event is no
    /// longer among the failures.
    ///
    /// # Errors
    /// The handler's own; [`Error::NoSuchFailure`]; [`Error::Corrupt`] if its record is damaged; [`Error::ProjectionStopped`]
    /// while the tables are of another version than the handler.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::sync::{Arc, atomic::{AtomicBool, Ordering}};
    /// use std::time::Duration;
    /// use onewrite::{Error, Event, FailurePolicy};
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let broken = Arc::new(AtomicBool::new(true));
    /// let is_broken = Arc::clone(&broken);
    /// let projection = store.projection("counts").on_failure(FailurePolicy::Quarantine { attempts: 1 })
    ///     .run(move |_, _| if is_broken.load(Ordering::Relaxed) { Err(Error::app("broken")) } else { Ok(()) })?;
    /// projection.await_position(0, Duration::from_secs(5))?;
    /// broken.store(false, Ordering::Relaxed);
    /// projection.redrive(0)?;
    /// assert!(projection.failures(None, 10)?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn redrive(&self, seq: u64) -> Result<()> {
        self.store.core().owner.check()?;
        let (name, owned, handler) = (self.name.clone(), self.owned.clone(), Arc::clone(&self.handler));
        let version = self.version;
        // Said at once where it is plain; a write would wait for its turn first.
        if let Some(live) = self.store.core().tail().projections.get(&self.name).map(|row| row.live)
            && live.version != version
        {
            return Err(not_rebuilt(&self.name, live));
        }
        let redrive = move |tx: &crate::store::Transaction| {
            // Asked in the transaction: until a rebuild is done the tables are another handler's.
            tx.require_version(&name, version)?;
            // Looked at first: the record of a failure stands for as long as the failure does.
            let event = tx.event(seq);
            tx.drop_failure(&name, seq)?;
            let event = event?.ok_or(crate::error::CorruptError { seq, what: "it is missing" })?;
            handler(&event, &tx.projecting(&name, &owned, Which::Live)?)
        };
        self.store.write(redrive).map(drop)
    }

    /// Forgets an event that was given up.
    ///
    /// # Errors
    /// [`Error::NoSuchFailure`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::Error;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert!(matches!(projection.discard(7), Err(Error::NoSuchFailure { seq: 7, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn discard(&self, seq: u64) -> Result<()> {
        let name = self.name.clone();
        self.store.write(move |tx| tx.drop_failure(&name, seq)).map(drop)
    }

    /// Stops, `deadline` at most from now. What is applied by then is durable with its position.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use std::time::Duration;
    /// use onewrite::ProjectionState;
    /// let projection = store.projection("counts").run(|_, _| Ok(()))?;
    /// assert_eq!(projection.stop(Duration::from_secs(5)).state, ProjectionState::Ended);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stop(mut self, deadline: Duration) -> ProjectionStatus {
        self.end(deadline);
        self.status()
    }

    fn end(&mut self, deadline: Duration) {
        let Some(ended) = self.ended.take() else { return };
        if self.store.core().owner.is_elsewhere() {
            // The projection's thread is not in this process.
            return;
        }
        self.asked.stop.store(true, Ordering::Release);
        self.bell.ring();
        if self.store.core().turns.must_not_wait() || self.thread == thread::current().id() {
            // It waits for its writes before it ends, and so for this very thread to go on.
            in_drop(|| {
                tracing::warn!(projection = %self.name, "a thread that the projection waits for has stopped it; it ends by itself");
            });
            return;
        }
        if ended.wait_until(Deadline::after(deadline)).is_none() {
            in_drop(
                || tracing::warn!(projection = %self.name, "the projection did not end by its deadline; it ends by itself"),
            );
        }
    }
}

impl Drop for Projection {
    fn drop(&mut self) {
        self.end(Duration::from_secs(5));
    }
}
