//! A server that speaks just enough AMQP 0-9-1 to be published to, and confirms what it is set to confirm: for what no
//! real broker can be made to do on purpose.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

const METHOD: u8 = 1;
const FRAME_END: u8 = 0xce;
const PUBLISH: (u16, u16) = (60, 40);
const CHANNEL: u16 = 1;

/// Takes one connection, lets `publishes` messages in, then confirms the tags `confirmed` and says no more.
pub(crate) struct FakeBroker {
    pub(crate) url: String,
    peer: Option<JoinHandle<()>>,
}

impl FakeBroker {
    pub(crate) fn confirming(publishes: u64, confirmed: &'static [u64]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("amqp://127.0.0.1:{}", listener.local_addr().expect("it is bound").port());
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the publisher connects");
            stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout is set");
            greet(&mut stream);
            for _ in 0..publishes {
                await_method(&mut stream, PUBLISH);
            }
            for tag in confirmed {
                let ack = [&tag.to_be_bytes()[..], &[0]].concat();
                say(&mut stream, CHANNEL, (60, 80), &ack);
            }
            // Until the publisher goes.
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        Self { url, peer: Some(peer) }
    }
}

impl FakeBroker {
    /// Takes one connection after the other until `last` have come. To each it delivers a message that announces so large a body.
    pub(crate) fn delivering_a_body_of(bytes: u64, connections: Arc<AtomicU32>, last: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("amqp://127.0.0.1:{}", listener.local_addr().expect("it is bound").port());
        let peer = std::thread::spawn(move || {
            while connections.load(Ordering::SeqCst) < last {
                let (mut stream, _) = listener.accept().expect("the consumer connects");
                stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout is set");
                log_in(&mut stream);
                for (asked, answer) in [((60, 10), (60, 11)), ((60, 20), (60, 21))] {
                    await_method(&mut stream, asked);
                    say(&mut stream, CHANNEL, answer, if answer == (60, 21) { &[1, b't'] } else { &[] });
                }
                connections.fetch_add(1, Ordering::SeqCst);
                let arguments = [&[1, b't'][..], &1_u64.to_be_bytes(), &[0, 0, 1, b'q']].concat();
                say(&mut stream, CHANNEL, (60, 60), &arguments);
                let header = [&[0, 60, 0, 0][..], &bytes.to_be_bytes(), &[0, 0]].concat();
                let frame = [&[2][..], &CHANNEL.to_be_bytes(), &long(&header), &[FRAME_END]].concat();
                stream.write_all(&frame).expect("the consumer listens");
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            }
        });
        Self { url, peer: Some(peer) }
    }
}

impl FakeBroker {
    /// Delivers so many messages of so many bytes to a consumer that settles none, or fewer if it hangs up.
    pub(crate) fn delivering(count: u64, bytes: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("amqp://127.0.0.1:{}", listener.local_addr().expect("it is bound").port());
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("the consumer connects");
            stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout is set");
            log_in(&mut stream);
            for (asked, answer) in [((60, 10), (60, 11)), ((60, 20), (60, 21))] {
                await_method(&mut stream, asked);
                say(&mut stream, CHANNEL, answer, if answer == (60, 21) { &[1, b't'] } else { &[] });
            }
            let frame = |kind: u8, payload: &[u8]| {
                [&[kind][..], &CHANNEL.to_be_bytes(), &long(payload), &[FRAME_END]].concat()
            };
            let header = [&[0, 60, 0, 0][..], &(bytes as u64).to_be_bytes(), &[0, 0]].concat();
            for tag in 1..=count {
                let deliver = [&[0, 60, 0, 60, 1, b't'][..], &tag.to_be_bytes(), &[0, 0, 1, b'q']].concat();
                let message =
                    [frame(METHOD, &deliver), frame(2, &header), frame(3, &vec![b'x'; bytes])].concat();
                if stream.write_all(&message).is_err() {
                    return;
                }
            }
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        });
        Self { url, peer: Some(peer) }
    }
}

impl Drop for FakeBroker {
    fn drop(&mut self) {
        let ended = self.peer.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(!matches!(ended, Some(Err(_))), "the fake broker panicked");
        }
    }
}

/// From the protocol header to a channel in confirm mode.
fn greet(stream: &mut TcpStream) {
    log_in(stream);
    await_method(stream, (85, 10));
    say(stream, CHANNEL, (85, 11), &[]);
}

/// From the protocol header to an open channel.
fn log_in(stream: &mut TcpStream) {
    stream.read_exact(&mut [0; 8]).expect("the protocol header");
    let start = [&[0, 9][..], &0_u32.to_be_bytes(), &long(b"PLAIN"), &long(b"en_US")].concat();
    say(stream, 0, (10, 10), &start);
    await_method(stream, (10, 11));
    let tune = [&100_u16.to_be_bytes()[..], &131_072_u32.to_be_bytes(), &0_u16.to_be_bytes()].concat();
    say(stream, 0, (10, 30), &tune);
    await_method(stream, (10, 31));
    await_method(stream, (10, 40));
    say(stream, 0, (10, 41), &[0]);
    await_method(stream, (20, 10));
    say(stream, CHANNEL, (20, 11), &long(b""));
}

fn long(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("a short text");
    [&len.to_be_bytes()[..], text].concat()
}

fn say(stream: &mut TcpStream, channel: u16, (class, method): (u16, u16), arguments: &[u8]) {
    let payload = [&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat();
    let frame = [&[METHOD][..], &channel.to_be_bytes(), &long(&payload), &[FRAME_END]].concat();
    stream.write_all(&frame).expect("the publisher listens");
}

/// Reads frames until one is this method.
fn await_method(stream: &mut TcpStream, wanted: (u16, u16)) {
    loop {
        let mut head = [0; 7];
        stream.read_exact(&mut head).expect("a frame");
        let len = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let mut payload = vec![0; len + 1];
        stream.read_exact(&mut payload).expect("the rest of the frame");
        assert_eq!(payload[len], FRAME_END);
        let is_it = |p: &[u8]| (u16::from_be_bytes([p[0], p[1]]), u16::from_be_bytes([p[2], p[3]])) == wanted;
        if head[0] == METHOD && is_it(&payload) {
            return;
        }
    }
}
