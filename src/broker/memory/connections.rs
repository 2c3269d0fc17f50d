//! The publishers of the broker: their connections, and the outcomes that are not reported yet
//! (*open* outcomes).
//!
//! **Invariants.**
//! - An outcome is reported once: `open` holds the open outcomes, and the report takes the outcome
//!   out.
//! - When an epoch ends, the open outcomes of its messages that are not isolated are dropped before
//!   `Down` is reported.
//! - The open outcome of an isolated message survives the end of a channel. When the connection is
//!   lost, the outcome becomes *unknown*.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::broker::{Epoch, PublisherEvent, PublisherEvents};
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};

use super::queue::Letter;
use super::script::Verdict;
use super::state::{PublishOutcome, State, refused};

/// The longest time that [`Verdict::ConfirmOutOfOrder`] waits for another outcome to go first.
pub(super) const OUT_OF_ORDER_WAIT: Duration = Duration::from_millis(10);

/// The event that makes an open outcome due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The alarm of the outcome.
    Alarm,
    /// The alarm, or the next outcome of the connection.
    Next,
    /// The test calls [`State::release_confirms`].
    Release,
    /// Nothing: the alarm is the confirm deadline.
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

/// An outcome that is not reported yet.
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
    /// The last epoch, which is current while `connected`.
    epoch: u64,
    connected: bool,
    /// Whether the publisher's relay is gone.
    ended: bool,
    /// The open outcomes, in publish order.
    open: BTreeMap<u64, Open>,
    /// The number of open outcomes that wait for the next outcome.
    open_until_next: usize,
    /// The highest ticket with an outcome other than silent on this connection.
    newest_reported: Option<Ticket>,
    next_token: u64,
    /// Messages sent while the broker blocks: they are in the socket, unread.
    unread: VecDeque<(Outgoing, Option<Verdict>)>,
}

impl Connection {
    fn send(&mut self, event: PublisherEvent) {
        self.ended |= !self.events.send(event);
    }

    /// Reports an outcome, and then the outcomes that waited for it.
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

    /// Moves open outcomes into `outcomes`, oldest first.
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

    /// Ends the channel: everything in flight is lost, except isolated messages.
    fn end_channel(&mut self, fault: Fault) {
        self.open.retain(|_, open| open.isolated);
        self.open_until_next = self.open.values().filter(|open| open.until == Until::Next).count();
        self.unread.retain(|(outgoing, _)| outgoing.isolated);
        self.connected = false;
        self.send(PublisherEvent::Down { epoch: Epoch(self.epoch), fault });
    }

    /// Ends the connection: everything in flight is lost.
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

    /// Ends a publisher. Its epoch ends like any other; after that nothing is reported to the
    /// publisher.
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

    /// Takes one publish. If the epoch is over, the message is dropped, or reported unknown if it
    /// is isolated.
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

    /// Reads one publish, as a broker reads from its socket.
    fn read(&mut self, id: u64, outgoing: Outgoing, verdict: Option<Verdict>) {
        let epoch = Epoch(self.connections.get(&id).map_or(0, |connection| connection.epoch));
        let Outgoing { ticket, exchange, routing_key, message, mandatory, isolated } = outgoing;
        let letter = Letter { exchange, routing_key, message };
        let (outcome, when) = match self.decide(&letter, epoch, verdict) {
            // Only a mandatory message is returned.
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

    /// Handles the alarm of an open outcome. Does nothing if the outcome was reported or dropped
    /// before.
    pub(super) fn fire(&mut self, id: u64, token: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(open) = connection.take_one(token) else { return };
        if open.until != Until::Deadline {
            return connection.report(open.ticket, open.outcome);
        }
        let fault =
            Fault::new(FaultClass::Outage, format!("no confirm within {:?}", connection.confirm_deadline));
        connection.report(open.ticket, Outcome::Silent(fault.clone()));
        // A younger message has its outcome: the connection works.
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
            // If one of these messages closes the channel, the rest is taken out of `unread`.
            while !blocked && let Some((outgoing, verdict)) = self.next_unread(id) {
                self.read(id, outgoing, verdict);
            }
        }
    }

    fn next_unread(&mut self, id: u64) -> Option<(Outgoing, Option<Verdict>)> {
        self.connections.get_mut(&id)?.unread.pop_front()
    }
}
