//! Who is told that something is to be driven again: the consumers that run, by scope.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

/// One doorbell per running consumer. It holds one ring: what it is about stands in the file.
#[derive(Debug, Default)]
pub(crate) struct Doorbells(Mutex<BTreeMap<String, Vec<Sender<()>>>>);

impl Doorbells {
    pub(crate) fn hang(&self, scope: &str) -> Receiver<()> {
        let (bell, rung) = bounded(1);
        let mut bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_scope = bells.entry(scope.to_owned()).or_default();
        // One is hung up for each consumer that starts: those that have ended since come down.
        of_scope.retain(|bell| !matches!(bell.try_send(()), Err(TrySendError::Disconnected(()))));
        of_scope.push(bell);
        rung
    }

    pub(crate) fn ring(&self, scope: &str) {
        let bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for bell in bells.get(scope).into_iter().flatten() {
            // A full doorbell has been rung already; whoever is gone looks at the file when it starts again.
            let _ = bell.try_send(());
        }
    }

    pub(crate) fn ring_all(&self) {
        let bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for bell in bells.values().flatten() {
            let _ = bell.try_send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_those_of_its_scope_once() {
        let bells = Doorbells::default();
        let (one, other) = (bells.hang("a"), bells.hang("b"));
        drop(bells.hang("a"));
        let second = bells.hang("a"); // the one that was dropped is gone
        one.try_recv().unwrap_or_default();
        bells.ring("a");
        bells.ring("a");
        assert_eq!((one.try_iter().count(), second.try_iter().count(), other.try_iter().count()), (1, 1, 0));
        assert_eq!(bells.0.lock().unwrap()["a"].len(), 2);
    }
}
