//! The stream under a connection (TCP, or TLS over TCP), and the runtime that gives the stream to
//! lapin.
//!
//! lapin opens no socket and knows nothing of TLS. lapin takes any runtime, and a runtime defines
//! its type of streams: here [`Transport`].

use std::future::Future;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::Sleep;

use crate::limits::CONNECT_MS_MAX;

use super::inbound::{HEARTBEAT_FRAME, Inbound, Refused};
use super::refusal::{Refusal, is_refusal};
use super::uri::Target;

/// The first two bytes of a TLS server's answer to a plain-text client: an alert, of SSL 3 or
/// later.
const TLS_ALERT: [u8; 2] = [0x15, 3];

/// The most bytes that one read takes from a socket.
const READ_BYTES: usize = 64 << 10;

/// The interval at which the client library hears that the broker lives while nothing is read. The
/// library gives up after twice the heartbeat, and the shortest heartbeat is a second.
const PULSE: Duration = Duration::from_millis(500);

/// Connects to the first of the host's addresses that accepts. The name is looked up anew each
/// time.
pub(super) async fn connect_tcp(target: &Target) -> io::Result<TcpStream> {
    let addresses: Vec<_> = tokio::net::lookup_host((target.host.as_str(), target.port)).await?.collect();
    connect_first(&addresses).await
}

/// Tries the addresses in order. Each address has an equal share of the connect deadline, so that a
/// silent address does not use up the time of later addresses. The last address has all the
/// remaining time. The caller applies the deadline itself, and its fault names the deadline.
async fn connect_first(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let Some((last, others)) = addresses.split_last() else {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    };
    let share = Duration::from_millis(CONNECT_MS_MAX) / u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for address in others {
        if let Ok(Ok(stream)) = tokio::time::timeout(share, connect_one(address)).await {
            return Ok(stream);
        }
    }
    connect_one(last).await
}

async fn connect_one(address: &SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connected stream. With TLS, the handshake is done and the peer's identity is verified.
pub(super) struct Transport {
    stream: Stream,
    /// No bytes from the peer have been handed on yet.
    fresh: bool,
    inbound: Inbound,
    /// The buffer for bytes from the socket.
    came: Box<[u8]>,
    /// The bytes that lapin may see; `taken` is how many of them lapin has.
    ready: Vec<u8>,
    taken: usize,
    /// The error of a failed write, while the transport checks whether the peer has sent a reason.
    broken: Option<io::Error>,
    /// While nothing is read: the time of the next heartbeat for the client library.
    pulse: Option<Pin<Box<Sleep>>>,
    runtime: Handle,
}

enum Stream {
    Plain(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite> Duplex for T {}

impl Transport {
    /// Returns a plain transport. All bytes from the peer go through `inbound`.
    pub(super) fn plain(stream: TcpStream, inbound: Inbound) -> Self {
        Self::over(Stream::Plain(stream), inbound)
    }

    #[cfg(feature = "tls")]
    pub(super) fn tls(stream: tokio_rustls::client::TlsStream<TcpStream>, inbound: Inbound) -> Self {
        Self::over(Stream::Tls(Box::new(stream)), inbound)
    }

    fn over(stream: Stream, inbound: Inbound) -> Self {
        Self {
            stream,
            fresh: true,
            inbound,
            came: vec![0; READ_BYTES].into_boxed_slice(),
            ready: Vec::new(),
            taken: 0,
            broken: None,
            pulse: None,
            runtime: Handle::current(),
        }
    }

    fn is_plain(&self) -> bool {
        matches!(self.stream, Stream::Plain(_))
    }

    fn stream(&mut self) -> Pin<&mut (dyn Duplex + Unpin)> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream),
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => Pin::new(stream.as_mut()),
        }
    }

    /// Writes by `write`. If the peer has closed and has sent a refusal before, the refusal is the
    /// error instead. With TLS 1.3 the peer checks the client certificate only after the client's
    /// handshake has ended. If the client has begun to write by then, a reset follows the peer's
    /// alert.
    fn write<T>(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut (dyn Duplex + Unpin)>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.broken.is_none() {
            match write(self.stream(), cx) {
                Poll::Ready(Err(error)) if self.fresh && !self.is_plain() && has_closed(&error) => {
                    self.broken = Some(error);
                }
                other => return other,
            }
        }
        // Pending only for a moment, until tokio has seen the end too.
        let word = std::task::ready!(self.stream().poll_read(cx, &mut ReadBuf::new(&mut [0])));
        let error = self.broken.take().unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
        Poll::Ready(Err(word.err().filter(is_refusal).unwrap_or(error)))
    }
}

fn has_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), ConnectionReset | BrokenPipe | ConnectionAborted)
}

impl Transport {
    /// Reads at most `room` bytes from the socket, once, and makes ready what lapin may see.
    /// Returns `false` at the end.
    fn read_more(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<io::Result<bool>> {
        let mut came = std::mem::take(&mut self.came);
        let len = came.len().min(room);
        let mut buffer = ReadBuf::new(came.get_mut(..len).unwrap_or_default());
        let read = self.stream().poll_read(cx, &mut buffer).map_ok(|()| buffer.filled().len());
        self.came = came;
        let read = self.came.get(..std::task::ready!(read)?).unwrap_or_default();
        if self.fresh && matches!(self.stream, Stream::Plain(_)) && read.starts_with(&TLS_ALERT) {
            return Poll::Ready(Err(
                Refusal("the peer speaks TLS, not plain text: use amqps://".into()).into()
            ));
        }
        self.fresh &= read.is_empty();
        self.inbound.feed(read, &mut self.ready)?;
        Poll::Ready(Ok(!read.is_empty()))
    }
}

impl Transport {
    /// Makes a heartbeat ready from time to time. The broker's own heartbeats are not read: they
    /// are behind deliveries that have no room.
    fn poll_pulse(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let runtime = &self.runtime;
        let pulse = self.pulse.get_or_insert_with(|| {
            let _entered = runtime.enter();
            Box::pin(tokio::time::sleep(PULSE))
        });
        std::task::ready!(pulse.as_mut().poll(cx));
        self.pulse = None;
        self.ready.extend_from_slice(&HEARTBEAT_FRAME);
        Poll::Ready(())
    }
}

impl futures_io::AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            let ready = this.ready.get(this.taken..).unwrap_or_default();
            if !ready.is_empty() {
                let (now, _) = ready.split_at(ready.len().min(buffer.len()));
                if let Some(room) = buffer.get_mut(..now.len()) {
                    room.copy_from_slice(now);
                }
                this.taken += now.len();
                return Poll::Ready(Ok(now.len()));
            }
            this.ready.clear();
            this.taken = 0;
            let Some(room) = this.inbound.room(cx) else {
                std::task::ready!(this.poll_pulse(cx));
                continue;
            };
            this.pulse = None;
            if !std::task::ready!(this.read_more(cx, room))? {
                return Poll::Ready(Ok(0));
            }
        }
    }
}

impl futures_io::AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().write(cx, |stream, cx| stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().write(cx, |stream, cx| stream.poll_write_vectored(cx, slices))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().write(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream().poll_shutdown(cx)
    }
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::ForGood(text) => Refusal(text.into()).into(),
            Refused::Broken(_) => Self::new(io::ErrorKind::InvalidData, refused),
        }
    }
}

/// Returns the runtime for lapin: tokio's current runtime, with [`Transport`] as its stream.
pub(super) fn runtime() -> LapinRuntime {
    Runtime::new(RuntimeParts::new(Tokio::current(), Sockets(Tokio::current())))
}

pub(super) type LapinRuntime = Runtime<RuntimeParts<Tokio, Sockets>>;

/// tokio's reactor, except for the type of its streams.
#[derive(Debug, Clone)]
pub(super) struct Sockets(Tokio);

impl Reactor for Sockets {
    type TcpStream = Transport;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl futures_io::AsyncRead + futures_io::AsyncWrite + Send + Unpin + 'static> {
        Err::<Transport, _>(not_asked_for())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl futures_util::Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        _: SocketAddr,
    ) -> impl Future<Output = io::Result<Transport>> + Send + 'static {
        std::future::ready(Err(not_asked_for()))
    }
}

/// lapin is given a connected stream. lapin would need another stream only to reconnect, which this
/// library does itself.
fn not_asked_for() -> io::Error {
    io::ErrorKind::Unsupported.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: if an address refuses, the next address of the same name is tried. Method: a closed
    /// port before an open port.
    #[test]
    fn the_addresses_of_a_name_are_tried_in_turn() {
        let open = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let connect = |addresses: &[SocketAddr]| runtime.block_on(connect_first(addresses));
        assert!(connect(&[closed, open.local_addr().unwrap()]).is_ok());
        assert_eq!(connect(&[closed]).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect(&[]).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
