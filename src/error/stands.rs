//! The place of an event, as an error names it.

use std::fmt;

use crate::printable::printable;

/// The place of the earlier event whose id an append reused.
///
/// ```
/// use onewrite::Stands;
/// let stands = Stands::InStream { stream: "account-7".into(), revision: 3 };
/// assert_eq!(stands.to_string(), "it is revision 3 of stream `account-7`");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stands {
    /// In a stream.
    InStream {
        /// The stream.
        stream: String,
        /// Its revision there.
        revision: u64,
    },
    /// In no stream.
    InNoStream,
    /// Its record is gone: truncated, deleted or trimmed.
    Gone,
}

impl fmt::Display for Stands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InStream { stream, revision } => {
                write!(f, "it is revision {revision} of stream `{}`", printable(stream))
            }
            Self::InNoStream => f.write_str("it is in no stream"),
            Self::Gone => f.write_str("its record is gone"),
        }
    }
}
