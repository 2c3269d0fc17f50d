//! The builder: the settings of a store as an application gives them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{BoxError, Result, SettingError};
use crate::event::Destination;
use crate::limits::{
    CACHE_BYTES_DEFAULT, HOLDER_WARN_MS_DEFAULT, INBOX_AGE_MS_DEFAULT, JOURNAL_BYTES_MAX, JOURNAL_BYTES_MIN,
    PAYLOAD_BYTES_DEFAULT, PAYLOAD_BYTES_MAX, PROGRESS_DELAY_MS_DEFAULT, TRANSACTION_BYTES_DEFAULT,
    TRANSACTION_EVENTS_DEFAULT,
};
use crate::store::handle::Store;
use crate::store::settings::capture::Capture;
use crate::store::settings::capture_types::Captures;
use crate::store::settings::policies::{IdsPolicy, LanesPolicy};
use crate::store::settings::quota::BacklogQuota;
use crate::store::settings::retention::Retention;
use crate::store::settings::{Settings, StreamDestination, TransactionMax};
use crate::time::{Clock, SystemClock, as_ms};

/// Settings of a store, before it is opened.
///
/// ```
/// use onewrite::{BacklogQuota, QuotaPolicy, Store};
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("payments.redb");
/// let store = Store::builder()
///     .cache_bytes(8 << 20)
///     .backlog_quota(BacklogQuota::events(1_000_000).and_bytes(1 << 30))
///     .open(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until `open` is called"]
pub struct StoreBuilder {
    pub(crate) settings: Settings,
}

impl Default for StoreBuilder {
    fn default() -> Self {
        Self {
            settings: Settings {
                cache_bytes: CACHE_BYTES_DEFAULT,
                journal_bytes: 0,
                abandon_journal: false,
                payload_bytes_max: PAYLOAD_BYTES_DEFAULT,
                transaction_max: TransactionMax {
                    events: TRANSACTION_EVENTS_DEFAULT,
                    bytes: TRANSACTION_BYTES_DEFAULT,
                },
                quota: None,
                retention: Retention::default(),
                stream_destination: None,
                upcasts: Arc::default(),
                captures: Captures::default(),
                inbox_age_ms: INBOX_AGE_MS_DEFAULT,
                inbox_ids_max: None,
                ids_policy: IdsPolicy::default(),
                lanes_max: u64::MAX,
                gaps_max: u64::MAX,
                lanes_policy: LanesPolicy::default(),
                progress_delay_ms: PROGRESS_DELAY_MS_DEFAULT,
                holder_warn_ms: HOLDER_WARN_MS_DEFAULT,
                write_wait_max: None,
                quick_repair_idle: None,
                create: true,
                overwrite_empty: false,
                adopt: false,
                clock: Arc::new(SystemClock::new()),
            },
        }
    }
}

impl StoreBuilder {
    /// Sets the size of redb's page cache; 32 MiB unless set (redb's own default is 1 GiB).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::Store;
    /// let store = Store::builder().cache_bytes(4 << 20).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.settings.cache_bytes = bytes;
        self
    }

    /// Sets the size of a journal, a second file to which each commit goes first; 0 (none) unless
    /// set. 8 MiB are plenty. Its name: the store's and `.journal`, shortened over 255 bytes.
    ///
    /// A commit writes a dozen pages all over the file. With a journal, one sync writes them in one
    /// piece. They go to their places many commits at a time, a page of many commits once. So
    /// commits are quicker, most of all with many writers (see docs/benchmarks.md).
    ///
    /// **Guarantee.** The same as without. When `write` returns, its commit is synced in the
    /// journal. After a crash, `open` moves the journal's content into the file, with or without
    /// this setting. Then redb checks the file as usual. Closing the store leaves one file.
    ///
    /// **The two files belong together** while the store is open and after a crash: copy or move
    /// both. `open` refuses to go on without the journal of a crash
    /// ([`OpenError::JournalMissing`](crate::OpenError::JournalMissing)), or with a foreign one
    /// ([`OpenError::JournalInTheWay`](crate::OpenError::JournalInTheWay)). Only copies made at
    /// different moments of one opening cannot be distinguished. Do not open an uncleanly closed
    /// store with plain redb: that bypasses the journal.
    ///
    /// **Ownership.** A journal is made as a temporary file of mode 0600, and renamed into place.
    /// `open` uses the journal of a crash only if no other user can have prepared it
    /// ([`OpenError::JournalNotPrivate`](crate::OpenError::JournalNotPrivate)). The journal, or a
    /// copy of it, must belong to this process's user, to root or to the owner of the store's file.
    /// It must have one name, and be closed to others.
    ///
    /// **Cost.** The bytes on the disk, and at most as much memory. A commit takes some
    /// milliseconds longer each time half of the journal is full. Opening writes the journal anew,
    /// after a crash twice. A transaction of over a quarter of the journal goes to its places at
    /// once, with one more sync. If the disk has no room for the pages there, the store opens only
    /// once there is room; nothing is lost. Sizes: [`JOURNAL_BYTES_MIN`] to [`JOURNAL_BYTES_MAX`].
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Event, Store};
    /// let path = folder.path().join("a.redb");
    /// let store = Store::builder().journal_bytes(8 << 20).open(&path)?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// assert!(folder.path().join("a.redb.journal").exists());
    /// store.close()?;
    /// assert!(!folder.path().join("a.redb.journal").exists());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn journal_bytes(mut self, bytes: usize) -> Self {
        self.settings.journal_bytes = bytes;
        self
    }

    /// Opens an uncleanly closed store whose [journal](Self::journal_bytes) is lost for good,
    /// without the journal's commits; no unless set. Move a damaged journal away first.
    /// The file is as it was last written: often in an older state, and damaged if the crash came
    /// while pages went to their places. So `open` verifies the file, and refuses a damaged one
    /// ([`OpenError::Damaged`](crate::OpenError::Damaged)). The log reports each loss of commits.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, OpenError, Store};
    /// let path = folder.path().join("a.redb");
    /// let store = Store::builder().journal_bytes(1 << 20).open(&path)?;
    /// let copy = folder.path().join("b.redb"); // of the file alone, as a crash would leave it
    /// std::fs::copy(&path, &copy)?;
    /// assert!(matches!(Store::open(&copy), Err(Error::Open(OpenError::JournalMissing { .. }))));
    /// let older = Store::builder().abandon_missing_journal(true).open(&copy)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn abandon_missing_journal(mut self, abandon: bool) -> Self {
        self.settings.abandon_journal = abandon;
        self
    }

    /// Sets the cap on one event's payload; 1 MiB unless set, at most [`PAYLOAD_BYTES_MAX`].
    /// RabbitMQ 3.10 accepts 128 MiB, RabbitMQ 4 accepts 16 MiB.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Event, Store};
    /// let store = Store::builder().payload_bytes_max(4).open(folder.path().join("a.redb"))?;
    /// let error = store.write(|tx| tx.append(Event::bytes("paid", "12345").to("", "payments"))).unwrap_err();
    /// assert_eq!(error.to_string(), "the payload is 5 bytes long; this store takes at most 4");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn payload_bytes_max(mut self, bytes: usize) -> Self {
        self.settings.payload_bytes_max = bytes;
        self
    }

    /// Sets the most events that one transaction appends, and the most entries that it makes (in
    /// the inbox, for captured tables); [`TRANSACTION_EVENTS_DEFAULT`] unless set. Not 0.
    /// A transaction gathers both in memory until it commits, and all other writes wait. Beyond the
    /// limit, every call fails with
    /// [`Error::TransactionTooLarge`](crate::Error::TransactionTooLarge), and nothing is written. A
    /// group of writes commits at the limit, so the store holds less than twice the limit.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, Event, Store};
    /// let store = Store::builder().transaction_events_max(2).open(folder.path().join("a.redb"))?;
    /// let append = |events: u64| {
    ///     store.write(move |tx| (0..events).try_for_each(|_| tx.append(Event::bytes("paid", "1").unpublished()).map(drop)))
    /// };
    /// assert_eq!(append(2)?.seqs(), [0, 1]);
    /// assert!(matches!(append(3), Err(Error::TransactionTooLarge { events: 3, events_max: 2, .. })));
    /// assert_eq!(store.stats()?.next_seq, 2); // nothing of the second
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn transaction_events_max(mut self, events: u64) -> Self {
        self.settings.transaction_max.events = events;
        self
    }

    /// Sets the most bytes of records and of the keys of entries that one transaction gathers;
    /// [`TRANSACTION_BYTES_DEFAULT`] unless set. A transaction takes a small multiple of that in
    /// memory. Otherwise as [`transaction_events_max`](Self::transaction_events_max).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, Event, Store};
    /// let store = Store::builder().transaction_bytes_max(1_000).open(folder.path().join("a.redb"))?;
    /// let append = |bytes: usize| store.write(move |tx| tx.append(Event::bytes("paid", vec![7; bytes]).unpublished()));
    /// append(500)?;
    /// assert!(matches!(append(1_500), Err(Error::TransactionTooLarge { bytes_max: 1_000, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn transaction_bytes_max(mut self, bytes: u64) -> Self {
        self.settings.transaction_max.bytes = bytes;
        self
    }

    /// Limits the backlog.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{BacklogQuota, QuotaPolicy, Store};
    /// let quota = BacklogQuota::events(0).and_bytes(1 << 30);
    /// let refused = Store::builder().backlog_quota(quota).open(folder.path().join("a.redb"));
    /// assert!(refused.is_err()); // a quota of zero would refuse every event
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn backlog_quota(mut self, quota: BacklogQuota) -> Self {
        self.settings.quota = Some(quota);
        self
    }

    /// Gives a destination (`None`: nowhere), by stream and event type, to events of streams that
    /// have none; they stay in the log unless set. The log records the rule's result at append.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Destination, Event, ExpectedRevision, Store};
    /// let store = Store::builder()
    ///     .stream_destination(|stream, event_type| {
    ///         stream.starts_with("account-").then(|| Destination::exchange("accounts", event_type))
    ///     })
    ///     .open(folder.path().join("a.redb"))?;
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("deposited", "100")], ExpectedRevision::Any)?;
    ///     tx.stream("audit-7").append([Event::bytes("looked-at", "")], ExpectedRevision::Any)
    /// })?;
    /// let snapshot = store.read()?;
    /// let destination = |seq| Ok::<_, onewrite::Error>(snapshot.event(seq)?.expect("appended above").destination().clone());
    /// assert_eq!(destination(0)?, Destination::exchange("accounts", "deposited"));
    /// assert_eq!(destination(1)?, Destination::Unpublished);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn stream_destination(
        mut self,
        rule: impl Fn(&str, &str) -> Option<Destination> + Send + Sync + 'static,
    ) -> Self {
        self.settings.stream_destination = Some(StreamDestination::new(rule));
        self
    }

    /// Sets how payloads of an older form are read: from a (type, [version](crate::Event::version))
    /// to a newer one, which may be of another type.
    ///
    /// The chain runs whenever an event is read (streams, projections, subscriptions, the log). The
    /// log is never rewritten, and a relay publishes the recorded form. If an upcast fails, or the
    /// version is newer than any named here or [declared](Self::event_version), reading fails
    /// ([`Error::Upcast`](crate::Error::Upcast)). [`open`](Self::open) refuses chains that are
    /// circular, ambiguous (two upcasts of a version), or incomplete (an older version has none).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Event, Store};
    /// let path = folder.path().join("a.redb");
    /// let store = Store::open(&path)?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "100").unpublished()))?; // in those days: cents, and only euros
    /// store.close()?;
    /// let store = Store::builder()
    ///     .upcast(("paid", 1), ("paid", 2), |cents| Ok([cents, b" EUR"].concat()))
    ///     .open(&path)?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!((event.version(), event.payload()), (2, &b"100 EUR"[..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn upcast(
        mut self,
        from: (&str, u32),
        to: (&str, u32),
        convert: impl Fn(&[u8]) -> Result<Vec<u8>, BoxError> + Send + Sync + 'static,
    ) -> Self {
        Arc::make_mut(&mut self.settings.upcasts).add(from, to, convert);
        self
    }

    /// Declares the newest [version](crate::Event::version) of a type that this release knows.
    /// Unless set, that is the newest version in an [upcast](Self::upcast), or 1 if there is none.
    ///
    /// For a newer version, appending fails with
    /// [`EventError::UnknownVersion`](crate::EventError::UnknownVersion), and reading with
    /// [`Error::Upcast`](crate::Error::Upcast). So an older release that is installed again
    /// misreads nothing of its successor. Declare the versions that your code distinguishes by
    /// [`RecordedEvent::version`](crate::RecordedEvent::version). [`open`](Self::open) refuses
    /// version 0, and a version below one that an upcast names.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, Event, EventError, Store};
    /// let store = Store::builder().event_version("paid", 2).open(folder.path().join("a.redb"))?;
    /// let pay = |version| store.write(move |tx| tx.append(Event::bytes("paid", "1").version(version).unpublished()));
    /// pay(1)?;
    /// pay(2)?;
    /// let refused = pay(3).unwrap_err();
    /// assert!(matches!(refused, Error::Event(EventError::UnknownVersion { version: 3, newest: 2, .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn event_version(mut self, event_type: &str, newest: u32) -> Self {
        Arc::make_mut(&mut self.settings.upcasts).declare(event_type, newest);
        self
    }

    /// Registers a table as captured: each of its changes leaves an event in the log, in the same
    /// transaction. Write it with [`captured_table`](crate::Transaction::captured_table) alone. The
    /// file remembers the capture: a process that does not register the table cannot write it
    /// either, until [`Store::end_capture`](crate::Store::end_capture).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let store = Store::builder()
    ///     .capture(Capture::json(ACCOUNTS).to("accounts", "changed"))
    ///     .open(folder.path().join("a.redb"))?;
    /// let receipt = store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
    /// assert_eq!(receipt.seqs(), [0]); // the event of the change
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn capture<K: redb::Key + 'static, V: redb::Value + 'static>(
        mut self,
        capture: Capture<K, V>,
    ) -> Self {
        self.settings.captures.add(Arc::new(capture));
        self
    }

    /// Sets how long confirmed events stay in the log; not at all unless set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Retention, Store};
    /// let store = Store::builder().retention(Retention::forever()).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn retention(mut self, retention: Retention) -> Self {
        self.settings.retention = retention;
        self
    }

    /// Sets how long a relay's progress may wait for a commit before it gets a commit of its own;
    /// 250 ms unless set. The time counts from the start of the wait or from the end of the last
    /// commit, whichever is later: while writes flow, they carry the progress. If the process dies,
    /// events whose progress is not written are published again. In a store without writes,
    /// confirmed events leave the log no sooner than this.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::time::Duration;
    /// use onewrite::Store;
    /// let store = Store::builder().progress_delay(Duration::from_millis(50)).open(folder.path().join("a.redb"))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn progress_delay(mut self, delay: Duration) -> Self {
        self.settings.progress_delay_ms = as_ms(delay);
        self
    }

    /// Sets how long `write`, `write_async`, `write_once`, `begin` and
    /// [`execute`](crate::AggregateStream::execute) wait for the write transaction; for ever unless
    /// set. `open` refuses zero. After that they fail with
    /// [`Error::WriteTimeout`](crate::Error::WriteTimeout), which names the thread that holds the
    /// transaction.
    ///
    /// A queued closure that was given up never runs. The limit counts until the closure begins;
    /// then the call waits for the closure's commit. With or without a limit, the store logs what
    /// holds the transaction when a caller has waited for a second, and each time the wait has
    /// doubled. Relays, consumers and projections have no limit; the store logs their waits.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::time::Duration;
    /// use onewrite::{Error, Store};
    /// let store = Store::builder().write_wait_max(Duration::from_millis(50)).open(folder.path().join("a.redb"))?;
    /// let tx = store.begin()?; // held for long
    /// let other = store.clone();
    /// let refused = std::thread::spawn(move || other.write(|_| Ok(()))).join().expect("it does not panic");
    /// assert!(matches!(refused, Err(Error::WriteTimeout { .. })));
    /// drop(tx);
    /// store.write(|_| Ok(()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn write_wait_max(mut self, limit: Duration) -> Self {
        self.settings.write_wait_max = Some(limit);
        self
    }

    /// Makes the next open quick if the process or the machine dies while the store is idle; off
    /// unless set. When no write has come for `idle` (not zero), one commit saves where redb's free
    /// pages are (redb's quick repair), as closing the store does. After an unclean end, an open
    /// verifies every page, which takes a second and more per GB. After this commit it takes
    /// milliseconds, at any size, until the next write.
    ///
    /// **Cost.** Two syncs and a few pages (at 10 GB about a third of a MiB) each time the store
    /// falls idle, and once after an open without writes. Nothing while writes flow.
    ///
    /// **Safety.** Such an open does not verify. If the disk lost what it reported as synced (only
    /// a lying disk does), the commit may be damaged, which is not noticed before a read. Events
    /// have checksums of their own; the application's tables have none. An open after any other
    /// write verifies, and falls back to what is whole. A longer `idle` gives such a disk more
    /// time.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::time::Duration;
    /// use onewrite::Store;
    /// let store = Store::builder().quick_repair_when_idle(Duration::from_secs(10)).open(folder.path().join("a.redb"))?;
    /// assert!(!store.stats()?.verified_at_open);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn quick_repair_when_idle(mut self, idle: Duration) -> Self {
        self.settings.quick_repair_idle = Some(idle);
        self
    }

    /// Sets whether a missing file is created; yes unless set. For an empty file, see
    /// [`overwrite_empty`](Self::overwrite_empty).
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::Store;
    /// let path = folder.path().join("a.redb");
    /// assert!(Store::builder().create_if_missing(false).open(&path).is_err());
    /// assert!(!path.exists());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create_if_missing(mut self, create: bool) -> Self {
        self.settings.create = create;
        self
    }

    /// Sets whether a store is made in place of an empty file; no unless set.
    /// A store is never empty: a failed copy, or a file system that lost content, leaves an empty
    /// file. So `open` refuses it ([`OpenError::Empty`](crate::OpenError::Empty)). Set this if the
    /// path comes from something that makes an empty file, such as `tempfile::NamedTempFile`. Even
    /// so, `open` refuses an empty file with a [journal](Self::journal_bytes) beside it: a store
    /// was there. If several processes open an empty file at once, one makes the store, and none
    /// replaces another's.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, OpenError, Store};
    /// let path = folder.path().join("a.redb");
    /// std::fs::write(&path, "")?;
    /// assert!(matches!(Store::open(&path), Err(Error::Open(OpenError::Empty { .. }))));
    /// let store = Store::builder().overwrite_empty(true).open(&path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn overwrite_empty(mut self, overwrite: bool) -> Self {
        self.settings.overwrite_empty = overwrite;
        self
    }

    /// Sets whether a redb database without a log gets one; no unless set, so that a wrong path is
    /// not written to. The application's own tables stay as they are.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Store, redb::Database};
    /// let path = folder.path().join("existing.redb");
    /// drop(Database::create(&path)?); // a database of the application, without a log
    /// assert!(Store::open(&path).is_err());
    /// assert!(Store::builder().adopt_existing(true).open(&path).is_ok());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn adopt_existing(mut self, adopt: bool) -> Self {
        self.settings.adopt = adopt;
        self
    }

    /// Sets how long something may hold the log or the file before the store logs a warning; a
    /// minute unless set ([`HOLDER_WARN_MS_DEFAULT`](crate::limits::HOLDER_WARN_MS_DEFAULT)).
    /// `Duration::MAX` is for ever. [`Stats::holders`](crate::Stats::holders) lists all holders.
    /// Holders are relays and projections that stand still (running or not), unread subscriptions,
    /// and snapshots. The warning names the holder, its position, since when it stands there, and
    /// how to let go. It comes once, and again after the holder has moved and then stood still for
    /// as long. The store checks at commits, so a warning may be a quarter of the time late.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::time::Duration;
    /// use onewrite::Store;
    /// let path = folder.path().join("a.redb");
    /// let store = Store::builder().holder_warn_after(Duration::from_secs(3600)).open(path)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn holder_warn_after(mut self, time: Duration) -> Self {
        self.settings.holder_warn_ms = as_ms(time);
        self
    }

    /// Sets the clock; the operating system's unless set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use std::sync::Arc;
    /// use onewrite::{Event, Store, time::{Clock, Now}};
    /// #[derive(Debug)]
    /// struct Fixed;
    /// impl Clock for Fixed {
    ///     fn now(&self) -> Now {
    ///         Now { mono_ms: 0, wall_ms: 1_000 }
    ///     }
    /// }
    /// let store = Store::builder().clock(Arc::new(Fixed)).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "payments")))?;
    /// assert_eq!(store.read()?.event(0)?.expect("appended above").time_ms(), 1_000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// Opens the store, creating it if there is none. When this returns `Ok`, this process owns the
    /// file, the log is readable and its end is known. After an unclean end of the last owner,
    /// every page is verified first (1 to 3 s per GB, warm).
    ///
    /// The path names the file itself, in a folder that exists; a symbolic link is not followed.
    /// The path is resolved once: the process may change its folder later. While the store is open,
    /// do not move, delete or replace the file, nor rename a folder above it. The store notices
    /// after 64 commits at the latest, and is then poisoned. The path does not lead to those
    /// commits.
    ///
    /// # Errors
    /// [`Error::Open`](crate::Error::Open), naming the file, or
    /// [`Error::Setting`](crate::Error::Setting). Nothing is lost by trying.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Error, OpenError, Store};
    /// let path = folder.path().join("payments.redb");
    /// let store = Store::builder().open(&path)?;
    /// assert!(matches!(Store::builder().open(&path), Err(Error::Open(OpenError::Locked { .. }))));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        let settings = self.settings;
        if settings.payload_bytes_max > PAYLOAD_BYTES_MAX {
            let reason = format!("{} bytes are more than {PAYLOAD_BYTES_MAX}", settings.payload_bytes_max);
            return Err(SettingError::new("payload_bytes_max", reason).into());
        }
        let max = settings.transaction_max;
        for (name, max) in [("transaction_events_max", max.events), ("transaction_bytes_max", max.bytes)] {
            if max == 0 {
                return Err(SettingError::new(name, "a limit of zero would refuse every event").into());
            }
        }
        let journal = settings.journal_bytes;
        if journal != 0 && !(JOURNAL_BYTES_MIN..=JOURNAL_BYTES_MAX).contains(&journal) {
            let reason =
                format!("{journal} bytes are not between {JOURNAL_BYTES_MIN} and {JOURNAL_BYTES_MAX}, nor 0");
            return Err(SettingError::new("journal_bytes", reason).into());
        }
        if settings.quota.is_some_and(|quota| quota.events_max == 0 || quota.bytes_max == 0) {
            return Err(SettingError::new("backlog_quota", "a quota of zero would refuse every event").into());
        }
        settings.upcasts.check()?;
        settings.captures.check_settings()?;
        if settings.quick_repair_idle.is_some_and(|idle| idle.is_zero()) {
            let reason = "a store is never idle for no time at all";
            return Err(SettingError::new("quick_repair_when_idle", reason).into());
        }
        if settings.write_wait_max == Some(Duration::ZERO) {
            return Err(SettingError::new("write_wait_max", "a write waits for some time at least").into());
        }
        if settings.inbox_ids_max == Some(0) {
            return Err(SettingError::new(
                "inbox_ids_max",
                "an inbox of no ids would see every message anew",
            )
            .into());
        }
        Store::open_with(PathBuf::from(path.as_ref()), settings)
    }
}
