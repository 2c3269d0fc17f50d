//! The two checks that a supervisor or load balancer asks.
//!
//! **A broker that is away makes the service neither unhealthy nor unready**: the service goes on
//! taking changes, and the relay publishes them later. Only a backlog near its quota ends that.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use onewrite::{Error, RelayState, Stats, Store};
use serde::Serialize;

use crate::accounts::Failure;
use crate::{BACKLOG_MAX, RELAY};

/// The answer of `/readyz`.
#[derive(Debug, Serialize)]
pub(crate) struct Readiness {
    relay: String,
    backlog_events: u64,
    backlog_age_ms: Option<u64>,
    quarantined: u64,
}

/// Whether the process works. A poisoned store accepts nothing more until it is opened again, so
/// the process should be restarted.
pub(crate) async fn healthz(State(store): State<Store>) -> Result<StatusCode, Failure> {
    let stats = stats(store).await?;
    Ok(if is_healthy(&stats) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE })
}

/// Whether the service should get traffic.
pub(crate) async fn readyz(
    State(store): State<Store>,
) -> Result<(StatusCode, Json<Readiness>), Failure> {
    let stats = stats(store).await?;
    let status = if is_ready(&stats) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let readiness = Readiness {
        relay: relay_state(&stats)
            .map_or_else(|| "not running".into(), |state| format!("{state:?}")),
        backlog_events: stats.backlog_events,
        backlog_age_ms: stats.backlog_age_ms,
        quarantined: stats.quarantined,
    };
    Ok((status, Json(readiness)))
}

/// The figures of the store. Reading them may wait for the disk.
async fn stats(store: Store) -> Result<Stats, Failure> {
    let stats = tokio::task::spawn_blocking(move || store.stats()).await;
    Ok(stats.map_err(Error::app)??)
}

/// The state of the relay, as the store knows it. So a handler needs the store alone.
fn relay_state(stats: &Stats) -> Option<&RelayState> {
    stats.relays.get(RELAY)?.running.as_ref().map(|status| &status.state)
}

fn is_healthy(stats: &Stats) -> bool {
    stats.poisoned.is_none()
}

fn is_ready(stats: &Stats) -> bool {
    let relay_ended =
        matches!(relay_state(stats), None | Some(RelayState::Failed(_) | RelayState::Stopped));
    is_healthy(stats) && !relay_ended && stats.backlog_events < BACKLOG_MAX / 10 * 9
}

#[cfg(test)]
mod tests {
    use onewrite::{Fault, FaultClass, RelayStats, RelayStatus};

    use super::*;

    fn with_relay(state: RelayState) -> Stats {
        let mut status = RelayStatus::default();
        status.state = state;
        let mut relay = RelayStats::default();
        relay.running = Some(status);
        let mut stats = Stats::default();
        stats.relays.insert(RELAY.into(), relay);
        stats
    }

    #[test]
    fn a_broker_that_is_away_leaves_the_service_ready_until_the_backlog_is_long() {
        let away = RelayState::Disconnected(Fault::new(FaultClass::Outage, "connection refused"));
        let mut stats = with_relay(away);
        assert!(is_healthy(&stats) && is_ready(&stats));
        stats.backlog_events = BACKLOG_MAX;
        assert!(is_healthy(&stats) && !is_ready(&stats));
    }

    #[test]
    fn a_relay_that_has_ended_makes_the_service_unready() {
        assert!(is_ready(&with_relay(RelayState::Connected)));
        assert!(!is_ready(&with_relay(RelayState::Stopped)));
        assert!(!is_ready(&Stats::default()));
    }

    #[test]
    fn a_poisoned_store_makes_the_service_unhealthy() {
        let mut stats = with_relay(RelayState::Connected);
        stats.poisoned = Some("the disk failed".into());
        assert!(!is_healthy(&stats) && !is_ready(&stats));
    }
}
