//! The projections that run in a store's process, and the names of the tables that they own.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::error::{Error, Result, caught};
use crate::log::keys::CursorId;
use crate::store::shared::owner::Owner;
use crate::time::Deadline;

/// The prefix of a table's name during a rebuild. The prefix is reserved, so no table of the
/// application has it.
const REBUILD_PREFIX: &str = "onewrite.rebuild.";

/// The prefix of a table's name after a rebuild has replaced the table, until the table is removed.
const REPLACED_PREFIX: &str = "onewrite.replaced.";

/// The state of a projection.
///
/// ```
/// use onewrite::ProjectionState;
/// assert_eq!(ProjectionState::default(), ProjectionState::CatchingUp);
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ProjectionState {
    /// The projection has not reached the end of the log yet.
    #[default]
    CatchingUp,
    /// The projection has applied everything that was in the log when it last looked.
    Live,
    /// The tables are of an earlier version and stay as they are until the rebuild has caught up.
    Rebuilding,
    /// The tables are of an earlier version, and the rebuild was
    /// [cancelled](crate::Store::cancel_rebuild). The tables stay as they are until the application
    /// asks for a rebuild.
    Cancelled,
    /// [Paused](crate::Projection::pause) by the application.
    Paused,
    /// The handler failed on this event; the projection tries it again after a while.
    Retrying {
        /// The event.
        seq: u64,
        /// The handler's error.
        reason: String,
    },
    /// The handler fails on this event for good, and the policy says to stop there. The projection
    /// tries the event again when it is started again.
    Stopped {
        /// The event.
        seq: u64,
        /// The handler's error, or the damage of the record.
        reason: String,
    },
    /// The projection can do nothing any more: its store is closed, poisoned or cannot be read.
    Failed(String),
    /// The application has ended the projection.
    Ended,
}

/// A projection's state and figures.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// let projection = store.projection("balances").spawn(|_, _| Ok(()))?;
/// let status: onewrite::ProjectionStatus = projection.status();
/// assert_eq!((status.position, status.applied, status.rebuilding), (0, 0, None));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ProjectionStatus {
    /// The state.
    pub state: ProjectionState,
    /// The projection has dealt with every event below this position. It has applied the event,
    /// skipped it by its filter, or noted it among its failures.
    pub position: u64,
    /// The position that a rebuild has reached, if a rebuild is under way.
    pub rebuilding: Option<u64>,
    /// Why a rebuild stands still, if it does: the event, and what the handler said of it.
    pub rebuild_stopped: Option<String>,
    /// Events applied since the projection was started, a rebuild's included.
    pub applied: u64,
    /// Tries that failed since the projection was started.
    pub failed_tries: u64,
    /// Events given up since the projection was started.
    pub quarantined: u64,
}

/// The part of a running projection that other threads share.
#[derive(Debug, Default)]
pub(crate) struct RunningProjection {
    status: Mutex<ProjectionStatus>,
    changed: Condvar,
    /// Futures that wait for a change.
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    next: u64,
    wakers: BTreeMap<u64, Waker>,
}

impl RunningProjection {
    pub(crate) fn status(&self) -> MutexGuard<'_, ProjectionStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the status, and notifies the threads and futures that wait for a change.
    pub(crate) fn change(&self, change: impl FnOnce(&mut ProjectionStatus)) {
        change(&mut self.status());
        self.changed.notify_all();
        let wakers = std::mem::take(&mut self.tasks().wakers);
        for waker in wakers.into_values() {
            if caught(|| waker.wake()).is_err() {
                tracing::error!("the waker of a task that waits for a projection panicked");
            }
        }
    }

    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a future of what `done` returns, once `done` returns something.
    pub(crate) fn until<T, F>(self: &Arc<Self>, owner: Owner, done: F) -> Until<F>
    where
        F: Fn(&ProjectionStatus) -> Option<T>,
    {
        Until { projection: Arc::clone(self), owner, number: None, done }
    }

    /// Waits until `done` returns something, or until the deadline. Returns the last result of
    /// `done`.
    pub(crate) fn wait<T>(
        &self,
        deadline: Deadline,
        done: impl Fn(&ProjectionStatus) -> Option<T>,
    ) -> Option<T> {
        let mut status = self.status();
        loop {
            if let Some(done) = done(&status) {
                return Some(done);
            }
            if deadline.is_over() {
                return None;
            }
            status = deadline.wait(&self.changed, status);
        }
    }
}

/// A future that waits for a projection. It returns `None` in a forked process, which must not take
/// a lock of the owner's.
pub(crate) struct Until<F> {
    projection: Arc<RunningProjection>,
    owner: Owner,
    /// The number that names the future's waker, once the future has waited.
    number: Option<u64>,
    done: F,
}

impl<T, F> Future for Until<F>
where
    F: Fn(&ProjectionStatus) -> Option<T> + Unpin,
{
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let this = self.get_mut();
        if this.owner.is_elsewhere() {
            return Poll::Ready(None);
        }
        // A waker is foreign code: it is cloned, and dropped, without a lock.
        let waker = context.waker().clone();
        let before = {
            let status = this.projection.status();
            if let Some(done) = (this.done)(&status) {
                return Poll::Ready(Some(done));
            }
            let mut tasks = this.projection.tasks();
            tasks.next += 1;
            let number = *this.number.get_or_insert(tasks.next);
            tasks.wakers.insert(number, waker)
        };
        drop(before);
        Poll::Pending
    }
}

impl<F> Drop for Until<F> {
    fn drop(&mut self) {
        let Some(number) = self.number.filter(|_| !self.owner.is_elsewhere()) else { return };
        let waker = self.projection.tasks().wakers.remove(&number);
        drop(waker);
    }
}

/// The projections that run in this process.
#[derive(Debug, Default)]
pub(crate) struct Projections {
    running: Mutex<BTreeMap<String, Running>>,
}

/// A running projection, and the tables that it owns.
#[derive(Debug)]
struct Running {
    shared: Arc<RunningProjection>,
    owned: OwnedTables,
}

impl Projections {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers the name and the tables, each for one projection only: a rebuild of one projection
    /// would delete what another projection has written.
    pub(crate) fn register(&self, name: &str, owned: &OwnedTables) -> Result<Arc<RunningProjection>> {
        let mut running = self.lock();
        if running.contains_key(name) {
            return Err(Error::ProjectionRunning { name: name.to_owned() });
        }
        for (projection, other) in running.iter() {
            if let Some(table) = owned.names().find(|table| other.owned.names().any(|its| its == *table)) {
                return Err(Error::ProjectionTable { name: table.clone(), projection: projection.clone() });
            }
        }
        let shared = Arc::<RunningProjection>::default();
        running.insert(name.to_owned(), Running { shared: Arc::clone(&shared), owned: owned.clone() });
        Ok(shared)
    }

    pub(crate) fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<RunningProjection>> {
        self.lock().get(name).map(|running| Arc::clone(&running.shared))
    }
}

/// The tables that a projection owns, by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnedTables {
    pub(crate) plain: Vec<String>,
    pub(crate) multimap: Vec<String>,
}

pub(crate) fn shadow_prefix(track: CursorId) -> String {
    format!("{REBUILD_PREFIX}{track}.")
}

/// The prefix of the names of the tables that this rebuild has replaced.
pub(crate) fn replaced_prefix(rebuild: CursorId) -> String {
    format!("{REPLACED_PREFIX}{rebuild}.")
}

impl OwnedTables {
    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.plain.iter().chain(&self.multimap)
    }

    /// Returns a name that is declared more than once, of one kind or of both.
    pub(crate) fn twice(&self) -> Option<&String> {
        let mut seen = BTreeSet::new();
        self.names().find(|name| !seen.insert(*name))
    }
}
