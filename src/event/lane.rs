//! The place of an event in its lane.

/// An event's place in its lane. A lane holds all events of one destination and key, of one store
/// and epoch.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, Lane};
/// store.write(|tx| {
///     tx.append(Event::bytes("paid", "1").key("alice").to("", "payments"))?;
///     tx.append(Event::bytes("paid", "2").key("alice").to("", "payments"))
/// })?;
/// let second = store.read()?.event(1)?.expect("appended above");
/// let lane: Lane = second.lane().expect("it is published");
/// assert_eq!((lane.id, lane.number), (0, 1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Lane {
    /// The sequence number of the lane's first event: unique within the store and epoch.
    pub id: u64,
    /// The event's number within the lane, from 0, without a gap.
    pub number: u64,
}

/// A lane, distinguished from the lanes of all other stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct LaneOf {
    /// The store that numbered the lane.
    pub(crate) store: [u8; 16],
    /// The store's epoch.
    pub(crate) epoch: u64,
    /// See [`Lane::id`].
    pub(crate) id: u64,
}
