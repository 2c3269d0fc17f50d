//! A TCP proxy that misbehaves on command: what a network does to a connection, without a network.
//!
//! **Invariants.** Nothing is done by chance: each fault is asked for. Bytes are never made up, lost or reordered within a
//! connection but where a control says so. Dropping the proxy ends its threads and sockets.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::rabbit::free_port;

/// How soon a thread that waits for bytes or room sees that something was asked for.
const TICK: Duration = Duration::from_millis(5);

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// To the broker.
    Up,
    /// From it.
    Down,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// FIN on both sides.
    Close,
    /// RST on both sides.
    Reset,
    /// Nothing more passes, either way, and neither side is notified: as if a router between had died.
    Vanish,
}

/// The proxy. It forwards faithfully until it is set otherwise.
pub(crate) struct ChaosProxy {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    target: u16,
    rules: Mutex<Rules>,
    sessions: Mutex<HashMap<u64, Arc<Session>>>,
    accepted: AtomicU64,
    /// Rounds of the thread that accepts.
    rounds: AtomicU64,
    bytes: [AtomicU64; 2],
    over: AtomicBool,
}

#[derive(Default)]
struct Rules {
    refuse: bool,
    silent: bool,
    ways: [WayRules; 2],
}

#[derive(Default)]
struct WayRules {
    delay: Duration,
    stalled: bool,
    /// One byte is flipped after so many more.
    corrupt_after: Option<u64>,
    /// The connection ends after so many more.
    end_after: Option<(u64, End)>,
}

struct Session {
    client: TcpStream,
    broker: TcpStream,
    ended: Mutex<Option<End>>,
}

impl ChaosProxy {
    /// Listens on a port of 127.0.0.1 of its own, for a broker on another.
    pub(crate) fn to(target: u16) -> Self {
        let port = free_port();
        let listener = listen(port);
        let shared = Arc::new(Shared {
            target,
            rules: Mutex::default(),
            sessions: Mutex::default(),
            accepted: AtomicU64::new(0),
            rounds: AtomicU64::new(0),
            bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            over: AtomicBool::new(false),
        });
        let acceptor = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept_all(&shared, port, listener)
        });
        Self { port, shared, acceptor: Some(acceptor) }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// The same URL, by way of the proxy.
    pub(crate) fn url(&self, direct: &str) -> String {
        direct.replace(&format!(":{}/", self.shared.target), &format!(":{}/", self.port))
    }

    /// Each chunk of bytes waits so long. Zero ends it.
    pub(crate) fn delay(&self, way: Way, delay: Duration) {
        self.rules().ways[way as usize].delay = delay;
    }

    /// Bytes of one way are kept back until it is lifted; the other way flows.
    pub(crate) fn stall(&self, way: Way, stalled: bool) {
        self.rules().ways[way as usize].stalled = stalled;
    }

    /// Flips one bit of the byte that comes after `bytes` more of this way.
    pub(crate) fn corrupt_after(&self, way: Way, bytes: u64) {
        self.rules().ways[way as usize].corrupt_after = Some(bytes);
    }

    /// Ends the connection that carries the byte after `bytes` more of this way, just before that byte.
    pub(crate) fn end_after(&self, way: Way, bytes: u64, end: End) {
        self.rules().ways[way as usize].end_after = Some((bytes, end));
    }

    /// Ends all connections now.
    pub(crate) fn end_all(&self, end: End) {
        for session in self.sessions().values() {
            session.end(end);
        }
    }

    /// New connections are refused by the operating system: nobody listens. Once this returns it is so.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.rules().refuse = refuse;
        self.await_round();
    }

    /// New connections are taken, and nothing ever comes of them. Once this returns it is so.
    pub(crate) fn silent(&self, silent: bool) {
        self.rules().silent = silent;
        self.await_round();
    }

    /// Waits until the thread that accepts has been through a round that began after this was called.
    fn await_round(&self) {
        let rounds = || self.shared.rounds.load(Ordering::SeqCst);
        let (begun, deadline) = (rounds(), Instant::now() + Duration::from_secs(30));
        // The one that is under way, and a whole one.
        while rounds() < begun + 2 {
            assert!(!self.acceptor.as_ref().is_none_or(JoinHandle::is_finished), "the proxy accepts no more");
            assert!(Instant::now() < deadline, "the proxy does not come round: it waits for its broker");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Connections taken so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Connections that live.
    pub(crate) fn live(&self) -> usize {
        self.sessions().len()
    }

    /// Bytes passed on so far.
    pub(crate) fn bytes(&self, way: Way) -> u64 {
        self.shared.bytes[way as usize].load(Ordering::SeqCst)
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.shared.rules.lock().unwrap()
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<u64, Arc<Session>>> {
        self.shared.sessions.lock().unwrap()
    }
}

impl Drop for ChaosProxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        let ended = self.acceptor.take().map(JoinHandle::join);
        self.end_all(End::Reset);
        if !std::thread::panicking() {
            assert!(!matches!(ended, Some(Err(_))), "the proxy panicked");
        }
    }
}

fn listen(port: u16) -> TcpListener {
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("the proxy's port is free");
    listener.set_nonblocking(true).expect("a listener can be polled");
    listener
}

fn accept_all(shared: &Arc<Shared>, port: u16, listener: TcpListener) {
    let mut listener = Some(listener);
    while !shared.over.load(Ordering::SeqCst) {
        let (refuse, silent) = {
            let rules = shared.rules.lock().unwrap();
            (rules.refuse, rules.silent)
        };
        if refuse {
            listener = None;
            std::thread::sleep(TICK);
        } else {
            match listener.get_or_insert_with(|| listen(port)).accept() {
                Ok((client, _)) => {
                    let number = shared.accepted.fetch_add(1, Ordering::SeqCst);
                    take_in(shared, number, client, silent);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(TICK),
                Err(error) => panic!("the proxy cannot accept: {error}"),
            }
        }
        shared.rounds.fetch_add(1, Ordering::SeqCst);
    }
}

/// Connects to the broker and starts the two pumps. A broker that is away ends the connection, as its kernel would.
fn take_in(shared: &Arc<Shared>, number: u64, client: TcpStream, silent: bool) {
    client.set_nonblocking(false).expect("a socket can block");
    let Ok(broker) = TcpStream::connect(("127.0.0.1", shared.target)) else {
        set_linger(&client);
        return;
    };
    for socket in [&client, &broker] {
        socket.set_nodelay(true).expect("a socket has options");
        socket.set_read_timeout(Some(TICK)).expect("a socket has options");
        socket.set_write_timeout(Some(TICK)).expect("a socket has options");
    }
    let session = Arc::new(Session { client, broker, ended: Mutex::new(silent.then_some(End::Vanish)) });
    shared.sessions.lock().unwrap().insert(number, Arc::clone(&session));
    let alive = Arc::new(AtomicU64::new(2));
    for way in [Way::Up, Way::Down] {
        let (shared, session, alive) = (Arc::clone(shared), Arc::clone(&session), Arc::clone(&alive));
        std::thread::spawn(move || {
            // An error is the end of one side, which is reported to the other.
            if pump(&shared, &session, way).is_err() {
                session.end(End::Reset);
            }
            if alive.fetch_sub(1, Ordering::SeqCst) == 1 {
                // The last handles go with this: only then is a reset sent.
                shared.sessions.lock().unwrap().remove(&number);
            }
        });
    }
}

impl Session {
    fn end(&self, end: End) {
        let mut ended = self.ended.lock().unwrap();
        // What has vanished can still be ended by the proxy's own end; nothing comes back from the others.
        if ended.is_some_and(|before| before != End::Vanish) {
            return;
        }
        *ended = Some(end);
        for socket in [&self.client, &self.broker] {
            match end {
                // The peer may have been first.
                End::Close => drop(socket.shutdown(Shutdown::Both)),
                End::Reset => set_linger(socket),
                End::Vanish => {}
            }
        }
    }

    fn ended(&self) -> Option<End> {
        *self.ended.lock().unwrap()
    }
}

/// Closing the last handle of this socket sends RST.
fn set_linger(socket: &TcpStream) {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).expect("a linger can be set");
}

/// Carries one way of one connection until it ends.
fn pump(shared: &Shared, session: &Session, way: Way) -> io::Result<()> {
    let (mut from, to) = match way {
        Way::Up => (&session.client, &session.broker),
        Way::Down => (&session.broker, &session.client),
    };
    let mut buffer = [0; 16 << 10];
    loop {
        let read = from.read(&mut buffer);
        // Asked after the read: what came while it waited is under the word of now.
        match (session.ended(), read) {
            (Some(End::Close | End::Reset), _) => return Ok(()),
            (_, Err(error)) if is_timeout(&error) => {
                if shared.over.load(Ordering::SeqCst) {
                    session.end(End::Reset);
                }
            }
            // Swallowed; and when one side gives up, the other is not notified.
            (Some(End::Vanish), Ok(1..)) => {}
            (Some(End::Vanish), _) if shared.over.load(Ordering::SeqCst) => session.end(End::Reset),
            (Some(End::Vanish), _) => std::thread::sleep(TICK),
            (None, Ok(0)) => {
                // It fails when the other side was first.
                let _ = to.shutdown(Shutdown::Write);
                return Ok(());
            }
            (None, Ok(count)) => pass(shared, session, way, to, &mut buffer[..count])?,
            (None, Err(error)) => return Err(error),
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

/// Passes one chunk on, under the rules of the moment.
fn pass(shared: &Shared, session: &Session, way: Way, to: &TcpStream, bytes: &mut [u8]) -> io::Result<()> {
    let began = Instant::now();
    let end = loop {
        let mut rules = shared.rules.lock().unwrap();
        let rules = &mut rules.ways[way as usize];
        if rules.stalled || began.elapsed() < rules.delay {
            if session.ended().is_some() || shared.over.load(Ordering::SeqCst) {
                return Ok(());
            }
        } else {
            break rules.apply(bytes);
        }
        // The lock is not held over this: `rules` is a part of its guard, which ends with each iteration.
        std::thread::sleep(Duration::from_millis(1));
    };
    let (bytes, end) = match end {
        Some((keep, end)) => (&bytes[..keep], Some(end)),
        None => (&*bytes, None),
    };
    // Counted first: whoever has read them finds them counted.
    shared.bytes[way as usize].fetch_add(bytes.len() as u64, Ordering::SeqCst);
    write_all(session, to, bytes)?;
    if let Some(end) = end {
        session.end(end);
    }
    Ok(())
}

impl WayRules {
    /// Counts these bytes against what was asked for. Returns how many pass before the connection ends, if it does.
    fn apply(&mut self, bytes: &mut [u8]) -> Option<(usize, End)> {
        let count = bytes.len() as u64;
        if let Some(after) = self.corrupt_after {
            match usize::try_from(after).ok().and_then(|at| bytes.get_mut(at)) {
                Some(byte) => {
                    *byte ^= 0x20;
                    self.corrupt_after = None;
                }
                None => self.corrupt_after = Some(after - count),
            }
        }
        let (after, end) = self.end_after?;
        if after < count {
            self.end_after = None;
            return Some((usize::try_from(after).expect("below a buffer's length"), end));
        }
        self.end_after = Some((after - count, end));
        None
    }
}

/// A peer that reads nothing must not keep the thread from its end.
fn write_all(session: &Session, mut to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if is_timeout(&error) && session.ended().is_none() => {}
            Err(error) if is_timeout(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// An echo server behind a proxy, and a client that has said hello through it.
#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        proxy: ChaosProxy,
        client: TcpStream,
        echo: TcpStream,
        listener: TcpListener,
    }

    impl Rig {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let proxy = ChaosProxy::to(listener.local_addr().unwrap().port());
            let (client, echo) = connect(&proxy, &listener);
            let mut rig = Self { proxy, client, echo, listener };
            assert_eq!((rig.up(b"hello"), rig.down(b"there")), (Ok(5), Ok(5)));
            rig
        }

        /// Sends upwards and reads until as much has come, the connection has ended, or two seconds are over. An error's
        /// kind stands for how it ended.
        fn up(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
            self.client.write_all(bytes).map_err(|error| error.kind())?;
            read(&mut self.echo, bytes)
        }

        fn down(&mut self, bytes: &[u8]) -> Result<usize, ErrorKind> {
            self.echo.write_all(bytes).map_err(|error| error.kind())?;
            read(&mut self.client, bytes)
        }
    }

    fn connect(proxy: &ChaosProxy, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
        let (echo, _) = listener.accept().unwrap();
        // The proxy has connected; a moment later it knows this connection, and what is asked for holds for it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while proxy.sessions().keys().max().is_none_or(|newest| newest + 1 != proxy.accepted()) {
            assert!(Instant::now() < deadline, "the proxy has not taken the connection in");
            std::thread::sleep(Duration::from_millis(1));
        }
        for socket in [&client, &echo] {
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        }
        (client, echo)
    }

    /// How many bytes came as they were sent.
    fn read(socket: &mut TcpStream, sent: &[u8]) -> Result<usize, ErrorKind> {
        let mut got = Vec::new();
        let mut buffer = [0; 64];
        while got.len() < sent.len() {
            match socket.read(&mut buffer) {
                Ok(0) if got.is_empty() => return Err(ErrorKind::UnexpectedEof),
                Ok(0) => break,
                Ok(count) => got.extend_from_slice(&buffer[..count]),
                Err(error) if got.is_empty() => return Err(error.kind()),
                Err(_) => break,
            }
        }
        Ok(got.iter().zip(sent).filter(|(got, sent)| got == sent).count())
    }

    /// Goal: a fault that is asked for happens, at the byte that was said, and nothing else does. Method: an echo server behind
    /// the proxy; each control by itself, looked at from both ends.
    #[test]
    fn each_control_does_what_it_says() {
        let mut rig = Rig::new();
        assert_eq!((rig.proxy.bytes(Way::Up), rig.proxy.bytes(Way::Down), rig.proxy.live()), (5, 5, 1));

        rig.proxy.delay(Way::Up, Duration::from_millis(200));
        let began = Instant::now();
        assert_eq!(rig.up(b"slow"), Ok(4));
        assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
        rig.proxy.delay(Way::Up, Duration::ZERO);

        rig.proxy.stall(Way::Down, true);
        assert_eq!(rig.up(b"flows"), Ok(5));
        assert_eq!(rig.down(b"stalled"), Err(ErrorKind::WouldBlock));
        rig.proxy.stall(Way::Down, false);
        assert_eq!(read(&mut rig.client, b"stalled"), Ok(7));

        rig.proxy.corrupt_after(Way::Up, 6);
        assert_eq!((rig.up(b"1234"), rig.up(b"5678"), rig.up(b"90")), (Ok(4), Ok(3), Ok(2)));

        rig.proxy.end_after(Way::Up, 6, End::Close);
        assert_eq!((rig.up(b"1234"), rig.up(b"5678")), (Ok(4), Ok(2)));
        assert_eq!(read(&mut rig.client, b"x"), Err(ErrorKind::UnexpectedEof));
        assert_eq!(read(&mut rig.echo, b"x"), Err(ErrorKind::UnexpectedEof));
    }

    /// Goal: a reset is one, on both sides; a connection that has vanished notifies nobody, though one side has given up; a
    /// refused one is refused by the system; a silent one hears nothing. Method: as above.
    #[test]
    fn each_end_is_what_it_says() {
        let mut rig = Rig::new();
        rig.proxy.end_all(End::Reset);
        assert_eq!(read(&mut rig.client, b"x"), Err(ErrorKind::ConnectionReset));
        assert_eq!(read(&mut rig.echo, b"x"), Err(ErrorKind::ConnectionReset));

        (rig.client, rig.echo) = connect(&rig.proxy, &rig.listener);
        rig.proxy.end_all(End::Vanish);
        // What is being handed on may still pass.
        std::thread::sleep(20 * TICK);
        assert_eq!(rig.up(b"lost"), Err(ErrorKind::WouldBlock));
        assert_eq!(rig.down(b"lost"), Err(ErrorKind::WouldBlock));
        rig.client.shutdown(Shutdown::Both).unwrap();
        assert_eq!(read(&mut rig.echo, b"x"), Err(ErrorKind::WouldBlock), "the other side was notified");
        assert_eq!(rig.proxy.live(), 1);

        rig.proxy.refuse(true);
        let refused = TcpStream::connect(("127.0.0.1", rig.proxy.port())).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        rig.proxy.refuse(false);
        rig.proxy.silent(true);
        (rig.client, rig.echo) = connect(&rig.proxy, &rig.listener);
        assert_eq!(rig.up(b"hello"), Err(ErrorKind::WouldBlock));
        assert_eq!(rig.proxy.accepted(), 3);
        // With the proxy everything ends.
        drop(rig.proxy);
        assert_eq!(read(&mut rig.echo, b"x"), Err(ErrorKind::ConnectionReset));
    }
}
