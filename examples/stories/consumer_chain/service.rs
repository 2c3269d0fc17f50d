//! A service: this same executable, run as a child process. It may be killed at any moment, and
//! starts again without any clean-up.

use std::io::{BufRead, Write};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use onewrite::broker::{RabbitMq, RabbitMqSource, Topology};
use onewrite::{BoxError, Consumer, Relay, Store};

use crate::plan::{Address, Plan, Progress, Role, Wiring};
use crate::socket_publisher::SocketPublisher;
use crate::socket_source::SocketSource;
use crate::tables;
use crate::{orders, payments, shipping};

/// The relay's name in the file.
pub(crate) const RELAY: &str = "broker";
/// Between two lines of progress.
const LINE: Duration = Duration::from_millis(50);
/// First and longest wait between attempts to connect to RabbitMQ.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// Runs until the supervisor asks for the end.
pub(crate) fn run(plan: &Plan) -> Result<(), BoxError> {
    let store = Store::open(&plan.file)?;
    let (mut relay, mut consumer, mut desk) = (None, None, None);
    match plan.role {
        Role::Orders => {
            store.write(orders::prepare)?;
            relay = Some(publish(plan, &store, Role::Payments)?);
            desk = Some(orders::open_desk(&store, &plan.wiring)?);
        }
        Role::Payments => {
            store.write(payments::prepare)?;
            relay = Some(publish(plan, &store, Role::Shipping)?);
            consumer = Some(consume(plan, &store)?);
        }
        Role::Shipping => {
            store.write(shipping::prepare)?;
            consumer = Some(consume(plan, &store)?);
        }
    }
    let finish = listen();
    while finish.recv_timeout(LINE) == Err(RecvTimeoutError::Timeout) {
        let stats = consumer.as_ref().map(Consumer::status).unwrap_or_default();
        if let Some(why) = stats.failed {
            return Err(why.into());
        }
        let (repeated, rejected) = (stats.repeated, stats.rejected);
        let (orders, backlog) = (tables::len(&store, ledger(plan.role))?, store.stats()?.backlog_events);
        report(&Progress { desk, orders, backlog, repeated, rejected })?;
    }
    // The consumer brings work in, so it stops first. The relay takes work out.
    if let Some(consumer) = consumer {
        consumer.stop(Duration::from_secs(5));
    }
    if let Some(relay) = relay {
        relay.stop(Duration::from_secs(5));
    }
    Ok(store.close()?)
}

/// The table in which a service keeps a row for each order.
fn ledger(role: Role) -> tables::Rows {
    match role {
        Role::Orders => orders::ORDERS,
        Role::Payments => payments::PAYMENTS,
        Role::Shipping => shipping::LEDGER,
    }
}

/// Publishes the log of this service for the next service. It also declares the queue of the next
/// service: without a queue, the broker would return the events.
fn publish(plan: &Plan, store: &Store, next: Role) -> Result<Relay, BoxError> {
    let relay = store.relay(RELAY).app_id(plan.role.name());
    Ok(match &plan.broker {
        Address::Sockets { publish, .. } => relay.spawn(SocketPublisher::new(*publish))?,
        Address::RabbitMq { url } => relay.spawn(
            RabbitMq::new(url)?
                .connection_name(plan.role.name())
                .reconnect_backoff(BACKOFF.0, BACKOFF.1)
                .declare(topology(&plan.wiring, next)),
        )?,
    })
}

fn consume(plan: &Plan, store: &Store) -> Result<Consumer, BoxError> {
    let (role, wiring) = (plan.role, plan.wiring.clone());
    let queue = wiring.queue(role);
    // The store remembers deliveries under this name: it must stay the same over all lives.
    let consumer = store.consumer(role.name());
    let apply = move |delivery: &_, tx: &_| match role {
        Role::Payments => payments::apply(delivery, tx, &wiring),
        _ => shipping::apply(delivery, tx),
    };
    Ok(match &plan.broker {
        Address::Sockets { consume, .. } => consumer.spawn(SocketSource::new(*consume, &queue), apply)?,
        Address::RabbitMq { url } => consumer.spawn(
            RabbitMqSource::new(url, queue)?
                .connection_name(role.name())
                .reconnect_backoff(BACKOFF.0, BACKOFF.1)
                .declare(topology(&plan.wiring, role)),
            apply,
        )?,
    })
}

/// The queue of a service. The broker removes the queue some minutes after its last use.
///
/// The queue serves one consumer at a time: the unsettled deliveries of a killed consumer are back
/// in the queue before the next consumer gets anything. Two at once could swap the orders of a
/// customer.
fn topology(wiring: &Wiring, of: Role) -> Topology {
    let queue = wiring.queue(of);
    Topology::new()
        .queue_with(&queue, [("x-expires", 300_000.into()), ("x-single-active-consumer", true.into())])
        .bind(&wiring.exchange, &queue, wiring.pattern(of))
}

fn report(progress: &Progress) -> Result<(), BoxError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(progress)?)?;
    Ok(out.flush()?)
}

/// A line on the input asks for an orderly end. The end of the input means that the supervisor is
/// gone.
fn listen() -> Receiver<()> {
    let (finish, asked) = mpsc::channel();
    thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut line = String::new();
        while input.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            let _ = finish.send(());
        }
        std::process::exit(1);
    });
    asked
}
