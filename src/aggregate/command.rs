//! Commands on an aggregate: load, decide, append, and decide again if another command was faster.
//!
//! **Invariant.** `decide` runs outside any transaction and without a lock.

use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::Arc;

use super::{Aggregate, Loaded};
use crate::error::{Error, ExpectedRevision, Result};
use crate::event::{Event, check_category};
use crate::limits::SNAPSHOT_BYTES_MAX;
use crate::store::shared::core::Core;
use crate::store::shared::lines::{Head, Lines, TaskPlace};
use crate::store::{Receipt, Store, Transaction};

/// The stream of one aggregate. See [`Store::aggregate`].
///
/// ```
/// # use onewrite::{Aggregate, AggregateStream, Error, Event, RecordedEvent, Result, Store};
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
/// let count: AggregateStream<Count> = store.aggregate("a");
/// assert_eq!(count.attempts(3).load()?.state.0, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct AggregateStream<A> {
    pub(super) store: Store,
    pub(super) stream: String,
    pub(super) attempts: u32,
    pub(super) of: PhantomData<fn() -> A>,
}

impl<A: Aggregate> AggregateStream<A> {
    /// Sets how often [`execute`](Self::execute) decides at most while other commands are faster.
    /// The default is 10, the minimum 1.
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
    /// store.aggregate::<Count>("a").attempts(1).execute(|_| Ok(vec![()]))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// Loads the aggregate as of the last commit.
    ///
    /// # Errors
    /// Returns [`Error::Setting`] for a [category](Aggregate::CATEGORY) that cannot work; otherwise
    /// as [`StreamReader::fold`](crate::StreamReader::fold).
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
    /// assert_eq!(store.aggregate::<Count>("a").load()?.revision, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load(&self) -> Result<Loaded<A>> {
        check_category("Aggregate::CATEGORY", A::CATEGORY)?;
        self.store.read()?.stream(&*self.stream)?.fold()
    }

    /// Executes a command: loads the aggregate, calls `decide` for the events, and appends them if
    /// no other write was faster.
    ///
    /// After a faster write, `decide` is called again on the new state. It runs on this thread,
    /// outside any transaction, so it may take its time. It may run several times. The receipt
    /// holds the state after the append. If `decide` returns no events, nothing is written.
    ///
    /// A command whose events carry ids may be executed again. If the events are in the stream
    /// already, nothing is written. The receipt then names those events and holds the current
    /// state.
    ///
    /// Commands that meet a conflict take turns, in the order in which they met it. While some
    /// commands take turns, every further command on the aggregate joins them. So if only commands
    /// write the stream, each decides three times at most, however many commands there are. Three
    /// things give that up, and then [`attempts`](Self::attempts) is the only bound:
    ///
    /// - writers that append to the stream by themselves;
    /// - a `decide` that keeps the other commands waiting for more than two seconds;
    /// - commands that `decide` itself executes, which never wait for other commands.
    ///
    /// # Errors
    /// - The error of `decide`.
    /// - [`Error::WrongRevision`] once the attempts are used up.
    /// - The errors of [`load`](Self::load) and of
    ///   [`EventStream::append`](crate::EventStream::append).
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
    /// let count = store.aggregate::<Count>("a");
    /// count.execute(|state| Ok(if state.0 == 0 { vec![()] } else { Vec::new() }))?;
    /// let receipt = count.execute(|state| Ok(if state.0 == 0 { vec![()] } else { Vec::new() }))?;
    /// assert_eq!((receipt.value().state.0, receipt.seqs().len()), (1, 0)); // nothing to do any more
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn execute(&self, mut decide: impl FnMut(&A) -> Result<Vec<A::Event>>) -> Result<Receipt<Loaded<A>>> {
        self.store.core().owner.check()?;
        // The place in the line of commands, once there is a line. `Some(None)`: this thread must
        // not wait in a line.
        let mut line = self.store.core().lines.is_there(&self.stream).then(|| self.stand());
        let mut attempts = 0;
        loop {
            attempts += 1;
            let last = attempts >= self.attempts;
            match self.try_once(&mut decide, line.is_none() && !last) {
                Err(Error::WrongRevision { .. }) if !last => {
                    if !line.as_ref().and_then(Option::as_ref).is_some_and(Head::is_first) {
                        // A command that others have passed leaves its place before it takes
                        // another.
                        line = None;
                        line.get_or_insert_with(|| self.stand());
                    }
                }
                result => return result,
            }
        }
    }

    /// Executes a command as [`execute`](Self::execute) does, without blocking a thread. No runtime
    /// is needed.
    ///
    /// Loading and `decide` run on the thread that polls. The write is made as by
    /// [`Store::write_async`]: dropping the future while the write is on its way does not take the
    /// write back. Give the events ids if a command may be executed again.
    ///
    /// # Errors
    /// Those of [`execute`](Self::execute).
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
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// # runtime.block_on(async {
    /// let receipt = store.aggregate::<Count>("a").execute_async(|_| Ok(vec![()])).await?;
    /// assert_eq!(receipt.value().state.0, 1);
    /// # Ok::<(), Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn execute_async(
        &self,
        mut decide: impl FnMut(&A) -> Result<Vec<A::Event>>,
    ) -> Result<Receipt<Loaded<A>>> {
        let core = Arc::clone(self.store.core());
        core.owner.check()?;
        let mut line = None;
        if core.lines.is_there(&self.stream) {
            line = Some(self.stand_as_task(&core).await);
        }
        let mut attempts = 0;
        loop {
            attempts += 1;
            let last = attempts >= self.attempts;
            let place = line.as_ref().and_then(Option::as_ref);
            match self.try_once_async(&mut decide, place, line.is_none() && !last).await {
                Err(Error::WrongRevision { .. }) if !last => {
                    if !place.is_some_and(TaskPlace::is_first) {
                        // A command that others have passed leaves its place before it takes
                        // another.
                        drop(line.take());
                        line = Some(self.stand_as_task(&core).await);
                    }
                }
                result => return result,
            }
        }
    }

    fn may_stand(&self, call: &'static str) -> bool {
        Lines::may_wait() && self.store.core().refuse_reentrant(call).is_ok()
    }

    fn stand(&self) -> Option<Head<'_>> {
        let may = self.may_stand("AggregateStream::execute");
        may.then(|| self.store.core().lines.stand(&self.stream))
    }

    async fn stand_as_task<'a>(&'a self, core: &'a Core) -> Option<TaskPlace<'a>> {
        if !self.may_stand("AggregateStream::execute_async") {
            return None;
        }
        let mut place = core.lines.join_as_task(&self.stream, core.waking());
        poll_fn(|context| place.poll_head(context)).await;
        Some(place)
    }

    #[track_caller]
    fn try_once(
        &self,
        decide: &mut impl FnMut(&A) -> Result<Vec<A::Event>>,
        steps_back: bool,
    ) -> Result<Receipt<Loaded<A>>> {
        match self.decide(decide)? {
            Decided::Nothing(loaded) => Ok(Receipt::new(loaded, Vec::new(), self.store.core())),
            Decided::Append(append, after) => {
                let receipt = self.store.write(append.closure(steps_back))?;
                self.appended(receipt, after)
            }
        }
    }

    async fn try_once_async(
        &self,
        decide: &mut impl FnMut(&A) -> Result<Vec<A::Event>>,
        place: Option<&TaskPlace<'_>>,
        steps_back: bool,
    ) -> Result<Receipt<Loaded<A>>> {
        let decided = {
            let _decides = place.map(TaskPlace::decides);
            self.decide(decide)?
        };
        match decided {
            Decided::Nothing(loaded) => Ok(Receipt::new(loaded, Vec::new(), self.store.core())),
            Decided::Append(append, after) => {
                let receipt = self.store.write_async(append.closure(steps_back)).await?;
                self.appended(receipt, after)
            }
        }
    }

    /// Loads the aggregate, and calls `decide` for the events.
    fn decide(&self, decide: &mut impl FnMut(&A) -> Result<Vec<A::Event>>) -> Result<Decided<A>> {
        let loaded = self.load()?;
        let expected = loaded.expected();
        let Loaded { mut state, revision, snapshot } = loaded;
        let happened = decide(&state)?;
        let events = happened.iter().map(A::encode).collect::<Result<Vec<Event>>>()?;
        if events.is_empty() {
            return Ok(Decided::Nothing(Loaded { state, revision, snapshot }));
        }
        happened.iter().for_each(|event| state.apply(event));
        let newest = revision.map_or(0, |revision| revision + 1) + events.len() as u64 - 1;
        // The number of revisions since the snapshot that the state was loaded from.
        let since = newest + 1 - snapshot.map_or(0, |revision| revision + 1);
        let before = since - events.len() as u64;
        let (core, every) = (self.store.core(), A::SNAPSHOT_EVERY);
        // A snapshot that was too large is tried again after `SNAPSHOT_EVERY` more events.
        let is_due = every > 0
            && since >= every
            && (!core.left_out.has(&self.stream) || since / every > before / every);
        let saved = if is_due { state.save() } else { None };
        let left_out = saved.as_ref().map(Vec::len).filter(|len| *len > SNAPSHOT_BYTES_MAX);
        let saved = saved.filter(|_| left_out.is_none()).map(|saved| (A::SNAPSHOT_VERSION, saved));
        let append = Append { stream: self.stream.clone(), events, expected, actual: revision, saved };
        let loaded = Loaded { state, revision: Some(newest), snapshot };
        Ok(Decided::Append(append, After { loaded, left_out }))
    }

    /// Makes the receipt of an append that was written. The value of `receipt` says whether the
    /// append was a repeat.
    fn appended(&self, receipt: Receipt<bool>, after: After<A>) -> Result<Receipt<Loaded<A>>> {
        if *receipt.value() {
            // The command was executed before. The state that it decided on may already contain
            // those events, so they are not applied twice.
            return Ok(receipt.with_value(self.load()?));
        }
        if let Some(len) = after.left_out {
            self.store.core().left_out.note(&self.stream, len);
        }
        Ok(receipt.with_value(after.loaded))
    }
}

/// The result of a decision.
enum Decided<A> {
    Nothing(Loaded<A>),
    Append(Append, After<A>),
}

/// The aggregate after its events are appended.
struct After<A> {
    loaded: Loaded<A>,
    /// The length of a snapshot that is too large.
    left_out: Option<usize>,
}

/// The append that a command leads to.
struct Append {
    stream: String,
    events: Vec<Event>,
    expected: ExpectedRevision,
    /// The stream's revision when the command decided.
    actual: Option<u64>,
    saved: Option<(u32, Vec<u8>)>,
}

impl Append {
    /// Returns the closure of the write. The closure's value says whether the events were there
    /// already.
    fn closure(self, steps_back: bool) -> impl FnMut(&Transaction) -> Result<bool> + Send + 'static {
        let Self { stream: name, events, expected, actual, saved } = self;
        move |tx| {
            if steps_back && tx.core.lines.is_there(&name) {
                // Other commands have met a conflict since this command decided. This command
                // decides anew behind them.
                return Err(Error::WrongRevision { stream: name.clone(), expected, actual });
            }
            let stream = tx.stream(&*name);
            let appended = stream.append(events.iter().cloned(), expected)?;
            if let Some((version, saved)) = saved.as_ref().filter(|_| !appended.repeated) {
                stream.save_snapshot(*version, saved)?;
            }
            Ok(appended.repeated)
        }
    }
}
