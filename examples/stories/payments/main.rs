//! The 100-dollar transfer: money moves in one service, and credit offers follow in another.
//!
//! A `kill -9` of the first service and an outage of the broker come on the way. At the end both
//! services must agree.
//!
//! ```text
//!   payment service (child process, killed midway)         this process
//!  ┌──────────────────────────────────────────────┐       ┌─────────────────────────────────────────┐
//!  │ tellers ──transfer + event──> payments.redb  │       │ broker ──> credit service ──> credit.redb│
//!  │                 one write          │ relay ──┼──TCP──┼──^                                       │
//!  └──────────────────────────────────────────────┘       └─────────────────────────────────────────┘
//! ```
//!
//! `cargo run --release --example payments` needs nothing installed: the broker is the library's
//! in-process one. That broker keeps its queues in memory, so it lives in this process, which
//! supervises. The payment service reaches it over a loopback socket. Confirmed events thus outlive
//! the payment service, as with a real broker.
//!
//! With `AMQP_URL=amqp://guest:guest@localhost` the same story goes through RabbitMQ. This process
//! cannot stop your RabbitMQ. So the connections go through a small proxy here, and the proxy goes
//! away. Kill RabbitMQ itself while this runs, if you like, and start it again.
//!
//! | file | keeps |
//! |---|---|
//! | `bank` | the tables of the payment service, and **the one transaction** of this story |
//! | `payment_service` | the child process: tellers, relay, progress |
//! | `credit_service` | the consumer and its tables |
//! | `supervisor` | starts, kills and watches the child; takes the broker away |
//! | `account` | opens both files at the end and compares them, row by row |
//! | `broker`, `door` | the chosen broker, and the loopback door that can be shut |
//! | `socket_publisher`, `publishing`, `frames`, `letter` | our own `Publisher`, over the socket |
//!
//! Modules that other stories need too are in `../common`.

mod account;
mod bank;
mod broker;
#[path = "../common/child.rs"]
mod child;
mod credit_service;
#[path = "../common/door.rs"]
mod door;
#[path = "../common/frames.rs"]
mod frames;
#[path = "../common/letter.rs"]
mod letter;
mod payment_service;
#[path = "../common/publishing.rs"]
mod publishing;
#[path = "../common/report.rs"]
mod report;
#[path = "../common/socket_publisher.rs"]
mod socket_publisher;
mod supervisor;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use onewrite::{BoxError, Store};

use crate::broker::Broker;
use crate::payment_service::Plan;

/// The number of transfers.
const TRANSFERS: u32 = 20_000;
/// Threads of the payment service that make the transfers.
const TELLERS: u32 = 8;
/// The account is printed by then, in any case.
const DEADLINE: Duration = Duration::from_secs(100);

fn main() -> ExitCode {
    let outcome = match Plan::from_environment() {
        Some(plan) => plan.and_then(|plan| payment_service::run(&plan)).map(|()| true),
        None => run_the_story(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `false` if a line of the account is wrong.
fn run_the_story() -> Result<bool, BoxError> {
    let begin = Instant::now();
    let broker = Broker::choose(std::env::var("AMQP_URL").ok())?;
    print_header(&broker);
    // Both files are in this folder, which is removed at the end.
    let folder = tempfile::tempdir()?;
    let credit = Store::open(folder.path().join("credit.redb"))?;
    let consumer = broker.consume(&credit)?;

    let plan = broker.plan(folder.path());
    let events = supervisor::run(&plan, &broker, &consumer, begin)?;

    // The child has ended, so the file is free. Confirmed events may still be on their way to the
    // credit service.
    let payments = Store::open(plan.store_path())?;
    let expected = bank::transfers(&payments)?.len();
    credit_service::wait_for(&consumer, expected, broker.timeout(), begin + DEADLINE);
    let stats = consumer.stop(Duration::from_secs(5));

    let account = account::take(&payments, &credit, &stats, &events, begin.elapsed())?;
    payments.close()?;
    credit.close()?;
    println!("{account}");
    Ok(account.is_right())
}

fn print_header(broker: &Broker) {
    let (seconds, [what, how]) = (broker.seconds(), broker.description());
    println!(
        "Payments and credit offers: one transaction writes a transfer and its event; a relay publishes it."
    );
    println!(
        "  payment service  a child process: {TELLERS} threads, {TRANSFERS} transfers of $100 in about {seconds} s"
    );
    println!(
        "  credit service   in this process, with its own store: raises the payer's offer once per transfer"
    );
    println!("  broker           {what}");
    println!("                   {how}");
    println!("A third of the way the payment service is ended by kill -9 and started again.");
    println!("At two thirds {} for 2 s.\n", broker.outage_description());
}
