//! Ids that were appended before: where their events are, and which error to return if they are not
//! where they should be.

use crate::error::{Error, ExpectedRevision, Result, Stands};
use crate::event::{Event, RecordedEvent};
use crate::log::keys;
use crate::log::streams::Run;
use crate::store::streams::{EventStream, StreamAppended, body_of};
use crate::store::transaction::{EVENT_SCOPE, Transaction};

impl Transaction {
    /// Returns why this event cannot be appended, if its id was appended as `seq` with another
    /// checksum. The checksum covers stream and destination. So the record tells whether the
    /// content is different, or only its place.
    #[cold]
    pub(in crate::store) fn clash(&self, event: &Event, seq: u64) -> Error {
        let id = event.id.as_deref().unwrap_or_default().to_owned();
        match self.recorded(seq) {
            Ok(Some(recorded)) if is_the_same_elsewhere(event, &recorded) => {
                Error::IdElsewhere { id, seq, stands: stands(&recorded) }
            }
            // If the record is gone or damaged, only the checksum is left to compare.
            Ok(_) | Err(Error::Corrupt(_)) => Error::Conflict { id, seq },
            Err(error) => error,
        }
    }

    /// Works as [`clash`](Self::clash), for an event with the same checksum that is not among the
    /// events that this append would repeat.
    #[cold]
    pub(in crate::store) fn elsewhere(&self, id: &str, seq: u64) -> Error {
        let stands = match self.recorded(seq) {
            Ok(recorded) => recorded.as_ref().map_or(Stands::Gone, stands),
            Err(Error::Corrupt(_)) => Stands::Gone,
            Err(error) => return error,
        };
        Error::IdElsewhere { id: id.to_owned(), seq, stands }
    }
}

fn stands(recorded: &RecordedEvent) -> Stands {
    match (recorded.stream(), recorded.revision()) {
        (Some(stream), Some(revision)) => Stands::InStream { stream: stream.to_owned(), revision },
        _ => Stands::InNoStream,
    }
}

/// Whether an event differs from a recorded event of another stream, or of none, only in what
/// follows from that.
fn is_the_same_elsewhere(event: &Event, recorded: &RecordedEvent) -> bool {
    let recorded = &recorded.event;
    if event.stream == recorded.stream {
        return false;
    }
    // A key that is the stream's name was set by the stream. So may the destination be.
    let derived = |event: &Event| event.key.as_deref().is_none_or(|key| event.stream.as_deref() == Some(key));
    let mut moved = Event {
        id: event.id.clone(),
        stream: event.stream.clone(),
        destination: event.destination.clone(),
        ..recorded.clone()
    };
    if derived(event) && derived(recorded) {
        moved.key.clone_from(&event.key);
    }
    body_of(&moved) == body_of(event)
}

impl EventStream<'_> {
    /// Returns where exactly these events are already, if they are: at the expected revision, or
    /// where the first id leads.
    #[cold]
    pub(in crate::store) fn repeated(
        &self,
        events: &[Event],
        expected: ExpectedRevision,
    ) -> Result<Option<StreamAppended>> {
        let Some(Some(id)) = events.first().map(|event| event.id.as_deref()) else { return Ok(None) };
        // The stream itself is searched first: it remembers for longer than the inbox.
        if let Some(first) = expected.first()
            && let Some(repeated) = self.repeated_from(events, first)?
        {
            return Ok(Some(repeated));
        }
        match self.revision_of(id)? {
            Some(first) => self.repeated_from(events, first),
            None => Ok(None),
        }
    }

    fn repeated_from(&self, events: &[Event], first: u64) -> Result<Option<StreamAppended>> {
        let reader = self.read()?;
        if !reader.view.state.readable().contains(&first) {
            return Ok(None);
        }
        let (mut seqs, mut chunk) = (Vec::with_capacity(events.len()), Run::default());
        for (event, revision) in events.iter().zip(first..) {
            if revision >= reader.view.state.next {
                return Ok(None);
            }
            // The record is read without an upcast: the upcast form is not what was appended.
            let recorded = reader.view.read(self.tx, revision, &mut chunk)?;
            let same_id = event.id.as_deref() == Some(recorded.id());
            if !same_id || body_of(event) != body_of(&recorded.event) {
                return Ok(None);
            }
            seqs.push(recorded.seq());
        }
        self.tx.note_seqs(&seqs)?;
        Ok(Some(StreamAppended { revisions: first..first + seqs.len() as u64, seqs, repeated: true }))
    }

    /// Returns the revision of the event with this id in this stream, if the store still remembers
    /// the id.
    fn revision_of(&self, id: &str) -> Result<Option<u64>> {
        let Some(row) = self.tx.inbox_row(&keys::inbox(EVENT_SCOPE, id.as_bytes()))? else { return Ok(None) };
        let recorded = self.tx.recorded(row.first)?;
        Ok(recorded.filter(|recorded| recorded.stream() == Some(&*self.name)).and_then(|it| it.revision()))
    }
}
