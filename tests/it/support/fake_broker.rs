//! A server that speaks just enough AMQP 0-9-1 to be published to, and confirms what it is told to confirm: for what no
//! real broker can be made to do on purpose.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
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
    await_method(stream, (85, 10));
    say(stream, CHANNEL, (85, 11), &[]);
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
