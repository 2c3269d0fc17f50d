//! Publishers on the broker: their connections, and the words that are still owed to them.
//!
//! **Invariants.**
//! - A word is reported once: `open` holds what is owed, and the report takes it out.
//! - When an epoch ends, all that is owed for its messages that are not isolated is dropped before
//!   `Down` is reported.
//! - What is owed for an isolated message outlives a channel. When the connection is lost it
//!   becomes *unknown*.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::broker::{Epoch, PublisherEvent, PublisherEvents};
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};

use super::queue::Letter;
use super::script::Verdict;
use super::state::{PublishOutcome, State, refused};

/// How long [`Verdict::ConfirmOutOfOrder`] waits for an outcome to come after.
pub(super) const OUT_OF_ORDER_WAIT: Duration = Duration::from_millis(10);

/// What ends the waiting of a word that is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Its alarm.
    Alarm,
    /// Its alarm, or the next outcome of the connection.
    Next,
    /// The test's own word.
    Release,
    /// Nothing: its alarm is the confirm deadline.
    Deadline,
}

/// When the outcome of a publish is reported.
#[derive(Debug, Clone, Copy)]
enum When {
    Now,
    Later(Until, Duration),
    Held,
    Never,
}

/// A word that is owed.
#[derive(Debug)]
struct Open {
    ticket: Ticket,
    isolated: bool,
    outcome: Outcome,
    until: Until,
}

/// One publisher.
pub(super) struct Connection {
    events: PublisherEvents,
    confirm_deadline: Duration,
    /// The last epoch, which is on while `connected`.
    epoch: u64,
    connected: bool,
    /// Whether its relay is gone.
    ended: bool,
    /// What it owes, in publish order.
    open: BTreeMap<u64, Open>,
    /// How many of them wait for the next outcome.
    open_until_next: usize,
    /// The highest ticket with a word on this connection.
    newest_reported: Option<Ticket>,
    next_token: u64,
    /// Sent while the broker blocks: in the socket, not read.
    unread: VecDeque<(Outgoing, Option<Verdict>)>,
}

impl Connection {
    fn send(&mut self, event: PublisherEvent) {
        self.ended |= !self.events.send(event);
    }

    /// Reports an outcome, and after it those that waited for it.
    fn report(&mut self, ticket: Ticket, outcome: Outcome) {
        let mut outcomes = vec![(ticket, outcome)];
        if self.open_until_next > 0 {
            self.take_open(&mut outcomes, |open| open.until == Until::Next);
        }
        self.report_all(outcomes);
    }

    fn report_all(&mut self, outcomes: Vec<(Ticket, Outcome)>) {
        let words = outcomes.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::Silent(_)));
        self.newest_reported = words.map(|(ticket, _)| *ticket).max().max(self.newest_reported);
        self.send(PublisherEvent::Outcomes(outcomes));
    }

    /// Moves words that are owed into `outcomes`, oldest first.
    fn take_open(&mut self, outcomes: &mut Vec<(Ticket, Outcome)>, take: impl Fn(&Open) -> bool) {
        let tokens: Vec<u64> =
            self.open.iter().filter(|(_, open)| take(open)).map(|(token, _)| *token).collect();
        outcomes.extend(
            tokens.iter().filter_map(|token| self.take_one(*token)).map(|open| (open.ticket, open.outcome)),
        );
    }

    fn take_one(&mut self, token: u64) -> Option<Open> {
        let open = self.open.remove(&token)?;
        self.open_until_next -= usize::from(open.until == Until::Next);
        Some(open)
    }

    /// The channel was closed: all in flight but the isolated ones is lost.
    fn end_channel(&mut self, fault: Fault) {
        self.open.retain(|_, open| open.isolated);
        self.open_until_next = self.open.values().filter(|open| open.until == Until::Next).count();
        self.unread.retain(|(outgoing, _)| outgoing.isolated);
        self.connected = false;
        self.send(PublisherEvent::Down { epoch: Epoch(self.epoch), fault });
    }

    /// The connection was lost: all in flight is.
    fn end_connection(&mut self, fault: Fault) {
        self.end_channel(fault.clone());
        let open = std::mem::take(&mut self.open).into_values().map(|open| open.ticket);
        let unread = std::mem::take(&mut self.unread).into_iter().map(|(outgoing, _)| outgoing.ticket);
        let unknown: Vec<_> =
            open.chain(unread).map(|ticket| (ticket, Outcome::Unknown(fault.clone()))).collect();
        self.open_until_next = 0;
        if !unknown.is_empty() {
            self.send(PublisherEvent::Outcomes(unknown));
        }
    }
}

impl State {
    /// Attaches a publisher and connects it.
    pub(super) fn attach(&mut self, events: PublisherEvents, confirm_deadline: Duration) -> u64 {
        let connection = Connection {
            events,
            confirm_deadline,
            epoch: 0,
            connected: false,
            ended: false,
            open: BTreeMap::new(),
            open_until_next: 0,
            newest_reported: None,
            next_token: 0,
            unread: VecDeque::new(),
        };
        let id = self.next_id();
        self.connections.insert(id, connection);
        self.connect_publisher(id);
        id
    }

    /// Ends a publisher. Its epoch ends like any other; after that nothing is reported to it.
    pub(super) fn detach(&mut self, id: u64) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        if connection.connected {
            connection.end_connection(Fault::new(FaultClass::Outage, "the publisher was stopped"));
        }
    }

    fn connect_publisher(&mut self, id: u64) {
        let (up, blocked) = (self.up, self.blocked);
        let Some(connection) =
            self.connections.get_mut(&id).filter(|connection| !connection.connected && !connection.ended)
        else {
            return;
        };
        connection.epoch += 1;
        connection.newest_reported = None;
        let epoch = Epoch(connection.epoch);
        if !up {
            return connection.send(PublisherEvent::Down { epoch, fault: refused() });
        }
        connection.connected = true;
        connection.send(PublisherEvent::Up { epoch });
        if blocked {
            connection.send(PublisherEvent::Blocked { blocked });
        }
    }

    pub(super) fn connect_publishers(&mut self) {
        for id in self.publisher_ids() {
            self.connect_publisher(id);
        }
    }

    pub(super) fn disconnect_publishers(&mut self, fault: &Fault) {
        self.connections.retain(|_, connection| !connection.ended);
        for connection in self.connections.values_mut().filter(|connection| connection.connected) {
            connection.end_connection(fault.clone());
        }
    }

    fn publisher_ids(&self) -> Vec<u64> {
        self.connections.keys().copied().collect()
    }

    pub(super) fn is_current(&self, id: u64, epoch: Epoch) -> bool {
        self.connections
            .get(&id)
            .is_some_and(|connection| connection.connected && connection.epoch == epoch.0)
    }

    /// One publish arrives. Of an epoch that is over it is dropped; an isolated one is reported
    /// unknown.
    pub(super) fn publish(&mut self, id: u64, epoch: Epoch, outgoing: Outgoing, verdict: Option<Verdict>) {
        let blocked = self.blocked;
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.connected || connection.epoch != epoch.0 {
            if outgoing.isolated {
                let fault = Fault::new(FaultClass::Outage, "not sent: the connection is over");
                connection.report(outgoing.ticket, Outcome::Unknown(fault));
            }
        } else if blocked {
            connection.unread.push_back((outgoing, verdict));
        } else {
            self.read(id, outgoing, verdict);
        }
    }

    /// The broker reads one publish.
    fn read(&mut self, id: u64, outgoing: Outgoing, verdict: Option<Verdict>) {
        let epoch = Epoch(self.connections.get(&id).map_or(0, |connection| connection.epoch));
        let Outgoing { ticket, exchange, routing_key, message, mandatory, isolated } = outgoing;
        let letter = Letter { exchange, routing_key, message };
        let (outcome, when) = match self.decide(&letter, epoch, verdict) {
            // Nothing is returned that is not mandatory.
            (PublishOutcome::Report(Outcome::Returned(_)), when) if !mandatory => {
                (PublishOutcome::Report(Outcome::Confirmed), when)
            }
            decided => decided,
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        match (outcome, when) {
            (PublishOutcome::Report(outcome), When::Now) => connection.report(ticket, outcome),
            (PublishOutcome::Report(outcome), when) => self.owe(id, ticket, isolated, outcome, when),
            (PublishOutcome::Close(fault), _) if isolated => {
                connection.report(ticket, Outcome::Refused(fault))
            }
            (PublishOutcome::Disconnect(fault), _) if isolated => {
                connection.report(ticket, Outcome::Unknown(fault))
            }
            (PublishOutcome::Close(fault), _) => {
                connection.end_channel(fault);
                self.connect_publisher(id);
            }
            (PublishOutcome::Disconnect(fault), _) => {
                connection.end_connection(fault);
                self.connect_publisher(id);
            }
        }
    }

    fn decide(&mut self, letter: &Letter, epoch: Epoch, verdict: Option<Verdict>) -> (PublishOutcome, When) {
        let lost = |text| PublishOutcome::Disconnect(Fault::new(FaultClass::Outage, text));
        let usual = if self.hanging { When::Never } else { When::Now };
        let when = match verdict {
            None | Some(Verdict::Confirm) => usual,
            Some(Verdict::Nack) => return (PublishOutcome::Report(Outcome::Nacked), usual),
            Some(Verdict::Return { code, text }) => {
                let fault = Fault::with_code(FaultClass::Destination, code, text);
                return (PublishOutcome::Report(Outcome::Returned(fault)), usual);
            }
            Some(Verdict::CloseChannel { code, text, class }) => {
                return (PublishOutcome::Close(Fault::with_code(class, code, text)), When::Now);
            }
            Some(Verdict::Disconnect) => {
                return (lost("connection lost before the message arrived"), When::Now);
            }
            Some(Verdict::Unknown) => {
                let outcome = match self.take_in(letter, epoch) {
                    PublishOutcome::Report(_) => lost("connection lost before the broker's word"),
                    closed => closed,
                };
                return (outcome, When::Now);
            }
            Some(Verdict::LoseConfirm) => When::Never,
            Some(Verdict::DelayConfirm(delay)) => When::Later(Until::Alarm, delay),
            Some(Verdict::ConfirmOutOfOrder) => When::Later(Until::Next, self.out_of_order_wait),
            Some(Verdict::HoldConfirm) => When::Held,
        };
        (self.take_in(letter, epoch), when)
    }

    /// Notes an outcome that is not reported now.
    fn owe(&mut self, id: u64, ticket: Ticket, isolated: bool, outcome: Outcome, when: When) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let (until, alarm) = match when {
            When::Later(until, delay) => (until, Some(delay)),
            When::Never => (Until::Deadline, Some(connection.confirm_deadline)),
            When::Held | When::Now => (Until::Release, None),
        };
        let token = connection.next_token;
        connection.next_token += 1;
        connection.open.insert(token, Open { ticket, isolated, outcome, until });
        connection.open_until_next += usize::from(until == Until::Next);
        if alarm.is_some_and(|delay| !self.timer.set(delay, id, token)) {
            self.fire(id, token); // no thread to be had: too early is better than never
        }
    }

    /// The alarm of a word that is owed. Nothing happens if it was reported, or dropped, before.
    pub(super) fn fire(&mut self, id: u64, token: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(open) = connection.take_one(token) else { return };
        if open.until != Until::Deadline {
            return connection.report(open.ticket, open.outcome);
        }
        let fault =
            Fault::new(FaultClass::Outage, format!("no confirm within {:?}", connection.confirm_deadline));
        connection.report(open.ticket, Outcome::Silent(fault.clone()));
        // A younger one has its word: the connection lives.
        if open.isolated || connection.newest_reported > Some(open.ticket) {
            return;
        }
        connection.end_connection(fault);
        self.connect_publisher(id);
    }

    pub(super) fn release_confirms(&mut self, newest_first: bool) {
        for connection in self.connections.values_mut() {
            let mut outcomes = Vec::new();
            connection.take_open(&mut outcomes, |open| matches!(open.until, Until::Release | Until::Next));
            if newest_first {
                outcomes.reverse();
            }
            if !outcomes.is_empty() {
                connection.report_all(outcomes);
            }
        }
    }

    pub(super) fn block(&mut self, blocked: bool) {
        if self.blocked == blocked {
            return;
        }
        self.blocked = blocked;
        for id in self.publisher_ids() {
            if let Some(connection) = self.connections.get_mut(&id).filter(|connection| connection.connected)
            {
                connection.send(PublisherEvent::Blocked { blocked });
            }
            // A channel that one of them closes takes the rest out of `unread`.
            while !blocked && let Some((outgoing, verdict)) = self.next_unread(id) {
                self.read(id, outgoing, verdict);
            }
        }
    }

    fn next_unread(&mut self, id: u64) -> Option<(Outgoing, Option<Verdict>)> {
        self.connections.get_mut(&id)?.unread.pop_front()
    }
}
