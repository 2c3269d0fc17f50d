//! Aggregates. An aggregate is a state that is folded from the events of one stream, and that
//! decides which events come next.

mod command;

use std::marker::PhantomData;

use crate::error::{Error, ExpectedRevision, Result};
use crate::event::{Event, RecordedEvent};
use crate::limits::CONFLICT_ATTEMPTS_DEFAULT;
use crate::store::{Store, StreamReader};

pub use self::command::AggregateStream;

/// A state that is folded from the events of one stream. The default is the state before the first
/// event.
///
/// ```
/// use onewrite::{Aggregate, Error, Event, RecordedEvent, Result, Store};
///
/// #[derive(Debug, Default)]
/// struct Account {
///     cents: u64,
/// }
///
/// enum Entry {
///     Deposited(u64),
///     Withdrawn(u64),
/// }
///
/// impl Aggregate for Account {
///     const CATEGORY: &'static str = "account";
///     type Event = Entry;
///
///     fn encode(event: &Entry) -> Result<Event> {
///         Ok(match event {
///             Entry::Deposited(cents) => Event::json("deposited", cents)?,
///             Entry::Withdrawn(cents) => Event::json("withdrawn", cents)?,
///         })
///     }
///     fn decode(recorded: &RecordedEvent) -> Result<Entry> {
///         let cents = onewrite::codec::from_json(recorded.payload())?;
///         match recorded.event_type() {
///             "deposited" => Ok(Entry::Deposited(cents)),
///             "withdrawn" => Ok(Entry::Withdrawn(cents)),
///             other => Err(Error::reject(format!("unknown event type `{other}`"))),
///         }
///     }
///     fn apply(&mut self, event: &Entry) {
///         match event {
///             Entry::Deposited(cents) => self.cents += cents,
///             Entry::Withdrawn(cents) => self.cents -= cents,
///         }
///     }
/// }
///
/// # let folder = tempfile::tempdir()?;
/// # let store = Store::open(folder.path().join("a.redb"))?;
/// let account = store.aggregate::<Account>("7"); // the stream `account-7`
/// account.execute(|_| Ok(vec![Entry::Deposited(100)]))?;
/// let refused = account.execute(|state| {
///     if state.cents < 500 {
///         return Err(Error::app("insufficient funds"));
///     }
///     Ok(vec![Entry::Withdrawn(500)])
/// });
/// assert!(refused.is_err());
/// assert_eq!(account.load()?.state.cents, 100);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait Aggregate: Default {
    /// The category of the aggregate's streams: the stream of id `7` is `CATEGORY-7`. Loading
    /// refuses a category that holds a `-`. The category of a stream is the part before the first
    /// `-`, so no filter would find the streams. Also, `a` with id `b-7` would share a stream with
    /// `a-b`.
    const CATEGORY: &'static str;
    /// How many events apart snapshots are: a snapshot is saved with the append that brings this
    /// many events since the last snapshot. 0 means no snapshots. A snapshot larger than
    /// [`SNAPSHOT_BYTES_MAX`](crate::limits::SNAPSHOT_BYTES_MAX) is left out
    /// ([`Stats::snapshots_left_out`](crate::Stats::snapshots_left_out)).
    const SNAPSHOT_EVERY: u64 = 0;
    /// The version of the snapshots' form. A snapshot of another version is ignored, and the events
    /// are folded instead.
    const SNAPSHOT_VERSION: u32 = 0;
    /// The events of the aggregate.
    type Event;

    /// Returns the event as it is appended: type and payload, and an id if a retry must be
    /// recognised.
    ///
    /// # Errors
    /// The error of the codec.
    fn encode(event: &Self::Event) -> Result<Event>;

    /// Returns a recorded event as an event of this aggregate. Read older forms here.
    ///
    /// # Errors
    /// Return an error for an unknown type or version. Loading then fails with this error, since a
    /// state that leaves out an event is wrong.
    fn decode(recorded: &RecordedEvent) -> Result<Self::Event>;

    /// Applies one event to the state. The event has happened: nothing is checked here.
    fn apply(&mut self, event: &Self::Event);

    /// Returns the state as a snapshot, or `None` for no snapshot.
    #[must_use]
    fn save(&self) -> Option<Vec<u8>> {
        None
    }

    /// Returns the state of a snapshot of this version. Returns `None` if the snapshot cannot be
    /// read; then the events are folded.
    #[must_use]
    fn restore(_snapshot: &[u8]) -> Option<Self> {
        None
    }
}

/// An aggregate as of one moment.
///
/// ```
/// # use onewrite::{Aggregate, Error, Event, RecordedEvent, Result, Store};
/// # #[derive(Default)]
/// # struct Count(u64);
/// # impl Aggregate for Count {
/// #     const CATEGORY: &'static str = "count";
/// #     type Event = ();
/// #     fn encode(_: &()) -> Result<Event> { Ok(Event::bytes("counted", "")) }
/// #     fn decode(_: &RecordedEvent) -> Result<()> { Ok(()) }
/// #     fn apply(&mut self, _: &()) { self.0 += 1; }
/// # }
/// # let folder = tempfile::tempdir()?;
/// # let store = Store::open(folder.path().join("a.redb"))?;
/// let loaded: onewrite::Loaded<Count> = store.aggregate::<Count>("a").load()?;
/// assert_eq!((loaded.state.0, loaded.revision), (0, None)); // nothing has happened yet
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loaded<A> {
    /// The state.
    pub state: A,
    /// The revision of the newest event in the state; `None` before the first event.
    pub revision: Option<u64>,
    /// The revision of the snapshot that the state was loaded from, if a snapshot was used.
    pub snapshot: Option<u64>,
}

impl<A> Loaded<A> {
    /// Returns the revision to expect for an append that builds on this state.
    ///
    /// ```
    /// # use onewrite::{Aggregate, Event, ExpectedRevision, RecordedEvent, Result, Store};
    /// # #[derive(Default)]
    /// # struct Count(u64);
    /// # impl Aggregate for Count {
    /// #     const CATEGORY: &'static str = "count";
    /// #     type Event = ();
    /// #     fn encode(_: &()) -> Result<Event> { Ok(Event::bytes("counted", "")) }
    /// #     fn decode(_: &RecordedEvent) -> Result<()> { Ok(()) }
    /// #     fn apply(&mut self, _: &()) { self.0 += 1; }
    /// # }
    /// # let folder = tempfile::tempdir()?;
    /// # let store = Store::open(folder.path().join("a.redb"))?;
    /// let count = store.aggregate::<Count>("a");
    /// assert_eq!(count.load()?.expected(), ExpectedRevision::NoStream);
    /// count.execute(|_| Ok(vec![()]))?;
    /// assert_eq!(count.load()?.expected(), ExpectedRevision::Exact(0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn expected(&self) -> ExpectedRevision {
        self.revision.map_or(ExpectedRevision::NoStream, ExpectedRevision::Exact)
    }
}

impl StreamReader<'_> {
    /// Folds the stream into an aggregate, from the newest snapshot that can be read, otherwise
    /// from the first event.
    ///
    /// # Errors
    /// - [`Error::StreamDeleted`].
    /// - [`Error::MissingRevision`] if the stream is truncated and no snapshot stands for the
    ///   events that are gone.
    /// - The error of [`Aggregate::decode`].
    ///
    /// ```
    /// # use onewrite::{Aggregate, Error, Event, ExpectedRevision, RecordedEvent, Result, Store};
    /// # #[derive(Default)]
    /// # struct Count(u64);
    /// # impl Aggregate for Count {
    /// #     const CATEGORY: &'static str = "count";
    /// #     type Event = ();
    /// #     fn encode(_: &()) -> Result<Event> { Ok(Event::bytes("counted", "")) }
    /// #     fn decode(_: &RecordedEvent) -> Result<()> { Ok(()) }
    /// #     fn apply(&mut self, _: &()) { self.0 += 1; }
    /// # }
    /// # let folder = tempfile::tempdir()?;
    /// # let store = Store::open(folder.path().join("a.redb"))?;
    /// // Two aggregates decided on in one transaction:
    /// store.write(|tx| {
    ///     let (from, to) = (tx.stream("count-a").read()?.fold::<Count>()?, tx.stream("count-b").read()?.fold::<Count>()?);
    ///     tx.stream("count-a").append([Count::encode(&())?], from.expected())?;
    ///     tx.stream("count-b").append([Count::encode(&())?], to.expected())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn fold<A: Aggregate>(&self) -> Result<Loaded<A>> {
        let stream = self.name();
        if self.is_deleted() {
            return Err(Error::StreamDeleted { stream: stream.to_owned() });
        }
        let saved = self.snapshot(A::SNAPSHOT_VERSION)?;
        let restored = saved.and_then(|(revision, bytes)| Some((A::restore(&bytes)?, revision)));
        let (mut state, snapshot) = match restored {
            Some((state, revision)) => (state, Some(revision)),
            None => (A::default(), None),
        };
        let from = snapshot.map_or(0, |revision| revision + 1);
        if from < self.first_revision() {
            return Err(Error::MissingRevision { stream: stream.to_owned(), revision: from });
        }
        for recorded in self.events(from) {
            state.apply(&A::decode(&recorded?)?);
        }
        Ok(Loaded { state, revision: self.revision(), snapshot })
    }
}

impl Store {
    /// Returns the aggregate of this id. Its stream is `CATEGORY-id`.
    ///
    /// ```
    /// # use onewrite::{Aggregate, Error, Event, RecordedEvent, Result, Store};
    /// # #[derive(Default)]
    /// # struct Count(u64);
    /// # impl Aggregate for Count {
    /// #     const CATEGORY: &'static str = "count";
    /// #     type Event = ();
    /// #     fn encode(_: &()) -> Result<Event> { Ok(Event::bytes("counted", "")) }
    /// #     fn decode(_: &RecordedEvent) -> Result<()> { Ok(()) }
    /// #     fn apply(&mut self, _: &()) { self.0 += 1; }
    /// # }
    /// # let folder = tempfile::tempdir()?;
    /// # let store = Store::open(folder.path().join("a.redb"))?;
    /// let receipt = store.aggregate::<Count>("a").execute(|_| Ok(vec![(), ()]))?;
    /// assert_eq!((receipt.value().state.0, receipt.seqs()), (2, &[0, 1][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn aggregate<A: Aggregate>(&self, id: impl std::fmt::Display) -> AggregateStream<A> {
        AggregateStream {
            store: self.clone(),
            stream: format!("{}-{id}", A::CATEGORY),
            attempts: CONFLICT_ATTEMPTS_DEFAULT,
            of: PhantomData,
        }
    }
}
