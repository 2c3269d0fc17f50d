//! The bound on unsettled deliveries: by number, and by bytes.
//!
//! The prefetch is a promise of the broker. A broker that breaks the promise would fill the
//! consumer's memory. So unsettled deliveries are counted before the client library sees them. No
//! broker counts their bytes: while there are too many bytes, nothing more is read.
//!
//! **Invariants.** A delivery that has begun always has room, so one delivery of any size has room.
//! `sizes` holds the bytes of each delivery that the consumer has not taken yet. No waker is called
//! under the lock.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

/// The bound that the transport of one connection shares with the consumer on it.
#[derive(Debug, Clone)]
pub(in crate::broker::rabbitmq) struct Deliveries(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max: usize,
    bytes_max: u64,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    unsettled: usize,
    bytes: u64,
    /// The bytes of each delivery that the consumer has not taken yet, in the order of delivery.
    sizes: VecDeque<u64>,
    /// The consumer takes nothing more.
    unwanted: bool,
    /// The waker of a transport that waits for room.
    reader: Option<Waker>,
}

/// What to do with a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    Wanted,
    /// The consumer takes nothing more.
    Unwanted,
    /// The delivery exceeds the prefetch.
    TooMany,
}

impl Deliveries {
    /// Allows `max` deliveries and `bytes_max` bytes. A delivery that has begun may exceed the
    /// bytes.
    pub(in crate::broker::rabbitmq) fn at_most(max: usize, bytes_max: u64) -> Self {
        Self(Arc::new(Shared { max, bytes_max, now: Mutex::default() }))
    }

    /// Allows no deliveries, for a connection that consumes nothing.
    pub(in crate::broker::rabbitmq) fn none() -> Self {
        Self::at_most(0, u64::MAX)
    }

    pub(super) fn max(&self) -> usize {
        self.0.max
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.0.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- for the transport ---

    /// Counts one more delivery.
    pub(super) fn came(&self) -> Came {
        let mut now = self.now();
        if now.unwanted {
            return Came::Unwanted;
        }
        now.unsettled = now.unsettled.saturating_add(1);
        if now.unsettled <= self.0.max { Came::Wanted } else { Came::TooMany }
    }

    /// Notes the bytes of the last delivery, as its header announces them.
    pub(super) fn announced(&self, bytes: u64) {
        let mut now = self.now();
        now.bytes = now.bytes.saturating_add(bytes);
        now.sizes.push_back(bytes);
    }

    /// Whether more may be read. If not, the task of `cx` is woken once it may.
    pub(super) fn have_room(&self, cx: &Context<'_>) -> bool {
        if self.0.bytes_max == u64::MAX {
            return true;
        }
        let mut now = self.now();
        let room = now.bytes <= self.0.bytes_max || now.unwanted;
        now.reader = (!room).then(|| cx.waker().clone());
        room
    }

    // --- for the consumer ---

    /// Notes that the consumer takes the next delivery. Returns its bytes.
    pub(in crate::broker::rabbitmq) fn taken(&self) -> u64 {
        self.now().sizes.pop_front().unwrap_or_default()
    }

    /// Notes that the unsettled number and bytes fell from `before` to `after`.
    pub(in crate::broker::rabbitmq) fn settled(&self, before: (usize, u64), after: (usize, u64)) {
        self.change(|now| {
            now.unsettled = now.unsettled.saturating_sub(before.0.saturating_sub(after.0));
            now.bytes = now.bytes.saturating_sub(before.1.saturating_sub(after.1));
        });
    }

    /// Notes that the connection ends: everything from now on is dropped.
    pub(in crate::broker::rabbitmq) fn want_no_more(&self) {
        self.change(|now| now.unwanted = true);
    }

    fn change(&self, change: impl FnOnce(&mut Now)) {
        let mut now = self.now();
        change(&mut now);
        let reader = now.reader.take();
        drop(now);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}
