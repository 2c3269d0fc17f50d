//! The other end: deliveries applied exactly once in effect.
//!
//! Each delivery is one write closure: it looks whether the message is a repeat, runs the handler, records the message
//! for deduplication, and commits with its group; only then is the delivery acknowledged. A crash at any point leaves either nothing,
//! and the broker delivers again, or everything, and the next delivery of that message is recognised and only
//! acknowledged. The broker's `redelivered` flag decides nothing of that; it only says which try is written down before it
//! begins. What a message is recognised by stands in `consumer/dedup.rs`: its number in its producer's lane, or the id that a
//! foreign producer gave it.
//!
//! **Nothing that waits stops the rest.** How often a delivery was tried is durable, and what waits for its next try is parked
//! in the store once it holds more than a share of the prefetch (`consumer/in_hand.rs`).
//!
//! **Nothing is dropped in silence.** What can never be handled goes to the consumer's own quarantine
//! (`consumer/rejected.rs`), or, where it is set so, to the queue's dead-letter exchange.
//!
//! **Order.** Deliveries of one key are applied in the order in which they arrive: while one waits for its next try,
//! later ones of its key wait behind it. Whether one may be applied before an earlier one of its *lane* has arrived at all
//! is the [`GapPolicy`].
//!
//! | file | keeps |
//! |---|---|
//! | `mod.rs` | the policies: what becomes of a gap, and where rejected deliveries go |
//! | `builder` | the settings |
//! | `handle` | a running consumer and its figures |
//! | `worker` | the thread |
//! | `dedup`, `lanes`, `ids` | deduplication, and how much is kept for it |
//! | `rejected`, `reject`, `rejected_room` | the quarantine: for a person, for the thread, its bounds |
//! | `in_hand` | the rows of tries, and of what is parked |
//! | `hold` | what waits for a gap in its lane to be filled |
//! | `waiting` | what waits for its next try, in lines |
//! | `space` | how much deliveries may still write before the disk is too full |
//! | `tries` | which try is written down, which runs alone, and when there were enough |

mod builder;
mod dedup;
mod handle;
mod hold;
mod ids;
mod in_hand;
mod lanes;
mod reject;
mod rejected;
mod rejected_room;
mod space;
mod tries;
mod waiting;
mod worker;

use std::time::Duration;

use crate::broker::Delivery;
use crate::error::Result;
use crate::store::Transaction;

pub use self::builder::ConsumerBuilder;
pub use self::handle::{Consumer, ConsumerStatus, ConsumerWait};
pub use self::rejected::{Rejected, RejectedDelivery};
pub use self::rejected_room::RejectedFull;

/// What a consumer does with a delivery that comes before an earlier one of its lane: see [`ConsumerBuilder::on_gap`].
///
/// ```
/// use std::time::Duration;
/// use onewrite::GapPolicy;
/// assert_eq!(GapPolicy::default(), GapPolicy::ApplyAtOnce);
/// let policy = GapPolicy::Hold(Duration::from_secs(10));
/// # let _ = policy;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum GapPolicy {
    /// It is applied as it comes; the earlier one too, once it comes. The default.
    #[default]
    ApplyAtOnce,
    /// It waits, unacknowledged, until the gap before it is filled, but no longer than this; then it is applied all the
    /// same. Later ones of its lane wait with it, in their order.
    Hold(Duration),
}

/// Where a consumer puts what can never be handled: see [`ConsumerBuilder::rejects`].
///
/// ```
/// assert_eq!(onewrite::RejectTo::default(), onewrite::RejectTo::Quarantine);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RejectTo {
    /// Into the store, durable, before the broker is notified that it is done with: see [`Store::rejected`](crate::Store::rejected). As many as
    /// [`rejected_max`](ConsumerBuilder::rejected_max) allows. The default.
    #[default]
    Quarantine,
    /// Back to the broker, which hands it to the queue's dead-letter exchange. **A queue that has none drops it.**
    DeadLetter,
}

type Handler = dyn Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync;
