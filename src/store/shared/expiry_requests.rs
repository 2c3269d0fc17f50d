//! Requests to relays to drop expired events, and their answers.
//!
//! Only a relay knows which events of its backlog are in flight, so the relay drops expired events.
//! A write that finds the quota reached asks the relay and waits. **Invariant:** a relay has one
//! request at a time, and gets no other while nothing can have expired since.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::store::settings::BacklogQuota;
use crate::store::shared::relays::{RelayRequest, Relays};
use crate::store::shared::tail::Tail;

#[derive(Debug, Default)]
struct ExpiryRequest {
    asked: bool,
    /// Answers so far.
    answers: u64,
    /// Before this sequence number, nothing expires until this time.
    seen: Option<(u64, Option<u64>)>,
}

impl ExpiryRequest {
    fn is_current(&self, next_seq: u64, now_ms: u64) -> bool {
        self.seen.is_some_and(|(to, earliest_ms)| {
            to >= next_seq && earliest_ms.is_none_or(|earliest_ms| earliest_ms > now_ms)
        })
    }
}

/// The requests, by relay.
#[derive(Debug, Default)]
pub(crate) struct ExpiryRequests(Mutex<BTreeMap<String, ExpiryRequest>>);

/// The answers that a write waits for: the count for each relay.
#[derive(Debug, Default)]
pub(crate) struct Wanted(Vec<(String, u64)>);

impl ExpiryRequests {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, ExpiryRequest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks every relay whose backlog, with `added`, exceeds the quota. Waits for no relay if one
    /// of them cannot help: the other relays alone make no room.
    pub(crate) fn ask(
        &self,
        tail: &Tail,
        quota: &BacklogQuota,
        added: (u64, u64),
        now_ms: u64,
        relays: &Relays,
    ) -> Wanted {
        let mut requests = self.lock();
        let mut wanted = Vec::new();
        for (name, cursor) in &tail.cursors {
            if !quota.is_over(tail.backlog_of(cursor), added) {
                continue;
            }
            let request = requests.entry(name.clone()).or_default();
            let Some(port) = relays.port(name).filter(|_| !request.is_current(tail.next_seq, now_ms)) else {
                return Wanted::default();
            };
            if !request.asked {
                request.asked = port.requests.send(RelayRequest::LetExpiredGo).is_ok();
            }
            wanted.push((name.clone(), request.answers + 1));
        }
        Wanted(wanted)
    }

    /// Whether an answer is still outstanding.
    pub(crate) fn is_awaited(&self, wanted: &Wanted) -> bool {
        let requests = self.lock();
        let comes = |(name, answers): &(String, u64)| {
            requests.get(name).is_some_and(|request| request.asked && request.answers < *answers)
        };
        wanted.0.iter().any(comes)
    }

    pub(crate) fn done(&self, relay: &str, to: u64, earliest_ms: Option<u64>) {
        if let Some(request) = self.lock().get_mut(relay) {
            *request =
                ExpiryRequest { asked: false, answers: request.answers + 1, seen: Some((to, earliest_ms)) };
        }
    }

    /// Forgets a relay that has ended. The relay answers no more, and its last answer may be out of
    /// date when the relay runs again.
    pub(crate) fn forget(&self, relay: &str) {
        if let Some(request) = self.lock().get_mut(relay) {
            *request = ExpiryRequest { asked: false, seen: None, ..*request };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: no write waits for the answer of a relay that has ended, and the relay is asked anew
    /// when it runs again. Method: a relay with an open request ends.
    #[test]
    fn a_relay_that_has_ended_owes_no_answer() {
        let requests = ExpiryRequests::default();
        requests.lock().insert("r".into(), ExpiryRequest { asked: true, answers: 3, seen: Some((5, None)) });
        let wanted = Wanted(vec![("r".into(), 4)]);
        assert!(requests.is_awaited(&wanted));
        requests.forget("r");
        assert!(!requests.is_awaited(&wanted));
        assert!(
            requests
                .lock()
                .get("r")
                .is_some_and(|request| !request.asked && request.answers == 3 && request.seen.is_none())
        );
    }
}
