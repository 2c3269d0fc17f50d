//! Writes that wait for the writer thread.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{OnceLock, RwLock, RwLockReadGuard, TryLockError};
use std::thread::ThreadId;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

/// Whether a write may skip the queue.
///
/// A lone writer gains nothing from the writer thread and would pay two changes of threads per commit, so it commits on
/// its own thread. With company the queue is what makes groups.
#[derive(Debug)]
pub(crate) struct Queue {
    /// Writes that were accepted and have no outcome yet, queued or not.
    pub(in crate::store) outstanding: AtomicUsize,
    /// The last group from the queue held more than one write.
    pub(in crate::store) crowded: AtomicBool,
    /// What the writer thread waits for beside its queue, or is about to: what is left to do, and it does not wait for, must be reported to it.
    pub(in crate::store) writer_waits: AtomicU8,
    /// It will look at the names of the files when that is due.
    pub(in crate::store) look_awaited: AtomicBool,
    /// Notifies it.
    pub(in crate::store) nudges: (Sender<()>, Receiver<()>),
    /// Held for reading by a write that skips the queue; closing waits for it.
    pub(in crate::store) skipping: RwLock<()>,
    /// The writer thread, once it runs.
    pub(in crate::store) writer: OnceLock<ThreadId>,
}

/// What the writer thread waits for beside its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waits {
    /// It is at work, or looks at what is left when that is due.
    Timed = 0,
    /// For the store to have been idle for long enough, which may be hours.
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
    /// The current thread is the writer thread.
    pub(crate) fn begin_writer(&self) {
        self.writer.get_or_init(|| std::thread::current().id());
    }

    /// Whether the current thread is the writer thread, where nothing may wait for the writer thread. What a closure captured, and
    /// what it returned, is dropped there, and a `Drop` may write.
    pub(crate) fn is_writer(&self) -> bool {
        self.writer.get() == Some(&std::thread::current().id())
    }

    /// Said before what is left is looked at: who commits elsewhere changes that first and looks at this then.
    pub(crate) fn writer_waits(&self, waits: Waits) {
        self.writer_waits.store(waits as u8, Ordering::SeqCst);
    }

    /// Said after what is left was looked at, and taken back before.
    pub(crate) fn awaits_look(&self, awaits: bool) {
        self.look_awaited.store(awaits, Ordering::SeqCst);
    }

    /// What nudges the writer thread.
    pub(crate) fn nudges(&self) -> &Receiver<()> {
        &self.nudges.1
    }

    /// A write goes into the queue.
    pub(crate) fn enter(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// Writes in the queue and in the group that is being committed.
    pub(crate) fn company(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    /// So many writes have their outcome, or did not get in.
    pub(crate) fn leave(&self, writes: usize) {
        self.outstanding.fetch_sub(writes, Ordering::AcqRel);
    }

    /// Notes the size of a group from the queue.
    pub(crate) fn note_group(&self, writes: usize) {
        self.crowded.store(writes > 1, Ordering::Relaxed);
    }

    /// Lets a write skip the queue if none is before it and none is likely to join it. It then counts as entered.
    pub(crate) fn skip(&self) -> Option<RwLockReadGuard<'_, ()>> {
        if self.crowded.load(Ordering::Relaxed) {
            return None;
        }
        let guard = self.skipping.try_read().ok()?;
        self.outstanding.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(guard)
    }

    /// Waits for a write that has skipped the queue. Afterwards `closing` keeps others from it.
    pub(crate) fn await_skipping(&self, mut report: impl FnMut()) {
        let mut pause = Duration::from_millis(1);
        while let Err(TryLockError::WouldBlock) = self.skipping.try_write() {
            // Only a closing store comes here, once, and only beside a write that began before.
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
            report();
        }
    }
}
