//! The state of clean-up in memory: how much is left, and when its next piece is due.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::time::Deadline;

/// How much is left to be cleaned up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Left {
    pub(crate) tasks: u64,
    /// Events of streams.
    pub(crate) events: u64,
}

/// The change of a transaction to what is left.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeftChange {
    pub(crate) tasks: i64,
    pub(crate) events: i64,
}

impl Left {
    pub(in crate::store) fn settle(&mut self, change: LeftChange) {
        self.tasks = self.tasks.saturating_add_signed(change.tasks);
        self.events = self.events.saturating_add_signed(change.events);
    }
}

#[derive(Debug)]
pub(crate) struct State {
    /// The next piece is of the first task after this one; the tasks are taken in a cycle.
    pub(crate) after: Vec<u8>,
    /// The task that the current piece has reached.
    pub(crate) at: Vec<u8>,
    pub(crate) due: Deadline,
    /// A piece is under way, or waits in the queue of writes.
    pub(crate) begun: bool,
    pub(crate) fails: u32,
}

/// State that lasts from one piece to the next. It is lost with the process.
#[derive(Debug)]
pub(crate) struct Cleaning {
    is_left: AtomicBool,
    state: Mutex<State>,
}

impl Default for Cleaning {
    fn default() -> Self {
        let state = State { after: Vec::new(), at: Vec::new(), due: Deadline::now(), begun: false, fails: 0 };
        Self { is_left: AtomicBool::new(false), state: Mutex::new(state) }
    }
}

impl Cleaning {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how many tasks are left. `true` if there were none before.
    pub(in crate::store) fn note_left(&self, tasks: u64) -> bool {
        !self.is_left.swap(tasks > 0, Ordering::SeqCst) && tasks > 0
    }

    /// When the next piece is due; `None` if nothing is left, or if a piece is under way.
    pub(in crate::store) fn due_at(&self) -> Option<Deadline> {
        if !self.is_left.load(Ordering::SeqCst) {
            return None;
        }
        let state = self.lock();
        (!state.begun).then_some(state.due)
    }

    /// Begins a piece, if one is due.
    pub(in crate::store) fn begin_if_due(&self) -> bool {
        let is_due = self.due_at().is_some_and(Deadline::is_over);
        if is_due {
            self.lock().begun = true;
        }
        is_due
    }
}
