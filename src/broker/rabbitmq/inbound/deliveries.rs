//! How much the broker may deliver before some of it is settled: by number, and by bytes.
//!
//! The prefetch is a promise of the broker. A broker that breaks it would fill the memory of its consumer; so the deliveries
//! that are not settled are counted before the client library sees them. Their bytes no broker counts: while they are too
//! many, nothing more is read.
//!
//! **Invariants.** What has begun has room: so one delivery always has, whatever its size. Of each delivery that is handed on, the bytes stand in
//! `sizes` until the consumer takes it. No waker is called under the lock.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

/// Shared by the transport of one connection and by the consumer on it.
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
    /// Of what the consumer has not taken yet, in the order of delivery.
    sizes: VecDeque<u64>,
    /// The consumer takes nothing more.
    unwanted: bool,
    /// It waits for room.
    reader: Option<Waker>,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Came {
    Wanted,
    /// The consumer takes nothing more.
    Unwanted,
    /// It is one more than was asked for.
    TooMany,
}

impl Deliveries {
    /// As many as were asked for, and so many bytes: what has begun comes to its end beyond them.
    pub(in crate::broker::rabbitmq) fn at_most(max: usize, bytes_max: u64) -> Self {
        Self(Arc::new(Shared { max, bytes_max, now: Mutex::default() }))
    }

    /// Where nothing is consumed.
    pub(in crate::broker::rabbitmq) fn none() -> Self {
        Self::at_most(0, u64::MAX)
    }

    pub(super) fn max(&self) -> usize {
        self.0.max
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.0.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- the transport's --------------------------------------------------------------------------------------------

    /// One more has come.
    pub(super) fn came(&self) -> Came {
        let mut now = self.now();
        if now.unwanted {
            return Came::Unwanted;
        }
        now.unsettled = now.unsettled.saturating_add(1);
        if now.unsettled <= self.0.max { Came::Wanted } else { Came::TooMany }
    }

    /// The header of the one that came last says that it takes so many bytes.
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

    // --- the consumer's ---------------------------------------------------------------------------------------------

    /// The consumer takes the next one. Its bytes.
    pub(in crate::broker::rabbitmq) fn taken(&self) -> u64 {
        self.now().sizes.pop_front().unwrap_or_default()
    }

    /// What is unsettled was `before`, and is `after` with what is sent next: a number, and bytes.
    pub(in crate::broker::rabbitmq) fn settled(&self, before: (usize, u64), after: (usize, u64)) {
        self.change(|now| {
            now.unsettled = now.unsettled.saturating_sub(before.0.saturating_sub(after.0));
            now.bytes = now.bytes.saturating_sub(before.1.saturating_sub(after.1));
        });
    }

    /// What comes from now on is dropped: the connection ends.
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
