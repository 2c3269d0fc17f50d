//! The in-process broker's end of a consumer's connection, and the frames that go over it.

use std::collections::BTreeMap;
use std::io::{self, BufReader, BufWriter, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use onewrite::broker::{
    Delivery, DeliveryTag, Epoch, EventReceiver, MemoryBroker, Settlement, Source, SourceEvent, SourceEvents,
};
use serde::{Deserialize, Serialize};

use crate::frames;
use crate::letter::Letter;

/// From the consumer, first on each connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Subscribe {
    pub(crate) queue: String,
    pub(crate) prefetch: u16,
}

/// From the consumer, after that: the outcomes of deliveries, by their tags, in order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Settle(pub(crate) Vec<(u64, Verdict)>);

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) enum Verdict {
    Acknowledge,
    Requeue,
    Reject,
}

/// From the broker. `Consuming` comes first.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum News {
    Consuming,
    Delivery { tag: u64, exchange: String, routing_key: String, redelivered: bool, letter: Box<Letter> },
}

/// The queues. Each serves one consumer at a time: the unsettled deliveries of a killed consumer
/// are back in the queue before the next consumer gets anything. Two at once could swap the order.
pub(crate) type Queues = BTreeMap<String, Mutex<()>>;

/// Serves one connection: hands out deliveries until the connection ends. Then the unsettled
/// deliveries go back.
pub(crate) fn serve(broker: &MemoryBroker, queues: &Queues, stream: &TcpStream) -> io::Result<()> {
    let mut from = BufReader::new(stream);
    let Subscribe { queue, prefetch } = frames::read(&mut from)?;
    let lock = queues.get(&queue).ok_or_else(|| io::Error::other("there is no such queue"))?;
    let _consuming = lock.lock().unwrap_or_else(PoisonError::into_inner);
    let (events, reported) = SourceEvents::channel();
    let mut source = broker.source(&queue);
    source.start(events, prefetch).map_err(io::Error::other)?;
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = hand_out(stream, &reported);
            // The other thread must notice if the broker has ended the connection.
            let _ = stream.shutdown(Shutdown::Both);
        });
        let ended = take_back(&mut source, &mut from);
        source.stop(Duration::ZERO); // ends the other thread too
        ended
    })
}

/// Writes the deliveries of the queue. Flushes when no delivery waits.
fn hand_out(stream: &TcpStream, reported: &EventReceiver<SourceEvent>) -> io::Result<()> {
    let mut to = BufWriter::new(stream);
    while let Ok(first) = reported.recv() {
        for event in std::iter::once(first).chain(reported.try_iter()) {
            match event {
                SourceEvent::Up { .. } => frames::write(&mut to, &News::Consuming)?,
                SourceEvent::Delivery(delivery) => frames::write(&mut to, &News::from(*delivery))?,
                _ => return Ok(()),
            }
        }
        to.flush()?;
    }
    Ok(())
}

impl From<Delivery> for News {
    fn from(delivery: Delivery) -> Self {
        let Delivery { tag, exchange, routing_key, redelivered, message, .. } = delivery;
        Self::Delivery {
            tag: tag.tag,
            exchange,
            routing_key,
            redelivered,
            letter: Box::new(Letter::new(message)),
        }
    }
}

/// Settles deliveries as the consumer asks, until the connection ends.
fn take_back(source: &mut impl Source, from: &mut BufReader<&TcpStream>) -> io::Result<()> {
    // A connection has one source, which is connected once.
    let epoch = Epoch(1);
    loop {
        let Settle(settled) = frames::read(from)?;
        let settlement = |verdict| match verdict {
            Verdict::Acknowledge => Settlement::Acknowledge,
            Verdict::Requeue => Settlement::Requeue,
            Verdict::Reject => Settlement::Reject,
        };
        let settled = settled.into_iter();
        source.settle(
            settled.map(|(tag, verdict)| (DeliveryTag { epoch, tag }, settlement(verdict))).collect(),
        );
    }
}
