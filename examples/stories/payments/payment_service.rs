//! The payment service: this same executable, run as a child process. It may be killed at any
//! moment.
//!
//! Tellers make transfers at an even pace. After a kill each teller goes back a little *before* the
//! end of its table, as clients do that got no answer. They repeat the request ids, and the store
//! recognises the requests.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use onewrite::broker::{RabbitMq, Topology};
use onewrite::{BoxError, Relay, RelayState, Store, WriteOnce};
use serde::{Deserialize, Serialize};

use crate::bank::{self, Destination, InsufficientFunds, Transfer};
use crate::socket_publisher::SocketPublisher;
use crate::{TELLERS, TRANSFERS};

/// The relay's name in the file.
pub(crate) const RELAY: &str = "payments";
/// The environment variable that makes this executable the payment service.
pub(crate) const PLAN: &str = "ONEWRITE_PAYMENTS_PLAN";
/// Requests that each teller repeats after a start.
const ASKED_AGAIN: u32 = 25;

/// The plan that the supervisor gives to the payment service. It is not on the command line: the
/// URL may hold a password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) folder: PathBuf,
    pub(crate) broker: Address,
    pub(crate) destination: Destination,
    /// The time for all transfers.
    pub(crate) seconds: u64,
}

/// Where the broker is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Address {
    /// The in-process broker of the supervisor, behind a loopback socket.
    Socket(std::net::SocketAddr),
    RabbitMq {
        url: String,
        queue: String,
    },
}

impl Plan {
    pub(crate) fn from_environment() -> Option<Result<Self, BoxError>> {
        let plan = std::env::var(PLAN).ok()?;
        Some(serde_json::from_str(&plan).map_err(Into::into))
    }

    pub(crate) fn store_path(&self) -> PathBuf {
        self.folder.join("payments.redb")
    }
}

/// A line of the child's output.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// Transfers committed, over all lives of the service.
    pub(crate) committed: u64,
    /// Events confirmed, over all lives, as far as it is durable.
    pub(crate) confirmed: u64,
    /// Requests of this life that had been committed before.
    pub(crate) asked_again: u64,
    /// Whether there is a connection to the broker, or no need of one any more.
    pub(crate) connected: bool,
}

/// The state that the tellers share.
#[derive(Debug, Default)]
struct Desk {
    asked_again: AtomicU64,
    closing: AtomicBool,
}

/// Runs until all transfers are done and the broker has confirmed every event.
pub(crate) fn run(plan: &Plan) -> Result<(), BoxError> {
    let store = Store::open(plan.store_path())?;
    bank::open_accounts(&store)?;
    let relay = start_relay(plan, &store)?;
    let desk: &'static Desk = Box::leak(Box::default());
    thread::spawn(|| obey(desk));
    thread::scope(|scope| {
        let tellers: Vec<_> = (0..TELLERS)
            .map(|number| {
                let store = &store;
                scope.spawn(move || teller(plan, store, desk, number))
            })
            .collect();
        while !tellers.iter().all(thread::ScopedJoinHandle::is_finished) {
            report(&store, desk)?;
            thread::sleep(Duration::from_millis(100));
        }
        tellers.into_iter().try_for_each(|teller| teller.join().map_err(|_| "a teller panicked")?)
    })?;
    while store.stats()?.backlog_events > 0 {
        report(&store, desk)?;
        thread::sleep(Duration::from_millis(100));
    }
    relay.stop(Duration::from_secs(5));
    report(&store, desk)?;
    store.close()?;
    Ok(())
}

fn start_relay(plan: &Plan, store: &Store) -> Result<Relay, BoxError> {
    let relay = store.relay(RELAY).app_id("payment-service");
    Ok(match &plan.broker {
        Address::Socket(address) => relay.spawn(SocketPublisher::new(*address))?,
        Address::RabbitMq { url, queue } => relay.spawn(
            RabbitMq::new(url)?
                .connection_name("payment-service")
                .reconnect_backoff(Duration::from_millis(100), Duration::from_secs(1))
                .declare(topology(queue, &plan.destination)),
        )?,
    })
}

/// The queue of this run. The broker removes the queue some minutes after its last use.
pub(crate) fn topology(queue: &str, from: &Destination) -> Topology {
    Topology::new().queue_with(queue, [("x-expires", 300_000.into())]).bind(
        &from.exchange,
        queue,
        &from.routing_key,
    )
}

fn teller(plan: &Plan, store: &Store, desk: &Desk, teller: u32) -> Result<(), BoxError> {
    let per_teller = TRANSFERS / TELLERS;
    let pace = Duration::from_secs(plan.seconds) / per_teller;
    let first = bank::done_by(store, teller)?.saturating_sub(ASKED_AGAIN);
    let begin = Instant::now();
    for number in first..per_teller {
        thread::sleep((pace * (number - first)).saturating_sub(begin.elapsed()));
        if desk.closing.load(Ordering::Relaxed) {
            break;
        }
        match bank::transfer(store, Transfer::numbered(teller, number), plan.destination.clone()) {
            Ok(WriteOnce::Repeated(_)) => _ = desk.asked_again.fetch_add(1, Ordering::Relaxed),
            Err(error) if error.downcast_app::<InsufficientFunds>().is_none() => return Err(error.into()),
            // The transfer is done, or refused without a trace.
            _ => {}
        }
    }
    Ok(())
}

fn report(store: &Store, desk: &Desk) -> Result<(), BoxError> {
    let stats = store.stats()?;
    let relay = stats.relays.get(RELAY).cloned().unwrap_or_default();
    let progress = Progress {
        committed: stats.next_seq,
        confirmed: relay.confirmed,
        asked_again: desk.asked_again.load(Ordering::Relaxed),
        connected: relay.running.is_none_or(|relay| relay.state == RelayState::Connected),
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(&progress)?)?;
    Ok(out.flush()?)
}

/// A line on the input asks for no more transfers and an orderly end. The end of the input means
/// that the supervisor is gone.
fn obey(desk: &Desk) {
    let mut input = std::io::stdin().lock();
    let mut line = String::new();
    while input.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
        desk.closing.store(true, Ordering::Relaxed);
    }
    std::process::exit(1);
}
