//! What a kill may do to files, and what it may not.

use std::path::PathBuf;

use onewrite_torture_checker::formats::{History, Line, TapMessage, read_history, read_tap};

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("torture-checker-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Self(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Goal: a history that was cut anywhere reads up to its last whole line; one that was damaged elsewhere is refused. Method: cut after
/// each byte; flip a bit of each byte of the first line.
#[test]
fn a_cut_history_reads_up_to_the_cut() {
    let scratch = Scratch::new("history");
    let path = scratch.0.join("a.hist");
    let mut history = History::create(&path).unwrap();
    for batch in 0..3 {
        history.line(&Line::Ok { batch, seqs: vec![batch] }).unwrap();
    }
    history.sync().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let mut lines = 0;
        read_history(&path, |_| lines += 1).map(|()| lines)
    };
    for cut in 0..=whole.len() {
        let lines = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(read(&whole[..cut]).unwrap(), lines);
    }
    let first = whole.iter().position(|byte| *byte == b'\n').unwrap();
    for at in 0..first {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        assert!(read(&damaged).is_err(), "byte {at}");
    }
}

/// Goal and method: as above, for the tap's file.
#[test]
fn a_cut_tap_reads_up_to_the_cut() {
    let scratch = Scratch::new("tap");
    let path = scratch.0.join("tap.bin");
    let message = TapMessage {
        exchange: "x.1".into(),
        routing_key: "r".into(),
        message_id: "m-1".into(),
        store: "s".into(),
        epoch: 1,
        lane: 2,
        lane_number: 3,
        crc: 4,
        sequence: 5,
        key: Some("k".into()),
        resend: true,
        redelivered: false,
        body: b"a0 1 abc".to_vec(),
    };
    let mut whole = Vec::new();
    message.encode_into(&mut whole);
    let one = whole.len();
    message.encode_into(&mut whole);
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let mut messages = Vec::new();
        read_tap(&path, |message| messages.push(message)).map(|()| messages)
    };
    for cut in 0..=whole.len() {
        assert_eq!(read(&whole[..cut]).unwrap(), vec![message.clone(); cut / one]);
    }
    for at in 4..one {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        assert!(read(&damaged).is_err(), "byte {at}");
    }
}
