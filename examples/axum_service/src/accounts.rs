//! The handlers of accounts.
//!
//! `write_async` is a future: a change waits for the disk without blocking a thread. A read may
//! wait for the disk too, so the read runs on a thread for blocking work.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use onewrite::redb::{ReadableTable, TableDefinition};
use onewrite::{Error, ErrorKind, Event, Store};
use serde::{Deserialize, Serialize};

use crate::QUEUE;

/// Cents by account.
const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");

/// The body of a change.
#[derive(Debug, Deserialize)]
pub(crate) struct Change {
    /// Negative to take money out.
    cents: i64,
}

/// The body of an answer.
#[derive(Debug, Serialize)]
pub(crate) struct Balance {
    cents: u64,
}

/// The payload of an event.
#[derive(Debug, Serialize)]
struct Changed<'a> {
    account: &'a str,
    cents: i64,
    balance: u64,
}

/// Changes the balance and appends the event, in one transaction. The answer comes once both are
/// durable; the relay publishes the event afterwards.
///
/// A client that gets no answer does not know whether the change took place. If your clients repeat
/// requests, take an id from them and call `write_once_async` instead.
pub(crate) async fn change(
    State(store): State<Store>,
    Path(account): Path<String>,
    Json(Change { cents }): Json<Change>,
) -> Result<(StatusCode, Json<Balance>), Failure> {
    let written = store.write_async(move |tx| {
        let mut accounts = tx.open_table(ACCOUNTS)?;
        let before = accounts.get(&*account)?.map_or(0, |row| row.value());
        let too_little = || Error::app("the balance is too small or too large for this change");
        let balance = before.checked_add_signed(cents).ok_or_else(too_little)?;
        accounts.insert(&*account, balance)?;
        let changed = Changed { account: &account, cents, balance };
        tx.append(Event::json("account.changed", &changed)?.key(&*account).to_queue(QUEUE))?;
        Ok(balance)
    });
    let cents = written.await?.into_value();
    Ok((StatusCode::CREATED, Json(Balance { cents })))
}

/// The balance as of the last commit.
pub(crate) async fn balance(
    State(store): State<Store>,
    Path(account): Path<String>,
) -> Result<Json<Balance>, Failure> {
    let read = tokio::task::spawn_blocking(move || {
        let accounts = store.read()?.open_table(ACCOUNTS)?;
        Ok::<_, Error>(accounts.get(&*account)?.map_or(0, |row| row.value()))
    });
    let cents = read.await.map_err(Error::app)??;
    Ok(Json(Balance { cents }))
}

/// An error of the store, as an answer.
#[derive(Debug)]
pub(crate) struct Failure(Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = match error.kind() {
            ErrorKind::App | ErrorKind::Conflict => StatusCode::CONFLICT,
            ErrorKind::Invalid => StatusCode::BAD_REQUEST,
            ErrorKind::NotFound => StatusCode::NOT_FOUND,
            ErrorKind::TryLater => StatusCode::SERVICE_UNAVAILABLE, // the backlog quota is reached
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status.is_client_error() {
            return (status, error.to_string()).into_response();
        }
        // The text names files of this machine: it is for the log alone.
        eprintln!("a request failed: {error}");
        status.into_response()
    }
}
