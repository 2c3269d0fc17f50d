//! Where an event is published to.

/// Where an event goes.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Destination, Event};
/// store.write(|tx| tx.append(Event::bytes("audited", "1").unpublished()))?;
/// let event = store.read()?.event(0)?.expect("appended above");
/// assert_eq!(event.destination(), &Destination::Unpublished);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Destination {
    /// Published to this exchange with this routing key. The empty exchange is AMQP's default one: the routing key then names a queue.
    Exchange {
        /// The exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
    /// Kept in the log, published nowhere.
    Unpublished,
}
