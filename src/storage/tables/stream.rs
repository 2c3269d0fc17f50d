//! The row of a stream.

use redb::ReadableTable;

use crate::error::Result;
use crate::log::streams::StreamState;
use crate::storage::errors::damaged_row;

pub(crate) fn stream_row(
    streams: &impl ReadableTable<&'static [u8], &'static [u8]>,
    name: &[u8],
) -> Result<Option<StreamState>> {
    let Some(row) = streams.get(name)? else { return Ok(None) };
    StreamState::from_bytes(row.value()).map(Some).ok_or_else(|| damaged_row("stream"))
}
