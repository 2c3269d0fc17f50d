//! Turns a record into what the machine and the publisher need of it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::Unpublished;
use crate::delivery::types::{Entry, Loaded};
use crate::error::caught;
use crate::event::{Destination, RecordedEvent};
use crate::limits::SHORT_STRING_BYTES_MAX;
use crate::message::{Fault, FaultClass, Message};
use crate::store::read::records::Read;
use crate::text::Text;
use crate::tuning::NAMES_MAX;
use crate::wire::Wire;

/// How events become messages.
#[derive(Debug)]
pub(crate) struct Form {
    pub(crate) wire: Wire,
    pub(crate) unpublished: Option<Unpublished>,
    /// Exchanges of which no message is mandatory.
    pub(crate) may_be_unroutable: BTreeSet<String>,
}

/// An event in memory, ready for the wire.
#[derive(Debug)]
pub(crate) struct Held {
    pub(super) exchange: Arc<str>,
    pub(super) routing_key: Arc<str>,
    pub(super) message: Arc<Message>,
    pub(super) mandatory: bool,
}

/// Whether an event is met in the log, or again because a row of the cursor names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Met {
    First,
    Again,
}

/// Makes a record ready for the wire, and returns what the machine needs to know of it.
pub(crate) fn hold(
    (seq, read): Read,
    met: Met,
    form: &mut Form,
    names: &mut HashMap<Box<str>, Arc<str>>,
    held: &mut FxHashMap<u64, Held>,
) -> Loaded {
    let recorded = match read {
        Ok(recorded) => recorded,
        Err(error) => {
            // The quarantine of the event logs the warning, in the same words.
            tracing::debug!(seq, %error, "a record cannot be published");
            return Loaded::Undecodable {
                seq,
                fault: Fault::new(FaultClass::Undecodable, error.to_string()),
            };
        }
    };
    let by_rule = match (recorded.destination(), &form.unpublished) {
        (Destination::Unpublished, Some(rule)) => {
            // The rule is the application's code: a panic for one event must not end the relay.
            let Ok(by_rule) = caught(|| (rule.0)(&recorded)) else {
                let fault = Fault::new(FaultClass::Destination, "the relay's rule panicked");
                return Loaded::Undecodable { seq, fault };
            };
            by_rule
        }
        _ => None,
    };
    let Destination::Exchange { exchange, routing_key } = by_rule.as_ref().unwrap_or(recorded.destination())
    else {
        let fault =
            || Fault::new(FaultClass::Destination, "the relay's rule names no destination for it any more");
        return match met {
            Met::First => Loaded::Unpublished { seq },
            Met::Again => Loaded::Undecodable { seq, fault: fault() },
        };
    };
    if exchange.len().max(routing_key.len()) > SHORT_STRING_BYTES_MAX {
        let fault =
            Fault::new(FaultClass::Destination, "the relay's rule names a destination of over 255 bytes");
        return Loaded::Undecodable { seq, fault };
    }
    let (exchange, routing_key) = (shared(names, exchange), shared(names, routing_key));
    let entry = entry_of(&recorded, &exchange, &routing_key);
    let may_be_unroutable = recorded.properties().may_be_unroutable
        || (!form.may_be_unroutable.is_empty() && form.may_be_unroutable.contains(&*exchange));
    let message = Arc::new(form.wire.message(recorded));
    held.insert(seq, Held { exchange, routing_key, message, mandatory: !may_be_unroutable });
    Loaded::Event(entry)
}

fn entry_of(recorded: &RecordedEvent, exchange: &Arc<str>, routing_key: &Arc<str>) -> Entry {
    Entry {
        seq: recorded.seq(),
        key: recorded.event.key.as_ref().map(Text::shared),
        exchange: Arc::clone(exchange),
        routing_key: Arc::clone(routing_key),
        bytes: recorded.payload().len(),
        not_before_ms: recorded.event.not_before_ms,
        expires_ms: recorded.event.expires_ms,
    }
}

fn shared(names: &mut HashMap<Box<str>, Arc<str>>, name: &str) -> Arc<str> {
    if let Some(name) = names.get(name) {
        return Arc::clone(name);
    }
    if names.len() >= NAMES_MAX {
        names.clear();
    }
    let shared: Arc<str> = name.into();
    names.insert(name.into(), Arc::clone(&shared));
    shared
}
