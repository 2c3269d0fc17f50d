//! How many deliveries the broker may send before some are settled.
//!
//! The prefetch is a promise of the broker. A broker that breaks it would fill the memory of whoever takes in what comes; so the
//! deliveries that are not settled are counted before the client library sees them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Shared by the transport of one connection and by the consumer on it.
#[derive(Debug, Clone)]
pub(in crate::publish::rabbitmq) struct Deliveries(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    max: usize,
    unsettled: AtomicUsize,
}

impl Deliveries {
    /// As many as were asked for; 0 where nothing is consumed.
    pub(in crate::publish::rabbitmq) fn at_most(max: usize) -> Self {
        Self(Arc::new(Shared { max, unsettled: AtomicUsize::new(0) }))
    }

    pub(super) fn max(&self) -> usize {
        self.0.max
    }

    /// One more has come. `false`: it is one too many.
    pub(super) fn came(&self) -> bool {
        self.0.unsettled.fetch_add(1, Ordering::AcqRel) < self.0.max
    }

    /// So many will be settled by what is sent next.
    pub(in crate::publish::rabbitmq) fn settled(&self, count: usize) {
        self.0.unsettled.fetch_sub(count, Ordering::AcqRel);
    }
}
