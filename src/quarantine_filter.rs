//! The filter for quarantined entries of a relay, a consumer or a projection, and the page-by-page
//! walk through all of them.
//!
//! **Terms.** *Quarantined* is the word for all three. A relay quarantines events, a consumer
//! rejects deliveries, a projection keeps failures. None of them is tried again unless the
//! application redrives it.

use crate::error::{ErrorKind, Result};
use crate::event::{Destination, RecordedEvent};
use crate::tuning::REDRIVE_STEP;

/// A selection of quarantined entries: of a relay's [`Quarantine`](crate::Quarantine), of a
/// consumer's [`Rejected`](crate::Rejected) deliveries, or of a projection's
/// [`ProjectionFailures`](crate::ProjectionFailures).
///
/// Each condition that is set must hold. A damaged entry has fewer known facts. Nothing is known of
/// a damaged rejected delivery, so only [`all`](Self::all) selects it. For an event whose record is
/// damaged, the reason and the tries are known.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// # let broker = onewrite::broker::MemoryBroker::new();
/// # let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher())?;
/// # let receipt = store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").to_queue("nowhere")))?;
/// # let _ = receipt.wait_confirmed(std::time::Duration::from_secs(5)); // no queue takes it: quarantined
/// use onewrite::QuarantineFilter;
/// let lost = QuarantineFilter::all().exchange("").routing_key("nowhere").event_type("paid");
/// assert_eq!(store.quarantine("rabbit")?.discard_all(&lost)?, 1);
/// # let _ = relay.stop(std::time::Duration::from_secs(5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use = "a filter does nothing by itself"]
pub struct QuarantineFilter {
    event_type: Option<String>,
    exchange: Option<String>,
    routing_key: Option<String>,
    reason: Option<String>,
    attempts_min: Option<u32>,
}

/// The facts about an entry that a filter checks.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Facts<'a> {
    pub(crate) event_type: Option<&'a str>,
    pub(crate) exchange: Option<&'a str>,
    pub(crate) routing_key: Option<&'a str>,
    pub(crate) reason: Option<&'a str>,
    pub(crate) attempts: Option<u32>,
}

impl<'a> Facts<'a> {
    pub(crate) fn to(mut self, destination: Option<&'a Destination>) -> Self {
        if let Some(Destination::Exchange { exchange, routing_key }) = destination {
            (self.exchange, self.routing_key) = (Some(exchange.as_str()), Some(routing_key.as_str()));
        }
        self
    }
}

impl QuarantineFilter {
    /// Selects every entry.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// use onewrite::QuarantineFilter;
    /// assert_eq!(store.rejected("credit-service").redrive_all(&QuarantineFilter::all())?, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn all() -> Self {
        Self::default()
    }

    /// Selects this type: the type of the [`Event`](crate::Event), or the AMQP property `type` of a
    /// delivery.
    ///
    /// ```
    /// use onewrite::QuarantineFilter;
    /// assert_ne!(QuarantineFilter::all().event_type("paid"), QuarantineFilter::all());
    /// ```
    pub fn event_type(mut self, event_type: impl Into<String>) -> Self {
        self.event_type = Some(event_type.into());
        self
    }

    /// Selects this exchange. The empty name is AMQP's default exchange.
    ///
    /// ```
    /// use onewrite::QuarantineFilter;
    /// assert_ne!(QuarantineFilter::all().exchange("payments"), QuarantineFilter::all().exchange(""));
    /// ```
    pub fn exchange(mut self, exchange: impl Into<String>) -> Self {
        self.exchange = Some(exchange.into());
        self
    }

    /// Selects this routing key.
    ///
    /// ```
    /// use onewrite::QuarantineFilter;
    /// assert_ne!(QuarantineFilter::all().routing_key("completed"), QuarantineFilter::all());
    /// ```
    pub fn routing_key(mut self, routing_key: impl Into<String>) -> Self {
        self.routing_key = Some(routing_key.into());
        self
    }

    /// Selects entries whose reason contains this text.
    ///
    /// ```
    /// use onewrite::QuarantineFilter;
    /// assert_ne!(QuarantineFilter::all().reason_contains("NO_ROUTE"), QuarantineFilter::all());
    /// ```
    pub fn reason_contains(mut self, text: impl Into<String>) -> Self {
        self.reason = Some(text.into());
        self
    }

    /// Selects entries that were tried at least this often.
    ///
    /// ```
    /// use onewrite::QuarantineFilter;
    /// assert_ne!(QuarantineFilter::all().attempts_min(3), QuarantineFilter::all());
    /// ```
    pub fn attempts_min(mut self, attempts: u32) -> Self {
        self.attempts_min = Some(attempts);
        self
    }

    pub(crate) fn takes(&self, facts: &Facts<'_>) -> bool {
        let is = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        is(&self.event_type, facts.event_type)
            && is(&self.exchange, facts.exchange)
            && is(&self.routing_key, facts.routing_key)
            && self
                .reason
                .as_deref()
                .is_none_or(|text| facts.reason.is_some_and(|reason| reason.contains(text)))
            && self.attempts_min.is_none_or(|least| facts.attempts.is_some_and(|attempts| attempts >= least))
    }
}

/// A quarantined entry.
pub(crate) trait Entry {
    /// The entry's place in the order of all entries.
    fn number(&self) -> u64;

    fn facts(&self) -> Facts<'_>;
}

/// The record, or `None` if it is damaged. Every other error is returned.
pub(crate) fn readable(record: Result<Option<RecordedEvent>>) -> Result<Option<RecordedEvent>> {
    match record {
        Err(error) if error.kind() == ErrorKind::Damaged => Ok(None),
        record => record,
    }
}

/// The entries above `after` that the filter selects, `limit` at most. `page` returns the next
/// entries above a number.
pub(crate) fn list_matching<T: Entry>(
    filter: &QuarantineFilter,
    mut after: Option<u64>,
    limit: usize,
    page: impl Fn(Option<u64>, usize) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let mut found = Vec::new();
    while found.len() < limit {
        let entries = page(after, REDRIVE_STEP)?;
        let Some(last) = entries.last() else { break };
        after = Some(last.number());
        found.extend(entries.into_iter().filter(|entry| filter.takes(&entry.facts())));
    }
    found.truncate(limit);
    Ok(found)
}

/// Changes the entries below `end` that the filter selects, page by page. Returns how many entries
/// `change` has changed. New entries stand at `end` or above, so the walk ends.
pub(crate) fn change_all<T: Entry>(
    filter: &QuarantineFilter,
    end: u64,
    mut page: impl FnMut(Option<u64>, usize) -> Result<Vec<T>>,
    change: impl Fn(Vec<T>) -> Result<u64>,
) -> Result<u64> {
    let (mut after, mut count) = (None, 0);
    loop {
        let mut entries = page(after, REDRIVE_STEP)?;
        let Some(last) = entries.last() else { return Ok(count) };
        after = Some(last.number());
        entries.retain(|entry| entry.number() < end && filter.takes(&entry.facts()));
        if !entries.is_empty() {
            count += change(entries)?;
        }
        if after.is_some_and(|after| after.saturating_add(1) >= end) {
            return Ok(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Of(u64);

    impl Entry for Of {
        fn number(&self) -> u64 {
            self.0
        }

        fn facts(&self) -> Facts<'_> {
            Facts { attempts: u32::try_from(self.0).ok(), ..Facts::default() }
        }
    }

    /// Goal: a change of all entries ends, and leaves later entries alone. Method: entries that
    /// never end.
    #[test]
    fn what_comes_meanwhile_is_not_changed() {
        let endless = |after: Option<u64>, limit: usize| {
            let from = after.map_or(0, |after| after + 1);
            Ok((from..from + limit as u64).map(Of).collect::<Vec<_>>())
        };
        for (end, expected) in [(0, 0), (1, 1), (REDRIVE_STEP as u64, REDRIVE_STEP as u64), (1_000, 1_000)] {
            let change = |entries: Vec<Of>| {
                assert!(entries.iter().all(|entry| entry.0 < end));
                Ok(entries.len() as u64)
            };
            assert_eq!(change_all(&QuarantineFilter::all(), end, endless, change).unwrap(), expected);
        }
        let filter = QuarantineFilter::all().attempts_min(990);
        let found = list_matching(&filter, None, 3, endless).unwrap();
        assert_eq!(found.iter().map(Entry::number).collect::<Vec<_>>(), [990, 991, 992]);
    }

    /// Goal: each condition decides alone, and only `all` selects an entry of which nothing is
    /// known.
    #[test]
    fn each_condition_decides() {
        let to = Destination::exchange("e", "r");
        let (event_type, reason) = (Some("paid"), Some("NO_ROUTE: no queue"));
        let facts = Facts { event_type, reason, attempts: Some(3), ..Facts::default() }.to(Some(&to));
        let all = QuarantineFilter::all;
        for (filter, takes) in [
            (all(), true),
            (
                all()
                    .event_type("paid")
                    .exchange("e")
                    .routing_key("r")
                    .reason_contains("ROUTE")
                    .attempts_min(3),
                true,
            ),
            (all().event_type("pai"), false),
            (all().exchange(""), false),
            (all().routing_key("R"), false),
            (all().reason_contains("nack"), false),
            (all().attempts_min(4), false),
        ] {
            assert_eq!(filter.takes(&facts), takes, "{filter:?}");
            assert_eq!(filter.takes(&Facts::default()), filter == all(), "{filter:?}");
        }
    }
}
