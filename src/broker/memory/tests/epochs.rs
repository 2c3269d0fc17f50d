//! The invariants of a publisher, under random events.
//!
//! Goal: within an epoch each ticket gets one outcome, or the epoch ends and the ticket gets none.
//! An isolated ticket gets exactly one outcome. Nothing is reported for an epoch that is over.
//! Every confirmed message is stored. Method: random publishes, verdicts, outages, blocks and
//! releases, with a real helper thread for the delayed outcomes. Then the test goes once over all
//! reports.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Publish { place: u8, isolated: bool, stale: bool },
    Script(Verdict),
    Down,
    Up,
    Block(bool),
    Hang(bool),
    Release(bool),
    Wait,
}

fn verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        Just(Verdict::Confirm),
        Just(Verdict::Nack),
        Just(Verdict::no_route()),
        Just(Verdict::close_channel(FaultClass::Message, 406, "too large")),
        Just(Verdict::Unknown),
        Just(Verdict::Disconnect),
        Just(Verdict::LoseConfirm),
        Just(Verdict::DelayConfirm(Duration::from_micros(100))),
        Just(Verdict::ConfirmOutOfOrder),
        Just(Verdict::HoldConfirm),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..8_u8, any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(place, isolated, stale)| Step::Publish { place, isolated, stale }),
        6 => verdict().prop_map(Step::Script),
        1 => Just(Step::Down),
        2 => Just(Step::Up),
        1 => any::<bool>().prop_map(Step::Block),
        1 => any::<bool>().prop_map(Step::Hang),
        1 => any::<bool>().prop_map(Step::Release),
        1 => Just(Step::Wait),
    ]
}

/// The tickets that were sent, and the reports on them, in order.
#[derive(Default)]
struct Witness {
    /// The current epoch, as reported.
    epoch: Option<u64>,
    last_epoch: u64,
    /// Tickets sent and not reported, with their epoch and whether they are isolated.
    sent: BTreeMap<u64, (u64, bool)>,
    reported: BTreeSet<u64>,
    confirmed: Vec<u64>,
}

impl Witness {
    fn hear(&mut self, event: PublisherEvent) {
        match event {
            PublisherEvent::Up { epoch } => {
                assert!(self.epoch.is_none() && epoch.0 > self.last_epoch, "epochs rise, one at a time");
                self.last_epoch = epoch.0;
                self.epoch = Some(epoch.0);
            }
            PublisherEvent::Down { epoch, .. } => {
                assert!(
                    self.epoch.is_none_or(|on| on == epoch.0),
                    "the epoch that ends is the one that is on"
                );
                self.epoch = None;
            }
            PublisherEvent::Blocked { .. } => {
                assert!(self.epoch.is_some(), "nobody is blocked without a connection")
            }
            PublisherEvent::Outcomes(outcomes) => {
                outcomes.into_iter().for_each(|(Ticket(n), outcome)| self.hear_outcome(n, &outcome));
            }
            PublisherEvent::Trouble(fault) => panic!("this broker has none: {fault}"),
        }
    }

    fn hear_outcome(&mut self, n: u64, outcome: &Outcome) {
        let (epoch, isolated) = self.sent.get(&n).copied().expect("an outcome of what was sent");
        assert!(self.reported.insert(n), "ticket {n} is reported once");
        assert!(
            isolated || self.epoch == Some(epoch),
            "ticket {n} of epoch {epoch} is reported in {:?}",
            self.epoch
        );
        assert!(
            isolated || !matches!(outcome, Outcome::Refused(_) | Outcome::Unknown(_)),
            "for the others the epoch ends"
        );
        if *outcome == Outcome::Confirmed {
            self.confirmed.push(n);
        }
    }
}

fn run(steps: Vec<Step>) {
    let broker = broker();
    broker.declare_queue("full", QueueOptions::default().max_length(3).overflow(Overflow::RejectPublish));
    let mut publishing = Publishing::with(broker.publisher().confirm_deadline(Duration::from_millis(2)));
    let mut witness = Witness::default();
    for (n, step) in (1..).zip(steps) {
        publishing.events.try_iter().for_each(|event| witness.hear(event));
        match step {
            Step::Publish { place, isolated, stale } => {
                let (exchange, key) = match place {
                    0 => ("nowhere", "good"),
                    1 => ("x", "bad"),
                    2 => ("", "full"),
                    _ => ("x", "good"),
                };
                // While the connection is away this number is stale too: the number of the last
                // epoch.
                let epoch = witness.last_epoch.saturating_sub(u64::from(stale));
                witness.sent.insert(n, (epoch, isolated));
                publishing.send(epoch, n, exchange, key, isolated);
            }
            Step::Script(verdict) => broker.script(Rule::any().then(verdict)),
            Step::Down => broker.go_down(),
            Step::Up => broker.come_up(),
            Step::Block(blocked) => broker.block(blocked),
            Step::Hang(hanging) => broker.hang(hanging),
            Step::Release(reversed) if reversed => broker.release_confirms_reversed(),
            Step::Release(_) => broker.release_confirms(),
            Step::Wait => std::thread::sleep(Duration::from_micros(500)),
        }
    }
    // At the end only held confirms are still open; the outage ends them.
    broker.go_down();
    publishing.events.try_iter().for_each(|event| witness.hear(event));
    assert_eq!(witness.epoch, None);
    for (n, (_, isolated)) in &witness.sent {
        assert!(!isolated || witness.reported.contains(n), "isolated ticket {n} is reported");
    }
    let stored: BTreeSet<String> = broker.tap().iter().map(|tapped| id_of(&tapped.message)).collect();
    for n in &witness.confirmed {
        assert!(stored.contains(&n.to_string()), "confirmed ticket {n} is stored");
    }
}

proptest! {
    #[test]
    fn every_ticket_gets_what_the_seam_promises(steps in prop::collection::vec(step(), 1..60)) {
        run(steps);
    }
}

/// Goal: in an epoch that continues, every ticket gets an outcome; the property above does not say
/// that. Method: 20 publishes for each of five verdicts, then a release.
#[test]
fn an_epoch_that_goes_on_owes_nothing() {
    let broker = broker();
    for verdict in [
        Verdict::DelayConfirm(Duration::from_millis(1)),
        Verdict::ConfirmOutOfOrder,
        Verdict::Nack,
        Verdict::no_route(),
        Verdict::HoldConfirm,
    ] {
        broker.script(Rule::any().times(20).then(verdict));
    }
    let mut publishing = Publishing::on(&broker);
    (1..=100).for_each(|n| publishing.good(1, n));
    broker.release_confirms();
    assert_eq!(publishing.next(), "up 1");
    let reported: BTreeSet<String> = (0..100).map(|_| publishing.next()).collect();
    let tickets: BTreeSet<_> = reported.iter().filter_map(|reported| reported.split(' ').nth(1)).collect();
    assert_eq!(tickets.len(), 100);
}
