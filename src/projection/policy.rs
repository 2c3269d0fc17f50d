//! What becomes of an event whose handler fails.

/// What a projection does with an event on which its handler fails again and again, or whose record is damaged.
///
/// ```
/// use onewrite::FailurePolicy;
/// assert_eq!(FailurePolicy::default(), FailurePolicy::Stop { attempts: 10 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// After so many tries it stands still before the event, and says so. The default, with 10: its tables are never wrong, only old.
    Stop {
        /// Tries.
        attempts: u32,
    },
    /// After so many tries the event is written down among the projection's failures, and the projection goes on without it.
    Quarantine {
        /// Tries.
        attempts: u32,
    },
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self::Stop { attempts: 10 }
    }
}

impl FailurePolicy {
    pub(crate) fn attempts(self) -> u32 {
        match self {
            Self::Stop { attempts } | Self::Quarantine { attempts } => attempts,
        }
    }
}
