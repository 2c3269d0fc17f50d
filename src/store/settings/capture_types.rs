//! A capture without its types: keys and values as bytes.

use std::any::{TypeId, type_name};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::Bound;
use std::sync::Arc;

use redb::{Key, ReadTransaction, ReadableTable, TableDefinition, TableError, Value, WriteTransaction};

use crate::error::{Error, Result, SettingError};
use crate::event::{Destination, Event};
use crate::storage::tables::capture::CaptureMode;
use crate::store::settings::capture::{Capture, Change, OldValues, Operation};
use crate::store::settings::capture_stored::{self, Found, Stored, Unreadable};

/// The types of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Types {
    ids: (TypeId, TypeId),
    names: (&'static str, &'static str),
}

impl Types {
    pub(crate) fn of<K: Key + 'static, V: Value + 'static>() -> Self {
        Self { ids: (TypeId::of::<K>(), TypeId::of::<V>()), names: (type_name::<K>(), type_name::<V>()) }
    }
}

impl std::fmt::Display for Types {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "<{}, {}>", self.names.0, self.names.1)
    }
}

/// Rows of a table, as a backfill finds them.
#[derive(Debug, Default)]
pub(crate) struct BackfillRows {
    /// Key and value.
    pub(crate) rows: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether more rows follow.
    pub(crate) more: bool,
}

/// One change, as far as it is known, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawChange<'a> {
    pub(crate) operation: Operation,
    pub(crate) key: &'a [u8],
    pub(crate) new: Option<&'a [u8]>,
    pub(crate) old: Old<'a>,
}

/// The value before a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Old<'a> {
    /// There was no value, or no codec needs it.
    None,
    Bytes(&'a [u8]),
    /// There was a value, of bytes that its type cannot read.
    Unreadable,
}

impl<'a> Old<'a> {
    /// Wraps the value that was found for a row.
    pub(in crate::store) fn found(bytes: &'a Found) -> Self {
        match bytes {
            Ok(Some(bytes)) => Self::Bytes(bytes),
            Ok(None) => Self::None,
            Err(Unreadable) => Self::Unreadable,
        }
    }
}

pub(crate) trait Captured: Debug + Send + Sync {
    fn name(&self) -> &str;
    fn mode(&self) -> CaptureMode;
    fn wants_snapshot(&self) -> bool;
    /// Whether the table's events hold the row's value before the change.
    fn wants_old(&self) -> bool;
    /// Whether the table's events stay in the log, so that the capture needs no relay.
    fn is_unpublished(&self) -> bool;
    fn types(&self) -> Types;
    /// Checks for settings that cannot work, whatever the file holds.
    fn check_settings(&self) -> Result<(), SettingError>;
    /// Checks whether the file's table, if there is one, has these types.
    fn check_table(&self, tx: &ReadTransaction) -> Result<Result<(), SettingError>>;
    /// Encodes a change with the codec.
    fn encode(&self, change: RawChange<'_>) -> Result<Event>;
    /// The error for a row that cannot be read.
    fn unreadable(&self, key: &[u8]) -> Error;
    /// The value that the key has in this transaction, as stored.
    fn value(&self, tx: &WriteTransaction, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// The rows behind `after`, as stored; from the first row on if `after` is `None`.
    ///
    /// Returns at most `keys_max` rows, and ends early once the rows have `bytes_max` bytes.
    fn rows_after(
        &self,
        tx: &WriteTransaction,
        after: Option<&[u8]>,
        keys_max: usize,
        bytes_max: usize,
    ) -> Result<BackfillRows>;
}

impl<K: Key + 'static, V: Value + 'static> Captured for Capture<K, V> {
    fn name(&self) -> &str {
        &self.name
    }

    fn mode(&self) -> CaptureMode {
        self.mode
    }

    fn wants_snapshot(&self) -> bool {
        self.snapshot
    }

    fn wants_old(&self) -> bool {
        self.old != OldValues::Left
    }

    fn is_unpublished(&self) -> bool {
        matches!(self.destination, Some(Destination::Unpublished))
    }

    fn types(&self) -> Types {
        Types::of::<K, V>()
    }

    fn check_settings(&self) -> Result<(), SettingError> {
        Self::check_settings(self)
    }

    fn check_table(&self, tx: &ReadTransaction) -> Result<Result<(), SettingError>> {
        match tx.open_table(self.definition()) {
            Ok(_) | Err(TableError::TableDoesNotExist(_)) => Ok(Ok(())),
            Err(TableError::Storage(error)) => Err(error.into()),
            // The table has other types, or is a multimap.
            Err(error) => Ok(Err(SettingError::new("capture", error.to_string()))),
        }
    }

    fn encode(&self, raw: RawChange<'_>) -> Result<Event> {
        let unreadable = |_| self.unreadable(raw.key);
        let old = match raw.old {
            Old::None => Ok(None),
            Old::Bytes(bytes) => capture_stored::read::<V>(bytes).map(Some),
            Old::Unreadable => Err(Unreadable),
        };
        let (old, old_is_unreadable) = match old {
            Ok(old) => (old, false),
            Err(_) if self.old == OldValues::WhereReadable => (None, true),
            Err(error) => return Err(unreadable(error)),
        };
        let change = Change {
            table: &self.name,
            key: capture_stored::read::<K>(raw.key).map_err(unreadable)?,
            operation: raw.operation,
            new: raw.new.map(capture_stored::read::<V>).transpose().map_err(unreadable)?,
            old,
            old_is_unreadable,
        };
        Self::encode(self, &change)
    }

    fn unreadable(&self, key: &[u8]) -> Error {
        let value_type = type_name::<V>();
        Error::UnreadableRow { table: self.name.clone(), key: key.to_vec(), value_type }
    }

    fn value(&self, tx: &WriteTransaction, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let table = tx.open_table(self.stored())?;
        Ok(table.get(key)?.map(|row| row.value().to_vec()))
    }

    fn rows_after(
        &self,
        tx: &WriteTransaction,
        after: Option<&[u8]>,
        keys_max: usize,
        bytes_max: usize,
    ) -> Result<BackfillRows> {
        let table = tx.open_table(self.stored())?;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut found = BackfillRows::default();
        let mut bytes = 0;
        for row in table.range::<&[u8]>((from, Bound::Unbounded))? {
            if found.rows.len() >= keys_max || bytes >= bytes_max {
                found.more = true;
                break;
            }
            let (key, value) = row?;
            let (key, value) = (key.value().to_vec(), value.value().to_vec());
            bytes += key.len() + value.len();
            found.rows.push((key, value));
        }
        Ok(found)
    }
}

impl<K: Key + 'static, V: Value + 'static> Capture<K, V> {
    fn definition(&self) -> TableDefinition<'_, K, V> {
        TableDefinition::new(&self.name)
    }

    /// The same table with keys and values as bytes, which redb takes for the types themselves.
    fn stored(&self) -> TableDefinition<'_, Stored<K>, Stored<V>> {
        TableDefinition::new(&self.name)
    }
}

/// The captures that this process has registered, by table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Captures {
    by_name: BTreeMap<String, Arc<dyn Captured>>,
    /// A table that was registered a second time.
    twice: Option<String>,
}

impl Captures {
    pub(crate) fn add(&mut self, capture: Arc<dyn Captured>) {
        let name = capture.name().to_owned();
        if self.by_name.insert(name.clone(), capture).is_some() {
            self.twice = Some(name);
        }
    }

    pub(crate) fn check_settings(&self) -> Result<(), SettingError> {
        if let Some(name) = &self.twice {
            return Err(SettingError::new("capture", format!("table `{name}` is registered twice")));
        }
        self.by_name.values().try_for_each(|capture| capture.check_settings())
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<dyn Captured>> {
        self.by_name.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<dyn Captured>> {
        self.by_name.values()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}
