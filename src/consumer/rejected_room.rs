//! How much a scope's rejected deliveries may take in the file, and what becomes of one more.

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

/// What becomes of a rejected delivery for which the [quarantine](crate::Store::rejected) has no room: see
/// [`ConsumerBuilder::on_rejected_full`](crate::ConsumerBuilder::on_rejected_full).
///
/// ```
/// assert_eq!(onewrite::RejectedFull::default(), onewrite::RejectedFull::StopConsuming);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RejectedFull {
    /// The consumer takes nothing more from its queue until there is room, and says so: one warning,
    /// [`ConsumerStatus::waits_for`](crate::ConsumerStatus::waits_for). Nothing is lost: the broker keeps what it has. What waits for its next
    /// try, and what is [driven again](crate::Rejected::redrive), goes on; that, or [`discard`](crate::Rejected::discard), makes room. The default.
    #[default]
    StopConsuming,
    /// The broker gets it back, as with [`RejectTo::DeadLetter`](crate::RejectTo::DeadLetter). **A queue without a dead-letter exchange drops it.**
    DeadLetter,
    /// The oldest ones go for it, for ever; all of them for one that is longer than the bound. They are counted (`rejected_dropped` in [`Stats::consumers`](crate::Stats::consumers)) and logged.
    DropOldest,
}

/// The bounds of one scope.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RejectedRoom {
    pub(crate) rows_max: u64,
    pub(crate) bytes_max: u64,
    pub(crate) full: RejectedFull,
    /// The broker gets back what has no room.
    pub(crate) gives_back: bool,
}

impl RejectedRoom {
    /// The first one has room whatever its length, unless the broker gets it back: it could go nowhere, and would stop its consumer for ever.
    fn holds(&self, totals: RejectedTotals, more: u64) -> bool {
        let is_alone = totals.rows == 0 && !self.gives_back;
        let has_bytes = is_alone || totals.bytes.saturating_add(more) <= self.bytes_max;
        totals.rows < self.rows_max && has_bytes
    }
}

/// What has become of a rejected delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    /// It is in the quarantine. So many went for it.
    Yes { dropped: u64 },
    /// It was before.
    Again,
    /// There is no room. Nothing is written.
    Full,
}

impl Transaction {
    /// Makes room for a row of this length, by what the policy says. `None` if there is none; else the totals, and how many went for it.
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

    /// What others send must not stay behind as a mark either. What a handler has refused stays recorded by its number or id.
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
        // An unknown producer has none that was believed.
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
