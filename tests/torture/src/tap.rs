//! The tap: plain AMQP, no library. Every message of its queue goes to a file, and is acknowledged once it is on disk.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use onewrite_torture_checker::formats::TapMessage;

use crate::Result;
use crate::plan::{self, Plan, TAP_QUEUE};

const PREFETCH: u16 = 1000;
/// Messages that share one sync.
const BATCH: usize = 512;

pub(crate) fn run(plan: &Plan) -> Result<()> {
    let closing = plan::closing();
    let mut file = File::options().create(true).append(true).open(plan.folder.join("tap.bin"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    while !closing.load(Ordering::SeqCst) {
        // A broker that is away is nothing to report: it is killed all the time.
        if let Err(error) = runtime.block_on(listen(plan, &mut file, &closing)) {
            if error.downcast_ref::<std::io::Error>().is_some() {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

async fn listen(plan: &Plan, file: &mut File, closing: &Arc<AtomicBool>) -> Result<()> {
    let url = format!("{}?heartbeat=5&frame_max=131072&connection_timeout=5000", plan.url);
    let connection = Connection::connect(&url, ConnectionProperties::default());
    let connection =
        tokio::time::timeout(Duration::from_secs(10), connection).await.map_err(|_| "no answer")??;
    let channel = connection.create_channel().await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    let mut consumer =
        channel.basic_consume(TAP_QUEUE.into(), "tap".into(), options, FieldTable::default()).await?;
    let mut frames = Vec::new();
    while !closing.load(Ordering::SeqCst) {
        let Ok(first) = tokio::time::timeout(Duration::from_millis(200), consumer.next()).await else {
            continue;
        };
        let Some(first) = first else { break };
        let mut last = first?;
        frames.clear();
        read(&last).encode_into(&mut frames);
        for _ in 1..BATCH {
            let Ok(more) = tokio::time::timeout(Duration::from_millis(5), consumer.next()).await else {
                break;
            };
            let Some(Ok(more)) = more else { break };
            read(&more).encode_into(&mut frames);
            last = more;
        }
        file.write_all(&frames)?;
        file.sync_data()?;
        last.acker.ack(BasicAckOptions { multiple: true }).await?;
    }
    Ok(())
}

fn read(delivery: &Delivery) -> TapMessage {
    let properties = &delivery.properties;
    let headers = properties.headers().as_ref();
    let header = |name: &str| headers.and_then(|headers| headers.inner().get(name));
    let text = |name: &str| match header(name) {
        Some(AMQPValue::LongString(text)) => Some(text.to_string()),
        _ => None,
    };
    let number = |name: &str| match header(name) {
        Some(AMQPValue::LongLongInt(number)) => number.cast_unsigned(),
        _ => u64::MAX,
    };
    TapMessage {
        exchange: delivery.exchange.to_string(),
        routing_key: delivery.routing_key.to_string(),
        message_id: properties.message_id().as_ref().map_or_else(String::new, ToString::to_string),
        store: text("onewrite-store").unwrap_or_default(),
        epoch: number("onewrite-epoch"),
        lane: number("onewrite-lane"),
        lane_number: number("onewrite-lane-number"),
        crc: number("onewrite-crc"),
        sequence: text("cloudEvents_sequence").and_then(|text| text.parse().ok()).unwrap_or(u64::MAX),
        key: text("cloudEvents_partitionkey"),
        resend: matches!(header("onewrite-resend"), Some(AMQPValue::Boolean(true))),
        redelivered: delivery.redelivered,
        body: delivery.data.clone(),
    }
}
