//! What comes in while handlers run.
//!
//! A delivery that was requeued may be dropped by its queue after it was requeued too often. Each lost connection, and each
//! death of the process, requeues once more what is unread at that moment. So handlers do not keep it unread: between two
//! of them the consumer takes such deliveries into the store. At its start a consumer with parked deliveries hears its source
//! first, since a handler of theirs may be what ends the process.
//!
//! **Limits.** While one handler holds the write transaction nothing can be written. What is delivered in that time is requeued
//! once more if the process dies in it.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::item::Item;
use super::{RETURNED_LINGER, Worker};
use crate::broker::SourceEvent;
use crate::error::Result;
use crate::time::Deadline;

/// How long a consumer with parked deliveries waits for its source before it begins with them.
const START_TIMEOUT: Duration = Duration::from_secs(1);

/// What has come while handlers ran, for the next batch.
#[derive(Default)]
pub(super) struct Meanwhile {
    pub(super) batch: Vec<Item>,
    /// It stands behind `batch`, and anything else behind it.
    pub(super) next: Option<SourceEvent>,
}

impl Meanwhile {
    pub(super) fn is_empty(&self) -> bool {
        self.batch.is_empty() && self.next.is_none()
    }
}

impl Worker {
    /// Reads what has come, and takes into the store what was requeued. Fails only if the store is lost.
    pub(super) fn take_in_meanwhile(&mut self, events: &Receiver<SourceEvent>) -> Result<()> {
        let mut batch = std::mem::take(&mut self.meanwhile.batch);
        while self.meanwhile.next.is_none()
            && batch.len() < usize::from(self.settings.prefetch)
            && let Ok(event) = events.try_recv()
        {
            match event {
                SourceEvent::Delivery(_) => self.receive(event, &mut batch),
                // The end of a connection concerns what handlers have now, too: it waits until they are done.
                event => self.meanwhile.next = Some(event),
            }
        }
        self.meanwhile.batch = self.take_in(batch)?;
        if self.returned {
            // Those behind others of their key.
            self.park_those_that_wait()?;
        }
        Ok(())
    }

    /// Those that came while the last batch ran. Earlier ones of their keys may wait by now, and go first.
    pub(super) fn go_on_with_those_of_meanwhile(&mut self, batch: &mut Vec<Item>) {
        for item in std::mem::take(&mut self.meanwhile.batch) {
            self.returned |= self.is_taken_in(&item);
            if item.key.as_ref().is_some_and(|key| self.waiting.has(key)) {
                self.wait_behind(item);
            } else {
                batch.push(item);
            }
        }
    }

    /// Hears what the source delivers at first, if there are parked deliveries to begin with.
    pub(super) fn await_source(&mut self, events: &Receiver<SourceEvent>, stop: &Receiver<Deadline>) {
        if self.waiting.is_empty() {
            return;
        }
        let mut batch = Vec::new();
        let mut until = Deadline::after(START_TIMEOUT);
        while stop.is_empty() && !until.is_over() && batch.len() < usize::from(self.settings.prefetch) {
            let event = match events.recv_timeout(RETURNED_LINGER) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                // It is reported where it is read next.
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let is_connected = matches!(event, SourceEvent::Up { .. } | SourceEvent::Delivery(_));
            self.receive(event, &mut batch);
            if is_connected {
                until = Deadline::after(RETURNED_LINGER);
            }
        }
        self.meanwhile.batch = batch;
    }
}
