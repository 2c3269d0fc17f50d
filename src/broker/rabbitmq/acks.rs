//! Merges acknowledgements into fewer frames. Pure.
//!
//! An AMQP *multiple* acknowledgement covers every unsettled delivery up to its tag. So it is right
//! only if the consumer has acknowledged all of them.

use std::collections::BTreeMap;

use crate::broker::Settlement;

/// One frame to the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    Ack { tag: u64, multiple: bool },
    Reject { tag: u64, requeue: bool },
}

/// The deliveries of one channel that are not settled yet, with their bytes.
#[derive(Debug, Default)]
pub(super) struct Unsettled {
    tags: BTreeMap<u64, u64>,
    bytes: u64,
}

impl Unsettled {
    pub(super) fn delivered(&mut self, tag: u64, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        let before = self.tags.insert(tag, bytes);
        self.bytes = self.bytes.saturating_sub(before.unwrap_or_default());
    }

    /// The number of unsettled deliveries, and their bytes.
    pub(super) fn load(&self) -> (usize, u64) {
        (self.tags.len(), self.bytes)
    }

    /// Returns the frames for these settlements, in order. A tag that is not unsettled (settled
    /// twice) is skipped, because the broker would close the channel for it.
    pub(super) fn settle(&mut self, settlements: impl IntoIterator<Item = (u64, Settlement)>) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut run = Vec::new();
        for (tag, settlement) in settlements {
            if !self.tags.contains_key(&tag) {
                continue;
            }
            if settlement != Settlement::Acknowledge {
                // This runs while the tag still counts as unsettled, so that no multiple frame
                // covers it.
                self.acknowledge(&mut run, &mut frames);
            }
            self.bytes = self.bytes.saturating_sub(self.tags.remove(&tag).unwrap_or_default());
            match settlement {
                Settlement::Acknowledge => run.push(tag),
                Settlement::Requeue | Settlement::Reject => {
                    frames.push(Frame::Reject { tag, requeue: settlement == Settlement::Requeue });
                }
            }
        }
        self.acknowledge(&mut run, &mut frames);
        frames
    }

    /// Adds one multiple frame for the tags below every unsettled tag, and single frames for the
    /// other tags.
    fn acknowledge(&self, run: &mut Vec<u64>, frames: &mut Vec<Frame>) {
        let lowest_left = self.tags.first_key_value().map_or(u64::MAX, |(tag, _)| *tag);
        let below = || run.iter().filter(|tag| **tag < lowest_left);
        if let Some(tag) = below().max().copied() {
            frames.push(Frame::Ack { tag, multiple: below().count() > 1 });
        }
        let above = run.iter().filter(|tag| **tag > lowest_left);
        frames.extend(above.map(|tag| Frame::Ack { tag: *tag, multiple: false }));
        run.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_run_from_the_bottom_is_one_frame() {
        let mut unsettled = Unsettled::default();
        (1..=5).for_each(|tag| unsettled.delivered(tag, 10));
        let acks = [1, 2, 3, 5].map(|tag| (tag, Settlement::Acknowledge));
        assert_eq!(
            unsettled.settle(acks),
            [Frame::Ack { tag: 3, multiple: true }, Frame::Ack { tag: 5, multiple: false }]
        );
        assert_eq!(
            unsettled.settle([(5, Settlement::Reject), (4, Settlement::Requeue)]),
            [Frame::Reject { tag: 4, requeue: true }]
        );
    }

    /// Goal: acknowledgements around a reject, in any order, do not cover the rejected delivery.
    /// Otherwise the broker would take that delivery as accepted, and close the channel at the
    /// reject. A run of the property below found this bug.
    #[test]
    fn an_acknowledgement_does_not_cover_a_reject() {
        let mut unsettled = Unsettled::default();
        (1..=4).for_each(|tag| unsettled.delivered(tag, 10));
        let settled = [
            (3, Settlement::Acknowledge),
            (1, Settlement::Acknowledge),
            (2, Settlement::Requeue),
            (4, Settlement::Acknowledge),
        ];
        assert_eq!(
            unsettled.settle(settled),
            [
                Frame::Ack { tag: 1, multiple: false },
                Frame::Ack { tag: 3, multiple: false },
                Frame::Reject { tag: 2, requeue: true },
                Frame::Ack { tag: 4, multiple: false },
            ]
        );
    }

    proptest! {
        /// Goal: the broker applies to each delivery exactly the consumer's settlement, and never
        /// gets a tag twice. Method: a naive broker applies the frames; settlements come in any
        /// order, in batches, some twice.
        #[test]
        fn the_broker_hears_what_the_consumer_said(
            said in prop::collection::vec((1_u64..40, 0_u8..8), 0..80),
            cuts in prop::collection::vec(1_usize..9, 80),
        ) {
            let mut unsettled = Unsettled::default();
            let mut broker: BTreeSet<u64> = (1..40).collect();
            (1..40).for_each(|tag| unsettled.delivered(tag, 10));
            let mut heard = BTreeMap::new();
            let mut meant = BTreeMap::new();
            let mut left = said.as_slice();
            for cut in cuts {
                let (now, rest) = left.split_at(cut.min(left.len()));
                left = rest;
                let batch: Vec<_> = now.iter().map(|(tag, kind)| (*tag, match kind {
                    0 => Settlement::Reject,
                    1 => Settlement::Requeue,
                    _ => Settlement::Acknowledge,
                })).collect();
                for (tag, settlement) in &batch {
                    meant.entry(*tag).or_insert(*settlement);
                }
                for frame in unsettled.settle(batch) {
                    let (tags, settlement): (Vec<u64>, _) = match frame {
                        Frame::Ack { tag, multiple: true } => (broker.range(..=tag).copied().collect(), Settlement::Acknowledge),
                        Frame::Ack { tag, multiple: false } => (vec![tag], Settlement::Acknowledge),
                        Frame::Reject { tag, requeue: true } => (vec![tag], Settlement::Requeue),
                        Frame::Reject { tag, requeue: false } => (vec![tag], Settlement::Reject),
                    };
                    for tag in tags {
                        prop_assert!(broker.remove(&tag), "tag {} is unknown to the broker", tag);
                        heard.insert(tag, settlement);
                    }
                }
            }
            prop_assert_eq!(heard, meant);
        }
    }
}
