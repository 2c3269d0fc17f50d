//! Notifies the running consumers of a scope that a delivery is to be redriven, or that something
//! else has changed.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

/// One signal per running consumer. A signal holds one notification; the file says what it is
/// about.
#[derive(Debug, Default)]
pub(crate) struct RedriveSignals(Mutex<BTreeMap<String, Vec<Sender<()>>>>);

impl RedriveSignals {
    pub(crate) fn subscribe(&self, scope: &str) -> (Sender<()>, Receiver<()>) {
        let (signal, notified) = bounded(1);
        let mut signals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_scope = signals.entry(scope.to_owned()).or_default();
        // Signals of consumers that have ended are removed here, not at their end.
        of_scope.retain(|signal| !matches!(signal.try_send(()), Err(TrySendError::Disconnected(()))));
        of_scope.push(signal.clone());
        (signal, notified)
    }

    pub(crate) fn notify(&self, scope: &str) {
        let signals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for signal in signals.get(scope).into_iter().flatten() {
            // A full signal holds a notification already. A consumer that is gone looks at the file
            // when it starts again.
            let _ = signal.try_send(());
        }
    }

    pub(crate) fn notify_all(&self) {
        let signals = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for signal in signals.values().flatten() {
            let _ = signal.try_send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifies_those_of_its_scope_once() {
        let signals = RedriveSignals::default();
        let subscribe = |scope| signals.subscribe(scope).1;
        let (one, other) = (subscribe("a"), subscribe("b"));
        drop(subscribe("a"));
        let second = subscribe("a"); // the dropped consumer is gone
        one.try_recv().unwrap_or_default();
        signals.notify("a");
        signals.notify("a");
        assert_eq!((one.try_iter().count(), second.try_iter().count(), other.try_iter().count()), (1, 1, 0));
        assert_eq!(signals.0.lock().unwrap()["a"].len(), 2);
    }
}
