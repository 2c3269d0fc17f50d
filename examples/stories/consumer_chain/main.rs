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
//! - `orders` writes the order and appends `order.placed`, once per request: a client that got no answer asks again.
//! - `payments` marks the delivery, debits the customer, and appends `payment.taken` or `payment.refused`.
//! - `shipping` marks the delivery, takes the pieces from the stock, and enters the order in the final ledger.
//!
//! Nothing else keeps the three together: no distributed transaction, no lock, no clean-up job. This process kills each
//! of them (`SIGKILL`) several times at random moments while orders go on, starts it again, lets everything drain, and
//! then compares the three files, row by row. `--seed N` kills at the same moments again.
//!
//! Nothing needs to be installed: the broker is the library's in-process one, which lives in this process, so that it
//! outlives the services. They publish and consume over loopback sockets. With
//! `AMQP_URL=amqp://guest:guest@localhost` the same story goes through RabbitMQ.
//!
//! | file | keeps |
//! |---|---|
//! | `orders`, `payments`, `shipping` | the three services: their tables, and **the transaction of each hop** |
//! | `arrivals` | what a consumer notes of each event, for the account |
//! | `service`, `plan` | the child process: store, relay, consumer; what it is told and tells |
//! | `clients` | customers that ask until they have an answer |
//! | `supervisor`, `mortal` | runs the services; kills each of them when its time has come |
//! | `account` | opens the three files at the end and compares them |
//! | `broker`, `consuming` | the in-process broker behind its doors, or RabbitMQ |
//! | `socket_source` | a `Source` of our own, over the socket |
//! | `tables`, `dice` | small helpers |
//!
//! What other examples need too is in `../common`.

mod account;
mod arrivals;
#[path = "../common/book.rs"]
mod book;
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

/// Whatever happens, the account is printed by then.
const DEADLINE: Duration = Duration::from_secs(100);

fn main() -> ExitCode {
    let outcome = match Plan::from_environment() {
        Some(plan) => plan.and_then(|plan| service::run(&plan)).map(|()| true),
        None => seed(std::env::args().skip(1)).and_then(tell_the_story),
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
fn tell_the_story(seed: u64) -> Result<bool, BoxError> {
    let begin = Instant::now();
    let broker = Broker::choose(std::env::var("AMQP_URL").ok())?;
    print_header(&broker, seed);
    // The three files live here, and go with it.
    let folder = tempfile::tempdir()?;
    let plans = Role::ALL.map(|role| broker.plan(role, folder.path()));
    let events = supervisor::run(&plans, &broker, seed, begin)?;
    if let Some(problem) = &events.problem {
        println!("         {problem}"); // at once: what is in the files may be of no use
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
