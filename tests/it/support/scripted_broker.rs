//! A server that speaks as much AMQP 0-9-1 as a publisher needs, and misbehaves as no real broker can be made to on demand.
//!
//! Each connection has a thread. Exchanges do not matter: the routing key is the queue.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const METHOD: u8 = 1;
const FRAME_END: u8 = 0xce;

/// How it behaves, and what it has seen.
#[derive(Debug)]
pub(crate) struct Script {
    /// What it offers at login.
    pub(crate) frame_max: u32,
    pub(crate) channel_max: u16,
    /// Connections at once; a further one is answered `NOT_ALLOWED`, as RabbitMQ does where a virtual host is full.
    pub(crate) connections_max: usize,
    /// Queues that take messages and confirm none.
    pub(crate) silent: BTreeSet<String>,
    /// A channel stops reading at the first message for these, as RabbitMQ 3.10 does for a quorum queue without a leader.
    pub(crate) stalling: BTreeSet<String>,
    /// A channel is closed with 404 at a message for these.
    pub(crate) missing: BTreeSet<String>,
    /// There are no such queues: a message for them is returned, and a question about them closes its channel with 404.
    pub(crate) nowhere: BTreeSet<String>,
    /// A question about these is answered so late: their node is down, and the channel is closed with 404. As RabbitMQ 4 does after a minute.
    pub(crate) late: BTreeMap<String, Duration>,
    /// Questions that were answered late.
    pub(crate) answered_late: usize,
    /// Queues that were declared, and answered at once.
    pub(crate) declared: BTreeSet<String>,
    /// What each queue has been sent: the message ids.
    pub(crate) copies: BTreeMap<String, Vec<String>>,
    pub(crate) logins: usize,
    pub(crate) connected: usize,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            frame_max: 131_072,
            channel_max: 100,
            connections_max: usize::MAX,
            silent: BTreeSet::new(),
            stalling: BTreeSet::new(),
            missing: BTreeSet::new(),
            nowhere: BTreeSet::new(),
            late: BTreeMap::new(),
            answered_late: 0,
            declared: BTreeSet::new(),
            copies: BTreeMap::new(),
            logins: 0,
            connected: 0,
        }
    }
}

/// The server. Dropping it closes its door; connections end with their clients.
#[derive(Debug)]
pub(crate) struct ScriptedBroker {
    port: u16,
    script: Arc<Mutex<Script>>,
    door: Option<JoinHandle<()>>,
}

impl ScriptedBroker {
    pub(crate) fn start(script: Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("it is bound").port();
        let script = Arc::new(Mutex::new(script));
        let shared = Arc::clone(&script);
        let door = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let mut first = [0; 1];
                // The owner's own connection says that it is over.
                if !matches!(stream.peek(&mut first), Ok(1)) {
                    return;
                }
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let mut peer = Peer { stream, script: shared, counted: false };
                    // It ends with its client.
                    _ = peer.serve();
                });
            }
        });
        Self { port, script, door: Some(door) }
    }

    pub(crate) fn url(&self) -> String {
        format!("amqp://127.0.0.1:{}", self.port)
    }

    /// Looks at it, or changes how it behaves from now on.
    pub(crate) fn script<T>(&self, look: impl FnOnce(&mut Script) -> T) -> T {
        look(&mut self.script.lock().expect("nobody panics while it is locked"))
    }

    /// How many messages a queue has been sent, and how many different ones.
    pub(crate) fn copies(&self, queue: &str) -> (usize, usize) {
        self.script(|script| {
            let ids = script.copies.get(queue).map(Vec::as_slice).unwrap_or_default();
            (ids.len(), ids.iter().collect::<BTreeSet<_>>().len())
        })
    }
}

impl Drop for ScriptedBroker {
    fn drop(&mut self) {
        if let Ok(stream) = TcpStream::connect(("127.0.0.1", self.port)) {
            _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(door) = self.door.take() {
            _ = door.join();
        }
    }
}

struct Peer {
    stream: TcpStream,
    script: Arc<Mutex<Script>>,
    counted: bool,
}

/// What is known of one channel.
#[derive(Default)]
struct Channel {
    published: u64,
    stalled: bool,
    /// The routing key of the message whose header comes next.
    to: Option<String>,
    /// Its exchange.
    exchange: Vec<u8>,
    /// Of the message whose body comes: bytes, routing key, id.
    body: Option<(u64, String, String)>,
    /// The content header of that message.
    header: Vec<u8>,
    /// Tags that wait for a word.
    silent: Vec<(u64, String)>,
    /// It has to answer a question, and does nothing else until then.
    busy: Option<Arc<Mutex<Busy>>>,
}

/// What is left to say on a channel that answers late.
#[derive(Default)]
struct Busy {
    answered: bool,
    /// The client has closed it meanwhile.
    closed: bool,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut script = self.script.lock().expect("nobody panics while it is locked");
        script.connected -= usize::from(self.counted);
    }
}

impl Peer {
    fn with<T>(&self, look: impl FnOnce(&mut Script) -> T) -> T {
        look(&mut self.script.lock().expect("nobody panics while it is locked"))
    }

    fn serve(&mut self) -> std::io::Result<()> {
        self.stream.read_exact(&mut [0; 8])?;
        let start = [&[0, 9][..], &0_u32.to_be_bytes(), &long(b"PLAIN"), &long(b"en_US")].concat();
        self.say(0, (10, 10), &start)?;
        let (channel_max, frame_max) = self.with(|script| (script.channel_max, script.frame_max));
        let mut channels: HashMap<u16, Channel> = HashMap::new();
        loop {
            let (kind, number, payload) = self.read()?;
            if kind == METHOD && number == 0 {
                match method(&payload) {
                    (10, 11) => {
                        let limits = [&channel_max.to_be_bytes()[..], &frame_max.to_be_bytes(), &[0, 0]];
                        self.say(0, (10, 30), &limits.concat())?;
                    }
                    (10, 40) if self.is_full() => {
                        let text = b"NOT_ALLOWED - access to vhost refused: connection limit is reached";
                        let close = [&530_u16.to_be_bytes()[..], &short(text), &[0, 10, 0, 40]].concat();
                        self.say(0, (10, 50), &close)?;
                    }
                    (10, 40) => self.say(0, (10, 41), &[0])?,
                    (10, 50) => return self.say(0, (10, 51), &[]),
                    _ => {}
                }
                continue;
            }
            let channel = channels.entry(number).or_default();
            if channel.stalled {
                continue;
            }
            match kind {
                METHOD => match method(&payload) {
                    (20, 10) => {
                        *channel = Channel::default();
                        self.say(number, (20, 11), &long(b""))?;
                    }
                    (20, 40) if channel.busy.is_some() => {
                        let Some(busy) = &channel.busy else { continue };
                        let mut busy = busy.lock().expect("nobody panics while it is locked");
                        busy.closed = true;
                        if busy.answered {
                            self.say(number, (20, 41), &[])?;
                        }
                    }
                    (20, 40) => self.say(number, (20, 41), &[])?,
                    (50, 10) => channel.busy = self.declare(number, &payload)?,
                    (40, 10) => self.say(number, (40, 11), &[])?,
                    (50, 20) => self.say(number, (50, 21), &[])?,
                    (20, 41) => *channel = Channel::default(),
                    (85, 10) => self.say(number, (85, 11), &[])?,
                    (60, 40) => {
                        channel.exchange = short_at(&payload[6..]).0.to_vec();
                        channel.to = Some(routing_key(&payload));
                    }
                    _ => {}
                },
                2 => {
                    let Some(to) = channel.to.take() else { continue };
                    let bytes = u64::from_be_bytes(payload[4..12].try_into().expect("eight bytes"));
                    let id = message_id(&payload);
                    channel.header = without_body(payload);
                    if bytes == 0 {
                        self.take(number, channel, to, id)?;
                    } else {
                        channel.body = Some((bytes, to, id));
                    }
                }
                3 => {
                    let Some((left, to, id)) = channel.body.take() else { continue };
                    match left.saturating_sub(payload.len() as u64) {
                        0 => self.take(number, channel, to, id)?,
                        left => channel.body = Some((left, to, id)),
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether this connection is one too many.
    fn is_full(&mut self) -> bool {
        let full = self.with(|script| {
            let full = script.connected >= script.connections_max;
            script.connected += usize::from(!full);
            script.logins += usize::from(!full);
            full
        });
        self.counted = !full;
        full
    }

    fn take(&mut self, number: u16, channel: &mut Channel, to: String, id: String) -> std::io::Result<()> {
        channel.published += 1;
        let (stalls, is_silent, is_missing) = self.with(|script| {
            script.copies.entry(to.clone()).or_default().push(id);
            (script.stalling.contains(&to), script.silent.contains(&to), script.missing.contains(&to))
        });
        if is_missing {
            let text = format!("NOT_FOUND - no exchange '{to}' in vhost '/'");
            let close = [&404_u16.to_be_bytes()[..], &short(text.as_bytes()), &[0, 60, 0, 40]].concat();
            channel.stalled = false;
            return self.say(number, (20, 40), &close);
        }
        if self.with(|script| script.nowhere.contains(&to) || script.late.contains_key(&to)) {
            let (exchange, key) = (short(&channel.exchange), short(to.as_bytes()));
            let text = [&312_u16.to_be_bytes()[..], &short(b"NO_ROUTE"), &exchange, &key].concat();
            self.say(number, (60, 50), &text)?;
            let frame = [&[2][..], &number.to_be_bytes(), &long(&channel.header), &[FRAME_END]].concat();
            self.stream.write_all(&frame)?;
        }
        if stalls {
            channel.stalled = true;
            return Ok(());
        }
        if is_silent {
            channel.silent.push((channel.published, to));
            return Ok(());
        }
        // Those that were silent and are not any more have their word at the next one's.
        let spoken = self.with(|script| {
            let (silent, spoken) = channel
                .silent
                .drain(..)
                .partition(|(_, queue): &(u64, String)| script.silent.contains(queue));
            channel.silent = silent;
            spoken
        });
        for (tag, _) in spoken {
            self.say(number, (60, 80), &[&tag.to_be_bytes()[..], &[0]].concat())?;
        }
        self.say(number, (60, 80), &[&channel.published.to_be_bytes()[..], &[0]].concat())
    }

    /// Answers at once, or leaves the answer to a thread.
    fn declare(&mut self, number: u16, payload: &[u8]) -> std::io::Result<Option<Arc<Mutex<Busy>>>> {
        let queue = String::from_utf8_lossy(short_at(&payload[6..]).0).into_owned();
        if self.with(|script| script.nowhere.contains(&queue)) {
            let text = format!("NOT_FOUND - no queue '{queue}' in vhost '/'");
            let close = [&404_u16.to_be_bytes()[..], &short(text.as_bytes()), &[0, 50, 0, 10]].concat();
            self.say(number, (20, 40), &close)?;
            return Ok(None);
        }
        let Some(delay) = self.with(|script| script.late.get(&queue).copied()) else {
            self.say(number, (50, 11), &[&short(queue.as_bytes())[..], &[0; 8]].concat())?;
            self.with(|script| script.declared.insert(queue));
            return Ok(None);
        };
        let busy = Arc::new(Mutex::new(Busy::default()));
        let (shared, script) = (Arc::clone(&busy), Arc::clone(&self.script));
        let mut peer = Self { stream: self.stream.try_clone()?, script, counted: false };
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let text = format!(
                "NOT_FOUND - home node 'rabbit@b' of durable queue '{queue}' in vhost '/' is down or inaccessible"
            );
            let close = [&404_u16.to_be_bytes()[..], &short(text.as_bytes()), &[0, 50, 0, 10]].concat();
            let mut busy = shared.lock().expect("nobody panics while it is locked");
            busy.answered = true;
            // It fails where the client has gone.
            _ = peer.say(number, (20, 40), &close);
            if busy.closed {
                _ = peer.say(number, (20, 41), &[]);
            }
            peer.with(|script| script.answered_late += 1);
        });
        Ok(Some(busy))
    }

    fn read(&mut self) -> std::io::Result<(u8, u16, Vec<u8>)> {
        let mut head = [0; 7];
        self.stream.read_exact(&mut head)?;
        let len = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut payload = vec![0; len + 1];
        self.stream.read_exact(&mut payload)?;
        assert_eq!(payload.pop(), Some(FRAME_END));
        Ok((head[0], u16::from_be_bytes([head[1], head[2]]), payload))
    }

    fn say(&mut self, channel: u16, (class, method): (u16, u16), arguments: &[u8]) -> std::io::Result<()> {
        let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
        let frame = [&[METHOD][..], &channel.to_be_bytes(), &long(&payload), &[FRAME_END]].concat();
        self.stream.write_all(&frame)
    }
}

/// A content header that announces no body.
fn without_body(mut header: Vec<u8>) -> Vec<u8> {
    header[4..12].fill(0);
    header
}

fn method(payload: &[u8]) -> (u16, u16) {
    (u16::from_be_bytes([payload[0], payload[1]]), u16::from_be_bytes([payload[2], payload[3]]))
}

fn long(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).expect("a short text").to_be_bytes()[..], text].concat()
}

fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).expect("a short text")][..], text].concat()
}

fn short_at(bytes: &[u8]) -> (&[u8], &[u8]) {
    bytes[1..].split_at(usize::from(bytes[0]))
}

/// Behind class, method, a reserved number and the exchange.
fn routing_key(payload: &[u8]) -> String {
    let (_exchange, rest) = short_at(&payload[6..]);
    String::from_utf8_lossy(short_at(rest).0).into_owned()
}

/// Of a content header: the properties before it are passed over.
fn message_id(payload: &[u8]) -> String {
    let flags = u16::from_be_bytes([payload[12], payload[13]]);
    let mut rest = &payload[14..];
    for bit in (7..16).rev().filter(|bit| flags & (1 << bit) != 0) {
        let (value, behind) = match bit {
            13 => {
                let len = u32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                rest[4..].split_at(len)
            }
            11 | 12 => rest.split_at(1),
            _ => short_at(rest),
        };
        if bit == 7 {
            return String::from_utf8_lossy(value).into_owned();
        }
        rest = behind;
    }
    String::new()
}
