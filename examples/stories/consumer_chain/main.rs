//! Three services in a row over RabbitMQ, each killed at random, and the money is still right.
//!
//! ```text
//!    clients           orders                       payments                         shipping
//!  (this process)     ┌─────────────┐ order.placed  ┌───────────────┐ payment.taken  ┌───────────────┐
//!     ── request ──>  │ orders.redb │ ── broker ──> │ payments.redb │ ── broker ──>  │ shipping.redb │
//!                     └─────────────┘               └───────────────┘ or .refused    └───────────────┘
//! ```
//!
//! Each service is a child process with a store of its own, and each hop is one transaction:
//!
//! - `orders` writes the order and appends `order.placed`, once per request: a client that got no
//!   answer sends the request again.
//! - `payments` marks the delivery, debits the customer, and appends `payment.taken` or
//!   `payment.refused`.
//! - `shipping` marks the delivery, takes the pieces from the stock, and enters the order in the
//!   final ledger.
//!
//! Nothing else keeps the three together: no distributed transaction, no lock, no clean-up job.
//! While orders go on, this process kills each service (`SIGKILL`) several times at random moments
//! and starts it again. Then it lets everything drain and compares the three files, row by row.
//! `--seed N` kills at the same moments again.
//!
//! Nothing needs to be installed: the broker is the library's in-process one. It lives in this
//! process and outlives the services, which publish and consume over loopback sockets. With
//! `AMQP_URL=amqp://guest:guest@localhost` the same story goes through RabbitMQ.
//!
//! | file | keeps |
//! |---|---|
//! | `orders`, `payments`, `shipping` | the three services: tables, and **the transaction of each hop** |
//! | `arrivals` | the notes of a consumer on each event, for the account |
//! | `service`, `plan` | the child process: store, relay, consumer; its input and output |
//! | `clients` | customers that repeat a request until they have an answer |
//! | `supervisor`, `mortal` | runs the services; kills each of them when its time has come |
//! | `account` | opens the three files at the end and compares them |
//! | `broker`, `consuming` | the in-process broker behind its doors, or RabbitMQ |
//! | `socket_source` | a `Source` of our own, over the socket |
//! | `tables`, `dice` | small helpers |
//!
//! Modules that other stories need too are in `../common`.

mod account;
mod arrivals;
mod broker;
#[path = "../common/child.rs"]
mod child;
mod clients;
mod consuming;
mod dice;
#[path = "../common/door.rs"]
#[expect(dead_code, reason = "this broker is never shut")]
mod door;
#[path = "../common/frames.rs"]
mod frames;
#[path = "../common/letter.rs"]
mod letter;
mod mortal;
mod orders;
mod payments;
mod plan;
#[path = "../common/publishing.rs"]
mod publishing;
#[path = "../common/report.rs"]
mod report;
mod service;
mod shipping;
#[path = "../common/socket_publisher.rs"]
mod socket_publisher;
mod socket_source;
mod supervisor;
mod tables;

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use onewrite::BoxError;

use crate::broker::Broker;
use crate::clients::{CLIENTS, REQUESTS};
use crate::mortal::KILLS;
use crate::plan::{Plan, Role};

/// The account is printed by then, in any case.
const DEADLINE: Duration = Duration::from_secs(100);

fn main() -> ExitCode {
    let outcome = match Plan::from_environment() {
        Some(plan) => plan.and_then(|plan| service::run(&plan)).map(|()| true),
        None => seed(std::env::args().skip(1)).and_then(run_the_story),
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

/// `--seed N`, or another one each time.
fn seed(mut arguments: impl Iterator<Item = String>) -> Result<u64, BoxError> {
    match (arguments.next().as_deref(), arguments.next(), arguments.next()) {
        (None, ..) => Ok(u64::from(SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos())),
        (Some("--seed"), Some(seed), None) => Ok(seed.parse()?),
        _ => Err("usage: consumer_chain [--seed N]".into()),
    }
}

/// `false` if a line of the account is wrong.
fn run_the_story(seed: u64) -> Result<bool, BoxError> {
    let begin = Instant::now();
    let broker = Broker::choose(std::env::var("AMQP_URL").ok())?;
    print_header(&broker, seed);
    // The three files are in this folder, which is removed at the end.
    let folder = tempfile::tempdir()?;
    let plans = Role::ALL.map(|role| broker.plan(role, folder.path()));
    let events = supervisor::run(&plans, &broker, seed, begin)?;
    if let Some(problem) = &events.problem {
        println!("         {problem}"); // at once: the files may be of no use
    }
    let account = account::take(folder.path(), &events, begin)?;
    println!("{account}");
    Ok(account.is_right())
}

fn print_header(broker: &Broker, seed: u64) {
    let seconds = broker.writing().as_secs();
    println!(
        "Three services in a row: orders -> payments -> shipping. Each is a process with a file of its own."
    );
    println!("  clients          {CLIENTS} threads in this process, {REQUESTS} orders in about {seconds} s");
    println!("  broker           {}", broker.description());
    println!(
        "Each service is ended {KILLS} times by kill -9, at random moments, and started again. --seed {seed}\n"
    );
}
