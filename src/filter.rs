//! Which events a reader receives, by stream, category and type.

use std::collections::BTreeSet;

use crate::error::SettingError;
use crate::event::{RecordedEvent, category_of, check_category, check_setting_name};

/// A selection of events. An empty filter takes all events.
///
/// An event passes if its stream or its category is among the named streams and categories, and its
/// type is among the named types. A part of the filter that names nothing lets every event pass.
/// The category of a stream is its name up to the first `-`.
///
/// Readers ask the filter before they decode a record and before an
/// [upcast](crate::StoreBuilder::upcast) runs. So an event that cannot be upcast stops only the
/// readers that select the event. A type means the type that the upcasts lead to. A filter for a
/// type also takes older events of the types that become it. A damaged record is shown to every
/// reader, since its stream and its type cannot be trusted.
///
/// Readers refuse a filter that no event can ever pass ([`Error::Setting`](crate::Error::Setting)).
/// Such a filter names a category with a `-`, a type that an upcast renames, or an empty name. A
/// name of over 255 bytes, or with a control character, is refused too.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, EventFilter, ExpectedRevision};
/// store.write(|tx| {
///     for (stream, event_type) in [("account-7", "opened"), ("account-7", "deposited"), ("card-1", "deposited")] {
///         tx.stream(stream).append([Event::bytes(event_type, "")], ExpectedRevision::Any)?;
///     }
///     Ok(())
/// })?;
/// let deposits = EventFilter::all().category("account").event_type("deposited");
/// let found: Vec<u64> = store.read()?.events(0)?
///     .filter_map(|event| event.ok().filter(|event| deposits.matches(event)).map(|event| event.seq()))
///     .collect();
/// assert_eq!(found, [1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventFilter {
    streams: BTreeSet<String>,
    categories: BTreeSet<String>,
    types: BTreeSet<String>,
}

impl EventFilter {
    /// Takes every event.
    ///
    /// ```
    /// assert_eq!(onewrite::EventFilter::all(), onewrite::EventFilter::default());
    /// ```
    #[must_use]
    pub fn all() -> Self {
        Self::default()
    }

    /// Adds the events of this stream.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, EventFilter, ExpectedRevision};
    /// store.write(|tx| {
    ///     tx.stream("account-7").append([Event::bytes("opened", "")], ExpectedRevision::Any)?;
    ///     tx.stream("account-8").append([Event::bytes("opened", "")], ExpectedRevision::Any)
    /// })?;
    /// assert_eq!(store.read()?.events_of(0, &EventFilter::all().stream("account-8"))?.count(), 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn stream(mut self, stream: impl Into<String>) -> Self {
        self.streams.insert(stream.into());
        self
    }

    /// Adds the events of all streams of this category.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, EventFilter, ExpectedRevision};
    /// store.write(|tx| tx.stream("account-7").append([Event::bytes("opened", "")], ExpectedRevision::Any))?;
    /// assert_eq!(store.read()?.events_of(0, &EventFilter::all().category("account"))?.count(), 1);
    /// assert_eq!(store.read()?.events_of(0, &EventFilter::all().category("card"))?.count(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn category(mut self, category: impl Into<String>) -> Self {
        self.categories.insert(category.into());
        self
    }

    /// Adds the events of this type.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, EventFilter};
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// assert_eq!(store.read()?.events_of(0, &EventFilter::all().event_type("paid"))?.count(), 1);
    /// assert_eq!(store.read()?.events_of(0, &EventFilter::all().event_type("refunded"))?.count(), 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn event_type(mut self, event_type: impl Into<String>) -> Self {
        self.types.insert(event_type.into());
        self
    }

    /// Whether the filter takes this event.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # use onewrite::{Event, EventFilter};
    /// store.write(|tx| tx.append(Event::bytes("paid", "1").unpublished()))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert!(EventFilter::all().matches(&event));
    /// assert!(!EventFilter::all().category("account").matches(&event)); // it is of no stream
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn matches(&self, event: &RecordedEvent) -> bool {
        self.takes_stream(event.stream()) && self.takes_type(event.event_type())
    }

    /// Refuses names that no stream, category or event type can have.
    pub(crate) fn check_names(&self) -> Result<(), SettingError> {
        let named = |what: &'static str| move |name: &String| check_setting_name("filter", what, name);
        self.streams.iter().try_for_each(named("a stream's name"))?;
        self.categories.iter().try_for_each(|category| check_category("filter", category))?;
        self.types.iter().try_for_each(named("an event type"))
    }

    pub(crate) fn takes_all(&self) -> bool {
        self.streams.is_empty() && self.categories.is_empty() && self.types.is_empty()
    }

    pub(crate) fn names_types(&self) -> bool {
        !self.types.is_empty()
    }

    pub(crate) fn types(&self) -> impl Iterator<Item = &str> {
        self.types.iter().map(String::as_str)
    }

    pub(crate) fn takes_type(&self, event_type: &str) -> bool {
        self.types.is_empty() || self.types.contains(event_type)
    }

    pub(crate) fn takes_stream(&self, stream: Option<&str>) -> bool {
        if self.streams.is_empty() && self.categories.is_empty() {
            return true;
        }
        stream.is_some_and(|stream| {
            self.streams.contains(stream) || self.categories.contains(category_of(stream))
        })
    }
}
