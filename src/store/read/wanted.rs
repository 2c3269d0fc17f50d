//! Which records a reader with a filter wants, asked before the records are decoded and upcast.
//!
//! **Invariants.** None of the application's code runs for a record that the filter skips. So only
//! an event that a reader wants can stop that reader. The filter compares the type that the upcasts
//! lead to. Each reader is shown a record that fails its check: neither its stream nor its type can
//! be trusted.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::SettingError;
use crate::event::RecordedEvent;
use crate::filter::EventFilter;
use crate::log::view::RecordView;
use crate::upcast::Upcasts;

/// A filter, and the recorded types from which upcasts make the filter's types.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    filter: EventFilter,
    /// The types of which some version is read as a type of the filter. Empty unless the filter
    /// names types.
    sources: BTreeSet<String>,
    upcasts: Arc<Upcasts>,
}

impl Wanted {
    /// # Errors
    /// [`SettingError`] for a filter that no event can ever pass.
    pub(crate) fn new(filter: EventFilter, upcasts: &Arc<Upcasts>) -> Result<Self, SettingError> {
        filter.check_names()?;
        if let Some((event_type, successor)) =
            filter.types().find_map(|it| upcasts.successor(it).map(|successor| (it, successor)))
        {
            let reason = format!(
                "no event is of type `{event_type}`: the upcasts lead on to `{successor}`; name that type"
            );
            return Err(SettingError::new("filter", reason));
        }
        let read_as =
            upcasts.read_as().filter(|(_, to)| filter.takes_type(to)).map(|(from, _)| from.to_owned());
        let sources = filter.types().map(str::to_owned).chain(read_as).collect();
        Ok(Self { filter, sources, upcasts: Arc::clone(upcasts) })
    }

    /// The filter of a reader that wants every event.
    pub(crate) fn all(upcasts: &Arc<Upcasts>) -> Self {
        Self { filter: EventFilter::all(), sources: BTreeSet::new(), upcasts: Arc::clone(upcasts) }
    }

    pub(in crate::store) fn takes_all(&self) -> bool {
        self.filter.takes_all()
    }

    /// Whether the reader wants the record that was viewed.
    pub(in crate::store) fn takes_record(&self, view: &RecordView, frame: &[u8]) -> bool {
        self.filter.takes_stream(view.stream(frame)) && self.takes_form(view.event_type(frame), view.version)
    }

    fn takes_form(&self, event_type: &str, version: u32) -> bool {
        if !self.filter.names_types() {
            return true;
        }
        // Most records end here, without a copy of the type.
        self.sources.contains(event_type)
            && self.upcasts.ends(event_type, version).into_iter().any(|end| self.filter.takes_type(end))
    }

    /// Whether the reader wants the event in its newest form.
    pub(in crate::store) fn takes_event(&self, event: &RecordedEvent) -> bool {
        self.filter.matches(event)
    }
}

/// A record as a reader with a filter finds it.
#[derive(Debug)]
pub(crate) struct Looked {
    pub(crate) seq: u64,
    /// `None` if the filter skips the record.
    pub(crate) event: Option<RecordedEvent>,
}
