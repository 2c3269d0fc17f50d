//! A delivery in hand, and what stays of it in memory while it is parked.

use std::sync::Arc;

use crate::broker::{Delivery, DeliveryTag, Epoch};
use crate::consumer::dedup::Identity;
use crate::consumer::in_hand::Name;
use crate::consumer::waiting::Member;
use crate::error::{Error, Result};
use crate::event::LaneOf;
use crate::log::in_hand::{Tries, TriesRow};
use crate::log::rejected::RejectedRow;
use crate::message::VALUE_BYTES;

/// A delivery in hand.
#[derive(Debug, Clone)]
pub(super) struct Item {
    /// The place in the order of arrival.
    pub(super) place: u64,
    /// The iteration in which the delivery was last taken out of its line.
    pub(super) taken: u64,
    pub(super) delivery: Arc<Delivery>,
    /// The identity of the delivery, or why it cannot be taken at all.
    pub(super) identity: Result<Arc<Identity>, Arc<Error>>,
    pub(super) key: Option<Arc<str>>,
    pub(super) tries: Tries,
    /// The name of its row of tries, once the name was needed.
    pub(super) name: Option<Name>,
    /// Whether there is such a row.
    pub(super) noted: bool,
    /// Whether another process may have tried the delivery.
    pub(super) accused: bool,
    /// The number of a parked delivery. The broker no longer has it.
    pub(super) parked: Option<u64>,
    /// The number in quarantine, if the delivery was redriven from there.
    pub(super) redriven: Option<u64>,
    /// The identity under which the delivery was refused, before it was redriven.
    pub(super) refused_as: Option<Arc<Identity>>,
    /// Whether the delivery has waited for the gap before it. It does so once, not again for each
    /// try.
    pub(super) waited: bool,
    /// The bytes that it takes in memory, and at most in the file.
    bytes: usize,
}

impl Item {
    pub(super) fn new(
        delivery: Delivery,
        identity: Result<Arc<Identity>, Arc<Error>>,
        key: Option<Arc<str>>,
    ) -> Self {
        Self {
            place: 0,
            taken: 0,
            bytes: bytes_of(&delivery),
            delivery: Arc::new(delivery),
            identity,
            key,
            tries: Tries::default(),
            name: None,
            noted: false,
            accused: false,
            parked: None,
            redriven: None,
            refused_as: None,
            waited: false,
        }
    }

    /// The lane and number, if the broker has delivered it in a lane.
    pub(super) fn lane(&self) -> Option<(LaneOf, u64)> {
        let identity = self.identity.as_ref().ok().filter(|_| self.redriven.is_none())?;
        identity.place()
    }

    /// Whether the broker has the delivery and waits for its settlement.
    pub(super) fn is_the_brokers(&self) -> bool {
        self.parked.is_none() && self.redriven.is_none()
    }

    /// Whether its next try is written down before it begins.
    pub(super) fn is_noted_first(&self) -> bool {
        self.noted || self.accused || !self.is_the_brokers()
    }

    pub(super) fn row(&self) -> TriesRow {
        TriesRow { tries: self.tries, parked: self.parked }
    }

    pub(super) fn size(&self) -> usize {
        self.bytes
    }
}

/// The bytes of a delivery besides its texts, its headers and its payload.
const FIXED_BYTES: usize = 512;

/// The size of a delivery, at least what its source counts for it: see
/// [`Source::unsettled_bytes_max`](crate::broker::Source::unsettled_bytes_max).
fn bytes_of(delivery: &Delivery) -> usize {
    let Delivery { exchange, routing_key, message, .. } = delivery;
    let texts: usize = message.texts().map(|text| text.len()).sum();
    let values: usize = message.headers.iter().map(|(_, value)| value.count()).sum();
    let headers = message.headers_len() + values * VALUE_BYTES;
    FIXED_BYTES + exchange.len() + routing_key.len() + texts + headers + message.payload.len()
}

/// A delivery that the store has kept under this number. The broker no longer has it.
pub(super) fn kept_delivery(number: u64, row: RejectedRow) -> Delivery {
    Delivery {
        tag: DeliveryTag { epoch: Epoch(0), tag: number },
        exchange: row.exchange,
        routing_key: row.routing_key,
        redelivered: true,
        message: row.message,
    }
}

/// The part of a parked delivery that stays in memory.
#[derive(Debug, Clone)]
pub(super) struct Stub {
    pub(super) number: u64,
    pub(super) name: Name,
    pub(super) tries: Tries,
    pub(super) key: Option<Arc<str>>,
    pub(super) waited: bool,
    pub(super) bytes: usize,
}

/// A delivery that waits.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    Here(Box<Item>),
    Stored(Stub),
}

impl Entry {
    /// Makes an entry, without its body if it is parked.
    pub(super) fn of(item: Item) -> Self {
        let bytes = item.size();
        match (item.parked, item.name.clone()) {
            (Some(number), Some(name)) => {
                let Item { tries, key, waited, .. } = item;
                Self::Stored(Stub { number, name, tries, key, waited, bytes })
            }
            _ => Self::Here(Box::new(item)),
        }
    }

    pub(super) fn key(&self) -> Option<&Arc<str>> {
        match self {
            Self::Here(item) => item.key.as_ref(),
            Self::Stored(stub) => stub.key.as_ref(),
        }
    }

    pub(super) fn item(&self) -> Option<&Item> {
        match self {
            Self::Here(item) => Some(item),
            Self::Stored(_) => None,
        }
    }
}

impl Member for Entry {
    fn holds_prefetch(&self) -> bool {
        self.item().is_some_and(Item::is_the_brokers)
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Here(item) => item.size(),
            Self::Stored(stub) => stub.bytes,
        }
    }
}
