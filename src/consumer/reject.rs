//! The transactions of the quarantine: a delivery enters it, is redriven, and leaves it.

use redb::ReadableTable;

use super::dedup::{Identity, fingerprint, is_of_the_delivery};
use super::rejected::read_row;
use super::rejected_room::{Kept, RejectedRoom};
use crate::broker::Delivery;
use crate::error::{Error, EventError, Result};
use crate::limits::REASON_BYTES_MAX;
use crate::log::keys;
use crate::log::rejected::RejectedRow;
use crate::printable::escaped;
use crate::storage::tables::pieces::{self, Of};
use crate::storage::tables::rejected::RejectedTotals;
use crate::storage::tables::schema::REJECTED;
use crate::store::transaction::{REJECT_SCOPE, Transaction};

/// Why a delivery is rejected.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    pub(crate) attempts: u32,
    /// Whether the handler has run. If not, the delivery is not recorded for deduplication, because
    /// its identity was not believed or is taken.
    pub(crate) handled: bool,
    /// Whether the refused delivery may be admitted one day. A redrive must check whether it came
    /// by itself meanwhile.
    pub(crate) recheck: bool,
    /// Whether the delivery's number or id is that of another message.
    pub(crate) conflict: bool,
}

impl Refusal {
    pub(crate) fn new(error: &Error, attempts: u32, by_handler: bool) -> Self {
        if by_handler && !matches!(error, Error::Storage(_)) {
            return Self { reason: reason(error), attempts, handled: true, recheck: false, conflict: false };
        }
        let unbelieved = matches!(error, Error::LaneHeader { .. } | Error::BadId { .. });
        let conflict = matches!(error, Error::LaneConflict { .. } | Error::IdConflict { .. });
        // A lane whose rows are damaged does not show which numbers it has seen.
        let recheck = matches!(
            error,
            Error::UnknownProducer { .. }
                | Error::NotAuthentic { .. }
                | Error::InboxFull { .. }
                | Error::LanesFull { .. }
                | Error::Storage(_)
        );
        let handled = !(unbelieved || conflict || recheck);
        Self { reason: reason(error), attempts, handled, recheck, conflict }
    }
}

/// The error's text, bounded, without control characters. A decoder's text may quote the payload,
/// so it is left out.
pub(crate) fn reason(error: &Error) -> String {
    let mut text = match error {
        Error::Event(EventError::Decode { format, .. }) => {
            format!("the payload cannot be decoded as {format}")
        }
        error => escaped(error.to_string()),
    };
    let end = (0..=REASON_BYTES_MAX).rev().find(|at| text.is_char_boundary(*at));
    text.truncate(end.unwrap_or(0));
    text
}

impl Transaction {
    /// Writes a rejected delivery and marks it as rejected, if there is room.
    pub(crate) fn reject_delivery(
        &self,
        scope: &str,
        identity: Option<&Identity>,
        delivery: &Delivery,
        refusal: &Refusal,
        room: &RejectedRoom,
    ) -> Result<Kept> {
        let (mut marked, mut recheck) = (identity.filter(|_| refusal.handled), refusal.recheck);
        if let Some(identity) = marked {
            match self.is_first_delivery(scope, identity) {
                Ok(true) => {}
                Ok(false) => return Ok(Kept::Again),
                // A delivery on which the process died was never checked.
                Err(error) if is_of_the_delivery(&error) => {
                    marked = None;
                    // If there is no room for its entry now, a redrive adds the entry.
                    recheck |= matches!(error, Error::InboxFull { .. } | Error::LanesFull { .. });
                }
                Err(error) => return Err(error),
            }
        }
        let fingerprint = fingerprint(&self.core.identity, scope, identity, delivery);
        let fingerprint = fingerprint.map(|name| keys::inbox(REJECT_SCOPE, &name));
        if let Some(key) = &fingerprint
            && self.inbox_row(key)?.is_some()
        {
            return Ok(Kept::Again);
        }
        // The clock is the application's code, so nothing is open while it is read.
        let since_ms = self.core.settings.clock.now().wall_ms;
        let row = RejectedRow {
            since_ms,
            attempts: refusal.attempts,
            recheck,
            reason: refusal.reason.clone(),
            exchange: delivery.exchange.clone(),
            routing_key: delivery.routing_key.clone(),
            message: delivery.message.clone(),
        };
        let number = RejectedTotals::of(&self.redb().open_table(REJECTED)?, &keys::rejected(scope))?.next;
        let key = keys::rejected_row(scope, number);
        let row = row.to_bytes(&key);
        let len = row.len() as u64;
        let Some((totals, dropped)) = self.rejected_room(scope, len, room)? else { return Ok(Kept::Full) };
        if let Some(identity) = marked {
            self.mark_refused(scope, identity)?;
        }
        if let Some(key) = fingerprint {
            self.mark_once(key)?;
        }
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        pieces::put(self.redb(), &mut rejected, Of::Rejected, &key, &row)?;
        let totals =
            RejectedTotals { next: number + 1, rows: totals.rows + 1, bytes: totals.bytes + len, ..totals };
        totals.put(&mut rejected, &keys::rejected(scope))?;
        Ok(Kept::Yes { dropped })
    }

    /// Rejects a redriven delivery again, under its number. Does nothing if it is gone meanwhile.
    pub(crate) fn reject_again(&self, scope: &str, number: u64, refusal: &Refusal) -> Result<()> {
        let Some(Ok(mut row)) = self.rejected_row(scope, number)? else { return Ok(()) };
        row.attempts = row.attempts.saturating_add(refusal.attempts);
        row.reason.clone_from(&refusal.reason);
        row.since_ms = self.core.settings.clock.now().wall_ms;
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        let (key, of_scope) = (keys::rejected_row(scope, number), keys::rejected(scope));
        let row = row.to_bytes(&key);
        let before = rejected.get(key.as_slice())?.map_or(0, |row| pieces::len(&key, row.value()));
        pieces::put(self.redb(), &mut rejected, Of::Rejected, &key, &row)?;
        let totals = RejectedTotals::of(&rejected, &of_scope)?;
        let bytes = totals.bytes.saturating_sub(before).saturating_add(row.len() as u64);
        RejectedTotals { bytes, ..totals }.put(&mut rejected, &of_scope)?;
        rejected.remove(keys::redriven(scope, number).as_slice())?;
        Ok(())
    }

    pub(crate) fn rejected_row(
        &self,
        scope: &str,
        number: u64,
    ) -> Result<Option<std::result::Result<RejectedRow, &'static str>>> {
        read_row(self.redb(), &self.redb().open_table(REJECTED)?, scope, number)
    }

    /// Marks a delivery for a redrive. Returns 1, or 0 for one that has gone meanwhile, which stays
    /// gone.
    pub(crate) fn mark_redriven(&self, scope: &str, number: u64) -> Result<u64> {
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        if rejected.get(keys::rejected_row(scope, number).as_slice())?.is_none() {
            return Ok(0);
        }
        rejected.insert(keys::redriven(scope, number).as_slice(), &[][..])?;
        Ok(1)
    }

    /// Removes the mark for a redrive.
    pub(crate) fn unmark_redriven(&self, scope: &str, number: u64) -> Result<()> {
        self.touch();
        self.redb().open_table(REJECTED)?.remove(keys::redriven(scope, number).as_slice())?;
        Ok(())
    }

    pub(crate) fn is_redriven(&self, scope: &str, number: u64) -> Result<bool> {
        Ok(self.redb().open_table(REJECTED)?.get(keys::redriven(scope, number).as_slice())?.is_some())
    }

    /// Removes the delivery from quarantine. Returns its bytes if it was there.
    pub(crate) fn remove_rejected(&self, scope: &str, number: u64) -> Result<Option<u64>> {
        self.touch();
        let key = keys::rejected(scope);
        let mut rejected = self.redb().open_table(REJECTED)?;
        let gone =
            pieces::remove(self.redb(), &mut rejected, Of::Rejected, &keys::rejected_row(scope, number))?;
        let Some(bytes) = gone else { return Ok(None) };
        rejected.remove(keys::redriven(scope, number).as_slice())?;
        RejectedTotals::of(&rejected, &key)?.less(bytes).put(&mut rejected, &key)?;
        Ok(Some(bytes))
    }

    /// Removes rows of a scope's rejected deliveries whose keys name no delivery.
    pub(crate) fn remove_unnamed(&self, scope: &str) -> Result<u64> {
        self.touch();
        let mut rejected = self.redb().open_table(REJECTED)?;
        let of_scope = keys::rejected(scope);
        let (mut unnamed, mut bytes, mut rows) = (Vec::new(), 0, 0);
        for kind in [0, 1] {
            let (from, to) = keys::numbered_range(scope, kind);
            for row in rejected.range(from.as_slice()..to.as_slice())? {
                let (key, row) = row?;
                if keys::split_numbered(scope, key.value()).is_none() {
                    unnamed.push(key.value().to_vec());
                } else if kind == 0 {
                    rows += 1;
                    bytes += pieces::len(key.value(), row.value());
                }
            }
        }
        for key in &unnamed {
            pieces::remove(self.redb(), &mut rejected, Of::Rejected, key)?;
        }
        let totals = RejectedTotals::of(&rejected, &of_scope)?;
        RejectedTotals { rows, bytes, ..totals }.put(&mut rejected, &of_scope)?;
        Ok(unnamed.len() as u64)
    }
}
