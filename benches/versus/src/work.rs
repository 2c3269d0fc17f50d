//! What is compared. Each work has a file of its own, runs by itself, and reports its ratios.

pub(crate) mod commit;
mod drain;
mod latency;
mod pipeline;
pub(crate) mod recovery;
pub(crate) mod replay;
pub(crate) mod scale;
pub(crate) mod sides;

use std::error::Error;

use crate::Setup;
use crate::report::Report;

pub(crate) struct Work {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) run: fn(&Setup) -> Result<Report, Box<dyn Error>>,
}

pub(crate) const ALL: &[Work] = &[
    Work { name: "commit", about: "durable transactions of a state row and an event", run: commit::run },
    Work { name: "replay", about: "reading the log from its beginning", run: replay::run },
    Work { name: "recovery", about: "opening after kill -9", run: recovery::run },
    Work { name: "scale", about: "what a long backlog costs", run: scale::run },
    Work { name: "drain", about: "a backlog into RabbitMQ", run: drain::run },
    Work { name: "latency", about: "from a write's begin to its delivery to a consumer", run: latency::run },
    Work { name: "pipeline", about: "16 writers, a relay and a consumer at once", run: pipeline::run },
];
