//! The timer of delayed outcomes: one helper thread per broker. The thread starts with the first
//! alarm and ends with the broker.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Weak;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::Shared;
use crate::time::Deadline;

/// When which open outcome of which publisher is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Alarm {
    due: Instant,
    connection: u64,
    token: u64,
}

/// The broker's end of the timer. Dropping it ends the thread.
pub(super) struct Timer {
    shared: Weak<Shared>,
    alarms: Option<Sender<Alarm>>,
    /// The thread is never joined: this very thread may be the one that drops the broker.
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Timer {
    pub(super) fn new(shared: Weak<Shared>) -> Self {
        Self { shared, alarms: None, thread: None }
    }

    /// Makes the publisher `connection` report `token` after `delay`. Returns `false` if there is
    /// no thread and none can be started.
    pub(super) fn set(&mut self, delay: Duration, connection: u64, token: u64) -> bool {
        let Some(due) = Deadline::after(delay).instant() else { return true }; // in no lifetime of this process
        if self.alarms.is_none() {
            let (sender, receiver) = unbounded();
            let shared = self.shared.clone();
            let thread = thread::Builder::new().name("onewrite-memory-broker".to_owned());
            let Ok(thread) = thread.spawn(move || run(&shared, &receiver)) else { return false };
            self.thread = Some(thread);
            self.alarms = Some(sender);
        }
        self.alarms.as_ref().is_some_and(|alarms| alarms.send(Alarm { due, connection, token }).is_ok())
    }
}

/// Sleeps until an alarm is due or set; ends when the broker is gone.
fn run(shared: &Weak<Shared>, alarms: &Receiver<Alarm>) {
    let mut waiting = BinaryHeap::new();
    loop {
        let next = waiting.peek().map(|Reverse(alarm): &Reverse<Alarm>| alarm.due);
        let set = match next {
            Some(due) => alarms.recv_deadline(due),
            None => alarms.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match set {
            Ok(alarm) => waiting.push(Reverse(alarm)),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                // The strong handle lives for this block only: due alarms do not keep a broker
                // alive.
                let Some(shared) = shared.upgrade() else { return };
                let mut state = shared.state();
                let now = Instant::now();
                while let Some(Reverse(alarm)) = waiting.pop() {
                    if alarm.due > now {
                        waiting.push(Reverse(alarm));
                        break;
                    }
                    state.fire(alarm.connection, alarm.token);
                }
            }
        }
    }
}
