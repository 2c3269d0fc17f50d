//! The settings of a captured table, as the application gives them.

use redb::{Key, TableDefinition, TableHandle, Value};

#[cfg(feature = "json")]
use crate::codec;
use crate::error::{Result, SettingError};
use crate::event::{Destination, Event};
#[cfg(feature = "json")]
use crate::limits::KEY_BYTES_MAX;
use crate::limits::SHORT_STRING_BYTES_MAX;
use crate::storage::tables::capture::CaptureMode;

/// The operation that changed a row.
///
/// ```
/// use onewrite::Operation;
/// assert_eq!(Operation::Remove.name(), "remove");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// The key was new.
    Insert,
    /// The key has another value. Under [`CaptureMode::NewestValue`], the key may be new.
    Update,
    /// The key is gone.
    Remove,
    /// The row was in the table when the capture was switched on.
    Snapshot,
}

impl Operation {
    /// The operation's name in a JSON payload.
    ///
    /// ```
    /// use onewrite::Operation;
    /// assert_eq!(Operation::Insert.name(), "insert");
    /// assert_eq!(Operation::Snapshot.name(), "snapshot");
    /// ```
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Remove => "remove",
            Self::Snapshot => "snapshot",
        }
    }
}

/// One change of a captured table, as a codec sees it.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// use onewrite::{Capture, Change, Event, Operation, Store, redb::TableDefinition};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// fn encode(change: &Change<'_, &'static str, u64>) -> onewrite::Result<Event> {
///     assert_eq!((change.table, change.operation), ("accounts", Operation::Insert));
///     assert_eq!((change.key, change.new, change.old), ("alice", Some(100), None));
///     Ok(Event::bytes("account.changed", change.key).unpublished())
/// }
/// let store = Store::builder().capture(Capture::with(ACCOUNTS, encode)).open(folder.path().join("a.redb"))?;
/// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[non_exhaustive]
pub struct Change<'a, K: Key + 'static, V: Value + 'static> {
    /// The table's name.
    pub table: &'a str,
    /// The row's key.
    pub key: K::SelfType<'a>,
    /// The operation on the row.
    pub operation: Operation,
    /// The value after the change; `None` for a remove.
    pub new: Option<V::SelfType<'a>>,
    /// The value before the change, if there was one. It is `None` under
    /// [`CaptureMode::NewestValue`], and where it was [not requested](Capture::old_values).
    pub old: Option<V::SelfType<'a>>,
    pub(crate) old_is_unreadable: bool,
}

impl<K: Key + 'static, V: Value + 'static> Change<'_, K, V> {
    /// Whether there was a value before the change that its type cannot read, such as a value that
    /// an older release has written.
    ///
    /// `old` is `None` then. If [`old_values(true)`](Capture::old_values) requests the value, the
    /// write fails instead.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Error, Event, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::with(ACCOUNTS, |change| {
    ///     if change.old_is_unreadable() {
    ///         return Ok(Event::bytes("account.migrated", change.key));
    ///     }
    ///     let gain = change.new.unwrap_or(0).saturating_sub(change.old.unwrap_or(0));
    ///     Ok(Event::bytes("account.gained", gain.to_string()))
    /// });
    /// let store = Store::builder().capture(accounts.unpublished()).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
    /// assert_eq!(store.read()?.event(0)?.expect("the change above").event_type(), "account.gained");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn old_is_unreadable(&self) -> bool {
        self.old_is_unreadable
    }
}

/// Shows neither key nor values, because they are the application's data.
impl<K: Key + 'static, V: Value + 'static> std::fmt::Debug for Change<'_, K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Change")
            .field("table", &self.table)
            .field("operation", &self.operation)
            .finish_non_exhaustive()
    }
}

type With<K, V> = dyn Fn(&Change<'_, K, V>) -> Result<Event> + Send + Sync;

/// Whether a codec is given the value before a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OldValues {
    /// No: the value is not decoded.
    Left,
    /// Yes, if the value can be read.
    WhereReadable,
    /// Yes. The write fails if the value cannot be read.
    Wanted,
}

/// Turns a change into an event.
enum Codec<K: Key + 'static, V: Value + 'static> {
    /// `bool`: whether the payload holds the old value.
    #[cfg(feature = "json")]
    Json(fn(&Change<'_, K, V>, bool) -> Result<Event>),
    With(Box<With<K, V>>),
}

/// A table whose changes become events, with the settings for that: which changes, when, how and
/// where to. Given to [`StoreBuilder::capture`](crate::StoreBuilder::capture).
///
/// ```
/// use onewrite::{Capture, CaptureMode, Store, redb::TableDefinition};
/// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
/// # let folder = tempfile::tempdir()?;
/// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed").old_values(true);
/// let store = Store::builder().capture(accounts).open(folder.path().join("bank.redb"))?;
/// store.write(|tx| {
///     tx.captured_table(ACCOUNTS)?.insert("alice", 100)?; // state alone; the event comes by itself
///     Ok(())
/// })?;
/// let event = store.read()?.event(0)?.expect("the change above");
/// assert_eq!(event.event_type(), "accounts.changed");
/// assert_eq!(event.payload(), br#"{"table":"accounts","key":"alice","operation":"insert","new":100,"old":null}"#);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a capture does nothing until it is given to `StoreBuilder::capture`"]
pub struct Capture<K: Key + 'static, V: Value + 'static> {
    pub(crate) name: String,
    pub(crate) mode: CaptureMode,
    pub(crate) destination: Option<Destination>,
    pub(crate) old: OldValues,
    pub(crate) snapshot: bool,
    codec: Codec<K, V>,
}

impl<K: Key + 'static, V: Value + 'static> std::fmt::Debug for Capture<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("table", &self.name)
            .field("mode", &self.mode)
            .field("destination", &self.destination)
            .field("snapshot", &self.snapshot)
            .finish_non_exhaustive()
    }
}

impl<K: Key + 'static, V: Value + 'static> Capture<K, V> {
    fn new(definition: TableDefinition<'_, K, V>, codec: Codec<K, V>, old: OldValues) -> Self {
        Self {
            name: definition.name().to_owned(),
            mode: CaptureMode::default(),
            destination: None,
            old,
            snapshot: false,
            codec,
        }
    }

    /// Encodes changes as JSON, in events of type `<table>.changed`.
    ///
    /// The payload is `{"table", "key", "operation", "new", "old"?}`. `new` is null for a remove,
    /// and `old` is there only if [requested](Self::old_values). The capture needs a destination:
    /// [`to`](Self::to) or [`unpublished`](Self::unpublished).
    ///
    /// The ordering key is the row's key: a string as it is, anything else (and an empty string) as
    /// its JSON text. A checksum replaces a key that no message can carry, because it has over 255
    /// bytes or control characters. Keys with the same checksum wait for each other; nothing else
    /// changes, because the payload has the whole key.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Store, redb::TableDefinition};
    /// const SEATS: TableDefinition<(u32, &str), bool> = TableDefinition::new("seats");
    /// let store = Store::builder().capture(Capture::json(SEATS).unpublished()).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.captured_table(SEATS)?.insert((7, "A"), true).map(drop))?;
    /// let event = store.read()?.event(0)?.expect("the change above");
    /// assert_eq!(event.key(), Some(r#"[7,"A"]"#));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(feature = "json")]
    pub fn json(definition: TableDefinition<'_, K, V>) -> Self
    where
        for<'a> K::SelfType<'a>: serde::Serialize,
        for<'a> V::SelfType<'a>: serde::Serialize,
    {
        Self::new(definition, Codec::Json(json_event::<K, V>), OldValues::Left)
    }

    /// Encodes changes with `codec`, which returns the whole event, with type, payload and ordering
    /// key.
    ///
    /// An event without a destination gets the capture's. The codec must have no effect of its own:
    /// it may run for a write that is rolled back.
    ///
    /// Set a key: an event without one is published in no order. An id must belong to this change
    /// alone: an event whose id is already in the log is not appended again.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Change, Event, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::with(ACCOUNTS, |change: &Change<'_, &str, u64>| {
    ///     let payload = change.new.map(u64::to_le_bytes).unwrap_or_default();
    ///     Ok(Event::bytes("account.balance", payload).key(change.key))
    /// });
    /// let store = Store::builder().capture(accounts.to("accounts", "balance")).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
    /// assert_eq!(store.read()?.event(0)?.expect("the change above").payload(), 100_u64.to_le_bytes());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with(
        definition: TableDefinition<'_, K, V>,
        codec: impl Fn(&Change<'_, K, V>) -> Result<Event> + Send + Sync + 'static,
    ) -> Self {
        Self::new(definition, Codec::With(Box::new(codec)), OldValues::WhereReadable)
    }

    /// Sets when changes become events; [`CaptureMode::EveryChange`] unless set.
    ///
    /// The mode may change from one opening to the next. If dirty keys wait when the mode becomes
    /// `EveryChange`, the next passes publish them, each with the value that its key has then.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, CaptureMode, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed").mode(CaptureMode::NewestValue);
    /// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
    /// for balance in 0..1000 {
    ///     store.write(move |tx| tx.captured_table(ACCOUNTS)?.insert("alice", balance).map(drop))?;
    /// }
    /// assert_eq!(store.stats()?.captures["accounts"].waiting, 1); // one event, once a relay asks for it
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mode(mut self, mode: CaptureMode) -> Self {
        self.mode = mode;
        self
    }

    /// Sets where the table's events go, unless a codec says otherwise.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Destination, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).to("accounts", "changed");
    /// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
    /// let event = store.read()?.event(0)?.expect("the change above");
    /// assert_eq!(event.destination(), &Destination::exchange("accounts", "changed"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn to(mut self, exchange: impl Into<String>, routing_key: impl Into<String>) -> Self {
        self.destination = Some(Destination::exchange(exchange, routing_key));
        self
    }

    /// Sends the table's events to this queue, over AMQP's default exchange. The same as
    /// [`to`](Self::to) with the empty exchange.
    ///
    /// ```
    /// use onewrite::{Capture, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).to_queue("account-changes");
    /// ```
    pub fn to_queue(self, queue: impl Into<String>) -> Self {
        self.to("", queue)
    }

    /// Keeps the table's events in the log only, unless a codec says otherwise.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Destination, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).unpublished();
    /// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.captured_table(ACCOUNTS)?.insert("alice", 100).map(drop))?;
    /// let event = store.read()?.event(0)?.expect("the change above");
    /// assert_eq!(event.destination(), &Destination::Unpublished);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn unpublished(mut self) -> Self {
        self.destination = Some(Destination::Unpublished);
        self
    }

    /// Sets whether events hold the row's value before the change.
    ///
    /// Unless set, a JSON payload does not hold that value, and a codec of the application gets it
    /// if it can be read. Under [`CaptureMode::NewestValue`] the value is not known, and `open`
    /// refuses a JSON payload that requests it.
    ///
    /// The file may hold values that their type can no longer read, after a release has changed the
    /// type. With `false`, old values are not decoded, and such a row is replaced and removed like
    /// any other. With `true`, a change of such a row fails with
    /// [`Error::UnreadableRow`](crate::Error::UnreadableRow), and no other change does.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// use onewrite::{Capture, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let accounts = Capture::json(ACCOUNTS).unpublished().old_values(true);
    /// let store = Store::builder().capture(accounts).open(folder.path().join("a.redb"))?;
    /// let set = |balance: u64| store.write(move |tx| tx.captured_table(ACCOUNTS)?.insert("alice", balance).map(drop));
    /// set(100)?;
    /// set(70)?;
    /// let payload = br#"{"table":"accounts","key":"alice","operation":"update","new":70,"old":100}"#;
    /// assert_eq!(store.read()?.event(1)?.expect("the change above").payload(), payload);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn old_values(mut self, old_values: bool) -> Self {
        self.old = if old_values { OldValues::Wanted } else { OldValues::Left };
        self
    }

    /// Sets whether the first opening with this capture publishes the rows that the table already
    /// has, as [`Operation::Snapshot`]; no unless set.
    ///
    /// A backfill reads the rows a few at a time, between the writes of the application. A running
    /// relay sets the pace, even while its broker is away. If no relay runs, or the events [stay in
    /// the log](Self::unpublished), the backfill waits for nothing, and a [backlog
    /// quota](crate::StoreBuilder::backlog_quota) bounds its events.
    /// [`CaptureStats::waits_for`](crate::CaptureStats::waits_for) says why a backfill waits.
    ///
    /// Each row is read in the transaction that appends its event. So a reader that applies the
    /// events of a key in order ends with the rows of the table. A crash neither skips nor repeats
    /// a row.
    ///
    /// If the file already knows the table as captured, this setting changes nothing: call
    /// [`Store::end_capture`](crate::Store::end_capture) first.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("a.redb");
    /// use onewrite::{Capture, Store, redb::TableDefinition};
    /// const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");
    /// let store = Store::open(&path)?;
    /// store.write(|tx| Ok(tx.open_table(ACCOUNTS)?.insert("alice", 100).map(drop)?))?; // before there was a capture
    /// store.close()?;
    /// let accounts = Capture::json(ACCOUNTS).unpublished().snapshot(true);
    /// let store = Store::builder().capture(accounts).open(&path)?;
    /// while !store.stats()?.captures["accounts"].snapshot_done {
    ///     std::thread::yield_now();
    /// }
    /// let payload = br#"{"table":"accounts","key":"alice","operation":"snapshot","new":100}"#;
    /// assert_eq!(store.read()?.event(0)?.expect("the row above").payload(), payload);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn snapshot(mut self, snapshot: bool) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// Checks for settings that cannot work, whatever the file holds.
    pub(crate) fn check_settings(&self) -> Result<(), SettingError> {
        let refuse = |reason: String| Err(SettingError::new("capture", reason));
        let name = &self.name;
        if name.starts_with(crate::storage::tables::schema::RESERVED_PREFIX) {
            return refuse(format!("table `{name}` belongs to the library"));
        }
        if let Some(Err(error)) = self.destination.as_ref().map(Destination::validate) {
            return refuse(format!("table `{name}`: {error}"));
        }
        if !matches!(self.codec, Codec::With(_)) {
            if self.destination.is_none() {
                return refuse(format!(
                    "table `{name}`: say where its events go, with `to` or `unpublished`"
                ));
            }
            if self.old == OldValues::Wanted && self.mode == CaptureMode::NewestValue {
                return refuse(format!("table `{name}`: old values are not known under `NewestValue`"));
            }
            if name.len() + CHANGED.len() > SHORT_STRING_BYTES_MAX || name.chars().any(char::is_control) {
                return refuse(format!("table `{}`: its name makes no event type", name.escape_debug()));
            }
        }
        Ok(())
    }

    pub(crate) fn encode(&self, change: &Change<'_, K, V>) -> Result<Event> {
        let mut event = match &self.codec {
            #[cfg(feature = "json")]
            Codec::Json(encode) => encode(change, self.old == OldValues::Wanted)?,
            Codec::With(encode) => encode(change)?,
        };
        if event.destination.is_none() {
            event.destination.clone_from(&self.destination);
        }
        Ok(event)
    }
}

/// The suffix of an event's type, after the table's name.
const CHANGED: &str = ".changed";

#[cfg(feature = "json")]
fn json_event<K, V>(change: &Change<'_, K, V>, old_values: bool) -> Result<Event>
where
    K: Key + 'static,
    V: Value + 'static,
    for<'a> K::SelfType<'a>: serde::Serialize,
    for<'a> V::SelfType<'a>: serde::Serialize,
{
    let key = codec::json_key(&change.key)?;
    let old = old_values.then_some(change.old.as_ref());
    let (table, operation) = (change.table, change.operation.name());
    let payload = codec::change_to_json(table, &key.json, operation, change.new.as_ref(), old)?;
    let event_type = format!("{table}{CHANGED}");
    Ok(Event::bytes(event_type, payload).content_type(codec::JSON).key(order_key(key)))
}

/// The ordering key of a row: the form of the row's key that a message can carry.
#[cfg(feature = "json")]
fn order_key(key: codec::JsonKey) -> String {
    let fits = |text: &String| {
        !text.is_empty() && text.len() <= KEY_BYTES_MAX && !text.chars().any(char::is_control)
    };
    let codec::JsonKey { json, string } = key;
    if let Some(string) = string.filter(fits) {
        return string;
    }
    if fits(&json) {
        return json;
    }
    format!("crc32-{:08x}-{}", crate::log::record::body_checksum(json.as_bytes()), json.len())
}

#[cfg(all(test, feature = "json"))]
mod tests {
    use super::*;

    #[test]
    fn an_order_key_is_what_a_message_can_carry() {
        let of = |key: &str| order_key(codec::json_key(key).unwrap());
        assert_eq!(of("alice"), "alice");
        assert_eq!(of(""), r#""""#);
        assert_eq!(of("two\nlines"), r#""two\nlines""#);
        assert_eq!(of(&"k".repeat(255)), "k".repeat(255));
        let (long, other) = (of(&"k".repeat(256)), of(&"l".repeat(256)));
        assert!(long.starts_with("crc32-") && long.ends_with("-258") && long != other);
        assert!(of("\u{7f}").starts_with("crc32-"), "JSON leaves this control character as it is");
        assert_eq!(order_key(codec::json_key(&u128::MAX).unwrap()), u128::MAX.to_string());
        assert_eq!(order_key(codec::json_key(&(1, "a")).unwrap()), r#"[1,"a"]"#);
    }
}
