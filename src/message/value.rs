//! The value of a header, with one variant for each AMQP 0-9-1 type that RabbitMQ supports.
//!
//! **Invariant.** Two values are equal if and only if their bytes on the wire are equal. Floats
//! compare by their bits.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::mem::discriminant;

use crate::text::Text;

/// A header's value: each type that RabbitMQ carries, with its width.
///
/// Read integers of any width with [`as_int`](Self::as_int). A plain integer
/// literal becomes [`Int`](Self::Int). Values are equal if their bytes on the wire are: `I32(7)` is
/// not `Int(7)`, and NaN equals itself.
///
/// ```
/// use onewrite::HeaderValue;
/// assert_eq!(HeaderValue::from("eu"), HeaderValue::Text("eu".into()));
/// assert_eq!(HeaderValue::from(true), HeaderValue::Bool(true));
/// assert_eq!(HeaderValue::I32(7).as_int(), HeaderValue::from(7).as_int());
/// assert_eq!(format!("{:?}", HeaderValue::from("secret")), "Text(6 bytes)");
///
/// let hops = HeaderValue::Array(vec!["a".into(), HeaderValue::Table(vec![("weight".into(), 0.5.into())])]);
/// assert_eq!(hops.as_array().map(<[_]>::len), Some(2));
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub enum HeaderValue {
    /// UTF-8 text (AMQP long string, `S`).
    Text(Text),
    /// A signed 64-bit integer (`l`).
    Int(i64),
    /// A boolean (`t`).
    Bool(bool),
    /// Raw bytes (AMQP byte array, `x`).
    Bytes(Vec<u8>),
    /// A signed 8-bit integer (`b`).
    I8(i8),
    /// An unsigned 8-bit integer (`B`).
    U8(u8),
    /// A signed 16-bit integer (`s`).
    I16(i16),
    /// An unsigned 16-bit integer (`u`).
    U16(u16),
    /// A signed 32-bit integer (`I`).
    I32(i32),
    /// An unsigned 32-bit integer (`i`).
    U32(u32),
    /// A 32-bit float (`f`).
    Float(f32),
    /// A 64-bit float (`d`).
    Double(f64),
    /// A decimal number (`D`): `unscaled` divided by ten to the power of `scale`. Some clients read
    /// `unscaled` as a signed integer.
    Decimal {
        /// Digits behind the point.
        scale: u8,
        /// The number without its point.
        unscaled: u32,
    },
    /// A time (`T`), in whole seconds since the Unix epoch.
    Timestamp(u64),
    /// A table (`F`): names and values.
    Table(Vec<(String, HeaderValue)>),
    /// An array (`A`) of values of any type.
    Array(Vec<HeaderValue>),
    /// No value (`V`).
    Void,
}

/// About how much memory a header's value takes besides its encoding: its place in a table or a
/// list.
pub(crate) const VALUE_BYTES: usize = 64;

impl HeaderValue {
    /// Returns the text if the value is one.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from("eu").as_text(), Some("eu"));
    /// assert_eq!(HeaderValue::from(7).as_text(), None);
    /// ```
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the integer if the value is one, of any width. A timestamp is no integer.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from(7).as_int(), Some(7));
    /// assert_eq!(HeaderValue::U8(7).as_int(), Some(7));
    /// assert_eq!(HeaderValue::from("7").as_int(), None);
    /// ```
    #[must_use]
    pub fn as_int(&self) -> Option<i64> {
        Some(match self {
            Self::Int(int) => *int,
            Self::I8(int) => (*int).into(),
            Self::U8(int) => (*int).into(),
            Self::I16(int) => (*int).into(),
            Self::U16(int) => (*int).into(),
            Self::I32(int) => (*int).into(),
            Self::U32(int) => (*int).into(),
            _ => return None,
        })
    }

    /// Returns the float if the value is one, of either width.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::Float(0.5).as_float(), HeaderValue::from(0.5).as_float());
    /// assert_eq!(HeaderValue::from(7).as_float(), None);
    /// ```
    #[must_use]
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(float) => Some((*float).into()),
            Self::Double(float) => Some(*float),
            _ => None,
        }
    }

    /// Returns the entries if the value is a table. A delivery from RabbitMQ has them in the order
    /// of their names.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// let table = HeaderValue::Table(vec![("queue".into(), "payments".into())]);
    /// let entries = table.as_table().unwrap_or_default();
    /// assert_eq!(entries.iter().find(|(name, _)| name == "queue").and_then(|(_, value)| value.as_text()), Some("payments"));
    /// ```
    #[must_use]
    pub fn as_table(&self) -> Option<&[(String, Self)]> {
        match self {
            Self::Table(entries) => Some(entries),
            _ => None,
        }
    }

    /// Returns the values if the value is an array. RabbitMQ's `x-death` is an array of tables.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// let array = HeaderValue::Array(vec![1.into(), "two".into()]);
    /// assert_eq!(array.as_array().map(|values| values[0].as_int()), Some(Some(1)));
    /// ```
    #[must_use]
    pub fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }

    /// Returns the bytes that the value takes on the wire, without its name and type tag.
    ///
    /// ```
    /// # use onewrite::HeaderValue;
    /// assert_eq!(HeaderValue::from(7).encoded_len(), 8);
    /// assert_eq!(HeaderValue::from("eu").encoded_len(), 4 + 2);
    /// assert_eq!(HeaderValue::Array(vec![HeaderValue::Void, true.into()]).encoded_len(), 4 + 1 + 2);
    /// ```
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        match self {
            Self::Text(text) => 4 + text.len(),
            Self::Bytes(bytes) => 4 + bytes.len(),
            Self::Int(_) | Self::Double(_) | Self::Timestamp(_) => 8,
            Self::Decimal { .. } => 5,
            Self::I32(_) | Self::U32(_) | Self::Float(_) => 4,
            Self::I16(_) | Self::U16(_) => 2,
            Self::Bool(_) | Self::I8(_) | Self::U8(_) => 1,
            Self::Void => 0,
            Self::Table(entries) => {
                4 + entries
                    .iter()
                    .map(|(name, value)| 1 + name.len() + 1 + value.encoded_len())
                    .sum::<usize>()
            }
            Self::Array(values) => 4 + values.iter().map(|value| 1 + value.encoded_len()).sum::<usize>(),
        }
    }

    /// Counts the value itself and the values within it.
    pub(crate) fn count(&self) -> usize {
        1 + match self {
            Self::Table(entries) => entries.iter().map(|(_, value)| value.count()).sum(),
            Self::Array(values) => values.iter().map(Self::count).sum::<usize>(),
            _ => 0,
        }
    }

    /// Whether the value is NaN or infinite, which RabbitMQ cannot read.
    pub(crate) fn is_odd_float(&self) -> bool {
        self.as_float().is_some_and(|float| !float.is_finite())
    }

    /// Returns a value that is neither text nor a container, as one number. Floats give their bits.
    fn bits(&self) -> u64 {
        match self {
            Self::Int(int) => int.cast_unsigned(),
            Self::Bool(bool) => (*bool).into(),
            Self::I8(int) => int.cast_unsigned().into(),
            Self::U8(int) => (*int).into(),
            Self::I16(int) => int.cast_unsigned().into(),
            Self::U16(int) => (*int).into(),
            Self::I32(int) => int.cast_unsigned().into(),
            Self::U32(int) => (*int).into(),
            Self::Float(float) => float.to_bits().into(),
            Self::Double(float) => float.to_bits(),
            Self::Decimal { scale, unscaled } => u64::from(*scale) << 32 | u64::from(*unscaled),
            Self::Timestamp(seconds) => *seconds,
            Self::Text(_) | Self::Bytes(_) | Self::Table(_) | Self::Array(_) | Self::Void => 0,
        }
    }
}

impl PartialEq for HeaderValue {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Text(left), Self::Text(right)) => left == right,
            (Self::Bytes(left), Self::Bytes(right)) => left == right,
            (Self::Table(left), Self::Table(right)) => left == right,
            (Self::Array(left), Self::Array(right)) => left == right,
            _ => discriminant(self) == discriminant(other) && self.bits() == other.bits(),
        }
    }
}

impl Eq for HeaderValue {}

impl Hash for HeaderValue {
    fn hash<H: Hasher>(&self, state: &mut H) {
        discriminant(self).hash(state);
        match self {
            Self::Text(text) => text.hash(state),
            Self::Bytes(bytes) => bytes.hash(state),
            Self::Table(entries) => entries.hash(state),
            Self::Array(values) => values.hash(state),
            other => other.bits().hash(state),
        }
    }
}

/// Shows the kind and length only, because header values may be personal data.
impl fmt::Debug for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => write!(f, "Text({} bytes)", text.len()),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            Self::Table(entries) => write!(f, "Table({} entries)", entries.len()),
            Self::Array(values) => write!(f, "Array({} values)", values.len()),
            Self::Int(_) => f.write_str("Int"),
            Self::Bool(_) => f.write_str("Bool"),
            Self::I8(_) => f.write_str("I8"),
            Self::U8(_) => f.write_str("U8"),
            Self::I16(_) => f.write_str("I16"),
            Self::U16(_) => f.write_str("U16"),
            Self::I32(_) => f.write_str("I32"),
            Self::U32(_) => f.write_str("U32"),
            Self::Float(_) => f.write_str("Float"),
            Self::Double(_) => f.write_str("Double"),
            Self::Decimal { .. } => f.write_str("Decimal"),
            Self::Timestamp(_) => f.write_str("Timestamp"),
            Self::Void => f.write_str("Void"),
        }
    }
}

impl From<&str> for HeaderValue {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}
impl From<String> for HeaderValue {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}
impl From<Text> for HeaderValue {
    fn from(text: Text) -> Self {
        Self::Text(text)
    }
}
// No other integer type: a literal could not choose among several, and would become an `i32`.
impl From<i64> for HeaderValue {
    fn from(int: i64) -> Self {
        Self::Int(int)
    }
}
impl From<bool> for HeaderValue {
    fn from(bool: bool) -> Self {
        Self::Bool(bool)
    }
}
impl From<f64> for HeaderValue {
    fn from(float: f64) -> Self {
        Self::Double(float)
    }
}
impl From<Vec<u8>> for HeaderValue {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes)
    }
}
