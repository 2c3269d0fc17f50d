//! The intake while handlers run.
//!
//! A queue may drop a delivery that was requeued too often. Each lost connection, and each death of
//! the process, requeues the deliveries that are unread at that moment once more. So between two
//! handlers, the consumer reads such deliveries and takes them into the store. A consumer that
//! starts with parked deliveries listens to its source first, since one of their handlers may end
//! the process.
//!
//! **Limits.** While one handler holds the write transaction, nothing can be written. Deliveries
//! that come in that time are requeued once more if the process dies in it.

use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::item::Item;
use super::{RETURNED_LINGER, Worker};
use crate::broker::SourceEvent;
use crate::error::Result;
use crate::time::Deadline;

/// How long a consumer with parked deliveries waits for its source before it begins with them.
const START_TIMEOUT: Duration = Duration::from_secs(1);

/// Deliveries that came while handlers ran, for the next batch.
#[derive(Default)]
pub(super) struct Meanwhile {
    pub(super) batch: Vec<Item>,
    /// An event that stands behind `batch`. Any later event stands behind it.
    pub(super) next: Option<SourceEvent>,
}

impl Meanwhile {
    pub(super) fn is_empty(&self) -> bool {
        self.batch.is_empty() && self.next.is_none()
    }
}

impl Worker {
    /// Reads what has come, and takes requeued deliveries into the store. Fails only if the store
    /// is lost.
    pub(super) fn take_in_meanwhile(&mut self, events: &Receiver<SourceEvent>) -> Result<()> {
        let mut batch = std::mem::take(&mut self.meanwhile.batch);
        while self.meanwhile.next.is_none()
            && batch.len() < usize::from(self.settings.prefetch)
            && let Ok(event) = events.try_recv()
        {
            match event {
                SourceEvent::Delivery(_) => self.receive(event, &mut batch),
                // The end of a connection also concerns the deliveries of running handlers, so it
                // waits until they are done.
                event => self.meanwhile.next = Some(event),
            }
        }
        self.meanwhile.batch = self.take_in(batch)?;
        if self.returned {
            // Parks deliveries that stand behind others of their key.
            self.park_those_that_wait()?;
        }
        Ok(())
    }

    /// Moves deliveries that came during the last batch into `batch`. Earlier ones of their keys
    /// may wait by now, and go first.
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

    /// Listens to the source first, if there are parked deliveries to begin with.
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
                // The next read reports the disconnection.
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
