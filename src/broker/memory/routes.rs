//! An exchange: its bindings, and the queues that a routing key leads to.

use std::collections::HashMap;
use std::sync::Arc;

use super::options::ExchangeKind;
use super::topic;

/// The most routing keys whose queues an exchange remembers. Beyond the limit the exchange forgets
/// all keys and starts again. Keys may be endless (one per customer); memory is not.
const CACHED_KEYS_MAX: usize = 4096;

/// The name of a queue: its place in the broker's list. Queues are never removed, so the place
/// stays valid.
pub(super) type QueueId = usize;

/// An exchange. **Invariant:** the cache always agrees with the bindings and the kind. Each change
/// of them empties the cache.
#[derive(Debug)]
pub(super) struct Exchange {
    kind: ExchangeKind,
    bindings: Vec<(QueueId, Box<str>)>,
    cache: HashMap<Arc<str>, Arc<[QueueId]>>,
}

impl Exchange {
    pub(super) fn new(kind: ExchangeKind) -> Self {
        Self { kind, bindings: Vec::new(), cache: HashMap::new() }
    }

    pub(super) fn set_kind(&mut self, kind: ExchangeKind) {
        self.kind = kind;
        self.cache.clear();
    }

    pub(super) fn bind(&mut self, queue: QueueId, pattern: &str) {
        if !self.bindings.iter().any(|(to, bound)| *to == queue && **bound == *pattern) {
            self.bindings.push((queue, pattern.into()));
            self.cache.clear();
        }
    }

    pub(super) fn unbind(&mut self, queue: QueueId, pattern: &str) -> bool {
        let before = self.bindings.len();
        self.bindings.retain(|(to, bound)| *to != queue || **bound != *pattern);
        self.cache.clear();
        self.bindings.len() < before
    }

    /// Returns the queues for this routing key, each once.
    pub(super) fn route(&mut self, key: &Arc<str>) -> Arc<[QueueId]> {
        if let Some(queues) = self.cache.get(key) {
            return Arc::clone(queues);
        }
        let mut queues: Vec<QueueId> = self
            .bindings
            .iter()
            .filter(|(_, bound)| self.leads(bound, key))
            .map(|(queue, _)| *queue)
            .collect();
        queues.sort_unstable();
        queues.dedup();
        let queues: Arc<[QueueId]> = queues.into();
        if self.cache.len() >= CACHED_KEYS_MAX {
            self.cache.clear();
        }
        self.cache.insert(Arc::clone(key), Arc::clone(&queues));
        queues
    }

    fn leads(&self, bound: &str, key: &str) -> bool {
        match self.kind {
            ExchangeKind::Direct => bound == key,
            ExchangeKind::Fanout => true,
            ExchangeKind::Topic => topic::matches(bound, key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_gets_a_message_once_however_many_bindings_match() {
        let mut exchange = Exchange::new(ExchangeKind::Topic);
        exchange.bind(1, "a.*");
        exchange.bind(0, "#");
        exchange.bind(1, "a.b");
        assert_eq!(*exchange.route(&"a.b".into()), [0, 1]);
        assert_eq!(*exchange.route(&"b".into()), [0]);
    }

    #[test]
    fn a_change_of_bindings_is_seen_by_the_next_publish() {
        let mut exchange = Exchange::new(ExchangeKind::Direct);
        assert!(exchange.route(&"a".into()).is_empty());
        exchange.bind(0, "a");
        assert_eq!(*exchange.route(&"a".into()), [0]);
        assert!(exchange.route(&"b".into()).is_empty());
        exchange.set_kind(ExchangeKind::Fanout);
        assert_eq!(*exchange.route(&"b".into()), [0]);
        assert!(exchange.unbind(0, "a"));
        assert!(exchange.route(&"a".into()).is_empty());
    }

    #[test]
    fn keys_without_end_do_not_fill_the_memory() {
        let mut exchange = Exchange::new(ExchangeKind::Fanout);
        exchange.bind(0, "");
        for key in 0..3 * CACHED_KEYS_MAX {
            assert_eq!(*exchange.route(&key.to_string().into()), [0]);
        }
        assert!(exchange.cache.len() <= CACHED_KEYS_MAX);
    }
}
