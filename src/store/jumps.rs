//! What a jump of the clock wakes: every thread of the store that may wait for a time of the clock.
//!
//! **Invariant.** The listener takes only the locks of signals, under which no foreign code runs. So a clock
//! may notify it from anywhere: from inside a transaction, and from inside its own `now`.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::core::Core;
use crate::time::ClockListener;

/// The store's end of its subscription at the clock. It ends when this is dropped.
pub(super) struct Jumps {
    _told: Arc<dyn Fn() + Send + Sync>,
}

impl Jumps {
    pub(super) fn listen(core: &Arc<Core>) -> Self {
        let weak = Arc::downgrade(core);
        let told: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            if let Some(core) = weak.upgrade() {
                core.clock_jumped();
            }
        });
        core.settings.clock.subscribe(ClockListener::new(&told));
        Self { _told: told }
    }
}

impl fmt::Debug for Jumps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jumps")
    }
}

/// The clock has jumped, and the writer thread has not looked yet.
#[derive(Debug, Default)]
pub(crate) struct Jumped(AtomicBool);

impl Jumped {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub(crate) fn take(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }
}
