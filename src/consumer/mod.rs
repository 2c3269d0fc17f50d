//! Consumers: deliveries applied exactly once in effect.
//!
//! Each delivery is one write closure. The closure checks whether the message is a repeat, runs the
//! handler, records the message for deduplication, and commits with its group. Only then is the
//! delivery acknowledged. A crash leaves either nothing or everything. After nothing, the broker
//! delivers again. After everything, the consumer recognises the next delivery of that message and
//! only acknowledges it.
//!
//! The broker's `redelivered` flag decides nothing of that; it only decides which try is written
//! down before it begins. A message is recognised by its number in its producer's lane, or by the
//! id that a foreign producer gave it (`consumer/dedup.rs`).
//!
//! **A waiting delivery does not stop the rest.** The number of a delivery's tries is durable.
//! Deliveries that wait for their next try are parked in the store once they hold more than a share
//! of the prefetch (`consumer/in_hand.rs`).
//!
//! **Nothing is dropped in silence.** A delivery that can never be handled goes to the consumer's
//! own quarantine (`consumer/rejected.rs`), or, if so configured, to the queue's dead-letter
//! exchange.
//!
//! **Order.** Deliveries of one key are applied in the order in which they arrive. While one waits
//! for its next try, later ones of its key wait behind it. The [`GapPolicy`] decides whether a
//! delivery may be applied before an earlier one of its *lane* has arrived.
//!
//! | file | keeps |
//! |---|---|
//! | `mod.rs` | the policies for a gap and for rejected deliveries |
//! | `builder` | the settings |
//! | `handle` | a running consumer and its figures |
//! | `worker` | the thread |
//! | `dedup`, `lanes`, `ids` | deduplication, and how much is kept for it |
//! | `rejected`, `reject`, `rejected_room` | the quarantine: for a person, for the thread, its bounds |
//! | `in_hand` | the rows of tries and of parked deliveries |
//! | `hold` | deliveries that wait for a gap in their lane |
//! | `waiting` | deliveries that wait for their next try, in lines |
//! | `space` | how much deliveries may still write before the disk is too full |
//! | `tries` | which try is written down, which runs alone, and when the tries are used up |

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

/// How a consumer handles a delivery that comes before an earlier one of its lane. See
/// [`ConsumerBuilder::on_gap`].
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
    /// The consumer applies the delivery at once, and the earlier one when that comes. This is the
    /// default.
    #[default]
    ApplyAtOnce,
    /// The delivery waits, unacknowledged, until the gap before it is filled, but no longer than
    /// this. Then the consumer applies the delivery despite the gap. Later deliveries of the lane
    /// wait with it, in their order.
    Hold(Duration),
}

/// Where a consumer puts a delivery that can never be handled. See [`ConsumerBuilder::rejects`].
///
/// ```
/// assert_eq!(onewrite::RejectTo::default(), onewrite::RejectTo::Quarantine);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum RejectTo {
    /// The store's [quarantine](crate::Store::rejected), the default. The row is durable before the
    /// broker gets the acknowledgement. The quarantine keeps as many as
    /// [`rejected_max`](ConsumerBuilder::rejected_max) allows.
    #[default]
    Quarantine,
    /// The broker, which hands the delivery to the queue's dead-letter exchange. **A queue without
    /// one drops it.**
    DeadLetter,
}

type Handler = dyn Fn(&Delivery, &Transaction) -> Result<()> + Send + Sync;
