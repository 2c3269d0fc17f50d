//! State that the consumers of a store share in memory. It says which consumer has taken up which
//! parked delivery, and where the search for an idle lane goes on.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::log::keys;

/// The parked deliveries that a consumer of this process has taken up. Each belongs to one
/// consumer, also where two consumers run for a scope.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    taken: Mutex<HashSet<(String, u64)>>,
    given_back: AtomicU64,
}

impl Claims {
    /// Takes up a parked delivery; `false` if another consumer has it.
    pub(crate) fn take(&self, scope: &str, number: u64) -> bool {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).insert((scope.to_owned(), number))
    }

    /// Gives deliveries back. `parked`: they are still parked, for another consumer to take up.
    pub(crate) fn give_back(&self, scope: &str, numbers: impl IntoIterator<Item = u64>, parked: bool) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        for number in numbers {
            taken.remove(&(scope.to_owned(), number));
        }
        if parked {
            self.given_back.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often a consumer has left parked deliveries behind.
    pub(crate) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }
}

/// Where the search for idle lanes goes on, by scope: in memory alone.
#[derive(Debug, Default)]
pub(crate) struct IdleSearch(Mutex<HashMap<String, Vec<u8>>>);

impl IdleSearch {
    pub(crate) fn from(&self, scope: &str) -> Vec<u8> {
        let places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        places.get(scope).cloned().unwrap_or_else(|| keys::inbox(scope, &[]))
    }

    pub(crate) fn go_on(&self, scope: &str, at: Vec<u8>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(scope.to_owned(), at);
    }
}
