//! How often one kind of warning is logged while its cause repeats.

use crate::tuning::{LOG_BURST_MAX, LOG_WINDOW_MS};

/// Admits [`LOG_BURST_MAX`] lines within [`LOG_WINDOW_MS`]. It counts the refused lines, for the
/// next line that it admits.
#[derive(Debug, Default)]
pub(crate) struct LogPace {
    /// When the window began, by the monotonic clock.
    since_ms: Option<u64>,
    logged: u32,
    held_back: u64,
}

impl LogPace {
    /// Returns how many lines were refused since the last admitted line, or `None` if this line is
    /// refused too.
    pub(crate) fn admit(&mut self, mono_ms: u64) -> Option<u64> {
        let is_over = |since_ms: u64| mono_ms.saturating_sub(since_ms) >= LOG_WINDOW_MS;
        if self.since_ms.is_none_or(is_over) {
            (self.since_ms, self.logged) = (Some(mono_ms), 0);
        }
        if self.logged >= LOG_BURST_MAX {
            self.held_back += 1;
            return None;
        }
        self.logged += 1;
        Some(std::mem::take(&mut self.held_back))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a window has no more lines than the bound, and the pace counts each refused line once.
    /// Method: a line each millisecond for five windows.
    #[test]
    fn what_is_held_back_is_counted() {
        let mut pace = LogPace::default();
        let (mut logged, mut counted) = (0, 0);
        for at in 0..5 * LOG_WINDOW_MS {
            if let Some(held_back) = pace.admit(at) {
                logged += 1;
                counted += held_back;
            }
        }
        assert_eq!(logged, 5 * u64::from(LOG_BURST_MAX));
        assert_eq!(logged + counted + pace.held_back, 5 * LOG_WINDOW_MS);
        assert_eq!(pace.admit(0), None, "a clock that went back opens no window");
    }
}
