//! How much a scope's rejected deliveries may take in the file, and what happens to one more.

use redb::ReadableTable;

use super::dedup::{Identity, fingerprint};
use super::rejected::read_row;
use crate::broker::{Delivery, DeliveryTag, Epoch};
use crate::error::Result;
use crate::log::keys;
use crate::storage::tables::pieces::{self, Of};
use crate::storage::tables::rejected::RejectedTotals;
use crate::storage::tables::schema::{INBOX, REJECTED};
use crate::store::transaction::{REJECT_SCOPE, Transaction};

/// The policy for a rejected delivery for which the [quarantine](crate::Store::rejected) has no
/// room. See [`ConsumerBuilder::on_rejected_full`](crate::ConsumerBuilder::on_rejected_full).
///
/// ```
/// assert_eq!(onewrite::RejectedFull::default(), onewrite::RejectedFull::StopConsuming);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RejectedFull {
    /// The consumer takes nothing more from its queue until there is room. This is the default.
    ///
    /// The consumer shows the wait with one warning and in
    /// [`ConsumerStatus::waits_for`](crate::ConsumerStatus::waits_for). Nothing is lost: the broker
    /// keeps its deliveries. Deliveries that wait for their next try or are
    /// [redriven](crate::Rejected::redrive) go on. They, or [`discard`](crate::Rejected::discard),
    /// make room.
    #[default]
    StopConsuming,
    /// The broker gets the delivery back, as with
    /// [`RejectTo::DeadLetter`](crate::RejectTo::DeadLetter). **A queue without a dead-letter
    /// exchange drops it.**
    DeadLetter,
    /// The oldest rejected deliveries are dropped for good to make room. A delivery longer than the
    /// bound displaces all of them. The drops are counted (`rejected_dropped` in
    /// [`Stats::consumers`](crate::Stats::consumers)) and logged.
    DropOldest,
}

/// The bounds of one scope.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RejectedRoom {
    pub(crate) rows_max: u64,
    pub(crate) bytes_max: u64,
    pub(crate) full: RejectedFull,
    /// Whether the broker gets back a delivery that has no room.
    pub(crate) gives_back: bool,
}

impl RejectedRoom {
    /// Whether one more row has room. The first row has room at any length, unless the broker gets
    /// it back. Otherwise the delivery could go nowhere, and would stop its consumer for ever.
    fn holds(&self, totals: RejectedTotals, more: u64) -> bool {
        let is_alone = totals.rows == 0 && !self.gives_back;
        let has_bytes = is_alone || totals.bytes.saturating_add(more) <= self.bytes_max;
        totals.rows < self.rows_max && has_bytes
    }
}

/// What happened to a rejected delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// The delivery is in the quarantine. It displaced `dropped` others.
    Yes { dropped: u64 },
    /// The delivery was in the quarantine before.
    Again,
    /// There is no room. Nothing is written.
    Full,
}

impl Transaction {
    /// Makes room for a row of this length, as the policy says. Returns `None` if there is no room,
    /// else the totals and how many rows were dropped.
    pub(crate) fn rejected_room(
        &self,
        scope: &str,
        len: u64,
        room: &RejectedRoom,
    ) -> Result<Option<(RejectedTotals, u64)>> {
        let key = keys::rejected(scope);
        let mut totals = self.engine(|| RejectedTotals::of(&self.redb().open_table(REJECTED)?, &key))?;
        if room.holds(totals, len) {
            return Ok(Some((totals, 0)));
        }
        if room.full != RejectedFull::DropOldest || room.rows_max == 0 {
            return Ok(None);
        }
        let mut dropped = 0;
        while !room.holds(totals, len) {
            let Some(less) = self.drop_oldest(scope, totals)? else { return Ok(None) };
            totals = less;
            dropped += 1;
        }
        Ok(Some((totals, dropped)))
    }

    fn drop_oldest(&self, scope: &str, totals: RejectedTotals) -> Result<Option<RejectedTotals>> {
        self.touch();
        let number = {
            let rejected = self.redb().open_table(REJECTED)?;
            let (from, to) = (keys::rejected_row(scope, 0), keys::rejected_row(scope, u64::MAX));
            let mut rows = rejected.range(from.as_slice()..=to.as_slice())?;
            rows.find_map(|row| match row {
                Ok((key, _)) => keys::split_numbered(scope, key.value()).map(Ok),
                Err(error) => Some(Err(error)),
            })
            .transpose()?
        };
        let Some(number) = number else { return Ok(None) };
        self.forget_fingerprint(scope, number)?;
        let mut rejected = self.redb().open_table(REJECTED)?;
        let bytes =
            pieces::remove(self.redb(), &mut rejected, Of::Rejected, &keys::rejected_row(scope, number))?;
        rejected.remove(keys::redriven(scope, number).as_slice())?;
        let totals = RejectedTotals { dropped: totals.dropped + 1, ..totals.less(bytes.unwrap_or_default()) };
        totals.put(&mut rejected, &keys::rejected(scope))?;
        Ok(Some(totals))
    }

    /// Removes the mark too, so that foreign messages leave nothing behind. A delivery that a
    /// handler refused stays recorded by its number or id.
    fn forget_fingerprint(&self, scope: &str, number: u64) -> Result<()> {
        let row = read_row(self.redb(), &self.redb().open_table(REJECTED)?, scope, number)?;
        let Some(Ok(row)) = row else { return Ok(()) };
        let delivery = Delivery {
            tag: DeliveryTag { epoch: Epoch(0), tag: number },
            exchange: row.exchange,
            routing_key: row.routing_key,
            redelivered: false,
            message: row.message,
        };
        let identity = Identity::of_delivery(&self.core.identity, scope, &delivery).ok();
        // A delivery of an unknown producer has no identity that was believed.
        for identity in [identity.as_ref(), None] {
            if let Some(name) = fingerprint(&self.core.identity, scope, identity, &delivery) {
                let key = keys::inbox(REJECT_SCOPE, &name);
                self.redb().open_table(INBOX)?.remove(key.as_slice())?;
                self.forget_entry(&key);
            }
        }
        Ok(())
    }
}
