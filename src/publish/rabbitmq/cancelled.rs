//! Why the broker cancelled a consumer. AMQP has one word for it, without a reason; the broker is asked for more.

use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ErrorKind};

use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};

use super::convert::short;

/// RabbitMQ's code for what is not there, and its word for a queue that was deleted. A queue whose node is down has the same code.
const NOT_FOUND: u16 = 404;
const NO_QUEUE: &str = "no queue '";

/// The fault of a consumer that was cancelled while its connection lives.
pub(super) async fn why(connection: &Connection, queue: &str) -> Fault {
    let deadline = Duration::from_millis(CONNECT_MS_MAX);
    match tokio::time::timeout(deadline, look(connection, queue)).await {
        Ok(Ok(())) => Fault::new(
            FaultClass::Outage,
            "the broker cancelled the consumer, and its queue is there: perhaps a delivery was held beyond \
             `consumer_timeout` (RabbitMQ 4.3), or the queue moved or was made anew",
        ),
        Ok(Err(error)) => of_answer(&error),
        Err(_) => Fault::new(
            FaultClass::Outage,
            "the broker cancelled the consumer, and did not say whether its queue is there",
        ),
    }
}

/// Asks without declaring anything.
async fn look(connection: &Connection, queue: &str) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    // The name has been sent before: it is short.
    let Ok(name) = short("queue", queue) else { return Ok(()) };
    channel.queue_declare(name, options, FieldTable::default()).await?;
    channel.close(200, "bye".into()).await
}

fn of_answer(error: &lapin::Error) -> Fault {
    match error.kind() {
        ErrorKind::ProtocolError(said)
            if said.get_id() == NOT_FOUND && said.get_message().as_str().contains(NO_QUEUE) =>
        {
            Fault::new(FaultClass::Destination, "the broker cancelled the consumer: its queue is gone")
        }
        _ => Fault::new(FaultClass::Outage, format!("the broker cancelled the consumer: {error}")),
    }
}
