//! The errors of an event that cannot be appended or read.

use super::BoxError;
use crate::printable::printable;

/// Why an append refused an event.
///
/// ```
/// use onewrite::{Event, EventError};
/// let error = Event::bytes("paid", "1").header("region", "eu").header("region", "us").to("", "q").validate().unwrap_err();
/// assert!(matches!(error, EventError::DuplicateHeader { name } if name == "region"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EventError {
    /// A field must not be empty.
    #[error("event field `{field}` is empty")]
    Empty {
        /// The field.
        field: &'static str,
    },
    /// A field is longer than AMQP can carry.
    #[error("event field `{field}` is {len} bytes long; at most {max} are allowed")]
    TooLong {
        /// The field, or the header's name.
        field: String,
        /// Its length in bytes.
        len: usize,
        /// The longest allowed, in bytes.
        max: usize,
    },
    /// The payload is larger than the store's cap.
    #[error("the payload is {len} bytes long; this store takes at most {max}")]
    PayloadTooLarge {
        /// Its length in bytes.
        len: usize,
        /// The cap in bytes.
        max: usize,
    },
    /// Headers are too many or too large together.
    #[error(
        "the event has {count} headers of {len} bytes together; at most {count_max} headers and {len_max} bytes are allowed"
    )]
    HeadersTooLarge {
        /// Number of headers.
        count: usize,
        /// Bytes of all names and values.
        len: usize,
        /// Most headers allowed.
        count_max: usize,
        /// Most bytes allowed.
        len_max: usize,
    },
    /// The header's name belongs to the library or to CloudEvents.
    #[error("header `{name}` is reserved")]
    ReservedHeader {
        /// The name.
        name: String,
    },
    /// The header was given twice.
    #[error("header `{name}` is given twice")]
    DuplicateHeader {
        /// The name.
        name: String,
    },
    /// A header's tables and arrays are nested too deep. See
    /// [`TABLE_NESTING_MAX`](crate::limits::TABLE_NESTING_MAX).
    #[error("header `{}` holds tables or arrays deeper than {max} levels", printable(header))]
    NestedTooDeep {
        /// The header.
        header: String,
        /// Most levels allowed. The headers are the first level.
        max: usize,
    },
    /// The headers hold too many values, counting those in tables and arrays. See
    /// [`HEADER_VALUES_MAX`](crate::limits::HEADER_VALUES_MAX).
    #[error("the headers hold more than {max} values, those in tables and arrays included")]
    TooManyHeaderValues {
        /// Most values allowed.
        max: usize,
    },
    /// A header holds NaN or an infinity, which RabbitMQ cannot read.
    #[error("header `{}` holds NaN or an infinity, which RabbitMQ cannot read", printable(header))]
    OddFloat {
        /// The header.
        header: String,
    },
    /// A field holds a control character.
    #[error("event field `{}` holds a control character", printable(field))]
    ControlCharacter {
        /// The field, or the header's name.
        field: String,
    },
    /// The event has no destination and is not marked as unpublished.
    #[error(
        "the event has no destination: call `to(exchange, routing_key)`, or `unpublished()` to keep it in the log only"
    )]
    NoDestination,
    /// The event would expire before it may be published.
    #[error("the event expires at {expires_ms} ms, which is not after its not_before of {not_before_ms} ms")]
    ExpiresBeforeDue {
        /// Earliest publication, Unix milliseconds.
        not_before_ms: u64,
        /// Expiry, Unix milliseconds.
        expires_ms: u64,
    },
    /// This store cannot read the event's version. See
    /// [`StoreBuilder::event_version`](crate::StoreBuilder::event_version).
    #[error(
        "version {version} of event type `{}` could not be read again: versions 1 to {newest} are known here; `upcast` or `event_version` makes a newer one known",
        printable(event_type)
    )]
    UnknownVersion {
        /// The type.
        event_type: String,
        /// The event's version.
        version: u32,
        /// The newest known version of the type.
        newest: u32,
    },
    /// The payload could not be encoded.
    #[error("the payload cannot be encoded as {format}: {cause}")]
    Encode {
        /// JSON or bincode.
        format: &'static str,
        /// The encoder's message.
        cause: BoxError,
    },
    /// The payload could not be decoded.
    #[error("the payload cannot be decoded as {format}: {cause}")]
    Decode {
        /// JSON or bincode.
        format: &'static str,
        /// The decoder's message.
        cause: BoxError,
    },
}
