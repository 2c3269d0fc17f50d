//! The subscription at the clock: a jump wakes every thread of the store that may wait for a time.
//!
//! **Invariant.** The listener takes only the locks of signals, under which no foreign code runs.
//! So a clock may notify the listener from anywhere: from inside a transaction, or from inside the
//! clock's own `now`.

use std::fmt;
use std::sync::Arc;

use crate::store::shared::core::Core;
use crate::time::ClockListener;

/// The store's end of its subscription at the clock. Dropping this value ends the subscription.
pub(in crate::store) struct Jumps {
    _on_jump: Arc<dyn Fn() + Send + Sync>,
}

impl Jumps {
    pub(in crate::store) fn listen(core: &Arc<Core>) -> Self {
        let weak = Arc::downgrade(core);
        let on_jump: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            if let Some(core) = weak.upgrade() {
                core.clock_jumped();
            }
        });
        core.settings.clock.subscribe(ClockListener::new(&on_jump));
        Self { _on_jump: on_jump }
    }
}

impl fmt::Debug for Jumps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jumps")
    }
}
