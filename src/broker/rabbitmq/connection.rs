//! One connection, from the name lookup to the open channel, under one deadline; and its end.
//!
//! **Invariants.**
//! - lapin never opens a socket. lapin gets a socket that is connected and, if requested, secured.
//! - The socket of a [`Link`] or of a dropped attempt is always shut down. So lapin's own thread
//!   sees the end and stops.
//! - lapin logs nothing: at `WARN` it would show returned messages with their payload, at `TRACE`
//!   the login.

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lapin::options::ConfirmSelectOptions;
use lapin::types::ShortString;
use lapin::{AsyncTcpStream, Channel, Connection, ConnectionProperties, Event};
use tokio::net::TcpStream;
use tracing::dispatcher::{DefaultGuard, Dispatch};

use crate::limits::CONNECT_MS_MAX;
use crate::message::{Fault, FaultClass};

use super::classify::{Phase, classify};
use super::declare::set_up;
use super::inbound::{Deliveries, Inbound, Returns};
use super::options::Options;
use super::transport::{self, Transport, connect_tcp};
use super::uri::Target;

/// A connection with one channel on it.
pub(super) struct Link {
    pub(super) connection: Arc<Connection>,
    pub(super) channel: Channel,
    /// The messages that the broker returns.
    pub(super) returns: Returns,
    /// The number and bytes of deliveries that the broker may send.
    pub(super) deliveries: Deliveries,
    /// Events of the connection as a whole.
    pub(super) events: BoxStream<'static, Event>,
    socket: Socket,
}

impl Link {
    /// Connects for publishing: declares the topology, checks the exchanges, and turns confirms on.
    pub(super) async fn open(options: &Options, target: &Target) -> Result<Self, Fault> {
        within_deadline(target, async {
            let link = Self::connect(options, target, Returns::of_a_publisher(), Deliveries::none()).await?;
            link.channel
                .confirm_select(ConfirmSelectOptions::default())
                .await
                .map_err(|error| classify(&error, Phase::Connect))?;
            Ok(link)
        })
        .await
    }

    /// Connects, declares the topology, checks the exchanges and opens a channel. Has no deadline
    /// of its own.
    pub(super) async fn connect(
        options: &Options,
        target: &Target,
        returns: Returns,
        deliveries: Deliveries,
    ) -> Result<Self, Fault> {
        let inbound = Inbound::new(options.body_bytes_max, returns.clone(), deliveries.clone());
        let unreachable =
            |error: io::Error| Fault::new(FaultClass::Outage, format!("cannot connect to {target}: {error}"));
        let stream = connect_tcp(target).await.map_err(unreachable)?;
        let socket = Socket::of(&stream, deliveries.clone()).map_err(unreachable)?;
        let stream = AsyncTcpStream::Plain(secure(stream, options, target, inbound).await?);
        let ready = Mutex::new(Some(stream));
        let properties = ConnectionProperties::default()
            .with_auth_provider(target.credentials.clone())
            .with_connection_name(options.connection_name.as_str().into());
        let take_ready = async move |_, _| {
            silence_this_thread();
            let stream = ready.lock().unwrap_or_else(PoisonError::into_inner).take();
            // lapin asks a second time only to reconnect, which this library does itself.
            stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected).into())
        };
        let heartbeat = options.heartbeat(target);
        let connection =
            Connection::connector(target.to_lapin(heartbeat), transport::runtime(), take_ready, properties)
                .await
                .map_err(|error| classify(&error, Phase::Connect))?;
        let channel = set_up(&options.topology, &connection, &options.required_exchanges).await?;
        // The listener starts only here, because a channel that was closed during the declarations
        // ends nothing.
        let events = connection.events_listener().boxed();
        Ok(Self { connection: Arc::new(connection), channel, returns, deliveries, events, socket })
    }

    /// Whether connection and channel are still open.
    pub(super) fn is_alive(&self) -> bool {
        self.connection.status().connected() && self.channel.status().connected()
    }

    /// Ends the connection within `deadline`. A broker that blocks is not notified, because it
    /// reads nothing.
    pub(super) async fn close(self, deadline: Duration) {
        self.deliveries.want_no_more();
        let status = self.connection.status();
        if status.connected() && !status.blocked() && !deadline.is_zero() {
            let goodbye = self.connection.close(200, ShortString::from("bye"));
            // In both cases the socket is shut down below.
            let _ = tokio::time::timeout(deadline, goodbye).await;
        }
        drop(self.socket);
    }
}

/// Runs a connection attempt to `target` under [`CONNECT_MS_MAX`]. Every fault names the target.
pub(super) async fn within_deadline<T>(
    target: &Target,
    attempt: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let deadline = Duration::from_millis(CONNECT_MS_MAX);
    let result = tokio::time::timeout(deadline, attempt).await.unwrap_or_else(|_| {
        let text = format!("{target} did not answer within {} s", deadline.as_secs());
        Err(Fault::new(FaultClass::Outage, text))
    });
    result.map_err(|fault| target.naming(fault))
}

/// Adds TLS to the stream, if the URI asks for it.
#[cfg(feature = "tls")]
async fn secure(
    stream: TcpStream,
    options: &Options,
    target: &Target,
    inbound: Inbound,
) -> Result<Transport, Fault> {
    if !target.tls {
        return Ok(Transport::plain(stream, inbound));
    }
    let tls = options.tls.clone().unwrap_or_default();
    Ok(Transport::tls(tls.secure(stream, target).await?, inbound))
}

#[cfg(not(feature = "tls"))]
#[expect(clippy::unused_async, reason = "the same shape as with TLS")]
async fn secure(
    stream: TcpStream,
    _: &Options,
    target: &Target,
    inbound: Inbound,
) -> Result<Transport, Fault> {
    // `Target::parse` has refused `amqps://`. The check is repeated here, because a mistake would
    // send plain text.
    if target.tls {
        return Err(Fault::new(FaultClass::Config, "TLS is not compiled in"));
    }
    Ok(Transport::plain(stream, inbound))
}

/// A second handle on the connection's socket. Dropping it shuts the socket down, even while other
/// handles exist. lapin's thread then reads on, so that it sees the end.
struct Socket {
    #[cfg(unix)]
    stream: std::net::TcpStream,
    deliveries: Deliveries,
}

impl Socket {
    #[cfg(unix)]
    fn of(stream: &TcpStream, deliveries: Deliveries) -> io::Result<Self> {
        use std::os::fd::AsFd;
        Ok(Self { stream: stream.as_fd().try_clone_to_owned()?.into(), deliveries })
    }

    #[cfg(not(unix))]
    fn of(_: &TcpStream, deliveries: Deliveries) -> io::Result<Self> {
        Ok(Self { deliveries })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The shutdown fails if the peer closed first, which has the same effect.
        #[cfg(unix)]
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.deliveries.want_no_more();
    }
}

thread_local! {
    static SILENCE: RefCell<Option<DefaultGuard>> = const { RefCell::new(None) };
}

/// Turns logging off on the calling thread, which is lapin's own, until the thread ends.
fn silence_this_thread() {
    SILENCE.with(|silence| {
        let mut silence = silence.borrow_mut();
        if silence.is_none() {
            *silence = Some(tracing::dispatcher::set_default(&Dispatch::none()));
        }
    });
}
