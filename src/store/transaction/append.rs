//! Appending events.

use crate::error::{CorruptError, EventError, Result};
use crate::event::{Event, Lane, RecordedEvent, fresh_uuid};
use crate::limits::NUMBER_MAX;
use crate::log::lanes::LaneState;
use crate::log::record::{Position, RecordId};
use crate::log::{keys, record};
use crate::storage::errors::damaged_row;
use crate::storage::tables::ids::content_of;
use crate::storage::tables::schema::{InboxRow, LANES, LOG};
use crate::store::shared::core::Core;
use crate::store::transaction::gathered::Amount;
use crate::store::transaction::pending::Undo;
use crate::store::transaction::{Appended, EVENT_SCOPE, Transaction};
use crate::time::Now;

impl Transaction {
    /// Appends an event to the log. It is published only after this transaction has committed.
    ///
    /// If an event with the same id and content is in the log already, this call appends nothing
    /// and returns the first position. That holds for ids that the application gave. The store
    /// remembers an id for its inbox age at least.
    ///
    /// # Errors
    /// In each case but the last, nothing of the event is written:
    /// - [`Error::Event`](crate::Error::Event) names the field that AMQP or the store's limits
    ///   refuse.
    /// - [`Error::Conflict`](crate::Error::Conflict): other content has the id.
    /// - [`Error::IdElsewhere`](crate::Error::IdElsewhere): the same content has the id, in a
    ///   stream.
    /// - [`Error::BacklogFull`](crate::Error::BacklogFull): the quota is reached, if one is set.
    /// - [`Error::TransactionTooLarge`](crate::Error::TransactionTooLarge): the transaction would
    ///   gather more than it may. Nothing of the transaction is written.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// assert_eq!(tx.append(Event::bytes("paid", "1").key("alice").to("", "payments"))?.seq, 0);
    /// assert!(tx.append(Event::bytes("paid", "1")).is_err()); // it says neither where to go nor that it stays
    /// tx.commit()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn append(&self, event: Event) -> Result<Appended> {
        let now = self.core.settings.clock.now();
        self.append_at(&event, None, now)
    }

    /// Appends an event of the outbox, or an event of a stream with its revision. The caller passes
    /// the time in and reads the clock before any lookup: a clock is the application's code and may
    /// append too.
    pub(crate) fn append_at(&self, event: &Event, revision: Option<u64>, now: Now) -> Result<Appended> {
        self.owned()?;
        event.validate()?;
        self.core.settings.upcasts.check_appended(&event.event_type, event.version)?;
        let max = self.core.settings.payload_bytes_max;
        if event.payload.len() > max {
            return Err(EventError::PayloadTooLarge { len: event.payload.len(), max }.into());
        }
        let id = match &event.id {
            Some(text) => RecordId::Text(text),
            None => RecordId::Uuid(fresh_uuid()),
        };
        let body = record::encode_body(event, id);
        let mut id_row = None;
        if let Some(text) = &event.id {
            let key = keys::inbox(EVENT_SCOPE, text.as_bytes());
            if let Some(first) = self.inbox_row(&key)? {
                if (first.crc, first.len) == content_of(&body) {
                    self.admit(Amount::entries(1))?;
                    self.seqs.borrow_mut().push(first.first);
                    return Ok(Appended { seq: first.first, repeated: true });
                }
                return Err(self.clash(event, first.first));
            }
            id_row = Some(key);
        }
        self.check_quota(now.wall_ms)?;
        if let Some(key) = &id_row {
            self.admit(Amount::entry(key.len()))?;
        }
        self.admit(Amount::event(body.len()))?;
        let seq = self.pending.borrow().next_seq;
        if seq > NUMBER_MAX {
            return Err(CorruptError { seq, what: "no event can have this number" }.into());
        }
        let lane = self.next_lane(event, seq)?;
        let mut pending = self.pending.borrow_mut();
        let position =
            Position { seq, start_offset: pending.end_offset, time_ms: now.wall_ms, lane, revision };
        let frame = record::encode(position, &body);
        pending.next_seq += 1;
        pending.end_offset += frame.len() as u64;
        pending.frames.push((seq, frame));
        if let Some(key) = id_row {
            let (crc, len) = content_of(&body);
            pending.put_inbox_row(key, InboxRow { first: seq, count: 1, crc, len, at_ms: 0 });
        }
        drop(pending);
        self.seqs.borrow_mut().push(seq);
        Ok(Appended { seq, repeated: false })
    }

    /// Appends an event and then makes the change that the event reports. If the change fails, the
    /// event is taken back.
    pub(crate) fn append_with<T>(
        &self,
        event: Event,
        then: impl FnOnce() -> std::result::Result<T, redb::StorageError>,
    ) -> Result<T> {
        let savepoint = self.savepoint();
        let seqs = self.seqs.borrow().len();
        self.append(event)?;
        self.engine(|| Ok(then()?)).inspect_err(|_| {
            let mut kept = self.take_seqs();
            kept.truncate(seqs);
            self.roll_back_to(&savepoint);
            self.seqs.borrow_mut().extend(kept);
        })
    }

    pub(in crate::store) fn check_quota(&self, now_ms: u64) -> Result<()> {
        let Some(quota) = &self.core.settings.quota else { return Ok(()) };
        let pending = self.pending.borrow();
        let tail = self.core.tail();
        let added = (pending.next_seq - tail.next_seq, pending.end_offset - tail.end_offset);
        let Some(error) = Core::over_quota(&tail, quota, added) else { return Ok(()) };
        // A caller that did not wait before (a future, a consumer) finds room at its next try.
        self.core.ask_for_expiry(&tail, added, now_ms);
        Err(error)
    }

    pub(in crate::store) fn next_lane(&self, event: &Event, seq: u64) -> Result<Option<Lane>> {
        let mut key = Vec::with_capacity(64);
        if !keys::lane(event.destination.as_ref(), event.key.as_deref(), &mut key) {
            return Ok(None);
        }
        let known = self.pending.borrow().lanes.get(&*key).copied();
        let mut state = match known {
            Some(state) => state,
            None => self.committed_lane(&key)?.unwrap_or(LaneState::beginning_at(seq)),
        };
        let lane = state.take();
        let mut pending = self.pending.borrow_mut();
        let key = key.into_boxed_slice();
        let before = pending.lanes.insert(key.clone(), state);
        pending.undo.push(Undo::Lane(key, before));
        Ok(Some(lane))
    }

    pub(in crate::store) fn committed_lane(&self, key: &[u8]) -> Result<Option<LaneState>> {
        if let Some(state) = self.core.tail().lanes.get(key) {
            return Ok(Some(state));
        }
        let state = self.engine(|| {
            let table = self.redb().open_table(LANES)?;
            let Some(row) = redb::ReadableTable::get(&table, key)? else { return Ok(None) };
            LaneState::from_bytes(row.value()).map(Some).ok_or_else(|| damaged_row("lane"))
        })?;
        if let Some(state) = state {
            self.core.tail().lanes.cache(key.into(), state);
        }
        Ok(state)
    }

    /// Returns the event at this sequence number, this transaction's own events included. Returns
    /// `None` if the event is not there, or not any more.
    ///
    /// # Errors
    /// - [`Error::Corrupt`](crate::Error::Corrupt): the record fails its check.
    /// - [`Error::Upcast`](crate::Error::Upcast): the event cannot be brought up to the newest
    ///   form.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::Event;
    /// let tx = store.begin()?;
    /// let seq = tx.append(Event::bytes("paid", "1").to("", "payments"))?.seq;
    /// assert_eq!(tx.event(seq)?.expect("appended above").payload(), b"1");
    /// assert!(tx.event(seq + 1)?.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn event(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        let recorded = self.recorded(seq)?;
        recorded.map(|recorded| self.core.settings.upcasts.upcast(recorded)).transpose()
    }

    /// Returns the event as recorded, without an upcast.
    pub(crate) fn recorded(&self, seq: u64) -> Result<Option<RecordedEvent>> {
        self.owned()?;
        let pending = self.pending.borrow();
        if let Ok(at) = pending.frames.binary_search_by_key(&seq, |(seq, _)| *seq)
            && let Some((_, frame)) = pending.frames.get(at)
        {
            return Ok(Some(record::decode(seq, frame)?));
        }
        drop(pending);
        self.engine(|| {
            let table = self.redb().open_table(LOG)?;
            let Some(frame) = redb::ReadableTable::get(&table, seq)? else { return Ok(None) };
            Ok(Some(record::decode(seq, frame.value())?))
        })
    }
}
