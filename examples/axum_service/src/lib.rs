//! An axum service on a store: accounts, and an event for each change of a balance.
//!
//! | route | what it does |
//! |---|---|
//! | `POST /accounts/{name}` | adds `{"cents": 100}` to the balance and publishes an event |
//! | `GET /accounts/{name}` | answers with the balance |
//! | `GET /healthz` | 503 if the process should be restarted |
//! | `GET /readyz` | 503 if the service should get no traffic; with figures |
//!
//! `accounts` holds the handlers, `health` the two checks. This file starts and stops everything.

mod accounts;
mod health;

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use onewrite::broker::Publisher;
use onewrite::{BacklogQuota, BoxError, Relay, StopReport, Store};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// The queue that the events go to.
pub const QUEUE: &str = "accounts";
/// The name of the relay. It stays the same for the life of the file.
const RELAY: &str = "rabbit";
/// The most events that may wait for the broker. Beyond this, a change answers with 503.
const BACKLOG_MAX: u64 = 1_000_000;
/// The longest time that open requests get to finish, and the relay after them.
const GRACE: Duration = Duration::from_secs(10);

/// An open store with its relay.
#[derive(Debug)]
pub struct Service {
    store: Store,
    relay: Relay,
}

impl Service {
    /// Opens the store and starts the relay. The broker may be away.
    ///
    /// # Errors
    /// The store cannot be opened, or a setting of the publisher cannot work.
    pub fn open(path: impl AsRef<Path>, publisher: impl Publisher) -> onewrite::Result<Self> {
        let quota = BacklogQuota::events(BACKLOG_MAX);
        let store = Store::builder().backlog_quota(quota).open(path)?;
        let relay = store.relay(RELAY).spawn(publisher)?;
        Ok(Self { store, relay })
    }

    /// Serves until `stop` is ready. Then it finishes open requests, stops the relay and closes the
    /// store, in this order. Only a request that outlasts the grace meets a closed store.
    ///
    /// # Errors
    /// The listener or the store failed. Every answered change is durable all the same.
    pub async fn serve<S>(self, listener: TcpListener, stop: S) -> Result<StopReport, BoxError>
    where
        S: Future<Output = ()> + Send + 'static,
    {
        let (stopping, begun) = oneshot::channel();
        let stop = async move {
            stop.await;
            let _ = stopping.send(()); // the receiver is gone if the server has failed
        };
        let server = axum::serve(listener, router(self.store.clone())).with_graceful_shutdown(stop);
        let served = tokio::select! {
            served = server => served,
            () = too_long(begun) => Ok(()), // a client that never ends its request
        };
        // Events that are still unpublished stay in the log. The next start publishes them.
        let report = self.relay.stop_async(GRACE).await;
        self.store.close_async().await?;
        served?;
        Ok(report)
    }
}

fn router(store: Store) -> Router {
    Router::new()
        .route("/accounts/{name}", get(accounts::balance).post(accounts::change))
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .with_state(store)
}

/// Ends when the grace after the beginning of the stop is over.
async fn too_long(begun: oneshot::Receiver<()>) {
    match begun.await {
        Ok(()) => tokio::time::sleep(GRACE).await,
        Err(_) => std::future::pending().await,
    }
}

/// A future that is ready on SIGTERM or ctrl-c. Both signals are caught from this call on.
///
/// # Errors
/// The operating system refuses a handler.
#[cfg(unix)]
pub fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// A future that is ready on ctrl-c.
///
/// # Errors
/// The operating system refuses a handler.
#[cfg(windows)]
pub fn stop_signal() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut ctrl_c = tokio::signal::windows::ctrl_c()?;
    Ok(async move {
        ctrl_c.recv().await;
    })
}
