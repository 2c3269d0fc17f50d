//! The AMQP properties that few events set, and the checks of header values.

use super::{Event, RecordedEvent, owned, short};
use crate::error::EventError;
use crate::limits::{HEADER_VALUES_MAX, TABLE_NESTING_MAX};
use crate::message::HeaderValue;
use crate::text::Text;

/// The AMQP properties of an event beyond content type, correlation id and headers.
///
/// The library sets three properties itself: `message_id` is the event's id, `type` its type, and
/// `timestamp` the time of its append.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
/// use onewrite::{Event, Properties};
/// store.write(|tx| tx.append(Event::bytes("paid", "1").priority(5).reply_to("answers").to("", "payments")))?;
/// let event = store.read()?.event(0)?.expect("appended above");
/// let properties: &Properties = event.properties();
/// assert_eq!((properties.priority, properties.reply_to.as_deref()), (Some(5), Some("answers")));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Properties {
    /// `content_encoding` of the payload.
    pub content_encoding: Option<Text>,
    /// `reply_to`.
    pub reply_to: Option<Text>,
    /// `user_id`.
    pub user_id: Option<Text>,
    /// `app_id`, instead of the relay's.
    pub app_id: Option<Text>,
    /// `cluster_id`.
    pub cluster_id: Option<Text>,
    /// `priority`.
    pub priority: Option<u8>,
    /// `expiration`, in milliseconds.
    pub expiration_ms: Option<u32>,
    /// `delivery_mode` 1: no queue needs to keep the message when the broker restarts.
    pub transient: bool,
    /// Whether the event is published without AMQP's `mandatory`. A broker that finds no queue for
    /// it then drops and confirms it.
    pub may_be_unroutable: bool,
}

pub(crate) const NONE: &Properties = &Properties {
    content_encoding: None,
    reply_to: None,
    user_id: None,
    app_id: None,
    cluster_id: None,
    priority: None,
    expiration_ms: None,
    transient: false,
    may_be_unroutable: false,
};

impl Event {
    fn properties(&mut self) -> &mut Properties {
        self.properties.get_or_insert_default()
    }

    /// Sets the AMQP `content_encoding` of the payload, such as `gzip`. The library neither encodes
    /// nor decodes.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", vec![0x1f, 0x8b]).content_encoding("gzip").to("", "payments").validate().is_ok());
    /// ```
    #[must_use]
    pub fn content_encoding(mut self, encoding: impl Into<String>) -> Self {
        self.properties().content_encoding = Some(owned(encoding));
        self
    }

    /// Sets the AMQP `reply_to`: the queue where the sender expects an answer.
    ///
    /// The pseudo-queue `amq.rabbitmq.reply-to` does not work here. It needs a consumer on the
    /// publisher's channel, and RabbitMQ refuses the event without one.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("quote", "1").reply_to("answers").to("", "quotes").validate().is_ok());
    /// ```
    #[must_use]
    pub fn reply_to(mut self, queue: impl Into<String>) -> Self {
        self.properties().reply_to = Some(owned(queue));
        self
    }

    /// Sets the AMQP `user_id`. RabbitMQ refuses an event whose user is not the relay's login,
    /// unless that login may impersonate. A refused event goes to quarantine.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", "1").user_id("bank").to("", "payments").validate().is_ok());
    /// ```
    #[must_use]
    pub fn user_id(mut self, user: impl Into<String>) -> Self {
        self.properties().user_id = Some(owned(user));
        self
    }

    /// Sets the AMQP `app_id` of this event. Without this call the event has the relay's
    /// [`app_id`](crate::RelayBuilder::app_id).
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", "1").app_id("till-7").to("", "payments").validate().is_ok());
    /// ```
    #[must_use]
    pub fn app_id(mut self, app: impl Into<String>) -> Self {
        self.properties().app_id = Some(owned(app));
        self
    }

    /// Sets the AMQP `cluster_id`. AMQP 0-9-1 has deprecated the property; RabbitMQ carries it.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("paid", "1").cluster_id("eu-1").to("", "payments").validate().is_ok());
    /// ```
    #[must_use]
    pub fn cluster_id(mut self, cluster: impl Into<String>) -> Self {
        self.properties().cluster_id = Some(owned(cluster));
        self
    }

    /// Sets the AMQP `priority`. It matters in queues that were declared with `x-max-priority`. The
    /// relay ignores it: events of one key keep their order on the way to the queue.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("alarm", "1").priority(9).to("", "alarms").validate().is_ok());
    /// ```
    #[must_use]
    pub fn priority(mut self, priority: u8) -> Self {
        self.properties().priority = Some(priority);
        self
    }

    /// Sets the AMQP `expiration`: how long the message may wait in a queue, in milliseconds.
    /// RabbitMQ takes 49 days at most.
    ///
    /// The broker drops or dead-letters an expired message, although the relay has its confirm.
    /// [`expires`](Self::expires) bounds the time that the event waits *here*.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("quote", "1").expiration_ms(60_000).to("", "quotes").validate().is_ok());
    /// ```
    #[must_use]
    pub fn expiration_ms(mut self, ms: u32) -> Self {
        self.properties().expiration_ms = Some(ms);
        self
    }

    /// Publishes the event with the AMQP `delivery_mode` 1 instead of 2. **Risk:** a broker that
    /// restarts loses such a message from a classic queue, although the relay has its confirm.
    /// Quorum queues keep the message all the same.
    ///
    /// ```
    /// use onewrite::Event;
    /// assert!(Event::bytes("cursor.moved", "1").transient().to("", "screens").validate().is_ok());
    /// ```
    #[must_use]
    pub fn transient(mut self) -> Self {
        self.properties().transient = true;
        self
    }

    /// Publishes the event without AMQP's `mandatory`. **Risk:** if no queue takes the event, the
    /// broker drops and confirms it. The event then counts as delivered, and nothing reports the
    /// loss. Causes are an exchange without bindings, a deleted queue, or a durable queue whose
    /// node is down.
    ///
    /// Use it for exchanges that return messages that they will deliver, such as
    /// `x-delayed-message`, and for events that need no reader.
    /// [`RelayBuilder::may_be_unroutable`](crate::RelayBuilder::may_be_unroutable) sets it for all
    /// events of an exchange.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// # let broker = onewrite::broker::MemoryBroker::new();
    /// # let relay = store.relay("rabbit").spawn(broker.publisher())?;
    /// use onewrite::Event;
    /// let event = || Event::bytes("cursor.moved", "1").may_be_unroutable().to("", "nobody");
    /// store.write(move |tx| tx.append(event()))?.wait_confirmed(Duration::from_secs(5))?; // and dropped: there is no queue
    /// # let _ = relay.stop(Duration::from_secs(5));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn may_be_unroutable(mut self) -> Self {
        self.properties().may_be_unroutable = true;
        self
    }
}

impl RecordedEvent {
    /// Returns the AMQP properties that few events set.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").expiration_ms(500).to("", "payments")))?;
    /// let event = store.read()?.event(0)?.expect("appended above");
    /// assert_eq!(event.properties().expiration_ms, Some(500));
    /// assert_eq!(event.properties().priority, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn properties(&self) -> &Properties {
        self.event.properties.as_deref().unwrap_or(NONE)
    }
    /// Returns the AMQP `correlation_id`.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let store = onewrite::Store::open(folder.path().join("a.redb"))?;
    /// store.write(|tx| tx.append(onewrite::Event::bytes("paid", "1").correlation_id("request-17").to("", "payments")))?;
    /// assert_eq!(store.read()?.event(0)?.expect("appended above").correlation_id(), Some("request-17"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.event.correlation_id.as_deref()
    }
}

impl Properties {
    /// Checks that a message can carry the properties.
    pub(super) fn validate(&self) -> Result<(), EventError> {
        let Self { content_encoding, reply_to, user_id, app_id, cluster_id, .. } = self;
        for (field, value) in [
            ("content_encoding", content_encoding),
            ("reply_to", reply_to),
            ("user_id", user_id),
            ("app_id", app_id),
            ("cluster_id", cluster_id),
        ] {
            if let Some(value) = value {
                short(field, value)?;
            }
        }
        Ok(())
    }
}

/// Checks the header values of one event.
#[derive(Debug, Default)]
pub(super) struct HeaderCheck {
    values: usize,
}

impl HeaderCheck {
    /// Checks one value: its content, its depth, and the count of values in all headers. `header`
    /// is the header's name.
    pub(super) fn value(&mut self, header: &str, value: &HeaderValue) -> Result<(), EventError> {
        self.nested(header, value, 1)
    }

    /// Checks a value in a table or array at this depth. The headers are the table at depth 1.
    fn nested(&mut self, header: &str, value: &HeaderValue, depth: usize) -> Result<(), EventError> {
        self.values += 1;
        if self.values > HEADER_VALUES_MAX {
            return Err(EventError::TooManyHeaderValues { max: HEADER_VALUES_MAX });
        }
        if value.is_odd_float() {
            return Err(EventError::OddFloat { header: header.to_owned() });
        }
        if !matches!(value, HeaderValue::Table(_) | HeaderValue::Array(_)) {
            return Ok(());
        }
        if depth >= TABLE_NESTING_MAX {
            return Err(EventError::NestedTooDeep { header: header.to_owned(), max: TABLE_NESTING_MAX });
        }
        match value {
            HeaderValue::Array(values) => {
                values.iter().try_for_each(|value| self.nested(header, value, depth + 1))
            }
            HeaderValue::Table(entries) => {
                entries.iter().try_for_each(|(name, value)| {
                    short(name, name)?;
                    self.nested(header, value, depth + 1)
                })?;
                let mut names: Vec<_> = entries.iter().map(|(name, _)| name.as_str()).collect();
                names.sort_unstable();
                let twice = names.windows(2).find_map(|pair| match pair {
                    [left, right] if left == right => Some((*left).to_owned()),
                    _ => None,
                });
                twice.map_or(Ok(()), |name| Err(EventError::DuplicateHeader { name }))
            }
            _ => Ok(()),
        }
    }
}
