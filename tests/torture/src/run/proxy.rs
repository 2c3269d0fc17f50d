//! A TCP proxy between a process and the broker, which does to connections what networks do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::SockRef;

use crate::Result;

const LOOK: Duration = Duration::from_millis(20);
/// The protocol header, which only clients send, and which is no frame.
const GREETING_BYTES: usize = 8;
const FRAME_HEAD_BYTES: usize = 7;

/// What goes on between a process and the broker.
#[derive(Debug)]
pub(super) struct Proxy {
    pub(super) port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    broker: u16,
    /// Nothing moves.
    stalled: AtomicBool,
    /// New connections are closed at once.
    refusing: AtomicBool,
    /// What each piece waits before it goes on, in milliseconds.
    delay_ms: AtomicU64,
    links: Mutex<Vec<Arc<Link>>>,
}

/// One connection, both ways.
#[derive(Debug, Default)]
struct Link {
    over: AtomicBool,
    /// Both ends stay open, and nothing arrives any more.
    silent: AtomicBool,
    /// The end of the next frame is to be damaged: to the broker, to the process.
    corrupt: [AtomicBool; 2],
    sockets: Vec<TcpStream>,
}

impl Proxy {
    pub(super) fn start(broker: u16) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            broker,
            stalled: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            delay_ms: AtomicU64::new(0),
            links: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A broker that is away refuses, and so does its proxy: by closing.
                if let Err(error) = serving.serve(client)
                    && error.kind() != std::io::ErrorKind::ConnectionRefused
                {
                    eprintln!("proxy: {error}");
                }
            }
        });
        Ok(Self { port, shared })
    }

    pub(super) fn stall(&self, stalled: bool) {
        self.shared.stalled.store(stalled, Ordering::SeqCst);
    }

    pub(super) fn refuse(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::SeqCst);
        if refusing {
            self.cut();
        }
    }

    pub(super) fn delay(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Ends all connections in an orderly way.
    pub(super) fn cut(&self) {
        for link in self.shared.links() {
            link.over.store(true, Ordering::SeqCst);
            for socket in &link.sockets {
                // It may be closed already.
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// Ends all connections by a reset.
    pub(super) fn reset(&self) -> std::io::Result<()> {
        for link in self.shared.links() {
            for socket in &link.sockets {
                SockRef::from(socket).set_linger(Some(Duration::ZERO))?;
            }
            link.over.store(true, Ordering::SeqCst);
        }
        // The last that holds the sockets closes them.
        self.shared.links.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Ok(())
    }

    /// Lets all connections go silent: nobody is notified that they are over.
    pub(super) fn silence(&self) {
        for link in self.shared.links() {
            link.silent.store(true, Ordering::SeqCst);
        }
    }

    /// Damages the frame-end byte at the end of the next frame of each connection: to the broker, or to the process. Other bytes are left
    /// alone: what AMQP cannot notice, TCP's checksums are there for.
    pub(super) fn corrupt(&self, to_process: bool) {
        for link in self.shared.links() {
            link.corrupt[usize::from(to_process)].store(true, Ordering::SeqCst);
        }
    }

    pub(super) fn heal(&self) {
        self.stall(false);
        self.refuse(false);
        self.delay(Duration::ZERO);
    }
}

impl Shared {
    fn links(&self) -> Vec<Arc<Link>> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|link| !link.over.load(Ordering::SeqCst));
        links.clone()
    }

    fn serve(self: &Arc<Self>, client: TcpStream) -> std::io::Result<()> {
        if self.refusing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let broker = TcpStream::connect(("127.0.0.1", self.broker))?;
        for socket in [&client, &broker] {
            socket.set_nodelay(true)?;
            socket.set_read_timeout(Some(LOOK))?;
            socket.set_write_timeout(Some(Duration::from_secs(30)))?;
        }
        let sockets = vec![client.try_clone()?, broker.try_clone()?];
        let link = Arc::new(Link { sockets, ..Link::default() });
        self.links.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&link));
        let ways = [(client.try_clone()?, broker.try_clone()?), (broker, client)];
        for (way, (from, to)) in ways.into_iter().enumerate() {
            let (shared, link) = (Arc::clone(self), Arc::clone(&link));
            std::thread::spawn(move || {
                pump(&shared, &link, way, from, to);
                link.over.store(true, Ordering::SeqCst);
            });
        }
        Ok(())
    }
}

/// Carries bytes one way until the connection is over.
fn pump(shared: &Shared, link: &Link, way: usize, mut from: TcpStream, mut to: TcpStream) {
    let mut frames = Frames { skip: if way == 0 { GREETING_BYTES } else { 0 }, head: Vec::new(), left: 0 };
    let mut bytes = [0; 16 << 10];
    let is_over = || link.over.load(Ordering::SeqCst);
    while !is_over() {
        if shared.stalled.load(Ordering::SeqCst) {
            std::thread::sleep(LOOK);
            continue;
        }
        let len = match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error)
                if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) =>
            {
                continue;
            }
            // Reset by its peer: the other end is notified below.
            Err(_) => break,
        };
        std::thread::sleep(Duration::from_millis(shared.delay_ms.load(Ordering::SeqCst)));
        while shared.stalled.load(Ordering::SeqCst) && !is_over() {
            std::thread::sleep(LOOK);
        }
        if link.silent.load(Ordering::SeqCst) {
            continue;
        }
        frames.pass(&mut bytes[..len], &link.corrupt[way]);
        if is_over() || to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    if !link.silent.load(Ordering::SeqCst) && !is_over() {
        // It may be closed already.
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// Follows AMQP's frames: type u8, channel u16, length u32, so many bytes, and a frame-end byte.
struct Frames {
    skip: usize,
    head: Vec<u8>,
    /// Bytes of the frame that are still to come, the frame-end byte included.
    left: usize,
}

impl Frames {
    fn pass(&mut self, bytes: &mut [u8], corrupt: &AtomicBool) {
        let mut at = 0;
        while at < bytes.len() {
            if self.skip > 0 {
                self.skip -= 1;
                at += 1;
            } else if self.left == 0 {
                self.head.push(bytes[at]);
                at += 1;
                if self.head.len() == FRAME_HEAD_BYTES {
                    let len = [self.head[3], self.head[4], self.head[5], self.head[6]];
                    self.left = u32::from_be_bytes(len) as usize + 1;
                    self.head.clear();
                }
            } else {
                let take = self.left.min(bytes.len() - at);
                at += take;
                self.left -= take;
                if self.left == 0 && corrupt.swap(false, Ordering::SeqCst) {
                    bytes[at - 1] ^= 0x55;
                }
            }
        }
    }
}
