//! The reason why the broker cancelled a consumer. AMQP's cancel carries no reason, so the source
//! asks the broker for the queue.

use lapin::Connection;

use crate::message::{Fault, FaultClass};
use crate::printable::printable;

use super::cause::{Answer, UNANSWERED, about};

/// Returns the fault of a consumer that was cancelled on a live connection.
pub(super) async fn why(connection: &Connection, queue: &str) -> Fault {
    match about(connection, queue).await {
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
        Answer::Unanswered => {
            let text =
                format!("the broker cancelled the consumer: queue `{}`: {UNANSWERED}", printable(queue));
            Fault::new(FaultClass::Outage, text)
        }
        Answer::NoChannel | Answer::Unasked => Fault::new(
            FaultClass::Outage,
            "the broker cancelled the consumer, and did not say whether its queue is there",
        ),
    }
}
