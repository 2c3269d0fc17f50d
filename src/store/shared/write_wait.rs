//! A wait for the write transaction: its purpose, its beginning, when it is worth a warning, and
//! when it is given up.
//!
//! **Invariant.** A call that need not wait costs nothing here: it reads no clock.

use std::fmt;
use std::panic::Location;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::time::{Deadline, as_ms};
use crate::tuning::{WRITE_WAIT_WARN_MS, WRITE_WAIT_WARN_MS_MAX};

/// The purpose of a write transaction.
#[derive(Debug, Clone)]
pub(crate) enum Purpose {
    /// The application has called this method, at this place.
    Call(&'static str, &'static Location<'static>),
    /// A handler of the application, by kind and name.
    Handler(&'static str, Arc<str>),
    /// The library's own work.
    Own(&'static str),
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call, at) => write!(f, "`{call}` at {at}"),
            Self::Handler(kind, name) => write!(f, "{kind} `{name}`"),
            Self::Own(work) => f.write_str(work),
        }
    }
}

/// One wait, of one caller.
#[derive(Debug)]
pub(crate) struct Wait {
    pub(crate) purpose: Purpose,
    limit: Option<Duration>,
    begun: Option<Begun>,
}

#[derive(Debug)]
struct Begun {
    since: Instant,
    over: Deadline,
    warn: Deadline,
    /// How long the wait has lasted by the next warning.
    warn_ms: u64,
}

impl Wait {
    /// A wait of at most `limit`; endless if there is no limit.
    pub(crate) fn new(purpose: Purpose, limit: Option<Duration>) -> Self {
        Self { purpose, limit, begun: None }
    }

    fn begun(&mut self) -> &mut Begun {
        let limit = self.limit;
        self.begun.get_or_insert_with(|| {
            let since = Instant::now();
            Begun {
                since,
                over: limit.map_or(Deadline::Never, |limit| Deadline::from(since, limit)),
                warn: Deadline::from(since, Duration::from_millis(WRITE_WAIT_WARN_MS)),
                warn_ms: WRITE_WAIT_WARN_MS,
            }
        })
    }

    /// Begins the wait, unless it has begun. Returns the moment at which the next warning or the
    /// limit is due.
    pub(crate) fn next(&mut self) -> Deadline {
        let begun = self.begun();
        begun.over.min(begun.warn)
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    pub(crate) fn has_limit(&self) -> bool {
        self.limit.is_some()
    }

    /// Whether the limit has passed.
    pub(crate) fn is_over(&mut self) -> bool {
        self.begun().over.is_over()
    }

    /// Drops the limit: from here on the wait takes as long as it must.
    pub(crate) fn forget_limit(&mut self) {
        self.begun().over = Deadline::Never;
    }

    /// Whether a warning is due. The next warning is due after twice the time, and after
    /// [`WRITE_WAIT_WARN_MS_MAX`] more at most.
    pub(crate) fn take_warning(&mut self) -> bool {
        let begun = self.begun();
        let is_due = begun.warn.is_over();
        while begun.warn.is_over() {
            begun.warn_ms = begun.warn_ms.saturating_add(begun.warn_ms.min(WRITE_WAIT_WARN_MS_MAX));
            begun.warn = Deadline::from(begun.since, Duration::from_millis(begun.warn_ms));
        }
        is_due
    }

    pub(crate) fn waited_ms(&mut self) -> u64 {
        as_ms(self.begun().since.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waited(wait: &mut Wait, ms: u64) -> bool {
        let begun = wait.begun();
        begun.since = Instant::now().checked_sub(Duration::from_millis(ms)).unwrap();
        begun.warn = Deadline::from(begun.since, Duration::from_millis(begun.warn_ms));
        wait.take_warning()
    }

    /// Goal: warnings come after 1, 2, 4, … s, and then once a minute; a standstill of the machine
    /// brings one warning, not many. Method: set the beginning of a wait back.
    #[test]
    fn warnings_grow_apart() {
        let mut wait = Wait::new(Purpose::Own("a test"), None);
        assert!(!wait.has_begun() && wait.next() > Deadline::now());
        let warned: Vec<u64> = (1..=300).filter(|seconds| waited(&mut wait, seconds * 1000)).collect();
        assert_eq!(warned, [1, 2, 4, 8, 16, 32, 64, 124, 184, 244]);
        assert!(!wait.is_over(), "it has no limit");
        let mut limited = Wait::new(Purpose::Own("a test"), Some(Duration::ZERO));
        assert!(limited.is_over());
        limited.forget_limit();
        assert!(!limited.is_over());
    }
}
