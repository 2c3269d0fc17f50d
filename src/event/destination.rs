//! The destination of an event.

/// The destination of an event.
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
    /// The exchange and the routing key of the publish. The empty exchange is AMQP's default
    /// exchange, where the routing key names a queue.
    Exchange {
        /// The exchange.
        exchange: String,
        /// The routing key.
        routing_key: String,
    },
    /// The event stays in the log, and no relay publishes it.
    Unpublished,
}
