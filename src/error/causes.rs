//! The causes of errors: a damaged record, a failure of the storage engine, a setting.
//!
//! An error prints its cause. The cause is not its `source()` too, so a chain of errors says
//! nothing twice.

use super::BoxError;

/// A record that failed its check when it was read.
///
/// ```
/// fn report(error: &onewrite::CorruptError) {
///     println!("event {} is lost: {}", error.seq, error.what);
/// }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("log record {seq} is damaged: {what}")]
#[non_exhaustive]
pub struct CorruptError {
    /// The record's sequence number.
    pub seq: u64,
    /// What is wrong.
    pub what: &'static str,
}

/// A failure of the storage engine, with the action that failed.
///
/// ```
/// fn report(failure: &onewrite::StorageFailure) {
///     println!("{} failed: {}", failure.action, failure.cause);
/// }
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{action}: {cause}")]
#[non_exhaustive]
pub struct StorageFailure {
    /// The action that failed.
    pub action: &'static str,
    /// The message of the storage engine.
    pub cause: BoxError,
    /// Whether the medium failed, which poisons the store.
    pub fatal: bool,
}

/// A setting that cannot work.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// use onewrite::Error;
/// let refused = store.relay("rabbit").window_events(0).spawn(broker.publisher());
/// assert!(matches!(refused, Err(Error::Setting(error)) if error.setting == "window_events"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("setting `{setting}`: {reason}")]
#[non_exhaustive]
pub struct SettingError {
    /// The setting's name.
    pub setting: &'static str,
    /// What is wrong with its value. The text never holds a password.
    pub reason: String,
}

impl SettingError {
    /// Makes the error of a [`Publisher`](crate::broker::Publisher) or a
    /// [`Source`](crate::broker::Source) that refuses one of its own settings.
    ///
    /// ```
    /// let error = onewrite::SettingError::new("port", "0 is no port");
    /// assert_eq!(error.to_string(), "setting `port`: 0 is no port");
    /// ```
    pub fn new(setting: &'static str, reason: impl Into<String>) -> Self {
        Self { setting, reason: reason.into() }
    }
}
