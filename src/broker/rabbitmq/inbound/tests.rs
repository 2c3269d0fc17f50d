//! The output is always readable for the client library: the library's own decoder checks it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::task::{Wake, Waker};

use amq_protocol::frame::{AMQPFrame, parse_frame};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::limits::TABLE_NESTING_MAX;
use crate::wire::{MENDED, UNREADABLE};

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    Head { kind, channel, len: payload.len() }.with(payload)
}

fn method(channel: u16, (class, method): (u16, u16), arguments: &[u8]) -> Vec<u8> {
    frame(METHOD, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat())
}

fn short(bytes: &[u8]) -> Vec<u8> {
    [&[u8::try_from(bytes.len()).unwrap()][..], bytes].concat()
}

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

fn entry(name: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [&short(name)[..], &[kind], value].concat()
}

/// Returns a table in a table, `depth` levels deep.
fn nested(depth: usize, kind: u8) -> Vec<u8> {
    let mut value = long(b"");
    for _ in 1..depth {
        let inner = if kind == b'F' { entry(b"", kind, &value) } else { [&[kind][..], &value].concat() };
        value = long(&inner);
    }
    value
}

/// Returns a content header with headers and, by their flags, other properties.
fn header(body_bytes: u64, flags: u16, before: &[u8], headers: &[Vec<u8>], behind: &[u8]) -> Vec<u8> {
    let flags = flags | u16::from(!headers.is_empty()) << 13;
    let table = if headers.is_empty() { Vec::new() } else { long(&headers.concat()) };
    let head = [&60_u16.to_be_bytes()[..], &[0, 0], &body_bytes.to_be_bytes(), &flags.to_be_bytes()].concat();
    frame(HEADER, 1, &[&head[..], before, &table, behind].concat())
}

fn deliver(routing_key: &[u8]) -> Vec<u8> {
    let arguments = [&short(b"tag")[..], &1_u64.to_be_bytes(), &[0], &short(b"x"), &short(routing_key)];
    method(1, BASIC_DELIVER, &arguments.concat())
}

fn fed(bytes: &[u8]) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::new();
    Inbound::new(1000, Returns::of_a_publisher(), Deliveries::at_most(10_000, u64::MAX))
        .feed(bytes, &mut out)
        .map(|()| out)
}

/// lapin's reading of all frames.
fn parsed(mut bytes: &[u8]) -> Vec<AMQPFrame> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let (rest, frame) =
            parse_frame(bytes).unwrap_or_else(|error| panic!("lapin does not read it: {error:?}"));
        frames.push(frame);
        bytes = rest;
    }
    frames
}

/// The note in the only content header.
fn note(bytes: &[u8], name: &str) -> Option<String> {
    let headers = parsed(bytes).into_iter().filter_map(|frame| match frame {
        AMQPFrame::Header(_, header) => header.properties.headers().clone(),
        _ => None,
    });
    let notes: Vec<_> = headers
        .filter_map(|headers| Some(format!("{}", headers.inner().get(name)?.as_long_string()?)))
        .collect();
    assert!(notes.len() <= 1);
    notes.into_iter().next()
}

/// Goal: a message fetched with `basic.get` is mended too. Method: it has no consumer tag, and more
/// fields before its texts.
#[test]
fn texts_of_a_fetched_message_are_mended() {
    let arguments = |routing_key: &[u8]| {
        let fixed = [&7_u64.to_be_bytes()[..], &[1]].concat();
        [fixed, short(b"x"), short(routing_key), vec![0, 0, 0, 9]].concat()
    };
    let out = fed(&method(1, BASIC_GET_OK, &arguments(b"a\xff\xfeb"))).unwrap();
    let AMQPFrame::Method(1, read) = parsed(&out).remove(0) else { panic!("no method") };
    let read = format!("{read:?}");
    assert!(read.contains(r"a\u{1a}\u{1a}b") && read.contains("message_count: 9"), "{read}");
    let sound = method(1, BASIC_GET_OK, &arguments(b"plain"));
    assert_eq!(fed(&sound).unwrap(), sound);
}

#[test]
fn sound_frames_pass_as_they_are_however_they_come() {
    let headers =
        [entry(b"n", b'S', &long(b"text")), entry(b"deep", b'F', &nested(TABLE_NESTING_MAX - 1, b'F'))];
    let stream = [
        method(1, (60, 80), &[0, 0, 0, 0, 0, 0, 0, 1, 0]),
        frame(HEARTBEAT, 0, &[]),
        deliver("schlüssel".as_bytes()),
        header(
            5,
            1 << 15 | 1 << 12 | 1 << 7,
            &short(b"text/plain"),
            &headers,
            &[&[2][..], &short(b"m-1")].concat(),
        ),
        frame(BODY, 1, b"he"),
        frame(BODY, 1, b"llo"),
        header(0, 0, b"", &[], b""),
    ]
    .concat();
    assert_eq!(fed(&stream).unwrap(), stream);
    for step in [1, 2, 3, 7, 8, 13] {
        let (mut inbound, mut out) = (
            Inbound::new(1000, Returns::of_a_publisher(), Deliveries::at_most(10_000, u64::MAX)),
            Vec::new(),
        );
        stream.chunks(step).for_each(|chunk| inbound.feed(chunk, &mut out).unwrap());
        assert_eq!(out, stream, "{step} bytes at a time");
    }
}

/// Goal: a message that would poison the decoder reaches the consumer. Method: one kind of poison
/// at a time. lapin reads each message, and the message tells what was wrong. It counts as lost if
/// it cannot be distinguished from another message.
#[test]
fn what_the_decoder_refuses_is_mended_and_said() {
    let id = |id: &[u8]| [&[2][..], &short(id)].concat();
    let (mode_and_id, user) = (1 << 12 | 1 << 7, 1 << 4);
    let big = |name: &[u8], len: usize| entry(name, b'S', &long(&vec![b'x'; len]));
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        (
            "id",
            header(0, mode_and_id, b"", &[], &id(b"m\xff")),
            UNREADABLE,
            "its message_id `m\\xff` is not UTF-8",
        ),
        ("type", header(0, 1 << 5, b"", &[], &short(b"\xc3")), UNREADABLE, "its type `\\xc3` is not UTF-8"),
        ("user", header(0, user, b"", &[], &short(b"\xffu")), MENDED, "its user_id `\\xffu` is not UTF-8"),
        (
            "key",
            [deliver(b"k\xfe"), header(0, 0, b"", &[], b"")].concat(),
            UNREADABLE,
            "its routing key `k\\xfe`",
        ),
        (
            "name",
            header(0, 0, b"", &[entry(b"n\xff", b'V', b"")], b""),
            MENDED,
            "the name of header `n\\xff`",
        ),
        (
            "inner name",
            header(0, 0, b"", &[entry(b"t", b'F', &long(&entry(b"\xff", b'V', b"")))], b""),
            MENDED,
            "`\\xff`",
        ),
        ("deep F", header(0, 0, b"", &[entry(b"deep", b'F', &nested(3000, b'F'))], b""), MENDED, "`deep`"),
        ("deep A", header(0, 0, b"", &[entry(b"deep", b'A', &nested(5000, b'A'))], b""), MENDED, "`deep`"),
        (
            "kind",
            header(0, 0, b"", &[entry(b"a", b'V', b""), entry(b"b", b'?', b"12")], b""),
            UNREADABLE,
            "from entry 2 on",
        ),
        (
            "cut",
            header(0, 0, b"", &[entry(b"a", b'S', &[0, 0, 0, 9, 1])], b""),
            UNREADABLE,
            "from entry 1 on",
        ),
        (
            "odd inside",
            header(0, 0, b"", &[entry(b"t", b'F', &long(b"\x01n?"))], b""),
            MENDED,
            "header `t` is kept as bytes",
        ),
        ("short", header(0, 1 << 7, b"", &[], b"\x09m"), UNREADABLE, "end too early"),
        ("flags", header(0, 1, b"", &[], b"\0\0"), UNREADABLE, "properties cannot be read"),
        (
            "large",
            header(0, 0, b"", &[big(b"x-death", 140_000), big(b"kept", 9)], b""),
            UNREADABLE,
            "`x-death` of 140013 bytes",
        ),
        (
            "forged",
            header(0, 0, b"", &[entry(UNREADABLE.as_bytes(), b'V', b"")], b""),
            MENDED,
            "`onewrite-unreadable` is left out",
        ),
    ];
    for (name, bytes, header, text) in cases {
        let out = fed(&bytes).unwrap();
        let said = note(&out, header).unwrap_or_else(|| panic!("{name}: no {header}"));
        assert!(said.contains(text), "{name}: {said}");
        let other = if header == MENDED { UNREADABLE } else { MENDED };
        assert_eq!(note(&out, other), None, "{name}");
    }
    // Sound headers beside the faulty one stay.
    let kept =
        fed(&header(0, mode_and_id, b"", &[big(b"x-death", 140_000), big(b"kept", 9)], &id(b"m-1"))).unwrap();
    let AMQPFrame::Header(1, kept) = parsed(&kept).remove(0) else { panic!("no header") };
    assert_eq!(kept.properties.message_id().as_ref().unwrap().as_str(), "m-1");
    assert!(kept.properties.headers().as_ref().unwrap().contains_key("kept"));
}

/// Goal: a hundred thousand small headers that do not fit cost a moment, not a minute. Method: as
/// many as a frame may bring.
#[test]
fn many_headers_that_do_not_fit_are_left_out_at_once() {
    let headers = vec![entry(b"", b'V', b""); 500_000];
    let out = fed(&header(0, 0, b"", &headers, b"")).unwrap();
    assert!(out.len() <= FRAME_BYTES_MAX as usize);
    assert!(note(&out, UNREADABLE).unwrap().contains("more"));
}

/// Goal: a body over the cap takes no memory, and its message is distinguished from another message
/// of the same length. Method: bodies in parts, with frames of other channels in between; the
/// header comes after the last part.
#[test]
fn a_body_over_the_cap_is_dropped_as_it_comes() {
    let body = |fill: u8| {
        let part = frame(BODY, 1, &[fill; 700]);
        let other = frame(BODY, 2, b"other");
        [deliver(b"k"), header(1400, 1 << 7, b"", &[], &short(b"m-1")), part.clone(), other, part].concat()
    };
    let (mut inbound, mut out) =
        (Inbound::new(1000, Returns::of_a_publisher(), Deliveries::at_most(10_000, u64::MAX)), Vec::new());
    for chunk in body(1).chunks(100) {
        inbound.feed(chunk, &mut out).unwrap();
    }
    assert!(out.len() < 600, "{}", out.len());
    let first = note(&out, UNREADABLE).unwrap();
    assert!(first.contains("its body of 1400 bytes (CRC-32 "), "{first}");
    assert_ne!(note(&fed(&body(2)).unwrap(), UNREADABLE).unwrap(), first);
    // The connection continues.
    let next = [deliver(b"k"), header(2, 0, b"", &[], b""), frame(BODY, 1, b"ok")].concat();
    out.clear();
    inbound.feed(&next, &mut out).unwrap();
    assert_eq!(out, next);
    // A body longer than announced, or cut short.
    let long = [header(1400, 0, b"", &[], b""), frame(BODY, 1, &[0; 1401])].concat();
    assert_eq!(fed(&long), Err(broken("the broker sent a body that is longer than its header says")));
    let cut = [header(1400, 0, b"", &[], b""), deliver(b"k")].concat();
    assert_eq!(fed(&cut), Err(broken("the broker sent another frame in the middle of a body")));
}

#[test]
fn what_no_broker_sends_ends_the_connection() {
    let endless = header(1 << 62, 0, b"", &[], b"");
    let head = |kind: u8, len: u32| [&[kind, 0, 1][..], &len.to_be_bytes()].concat();
    for (bytes, text) in [
        (endless, "its body is announced with 4611686018427387904 bytes"),
        (head(METHOD, u32::MAX), "a method in a frame of"),
        (head(HEADER, 1 << 20), "its headers are a frame of 1048584 bytes"),
        (head(BODY, 131_073), "a part of a body in a frame of"),
        (head(HEARTBEAT, 1), "a heartbeat in a frame of"),
        (head(9, 0), "unknown kind 9"),
        ([head(METHOD, 1), vec![0, 0]].concat(), "does not end where it should"),
    ] {
        let Err(Refused::Broken(said)) = fed(&bytes) else { panic!("{text} is taken") };
        assert!(said.contains(text), "{said}");
    }
}

/// Goal: lapin never sees a greeting without a login that this library supports: it would log that
/// and send the password all the same. Nor does lapin see a greeting that would overflow its stack.
/// Method: greetings.
#[test]
fn the_greeting_is_looked_at_before_the_login() {
    let start = |properties: &[u8], mechanisms: &[u8]| {
        method(
            0,
            CONNECTION_START,
            &[&[0, 9][..], &long(properties), &long(mechanisms), &long(b"en_US")].concat(),
        )
    };
    let good = start(&entry(b"product", b'S', &long(b"RabbitMQ")), b"AMQPLAIN PLAIN");
    assert_eq!(fed(&good).unwrap(), good);
    for offered in [&b"EXTERNAL"[..], b"", b"PLAINER", b"EXTERNAL AMQPLAIN"] {
        let Err(Refused::ForGood(said)) = fed(&start(b"", offered)) else { panic!("{offered:?} is taken") };
        assert!(said.contains("no password was sent"), "{said}");
    }
    let deep = fed(&start(&entry(b"deep", b'F', &nested(10_000, b'F')), b"PLAIN")).unwrap();
    assert_eq!(parsed(&deep).len(), 1);
}

/// Goal: if a broker's frames are smaller than the client library can send, the fault names that,
/// before the broker ends the connection without a reason. Method: offers around the limit; 0 means
/// any size.
#[test]
fn a_frame_max_that_is_too_small_is_named() {
    let tune = |frame_max: u32| {
        method(0, CONNECTION_TUNE, &[&[0, 9][..], &frame_max.to_be_bytes(), &[0, 60]].concat())
    };
    for frame_max in [1, 4096, 8191] {
        let Err(Refused::ForGood(said)) = fed(&tune(frame_max)) else { panic!("{frame_max} is taken") };
        assert!(said.contains(&format!("frames of {frame_max} bytes (`frame_max`)")), "{said}");
    }
    for frame_max in [0, 8192, 131_072, u32::MAX] {
        assert_eq!(fed(&tune(frame_max)).unwrap(), tune(frame_max));
    }
}

#[test]
fn a_server_of_another_version_is_lapins_to_name() {
    let answer = b"AMQP\0\x01\0\0";
    assert_eq!(fed(&[&answer[..], b"AMQP more"].concat()).unwrap(), answer);
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![3 => "[a-z]{0,8}".prop_map(String::into_bytes), 1 => vec(any::<u8>(), 0..8)]
}

fn value(depth: u32) -> impl Strategy<Value = (u8, Vec<u8>)> {
    let leaf = prop_oneof![
        4 => vec(any::<u8>(), 0..40).prop_map(|bytes| (b'S', long(&bytes))),
        1 => any::<u64>().prop_map(|int| (b'l', int.to_be_bytes().to_vec())),
        1 => Just((b'V', Vec::new())),
        1 => (1_usize..40).prop_map(|depth| (b'F', nested(depth, b'F'))),
        1 => (1_usize..40).prop_map(|depth| (b'A', nested(depth, b'A'))),
        1 => (any::<u8>(), vec(any::<u8>(), 0..20)),
    ];
    leaf.prop_recursive(depth, 64, 6, |inner| {
        prop_oneof![
            vec((name(), inner.clone()), 0..6).prop_map(|entries| {
                let entries: Vec<_> =
                    entries.iter().map(|(name, (kind, value))| entry(name, *kind, value)).collect();
                (b'F', long(&entries.concat()))
            }),
            vec(inner, 0..6).prop_map(|values| {
                let values: Vec<_> =
                    values.iter().map(|(kind, value)| [&[*kind][..], value].concat()).collect();
                (b'A', long(&values.concat()))
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Goal: for any headers of a message, lapin can read the mended headers, and they fit into a
    /// frame. Method: tables with odd names, types, lengths and depths, and properties with odd
    /// flags and cuts.
    #[test]
    fn whatever_a_header_holds_the_decoder_reads_it(
        entries in vec((name(), value(6)), 0..8),
        flags in any::<u16>(),
        properties in vec(any::<u8>(), 0..200),
        frame_bytes_max in prop_oneof![Just(8192_u32), Just(131_072)],
        step in 1_usize..200,
    ) {
        let entries: Vec<_> = entries.iter().map(|(name, (kind, value))| entry(name, *kind, value)).collect();
        let tune = method(0, CONNECTION_TUNE, &[&[0, 9][..], &frame_bytes_max.to_be_bytes(), &[0, 9]].concat());
        let odd = header(0, flags & !(1 << 13), &properties, &entries, b"");
        let stream = [tune, deliver(&properties[..properties.len().min(20)]), header(0, 0, b"", &entries, b""), odd].concat();
        let (mut inbound, mut out) = (Inbound::new(1000, Returns::of_a_publisher(), Deliveries::at_most(10_000, u64::MAX)), Vec::new());
        for chunk in stream.chunks(step) {
            inbound.feed(chunk, &mut out).unwrap();
        }
        let mut rest = &out[..];
        while !rest.is_empty() {
            let (behind, read) = parse_frame(rest).expect("lapin reads it");
            let is_header = matches!(read, AMQPFrame::Header(..));
            prop_assert!(!is_header || rest.len() - behind.len() <= frame_bytes_max as usize);
            rest = behind;
        }
        let headers = parsed(&out).into_iter().filter(|frame| matches!(frame, AMQPFrame::Header(..)));
        prop_assert_eq!(headers.count(), 2);
    }

    /// Goal: no bytes lead to a panic or to unbounded memory. Method: noise, and frames with noise
    /// in them.
    #[test]
    fn noise_is_taken_or_refused(
        frames in vec((prop_oneof![Just(1_u8), Just(2), Just(3), Just(8), any::<u8>()], any::<u16>(), vec(any::<u8>(), 0..100)), 0..10),
        noise in vec(any::<u8>(), 0..100),
    ) {
        let mut stream: Vec<u8> = frames.iter().flat_map(|(kind, channel, payload)| frame(*kind, *channel, payload)).collect();
        stream.extend(noise);
        let (mut inbound, mut out) = (Inbound::new(50, Returns::of_a_publisher(), Deliveries::at_most(10_000, u64::MAX)), Vec::new());
        let _ = inbound.feed(&stream, &mut out);
        prop_assert!(out.len() <= stream.len() + 2000 * frames.len());
    }
}

/// Goal: a broker that breaks its promises costs bounded memory, and the fault names the promise.
/// Method: deliveries beyond the prefetch, also after some were settled; returns where nothing is
/// published, and more returns than can be in flight.
#[test]
fn what_the_broker_promises_is_counted() {
    let message = |n: u64| [deliver(b"k"), header(n, 0, b"", &[], b"")].concat();
    let deliveries = Deliveries::at_most(3, u64::MAX);
    let mut inbound = Inbound::new(1000, Returns::of_a_consumer(), deliveries.clone());
    let mut out = Vec::new();
    for _ in 0..3 {
        inbound.feed(&message(0), &mut out).unwrap();
    }
    deliveries.settled((3, 0), (1, 0));
    for _ in 0..2 {
        inbound.feed(&message(0), &mut out).unwrap();
    }
    let error = inbound.feed(&message(0), &mut out).unwrap_err();
    assert!(error.to_string().contains("more than the 3 messages"), "{error}");

    let returned = [
        method(1, BASIC_RETURN, &[&[1, 56][..], &short(b"NO_ROUTE"), &short(b"x"), &short(b"k")].concat()),
        header(4, 1 << 7, b"", &[], &short(b"m-1")),
        frame(BODY, 1, b"body"),
    ]
    .concat();
    let returns = Returns::of_a_consumer();
    let mut inbound = Inbound::new(1000, returns, Deliveries::at_most(3, u64::MAX));
    let error = inbound.feed(&returned, &mut out).unwrap_err();
    assert!(error.to_string().contains("returned more messages than are in flight"), "{error}");

    let (returns, mut out) = (Returns::of_a_publisher(), Vec::new());
    let mut inbound = Inbound::new(1, returns.clone(), Deliveries::none());
    for _ in 0..10 {
        inbound.feed(&returned, &mut out).unwrap();
    }
    assert!(out.is_empty(), "lapin sees none of it");
    let taken = returns.take(1);
    assert_eq!((taken.len(), taken[0].id.as_str(), taken[0].fault.code), (10, "m-1", Some(312)));
    let error = (0..=crate::limits::WINDOW_EVENTS_MAX).find_map(|_| inbound.feed(&returned, &mut out).err());
    assert!(error.is_some_and(|error| error.to_string().contains("than are in flight")));
}

/// Goal: while unsettled deliveries exceed their bytes, only the rest of a delivery that has begun
/// is read. One delivery always has room. The reader is woken when there is room again. A fetched
/// message is no delivery. Method: bodies of 600 bytes in a bound of 1,000, in two frames.
#[test]
fn unsettled_bytes_are_bounded() {
    let content =
        [header(600, 0, b"", &[], b""), frame(BODY, 1, &[7; 400]), frame(BODY, 1, &[7; 200])].concat();
    let message = [deliver(b"k"), content.clone()].concat();
    let fetched = [method(1, (60, 71), &[0; 8]), content].concat();
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let cx = Context::from_waker(&waker);
    let deliveries = Deliveries::at_most(9, 1000);
    let mut inbound = Inbound::new(5000, Returns::of_a_consumer(), deliveries.clone());
    let mut out = Vec::new();
    inbound.feed(&[fetched.clone(), message.clone(), fetched.clone()].concat(), &mut out).unwrap();
    assert_eq!(inbound.room(&cx), Some(usize::MAX));
    let mut left = message.as_slice();
    let (now, later) = left.split_at(message.len() - 300);
    inbound.feed(now, &mut out).unwrap();
    left = later;
    while !left.is_empty() {
        let room = inbound.room(&cx).expect("what has begun comes to its end");
        assert!(room <= left.len(), "and nothing behind it: {room} of {}", left.len());
        let (now, later) = left.split_at(room);
        inbound.feed(now, &mut out).unwrap();
        left = later;
    }
    assert_eq!(inbound.room(&cx), None);
    assert_eq!(out, [&fetched[..], &message, &fetched, &message].concat(), "all of it is handed on");

    let sizes = [deliveries.taken(), deliveries.taken(), deliveries.taken()];
    assert!(sizes[0] > 600 && sizes[0] == sizes[1] && sizes[2] == 0, "{sizes:?}");
    assert_eq!(woken.0.load(Relaxed), 0);
    deliveries.settled((2, 1200), (1, 600));
    assert_eq!(woken.0.load(Relaxed), 1, "the reader waits for this");
    assert_eq!(inbound.room(&cx), Some(usize::MAX));

    // Some deliveries are larger than the bound.
    deliveries.settled((1, u64::MAX), (0, 0));
    let large = [deliver(b"k"), header(4000, 0, b"", &[], b"")].concat();
    let body = frame(BODY, 1, &[7; 4000]);
    assert_eq!(inbound.room(&cx), Some(usize::MAX));
    inbound.feed(&large, &mut out).unwrap();
    assert_eq!(inbound.room(&cx), Some(FRAME_HEAD), "the head of its body, and nothing behind it");
    inbound.feed(&body, &mut out).unwrap();
    assert_eq!(inbound.room(&cx), None);

    // At the end, a delivery that has begun is handed on, and later deliveries are dropped.
    deliveries.want_no_more();
    assert_eq!((inbound.room(&cx), woken.0.load(Relaxed)), (Some(usize::MAX), 2));
    let before = out.len();
    inbound.feed(&[message, large, body, deliver(b"k")].concat(), &mut out).unwrap();
    inbound.feed(&[header(0, 0, b"", &[], b""), HEARTBEAT_FRAME.to_vec()].concat(), &mut out).unwrap();
    assert_eq!(out.split_off(before), HEARTBEAT_FRAME);
}

/// Goal: a delivery whose body is left out is also read to its end, even if its headers take much:
/// only then is it handed on. Method: many values beside a body over the cap, in two frames, where
/// nothing has room.
#[test]
fn a_body_that_is_left_out_is_read_to_its_end() {
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(Arc::clone(&woken));
    let cx = Context::from_waker(&waker);
    let deliveries = Deliveries::at_most(9, 1000);
    let mut inbound = Inbound::new(500, Returns::of_a_consumer(), deliveries.clone());
    let values = entry(b"h", b'A', &long(&[b'V'; 1000]));
    let content = [header(700, 0, b"", &[values], b""), frame(BODY, 1, &[7; 400]), frame(BODY, 1, &[7; 300])];
    let message = [deliver(b"k"), content.concat()].concat();
    let (mut left, mut out) = (&message[..], Vec::new());
    while !left.is_empty() {
        let room = inbound.room(&cx).expect("what has begun comes to its end").min(left.len()).min(64);
        let (now, later) = left.split_at(room);
        inbound.feed(now, &mut out).unwrap();
        left = later;
    }
    assert_eq!(inbound.room(&cx), None);
    assert!(deliveries.taken() > 64_000 && out.len() > deliver(b"k").len() + 1000, "it is handed on");
}

/// Goal: headers count with the memory that they take: an array of a hundred thousand nothings
/// takes more than its bytes. Method: such a header, nested too, and one of text of the same
/// length.
#[test]
fn values_count_with_what_they_take_in_memory() {
    let bytes_of = |value: Vec<u8>| {
        let deliveries = Deliveries::at_most(9, 1000);
        let mut inbound = Inbound::new(5000, Returns::of_a_consumer(), deliveries.clone());
        inbound.feed(&[deliver(b"k"), header(0, 0, b"", &[value], b"")].concat(), &mut Vec::new()).unwrap();
        deliveries.taken()
    };
    let nothings = vec![b'V'; 100_000];
    let text = bytes_of(entry(b"h", b'S', &long(&nothings)));
    assert!((100_000..101_000).contains(&text), "{text}");
    let array = bytes_of(entry(b"h", b'A', &long(&nothings)));
    let nested = bytes_of(entry(b"h", b'A', &long(&[&b"A"[..], &long(&nothings)].concat())));
    assert!(array > 64 * 100_000 && nested > array, "{array}, {nested}");
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Relaxed);
    }
}
