//! A message as it is handed to lapin.

use std::sync::Arc;
use std::time::Duration;

use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};

use super::convert::{header_frame_len_max, short, to_properties};
use crate::message::{Fault, FaultClass, Message, Outgoing};

/// A message that can certainly be encoded.
pub(super) struct Prepared {
    pub(super) exchange: ShortString,
    pub(super) routing_key: ShortString,
    pub(super) properties: BasicProperties,
    pub(super) message: Arc<Message>,
    pub(super) mandatory: bool,
}

impl Prepared {
    pub(super) fn new(outgoing: &Outgoing, frame_bytes_max: usize) -> Result<Self, Fault> {
        let message = &outgoing.message;
        if message.message_id.is_none() {
            return Err(Fault::new(
                FaultClass::Message,
                "field `message_id` is missing; returns are matched by it",
            ));
        }
        let header_bytes = header_frame_len_max(message);
        if header_bytes > frame_bytes_max {
            return Err(Fault::new(
                FaultClass::Message,
                format!(
                    "properties and headers take {header_bytes} bytes; a frame of this broker takes {frame_bytes_max}"
                ),
            ));
        }
        Ok(Self {
            exchange: short("exchange", &outgoing.exchange)?,
            routing_key: short("routing_key", &outgoing.routing_key)?,
            properties: to_properties(message)?,
            message: Arc::clone(message),
            mandatory: outgoing.mandatory,
        })
    }

    /// Publishes and waits for the broker's confirm. The first poll does everything up to drawing
    /// the tag.
    pub(super) async fn send(self, channel: &Channel) -> lapin::Result<Confirmation> {
        let Self { exchange, routing_key, properties, message, mandatory } = self;
        let options = BasicPublishOptions { mandatory, immediate: false };
        channel.basic_publish(exchange, routing_key, options, &message.payload, properties).await?.await
    }
}

/// The fault of a message without a confirm.
pub(super) fn no_confirm_within(deadline: Duration) -> Fault {
    Fault::new(FaultClass::Outage, format!("no confirm within {} s", deadline.as_secs_f64()))
}
