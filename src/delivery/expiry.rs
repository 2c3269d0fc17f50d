//! Removes expired events early, if a backlog quota demands it, before they are next to publish.
//!
//! A scan looks at memory first, then at the rows on disk, then at the rest of the log, one part at
//! a time. An expired event in the log gets its exception before the log brings it, and is then
//! skipped (`Loaded::Exception`). So none of its sequence numbers stays in memory. **Invariant:**
//! an event in flight is left alone, because its outcome decides.

use super::types::{Action, Change, Exception, ExceptionState, ExpiredEvent, ExpiredPlace, ScanAt};
use super::{ItemState, Machine, expired, is_expired};
use crate::time::Now;

/// The result of the last scan, and the running scan.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct ExpiryScan {
    done: Option<Seen>,
    /// While a scan runs: what it has seen so far.
    running: Option<Option<u64>>,
}

/// No event before `to` expires earlier than `earliest_ms`.
#[derive(Debug, Clone, Copy)]
struct Seen {
    to: u64,
    earliest_ms: Option<u64>,
}

impl ExpiryScan {
    /// Notes the expiry of an event that now waits where a scan may already have been.
    pub(super) fn note_expiry(&mut self, expires_ms: Option<u64>) {
        if let Some(done) = &mut self.done {
            done.earliest_ms = earlier(done.earliest_ms, expires_ms);
        }
        if let Some(earliest_ms) = &mut self.running {
            *earliest_ms = earlier(*earliest_ms, expires_ms);
        }
    }
}

fn earlier(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    a.into_iter().chain(b).min()
}

impl Machine {
    /// Handles `Input::LetExpiredGo`. A running scan continues.
    pub(super) fn let_expired_go(&mut self, now: Now, out: &mut Vec<Action>) {
        if self.scan.running.is_some() {
            return;
        }
        let mut expired_seqs = Vec::new();
        let mut earliest_ms = None;
        for (seq, item) in &self.items {
            let in_flight = matches!(item.state, ItemState::InFlight { .. });
            if !in_flight && is_expired(item.expires_ms, now) {
                expired_seqs.push(*seq);
            } else {
                earliest_ms = earlier(earliest_ms, item.expires_ms);
            }
        }
        expired_seqs.sort_unstable();
        for seq in expired_seqs {
            self.let_go(seq, now, out);
        }
        let at = match self.scan.done {
            // Nothing that the last scan saw has expired since, so this scan covers new events
            // only.
            Some(done) if done.earliest_ms.is_none_or(|earliest_ms| earliest_ms > now.wall_ms) => {
                earliest_ms = earlier(earliest_ms, done.earliest_ms);
                ScanAt::Log(done.to)
            }
            _ => ScanAt::Due(None),
        };
        self.scan.running = Some(earliest_ms);
        self.find_expired(at, now, out);
    }

    fn find_expired(&self, at: ScanAt, now: Now, out: &mut Vec<Action>) {
        let events_max = self.settings.load_events;
        // Events that the log has brought are in memory, settled, or have a row.
        let at = if let ScanAt::Log(from) = at { ScanAt::Log(from.max(self.loaded_to)) } else { at };
        out.push(Action::FindExpired { at, until_ms: now.wall_ms, events_max });
    }

    /// Handles `Input::FoundExpired`.
    pub(super) fn found_expired(
        &mut self,
        found: Vec<ExpiredEvent>,
        next: Option<ScanAt>,
        (to, earliest_ms): (u64, Option<u64>),
        now: Now,
        out: &mut Vec<Action>,
    ) {
        self.rows_to = self.rows_to.max(to);
        for event in found {
            self.take_out(event, now, out);
        }
        self.scan.running = self.scan.running.map(|before| earlier(before, earliest_ms));
        if let Some(at) = next {
            self.find_expired(at, now, out);
            return;
        }
        if let Some(earliest_ms) = self.scan.running.take() {
            self.scan.done = Some(Seen { to, earliest_ms });
            out.push(Action::Scanned { to, earliest_ms });
        }
    }

    /// Removes an expired event that is in memory, where it may wait behind its key.
    fn let_go(&mut self, seq: u64, now: Now, out: &mut Vec<Action>) {
        if let Some(key) = self.items.get(&seq).and_then(|item| item.key.clone()) {
            self.keys.with(&key, |state| state.queue.retain(|queued| *queued != seq));
        }
        self.quarantine(seq, expired(), now, out);
    }

    /// Removes an expired event that is on disk only.
    fn take_out(&mut self, event: ExpiredEvent, now: Now, out: &mut Vec<Action>) {
        let ExpiredEvent { seq, key, place } = event;
        if let Some(item) = self.items.get(&seq) {
            // The event has come into memory since the scan of memory.
            if !matches!(item.state, ItemState::InFlight { .. }) {
                self.let_go(seq, now, out);
            }
            return;
        }
        // The log has brought the event since, or will bring it although it is settled already.
        if place == ExpiredPlace::Log && (seq < self.loaded_to || self.ahead.contains(&seq)) {
            return;
        }
        let (attempts, destination_attempts) = match &place {
            ExpiredPlace::Exception(found) => (found.attempts, found.destination_attempts),
            ExpiredPlace::Log | ExpiredPlace::Parked => (0, 0),
        };
        let state = ExceptionState::Quarantined { at_ms: now.wall_ms, holds_key: false };
        let exception = Exception { state, attempts, destination_attempts, fault: Some(expired()) };
        out.push(Action::Save(Change::PutException { seq, key: key.clone(), exception }));
        if let (ExpiredPlace::Parked, Some(key)) = (&place, &key) {
            out.push(Action::Save(Change::Unpark { key: key.clone(), seq }));
        }
        self.quarantined += 1;
        out.push(Action::Quarantined { seq, fault: expired() });
        // The event no longer holds its key.
        self.discarded(seq, key);
    }
}
