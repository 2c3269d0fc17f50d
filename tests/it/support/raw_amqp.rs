//! An AMQP 0-9-1 client that sends what well-behaved clients cannot: bytes that are no text, tables without end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Text behind a length of one byte.
pub(crate) fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).expect("a short string")][..], bytes].concat()
}

/// Bytes behind a length of four bytes.
pub(crate) fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).expect("a long string").to_be_bytes()[..], bytes].concat()
}

/// One entry of a table: name, type, encoded value.
pub(crate) fn entry(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(name)[..], &[kind], value].concat()
}

/// A table (`F`) or an array (`A`) within another of its kind, so many levels deep.
pub(crate) fn nested(depth: usize, kind: u8) -> Vec<u8> {
    let level: &[u8] = if kind == b'F' { &[0, kind] } else { &[kind] };
    let mut value = Vec::new();
    for inner in (0..depth).rev() {
        let len = inner * (level.len() + 4);
        value.extend(u32::try_from(len).expect("a short table").to_be_bytes());
        value.extend(if inner == 0 { &[] } else { level });
    }
    value
}

/// Properties, by the bits of their flags, encoded.
#[derive(Debug, Clone, Default)]
pub(crate) struct Properties(Vec<(u16, Vec<u8>)>);

impl Properties {
    pub(crate) fn text(mut self, bit: u16, text: &[u8]) -> Self {
        self.0.push((bit, short(text)));
        self
    }

    pub(crate) fn id(self, id: &[u8]) -> Self {
        self.text(7, id)
    }

    pub(crate) fn headers(mut self, entries: &[Vec<u8>]) -> Self {
        self.0.push((13, long(&entries.concat())));
        self
    }
}

/// A connection with channel 1 open.
#[derive(Debug)]
pub(crate) struct RawAmqp {
    stream: TcpStream,
}

impl RawAmqp {
    /// Logs in as `guest`, for the virtual host `/`.
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the broker listens");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket");
        let mut raw = Self { stream };
        raw.stream.write_all(b"AMQP\0\0\x09\x01").expect("connected");
        raw.await_method(10, 10);
        let login = [long(&[]), short(b"PLAIN"), long(b"\0guest\0guest"), short(b"en_US")].concat();
        raw.method(0, (10, 11), &login);
        let tune = raw.await_method(10, 30);
        raw.method(0, (10, 31), &[&tune[..6], &[0, 0]].concat());
        raw.method(0, (10, 40), &[short(b"/"), short(b""), vec![0]].concat());
        raw.await_method(10, 41);
        raw.method(1, (20, 10), &[0]);
        raw.await_method(20, 11);
        raw
    }

    fn frame(&mut self, kind: u8, channel: u16, payload: &[u8]) {
        let frame = [&[kind][..], &channel.to_be_bytes(), &long(payload), &[0xce]].concat();
        self.stream.write_all(&frame).expect("the broker takes it");
    }

    fn method(&mut self, channel: u16, (class, method): (u16, u16), arguments: &[u8]) {
        self.frame(1, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat());
    }

    /// The arguments of the next method of this name. That the broker closes is an error.
    fn await_method(&mut self, class: u16, method: u16) -> Vec<u8> {
        loop {
            let mut head = [0; 7];
            self.stream.read_exact(&mut head).expect("the broker answers");
            let len = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            let mut payload = vec![0; len + 1];
            self.stream.read_exact(&mut payload).expect("the broker answers");
            let Some((name, arguments)) = payload.split_at_checked(4).filter(|_| head[0] == 1) else {
                continue;
            };
            let is = |class: u16, method: u16| *name == [class.to_be_bytes(), method.to_be_bytes()].concat();
            assert!(!is(10, 50) && !is(20, 40), "the broker closes: {}", String::from_utf8_lossy(arguments));
            if is(class, method) {
                return arguments[..arguments.len() - 1].to_vec();
            }
        }
    }

    /// Publishes and waits until the broker's channel has taken it in.
    pub(crate) fn publish(
        &mut self,
        exchange: &str,
        routing_key: &[u8],
        properties: &Properties,
        body: &[u8],
    ) {
        let to = [vec![0, 0], short(exchange.as_bytes()), short(routing_key), vec![0]].concat();
        self.method(1, (60, 40), &to);
        let mut properties = properties.0.clone();
        properties.sort_by_key(|(bit, _)| std::cmp::Reverse(*bit));
        let flags = properties.iter().fold(0_u16, |flags, (bit, _)| flags | 1 << bit);
        let head = [&[0, 60, 0, 0][..], &(body.len() as u64).to_be_bytes(), &flags.to_be_bytes()].concat();
        let values: Vec<_> = properties.into_iter().flat_map(|(_, value)| value).collect();
        self.frame(2, 1, &[head, values].concat());
        for part in body.chunks(100_000) {
            self.frame(3, 1, part);
        }
        self.method(1, (60, 10), &[0, 0, 0, 0, 0, 1, 0]);
        self.await_method(60, 11);
    }
}
