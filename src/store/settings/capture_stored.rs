//! A table's rows as redb stores them, read as far as possible.
//!
//! The file may hold rows of an older form, because a release has changed how a type reads its
//! bytes. Then `from_bytes` of the application's type may panic. So it runs only where its value is
//! needed, and the panic is caught there.

use std::cmp::Ordering;
use std::marker::PhantomData;

use redb::{AccessGuard, Key, TypeName, Value};

use crate::error::caught;

/// A key or a value of the application's type, as its bytes. redb sees the same type.
#[derive(Debug)]
pub(in crate::store) struct Stored<T>(PhantomData<T>);

impl<T: Value + 'static> Value for Stored<T> {
    type SelfType<'a> = &'a [u8];
    type AsBytes<'a> = &'a [u8];

    fn fixed_width() -> Option<usize> {
        T::fixed_width()
    }

    fn from_bytes<'a>(data: &'a [u8]) -> &'a [u8]
    where
        Self: 'a,
    {
        data
    }

    fn as_bytes<'a, 'b: 'a>(value: &'a &'b [u8]) -> &'a [u8]
    where
        Self: 'b,
    {
        value
    }

    fn type_name() -> TypeName {
        T::type_name()
    }
}

impl<K: Key + 'static> Key for Stored<K> {
    fn compare(data1: &[u8], data2: &[u8]) -> Ordering {
        K::compare(data1, data2)
    }
}

/// The error for bytes that are no value of the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Unreadable;

/// The bytes of a requested value, if there is one.
pub(in crate::store) type Found = Result<Option<Vec<u8>>, Unreadable>;

/// Reads stored bytes as a value of the type.
pub(in crate::store) fn read<V: Value>(bytes: &[u8]) -> Result<V::SelfType<'_>, Unreadable> {
    caught(|| V::from_bytes(bytes)).map_err(|_| Unreadable)
}

/// Returns a row's key or value.
pub(in crate::store) fn value_of<'a, V: Value>(
    row: &'a AccessGuard<'_, V>,
) -> Result<V::SelfType<'a>, Unreadable> {
    caught(|| row.value()).map_err(|_| Unreadable)
}

/// Returns the bytes of a row's key or value. redb gives bytes only through the type.
pub(in crate::store) fn bytes_of<V: Value>(row: &AccessGuard<'_, V>) -> Result<Vec<u8>, Unreadable> {
    caught(|| V::as_bytes(&row.value()).as_ref().to_vec()).map_err(|_| Unreadable)
}
