//! Expired events make room: where a backlog quota says so, they are taken out before they are next to publish.
//!
//! A scan looks at memory first, then at what waits on disk, then at what the log has still to bring, a piece at a time.
//! What it finds in the log gets its exception before the log brings it; it is passed over there (`Loaded::Exception`), so no
//! sequence number of it stays in memory. **Invariant:** what is in flight is left alone: its outcome decides.

use super::types::{Action, Change, Exception, ExceptionState, ExpiredEvent, ExpiredPlace, ScanAt};
use super::{ItemState, Machine, expired, is_expired};
use crate::time::Now;

/// What the last scan has seen, and the one that runs.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(super) struct ExpiryScan {
    done: Option<Seen>,
    /// While one runs: what it has seen so far.
    running: Option<Option<u64>>,
}

/// Before `to` nothing expires earlier than `earliest_ms`.
#[derive(Debug, Clone, Copy)]
struct Seen {
    to: u64,
    earliest_ms: Option<u64>,
}

impl ExpiryScan {
    /// An event with this expiry waits now where a scan may have been already.
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
    /// `Input::LetExpiredGo`. One that runs goes on.
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
            // Nothing that was looked at has expired since: only what is new is looked at.
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
        // What the log has brought is in memory, settled, or has a row.
        let at = if let ScanAt::Log(from) = at { ScanAt::Log(from.max(self.loaded_to)) } else { at };
        out.push(Action::FindExpired { at, until_ms: now.wall_ms, events_max });
    }

    /// `Input::FoundExpired`.
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

    /// Takes one out that is in memory; it may wait there behind its key.
    fn let_go(&mut self, seq: u64, now: Now, out: &mut Vec<Action>) {
        if let Some(key) = self.items.get(&seq).and_then(|item| item.key.clone()) {
            self.keys.with(&key, |state| state.queue.retain(|queued| *queued != seq));
        }
        self.quarantine(seq, expired(), now, out);
    }

    /// Takes one out that is on disk alone.
    fn take_out(&mut self, event: ExpiredEvent, now: Now, out: &mut Vec<Action>) {
        let ExpiredEvent { seq, key, place } = event;
        if let Some(item) = self.items.get(&seq) {
            // It has come into memory since memory was looked at.
            if !matches!(item.state, ItemState::InFlight { .. }) {
                self.let_go(seq, now, out);
            }
            return;
        }
        // The log has brought it since, or will bring what is settled already.
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
        // It holds its key no longer.
        self.discarded(seq, key);
    }
}
