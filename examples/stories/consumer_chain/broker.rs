//! The broker of the story: the in-process one behind two loopback doors, or RabbitMQ.

use std::path::Path;
use std::time::Duration;

use onewrite::BoxError;
use onewrite::broker::{ExchangeKind, MemoryBroker, QueueOptions};

use crate::consuming::{self, Queues};
use crate::door::Door;
use crate::plan::{Address, Plan, Role, Wiring};
use crate::publishing;

pub(crate) struct Broker {
    address: Address,
    wiring: Wiring,
}

impl Broker {
    pub(crate) fn choose(amqp_url: Option<String>) -> Result<Self, BoxError> {
        let run = std::process::id().to_string();
        Ok(match amqp_url.filter(|url| !url.is_empty()) {
            None => {
                let wiring = Wiring { exchange: "chain".into(), run };
                Self { address: in_process(&wiring)?, wiring }
            }
            // Every RabbitMQ has `amq.topic`: the story declares no exchange and leaves none
            // behind.
            Some(url) => Self {
                address: Address::RabbitMq { url },
                wiring: Wiring { exchange: "amq.topic".into(), run },
            },
        })
    }

    /// The plan for a service.
    pub(crate) fn plan(&self, role: Role, folder: &Path) -> Plan {
        Plan { role, file: role.file(folder), broker: self.address.clone(), wiring: self.wiring.clone() }
    }

    /// The time for all requests.
    pub(crate) fn writing(&self) -> Duration {
        Duration::from_secs(match self.address {
            Address::Sockets { .. } => 8,
            Address::RabbitMq { .. } => 12,
        })
    }

    /// How long to wait without any news.
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(match self.address {
            Address::Sockets { .. } => 5,
            Address::RabbitMq { .. } => 20,
        })
    }

    /// For the header.
    pub(crate) fn description(&self) -> String {
        match self.address {
            Address::Sockets { .. } => {
                "the in-process one (AMQP_URL is not set), behind loopback sockets".into()
            }
            Address::RabbitMq { .. } => {
                format!("RabbitMQ (AMQP_URL), queues onewrite-*-{}, removed 5 minutes after", self.wiring.run)
            }
        }
    }
}

/// The broker lives as long as this process, in its doors.
fn in_process(wiring: &Wiring) -> Result<Address, BoxError> {
    let broker = MemoryBroker::new();
    broker.declare_exchange(&wiring.exchange, ExchangeKind::Topic);
    let mut queues = Queues::new();
    for role in [Role::Payments, Role::Shipping] {
        let queue = wiring.queue(role);
        broker.declare_queue(&queue, QueueOptions::default());
        broker.bind(&queue, &wiring.exchange, &wiring.pattern(role))?;
        queues.insert(queue, Default::default());
    }
    let behind = broker.clone();
    // Each ends with its connection. The service at the other end notices by itself.
    let publish = Door::open(move |stream| _ = publishing::serve(&behind, stream))?;
    let consume = Door::open(move |stream| _ = consuming::serve(&broker, &queues, stream))?;
    Ok(Address::Sockets { publish: publish.address(), consume: consume.address() })
}
