//! The plan that the supervisor gives to a child process, and the lines that the child prints.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use onewrite::BoxError;
use serde::{Deserialize, Serialize};

/// The environment variable that makes this executable one of the services.
pub(crate) const PLAN: &str = "ONEWRITE_CHAIN_PLAN";

/// A service, by its place in the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Role {
    Orders,
    Payments,
    Shipping,
}

impl Role {
    pub(crate) const ALL: [Self; 3] = [Self::Orders, Self::Payments, Self::Shipping];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Orders => "orders",
            Self::Payments => "payments",
            Self::Shipping => "shipping",
        }
    }

    pub(crate) fn file(self, folder: &Path) -> PathBuf {
        folder.join(self.name()).with_extension("redb")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The plan of a service. It is not on the command line: the URL may hold a password.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) role: Role,
    pub(crate) file: PathBuf,
    pub(crate) broker: Address,
    pub(crate) wiring: Wiring,
}

/// Where the broker is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Address {
    /// The in-process broker of the supervisor, behind loopback sockets.
    Sockets {
        publish: SocketAddr,
        consume: SocketAddr,
    },
    RabbitMq {
        url: String,
    },
}

/// Names on the broker. They hold the name of the run, so that runs do not meet.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Wiring {
    pub(crate) exchange: String,
    pub(crate) run: String,
}

impl Wiring {
    /// The queue from which a service takes its work.
    pub(crate) fn queue(&self, of: Role) -> String {
        format!("onewrite-{of}-{}", self.run)
    }

    /// The routing keys of the bindings of that queue.
    pub(crate) fn pattern(&self, of: Role) -> String {
        self.routing_key(match of {
            // `orders` has no queue: clients connect directly.
            Role::Orders | Role::Payments => "order.*",
            Role::Shipping => "payment.*",
        })
    }

    pub(crate) fn routing_key(&self, event_type: &str) -> String {
        format!("{event_type}.{}", self.run)
    }
}

/// A line of the child's output.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// The address for clients, once there is one.
    pub(crate) desk: Option<SocketAddr>,
    /// Orders it has in its table, over all lives of the service.
    pub(crate) orders: u64,
    /// Events that are not confirmed yet.
    pub(crate) backlog: u64,
    /// Deliveries of this life that were recognised as repeats.
    pub(crate) repeated: u64,
    /// Deliveries of this life that were rejected.
    pub(crate) rejected: u64,
}

impl Plan {
    pub(crate) fn from_environment() -> Option<Result<Self, BoxError>> {
        let plan = std::env::var(PLAN).ok()?;
        Some(serde_json::from_str(&plan).map_err(Into::into))
    }
}
