//! The queue of writes that wait for the writer thread.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{OnceLock, RwLock, RwLockReadGuard, TryLockError};
use std::thread::ThreadId;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

/// The counters of the write queue, which say whether a write may skip the queue.
///
/// A lone writer gains nothing from the writer thread and would pay two thread switches per commit,
/// so it commits on its own thread. When several threads write, the queue makes groups.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Writes that were accepted and have no outcome yet, queued or not.
    pub(in crate::store) outstanding: AtomicUsize,
    /// The last group from the queue held more than one write.
    pub(in crate::store) crowded: AtomicBool,
    /// How the writer thread waits beside its queue, or is about to wait: a value of [`Waits`]. A
    /// thread that leaves work for which the writer thread does not wait must nudge the writer
    /// thread.
    pub(in crate::store) writer_waits: AtomicU8,
    /// Whether the writer thread will look at the names of the files when that is due.
    pub(in crate::store) look_awaited: AtomicBool,
    /// Nudges the writer thread.
    pub(in crate::store) nudges: (Sender<()>, Receiver<()>),
    /// Held for reading by a write that skips the queue; closing waits for it.
    pub(in crate::store) skipping: RwLock<()>,
    /// The writer thread, once it runs.
    pub(in crate::store) writer: OnceLock<ThreadId>,
}

/// How the writer thread waits beside its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// The writer thread is at work, or looks at the remaining work when that is due.
    Timed = 0,
    /// The writer thread waits until the store has been idle for long enough, which may be hours.
    UntilIdle = 1,
    Untimed = 2,
}

impl Default for Queue {
    fn default() -> Self {
        Self {
            outstanding: AtomicUsize::default(),
            crowded: AtomicBool::default(),
            writer_waits: AtomicU8::new(Waits::Timed as u8),
            look_awaited: AtomicBool::default(),
            nudges: bounded(1),
            skipping: RwLock::default(),
            writer: OnceLock::new(),
        }
    }
}

impl Queue {
    /// Notes that the current thread is the writer thread.
    pub(crate) fn begin_writer(&self) {
        self.writer.get_or_init(|| std::thread::current().id());
    }

    /// Whether the current thread is the writer thread, where nothing may wait for the writer
    /// thread. The writer thread drops what a closure captured and what it returned, and a `Drop`
    /// may write.
    pub(crate) fn is_writer(&self) -> bool {
        self.writer.get() == Some(&std::thread::current().id())
    }

    /// Sets how the writer thread waits, before the writer thread looks at the remaining work. A
    /// thread that commits elsewhere changes the remaining work first and reads this afterwards.
    pub(crate) fn writer_waits(&self, waits: Waits) {
        self.writer_waits.store(waits as u8, Ordering::SeqCst);
    }

    /// Sets whether the writer thread awaits a look at the names of the files. It is set after the
    /// look at the remaining work, and taken back before.
    pub(crate) fn awaits_look(&self, awaits: bool) {
        self.look_awaited.store(awaits, Ordering::SeqCst);
    }

    /// The receiver of the writer thread's nudges.
    pub(crate) fn nudges(&self) -> &Receiver<()> {
        &self.nudges.1
    }

    /// Counts a write that goes into the queue.
    pub(crate) fn enter(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts the writes in the queue and in the group that is being committed.
    pub(crate) fn company(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    /// Subtracts writes that have their outcome, or did not get into the queue.
    pub(crate) fn leave(&self, writes: usize) {
        self.outstanding.fetch_sub(writes, Ordering::AcqRel);
    }

    /// Notes the size of a group from the queue.
    pub(crate) fn note_group(&self, writes: usize) {
        self.crowded.store(writes > 1, Ordering::Relaxed);
    }

    /// Lets a write skip the queue if no write is before it and none is likely to join it. The
    /// write then counts as entered.
    pub(crate) fn skip(&self) -> Option<RwLockReadGuard<'_, ()>> {
        if self.crowded.load(Ordering::Relaxed) {
            return None;
        }
        let guard = self.skipping.try_read().ok()?;
        self.outstanding.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(guard)
    }

    /// Waits for a write that has skipped the queue. Afterwards `closing` keeps other writes from
    /// skipping.
    pub(crate) fn await_skipping(&self, mut report: impl FnMut()) {
        let mut pause = Duration::from_millis(1);
        while let Err(TryLockError::WouldBlock) = self.skipping.try_write() {
            // Only a closing store gets here, once, and only while a write is under way that began
            // earlier.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
            report();
        }
    }
}
