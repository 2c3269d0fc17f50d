//! Runs the service until SIGTERM or ctrl-c.
//!
//! ```text
//! cargo run --manifest-path examples/axum_service/Cargo.toml
//! curl -i localhost:3000/accounts/alice -d '{"cents": 500}' -H 'content-type: application/json'
//! curl -i localhost:3000/readyz
//! ```
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `STORE` | the file of the store | `accounts.redb` |
//! | `LISTEN` | address and port; port 0 takes a free one | `127.0.0.1:3000` |
//! | `AMQP_URL` | a RabbitMQ: `amqp://guest:guest@127.0.0.1:5672/%2f` | a broker in memory |

use std::env;

use onewrite::BoxError;
use onewrite::broker::{MemoryBroker, RabbitMq, Topology};
use onewrite_axum_service::{QUEUE, Service, stop_signal};
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let path = env::var("STORE").unwrap_or_else(|_| "accounts.redb".into());
    let address = env::var("LISTEN").unwrap_or_else(|_| "127.0.0.1:3000".into());
    let service = match env::var("AMQP_URL") {
        Ok(url) => {
            let publisher = RabbitMq::new(&url)?.declare(Topology::new().queue(QUEUE));
            Service::open(path, publisher)?
        }
        Err(_) => {
            // The content of this broker ends with the process: it serves to try the service out.
            let broker = MemoryBroker::new();
            broker.declare_queue(QUEUE, Default::default());
            Service::open(path, broker.publisher())?
        }
    };
    let stop = stop_signal()?;
    let listener = TcpListener::bind(address).await?;
    println!("listening on {}", listener.local_addr()?);

    let report = service.serve(listener, stop).await?;
    println!("stopped: {} confirmed, {} wait", report.confirmed, report.backlog_events);
    Ok(())
}
