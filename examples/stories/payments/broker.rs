//! The broker of the story: the in-process one behind a socket, or RabbitMQ behind a proxy. The way
//! to either is a door that can be shut.

use std::io;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions, RabbitMqSource};
use onewrite::{BoxError, Consumer, Store};

use crate::bank::Destination;
use crate::credit_service;
use crate::door::Door;
use crate::payment_service::{Address, Plan, topology};
use crate::publishing;

/// The credit service's queue on the in-process broker.
const QUEUE: &str = "credit";

pub(crate) enum Broker {
    InProcess {
        broker: MemoryBroker,
        door: Door,
    },
    RabbitMq {
        /// As for the user, without the password.
        host: String,
        /// Through the proxy.
        url: String,
        /// This run's own.
        queue: String,
        door: Door,
    },
}

impl Broker {
    pub(crate) fn choose(amqp_url: Option<String>) -> Result<Self, BoxError> {
        match amqp_url.filter(|url| !url.is_empty()) {
            None => Self::in_process(),
            Some(url) => Self::rabbit_mq(&url),
        }
    }

    fn in_process() -> Result<Self, BoxError> {
        let broker = MemoryBroker::new();
        broker.declare_exchange("payments", ExchangeKind::Topic);
        broker.declare_queue(QUEUE, QueueOptions::default());
        broker.bind(QUEUE, "payments", "payment.*")?;
        let behind = broker.clone();
        let door = Door::open(move |stream| {
            // It ends with the connection. The publisher notices the end by itself.
            let _ = publishing::serve(&behind, stream);
        })?;
        Ok(Self::InProcess { broker, door })
    }

    fn rabbit_mq(url: &str) -> Result<Self, BoxError> {
        let (before, host, after) = split(url).ok_or(
            "AMQP_URL must be like amqp://user:password@localhost:5672/%2f, with a host that is this machine",
        )?;
        let upstream = host.clone();
        let door = Door::open(move |client| {
            if let Ok(broker) = TcpStream::connect(&upstream) {
                carry(client, &broker);
            }
        })?;
        let url = format!("{before}{}{after}", door.address());
        Ok(Self::RabbitMq { host, url, queue: format!("onewrite-payments-{}", std::process::id()), door })
    }

    /// Every RabbitMQ has `amq.topic`: the story declares no exchange and leaves none behind.
    fn destination(&self) -> Destination {
        match self {
            Self::InProcess { .. } => {
                Destination { exchange: "payments".into(), routing_key: "payment.completed".into() }
            }
            Self::RabbitMq { queue, .. } => Destination {
                exchange: "amq.topic".into(),
                routing_key: format!("payment.completed.{queue}"),
            },
        }
    }

    /// The plan for the payment service.
    pub(crate) fn plan(&self, folder: &Path) -> Plan {
        let broker = match self {
            Self::InProcess { door, .. } => Address::Socket(door.address()),
            Self::RabbitMq { url, queue, .. } => Address::RabbitMq { url: url.clone(), queue: queue.clone() },
        };
        Plan { folder: folder.into(), broker, destination: self.destination(), seconds: self.seconds() }
    }

    /// Starts the credit service.
    pub(crate) fn consume(&self, store: &Store) -> Result<Consumer, BoxError> {
        Ok(match self {
            Self::InProcess { broker, .. } => credit_service::start(store, broker.source(QUEUE))?,
            Self::RabbitMq { url, queue, .. } => {
                let source = RabbitMqSource::new(url, queue)?
                    .connection_name("credit-service")
                    .reconnect_backoff(Duration::from_millis(100), Duration::from_secs(1))
                    .declare(topology(queue, &self.destination()));
                credit_service::start(store, source)?
            }
        })
    }

    pub(crate) fn go_away(&self) {
        match self {
            Self::InProcess { broker, door } => {
                door.shut();
                broker.go_down();
            }
            Self::RabbitMq { door, .. } => door.shut(),
        }
    }

    pub(crate) fn come_back(&self) {
        match self {
            Self::InProcess { broker, door } => {
                broker.come_up();
                door.reopen();
            }
            Self::RabbitMq { door, .. } => door.reopen(),
        }
    }

    /// The time for all transfers. It is longer with RabbitMQ, so that you have time to kill
    /// RabbitMQ.
    pub(crate) fn seconds(&self) -> u64 {
        match self {
            Self::InProcess { .. } => 9,
            Self::RabbitMq { .. } => 18,
        }
    }

    /// How long to wait without any news: a RabbitMQ may be starting again.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(match self {
            Self::InProcess { .. } => 5,
            Self::RabbitMq { .. } => 60,
        })
    }

    /// For the header, line by line.
    pub(crate) fn description(&self) -> [String; 2] {
        match self {
            Self::InProcess { .. } => [
                "the in-process one (AMQP_URL is not set), in this process, behind a loopback socket:".into(),
                "what it has confirmed outlives the payment service, as with a real broker".into(),
            ],
            Self::RabbitMq { host, queue, .. } => [
                format!("RabbitMQ at {host} (AMQP_URL), through a proxy in this process"),
                format!("queue {queue}; RabbitMQ removes it 5 minutes after its last use"),
            ],
        }
    }

    pub(crate) fn outage_description(&self) -> &'static str {
        match self {
            Self::InProcess { .. } => "the broker goes away",
            Self::RabbitMq { .. } => "the proxy cuts all connections (RabbitMQ itself runs on)",
        }
    }
}

/// Carries bytes both ways until either side ends.
fn carry(client: &TcpStream, broker: &TcpStream) {
    let _ = broker.set_nodelay(true);
    let one_way = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    };
    thread::scope(|scope| {
        scope.spawn(|| one_way(client, broker));
        one_way(broker, client);
    });
}

/// `amqp://user:password@`, `host:port`, `/vhost?query`. The host must be this machine. The library
/// sees only the proxy, and would not notice that the password leaves the machine in plain text.
fn split(url: &str) -> Option<(String, String, String)> {
    let rest = url.strip_prefix("amqp://")?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (authority, after) = rest.split_at_checked(end)?;
    let (user, host) = authority.rsplit_once('@').map_or(("", authority), |(user, host)| (user, host));
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()?),
        _ => (host, 5672_u16),
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    let is_here =
        name.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    let at = if authority.contains('@') { "@" } else { "" };
    is_here.then(|| (format!("amqp://{user}{at}"), format!("{name}:{port}"), after.to_owned()))
}
