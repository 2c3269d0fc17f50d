//! Whatever a broker sends: it is refused, or the AMQP client reads the headers of what is made of it. Never a panic, never a deep
//! recursion, never more memory than the bytes and a note for each frame.
#![no_main]

use amq_protocol::frame::{AMQPFrame, parse_frame};
use libfuzzer_sys::fuzz_target;

/// A content header that holds these bytes, behind the head that says so.
fn header(payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    [&[2, 0, 1][..], &len, payload, &[0xce]].concat()
}

fuzz_target!(|input: (u16, &[u8])| {
    let (piece, bytes) = input;
    let noise = onewrite::fuzzing::frames_of_a_broker(bytes, piece.into());
    assert!(noise.len() <= bytes.len() * 2 + 4096 * (1 + bytes.len() / 8));
    // With a right head, where mere noise seldom gets: class, weight, no body, headers, and then whatever comes.
    let head = [0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0];
    let table = [&head[..], &(bytes.len() as u32).to_be_bytes(), bytes].concat();
    for payload in [bytes, &table] {
        let seen = onewrite::fuzzing::frames_of_a_broker(&header(payload), piece.into());
        // A body that is announced too large is refused, or waited for and dropped.
        if seen.is_empty() {
            continue;
        }
        let Ok((rest, AMQPFrame::Header(1, _))) = parse_frame(&seen[..]) else {
            // Shorter than a content header can be: nothing in it nests.
            assert!(payload.len() < 14, "the client does not read {seen:?}");
            continue;
        };
        assert!(rest.is_empty());
    }
});
