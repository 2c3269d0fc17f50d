//! Why the broker cancelled a consumer. AMQP has one word for it, without a reason; the broker is asked for more.

use std::time::Duration;

use lapin::Connection;

use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};

use super::cause::{Answer, about};

/// The fault of a consumer that was cancelled while its connection lives.
pub(super) async fn why(connection: &Connection, queue: &str) -> Fault {
    let deadline = Duration::from_millis(CONNECT_MS_MAX);
    let answer = tokio::time::timeout(deadline, about(connection, queue)).await.unwrap_or(Answer::Unasked);
    match answer {
        Answer::There => Fault::new(
            FaultClass::Outage,
            "the broker cancelled the consumer, and its queue is there: perhaps a delivery was held beyond \
             `consumer_timeout` (RabbitMQ 4.3), or the queue moved or was made anew",
        ),
        Answer::Missing => {
            Fault::new(FaultClass::Destination, "the broker cancelled the consumer: its queue is gone")
        }
        Answer::Away(why) => {
            Fault::new(FaultClass::Outage, format!("the broker cancelled the consumer: {why}"))
        }
        Answer::Unasked => Fault::new(
            FaultClass::Outage,
            "the broker cancelled the consumer, and did not say whether its queue is there",
        ),
    }
}
