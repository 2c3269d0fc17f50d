//! RabbitMQ, over AMQP 0-9-1: [`RabbitMq`] publishes, [`RabbitMqSource`] consumes.
//!
//! Each lives on one thread of its own, with a current-thread runtime; nothing of lapin or tokio is seen outside this
//! folder. It owns its connection: lapin's recovery is off, each connection is a new [`Epoch`], and no channel
//! outlives an error.
//!
//! | file | keeps |
//! |---|---|
//! | `uri`, `options`, `topology` | the settings; passwords are in `uri` alone |
//! | `background`, `pace` | the thread and its stop; the waits between attempts |
//! | `connection`, `classify`, `convert` | lapin, tamed: deadlines, faults, messages |
//! | `publisher`, `isolated`, `settle` | publishing; `settle` is pure |
//! | `source`, `consumer`, `acks` | consuming; `acks` is pure |
//!
//! **Logs.** Ours name host, virtual host, epoch and fault. lapin's thread logs nothing (see `connection`); its tasks on
//! our thread log little, but at `TRACE` they may show frames: keep the target `lapin` off `TRACE` in production.

mod acks;
mod background;
mod classify;
mod connection;
mod consumer;
mod convert;
mod isolated;
mod options;
mod pace;
mod publisher;
mod settle;
mod source;
mod topology;
mod uri;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{self, error::TrySendError};

use crate::error::SettingError;
use crate::limits::WINDOW_EVENTS_MAX;
use crate::message::{Fault, FaultClass, Outcome, Outgoing, Ticket};
use crate::publish::{Epoch, Publisher, PublisherEvent, PublisherEvents};

use background::Background;
use options::Options;

pub use source::RabbitMqSource;
pub use topology::Topology;

/// Room for the largest window, and for what is in it from an epoch that has just ended.
const COMMANDS_MAX: usize = 2 * WINDOW_EVENTS_MAX;

/// Publishes to RabbitMQ: persistent, mandatory, confirmed.
///
/// [`Outcome::Confirmed`] is told only of a message that the broker confirmed and did not return. A message whose
/// exchange is missing or closed to us makes the broker close the channel; that is told as a
/// [`PublisherEvent::Down`] of class [`FaultClass::Destination`], and the relay finds the culprit by resending in
/// isolation. The connection is kept alive with heartbeats and made anew after each failure, with jittered backoff.
///
/// A queue that overflows with `drop-head`, RabbitMQ's default, confirms a message and then deletes an older one; no
/// publisher can see that. Use `x-overflow: reject-publish`, which is told as [`Outcome::Nacked`].
///
/// ```no_run
/// use std::time::Duration;
/// use onewrite::publish::{RabbitMq, Topology};
///
/// # fn main() -> Result<(), onewrite::SettingError> {
/// let publisher = RabbitMq::new("amqp://app:secret@localhost:5672/%2f")?
///     .connection_name("ledger")
///     .heartbeat(Duration::from_secs(10))
///     .require_exchange("payments");
/// # let _ = publisher;
/// # Ok(()) }
/// ```
pub struct RabbitMq {
    options: Options,
    running: Option<Running>,
    started: bool,
}

struct Running {
    commands: mpsc::Sender<publisher::Command>,
    suspects: mpsc::Sender<Outgoing>,
    events: PublisherEvents,
    /// The epoch that is up, or 0.
    current: Arc<AtomicU64>,
    background: Background,
}

impl RabbitMq {
    /// A publisher for the broker at `amqp://user:password@host:port/vhost`.
    ///
    /// Every part but the host may be left out: the user and password are then `guest`, the port 5672 (5671 with
    /// `amqps`), the virtual host `/`. `amqp://host/` names the virtual host with the empty name, as AMQP URIs do.
    /// Special characters are percent-encoded. The one query parameter is `heartbeat`, in seconds.
    ///
    /// # Errors
    /// The URI cannot be understood, or asks for TLS that is not compiled in. The error's text shows nothing of it.
    ///
    /// ```
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://app:secret@10.0.0.7/orders")?;
    /// assert!(!format!("{publisher:?}").contains("secret"));
    /// assert!(RabbitMq::new("http://example.org").is_err());
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    pub fn new(url: &str) -> Result<Self, SettingError> {
        Ok(Self { options: Options::new(url)?, running: None, started: false })
    }

    /// How often each side shows that it is alive: whole seconds, 10 by default. A dead peer is noticed within twice
    /// that. The lower of this and the broker's own value counts.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.heartbeat(Duration::from_secs(5));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn heartbeat(mut self, heartbeat: Duration) -> Self {
        self.options.heartbeat = heartbeat;
        self
    }

    /// How long a confirm may take, 60 s by default. After it the connection is given up and everything in flight is
    /// unknown. Time during which the broker blocks publishers does not count.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.confirm_deadline(Duration::from_secs(30));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn confirm_deadline(mut self, deadline: Duration) -> Self {
        self.options.confirm_deadline = deadline;
        self
    }

    /// The name that the broker shows for the connection. `onewrite` by default.
    ///
    /// ```
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.connection_name("ledger"); // shown in the management page
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn connection_name(mut self, name: impl Into<String>) -> Self {
        self.options.connection_name = name.into();
        self
    }

    /// First and longest wait between connection attempts, 0.1 s and 30 s by default. The waits double, with jitter,
    /// and start over once a connection has lasted 5 s or something was confirmed on it. After a refusal that waiting
    /// will not heal (wrong password, missing virtual host or exchange) it is always about 30 s.
    ///
    /// ```
    /// use std::time::Duration;
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.reconnect_backoff(Duration::from_millis(200), Duration::from_secs(60));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn reconnect_backoff(mut self, first: Duration, max: Duration) -> Self {
        self.options.backoff = (first, max);
        self
    }

    /// Checks at each connect that this exchange exists. If not, nothing is published, and a fault of class
    /// [`FaultClass::Config`] says so until it does.
    ///
    /// ```
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://localhost")?.require_exchange("payments");
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn require_exchange(mut self, exchange: impl Into<String>) -> Self {
        self.options.required_exchanges.push(exchange.into());
        self
    }

    /// Declares exchanges, queues and bindings at each connect. Nothing is declared unless this is called.
    ///
    /// ```
    /// use onewrite::publish::{RabbitMq, Topology};
    /// let publisher = RabbitMq::new("amqp://localhost")?.declare(Topology::new().queue("ledger"));
    /// # let _ = publisher;
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn declare(mut self, topology: Topology) -> Self {
        self.options.topology = topology;
        self
    }

    /// Allows `amqp://` to a host that is not this machine. The password then travels in plain text: right only
    /// inside a tunnel or a private network.
    ///
    /// ```
    /// use onewrite::publish::RabbitMq;
    /// let publisher = RabbitMq::new("amqp://app:secret@10.0.0.7")?.allow_plaintext_credentials();
    /// assert!(!format!("{publisher:?}").contains("secret"));
    /// # Ok::<(), onewrite::SettingError>(())
    /// ```
    #[must_use]
    pub fn allow_plaintext_credentials(mut self) -> Self {
        self.options.plaintext_allowed = true;
        self
    }
}

/// Shows host, port and virtual host only.
impl fmt::Debug for RabbitMq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMq")
            .field("host", &self.options.target.host)
            .field("port", &self.options.target.port)
            .field("vhost", &self.options.target.vhost)
            .finish_non_exhaustive()
    }
}

impl Publisher for RabbitMq {
    fn start(&mut self, events: PublisherEvents) -> Result<(), SettingError> {
        self.options.check()?;
        if std::mem::replace(&mut self.started, true) {
            return Err(SettingError::new("publisher", "it was started before"));
        }
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (suspects, suspect_inbox) = mpsc::channel(COMMANDS_MAX);
        let current = Arc::new(AtomicU64::new(0));
        let background = Background::spawn("onewrite-amqp", {
            let (options, events, current) =
                (Arc::new(self.options.clone()), events.clone(), Arc::clone(&current));
            move |stop| async move {
                let isolated = tokio::spawn(isolated::run(
                    Arc::clone(&options),
                    suspect_inbox,
                    events.clone(),
                    stop.clone(),
                ));
                publisher::run(options, inbox, events, current, stop).await;
                // It ends for the same reasons; its messages want their outcomes.
                let _ = isolated.await;
            }
        })?;
        self.running = Some(Running { commands, suspects, events, current, background });
        Ok(())
    }

    fn publish(&mut self, epoch: Epoch, outgoing: Outgoing) {
        let Some(running) = &self.running else { return };
        let ticket = outgoing.ticket;
        if outgoing.isolated {
            if running.suspects.try_send(outgoing).is_err() {
                running.unknown(ticket, "no room for another isolated message, or the publisher has ended");
            }
            return;
        }
        // A full queue is more than any window holds: a fault of the caller. Nothing is waited for, nothing lost.
        if let Err(TrySendError::Full(_)) = running.commands.try_send((epoch, outgoing))
            && running.current.load(Ordering::Acquire) == epoch.0
        {
            running.unknown(ticket, "more messages at once than the largest window");
        }
    }

    fn stop(&mut self, deadline: Duration) {
        if let Some(running) = self.running.take() {
            running.background.stop(deadline);
        }
    }
}

impl Running {
    fn unknown(&self, ticket: Ticket, text: &str) {
        let outcome = Outcome::Unknown(Fault::new(FaultClass::Outage, text));
        self.events.send(PublisherEvent::Outcomes(vec![(ticket, outcome)]));
    }
}
