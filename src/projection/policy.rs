//! The policy for an event whose handler fails.

/// How a projection handles an event on which its handler fails again and again, or whose record is
/// damaged.
///
/// ```
/// use onewrite::FailurePolicy;
/// assert_eq!(FailurePolicy::default(), FailurePolicy::Stop { attempts: 10 });
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailurePolicy {
    /// After this many tries, the projection stands still before the event and shows it. This is
    /// the default, with 10 tries: the tables are never wrong, only old.
    Stop {
        /// Tries.
        attempts: u32,
    },
    /// After this many tries, the projection records the event among its failures and goes on
    /// without the event.
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
