//! B21. A peer that lies, stammers or hangs up, in every phase of the protocol; and a good one behind a line that garbles.
//!
//! All of it happens to a child process, so that its memory and its panics are its own.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use onewrite::FaultClass;

use super::{Line, rabbit, until};
use crate::scratch::{Random, child, task};
use crate::support::proxy::{ChaosProxy, End, Way};
use crate::support::rabbit::shared_node;
use crate::support::tap::Tap;

/// Resident memory that the child may reach: several times what it needs, a fraction of one hostile frame.
const RESIDENT_KIB_MAX: u64 = 400 << 10;

/// When the peer stops playing by the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Greeting,
    Login,
    Open,
    Channel,
    Confirm,
    Publish,
}

const PHASES: [Phase; 6] =
    [Phase::Greeting, Phase::Login, Phase::Open, Phase::Channel, Phase::Confirm, Phase::Publish];

/// What the peer does about it.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) name: String,
    pub(super) tune: (u16, u32, u16),
    until: Phase,
    says: Vec<u8>,
    end: End,
}

const HONEST_TUNE: (u16, u32, u16) = (100, 131_072, 1);

fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&[kind][..], &channel.to_be_bytes(), &len.to_be_bytes(), payload, &[0xce]].concat()
}

fn method(channel: u16, (class, method): (u16, u16), arguments: &[u8]) -> Vec<u8> {
    frame(1, channel, &[&class.to_be_bytes()[..], &method.to_be_bytes(), arguments].concat())
}

fn long(text: &[u8]) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat()
}

/// Frames that no broker sends.
fn lies() -> Vec<(&'static str, Vec<u8>)> {
    let mut noise = vec![0; 64 << 10];
    let mut random = Random(21);
    noise.iter_mut().for_each(|byte| *byte = random.next() as u8);
    let ack = |tag: u64, multiple: u8| method(1, (60, 80), &[&tag.to_be_bytes()[..], &[multiple]].concat());
    let header =
        |size: u64| frame(2, 1, &[&60_u16.to_be_bytes()[..], &[0, 0], &size.to_be_bytes(), &[0, 0]].concat());
    let returned = method(1, (60, 50), &[&312_u16.to_be_bytes()[..], &[2, b'N', b'O', 0, 0]].concat());
    let delivered = method(1, (60, 60), &[&[1, b't'][..], &1_u64.to_be_bytes(), &[0, 0, 0]].concat());
    vec![
        ("nothing", vec![]),
        ("noise", noise),
        ("http", b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n".to_vec()),
        ("half a frame", frame(1, 0, &[0; 100])[..20].to_vec()),
        ("half a head", vec![1, 0, 0]),
        ("a frame of 4 GiB", [&[1, 0, 0, 0xff, 0xff, 0xff, 0xff][..], &[0; 1 << 20]].concat()),
        ("a frame over the limit", frame(3, 1, &vec![0; 131_072 + 1])),
        ("a frame without its end", {
            let mut cut = frame(8, 0, &[]);
            *cut.last_mut().unwrap() = 0;
            cut
        }),
        ("a method that is none", method(0, (999, 999), &[])),
        ("a method cut short", method(0, (10, 50), &[1])),
        ("a channel that is none", method(65_535, (20, 40), &[0, 0, 0, 0, 0, 0, 0])),
        ("an ack of nothing", ack(999, 0)),
        ("an ack of more than all", ack(u64::MAX, 1)),
        ("a body of nothing", frame(3, 1, b"x")),
        ("a header of nothing", header(1)),
        ("a return of 2^63 bytes", [returned.clone(), header(1 << 63), frame(3, 1, &[0; 1000])].concat()),
        ("a return that ends early", [returned, header(1)].concat()),
        ("a delivery nobody asked for", [delivered, header(1 << 62)].concat()),
        ("a table that is longer than its frame", method(0, (10, 10), &[0, 9, 0xff, 0xff, 0xff, 0xff])),
        ("blocked without end", method(0, (10, 60), &[255, b'x'])),
        ("goodbye", method(0, (10, 50), &[&320_u16.to_be_bytes()[..], &[1, b'x', 0, 0, 0, 0]].concat())),
    ]
}

impl Script {
    /// Frames that the client library cannot send. That is a fault of configuration, so the relay comes again after 30 s only.
    pub(super) fn is_refused_for_good(&self) -> bool {
        (1..onewrite::limits::FRAME_BYTES_MIN).contains(&self.tune.1)
    }
}

pub(super) fn scripts() -> Vec<Script> {
    let mut scripts = Vec::new();
    for until in PHASES {
        for (name, says) in lies() {
            // In mid-publish that is a confirm, as far as the protocol goes; a broker that lies in its confirms cannot be detected.
            if until == Phase::Publish && name == "an ack of more than all" {
                continue;
            }
            let end = if scripts.len() % 2 == 0 { End::Close } else { End::Reset };
            scripts.push(Script { name: name.into(), tune: HONEST_TUNE, until, says, end });
        }
    }
    for frame_max in [0, 1, 7, 8, 9, 100, 4095, 131_073, u32::MAX] {
        for (channel_max, heartbeat) in [(0, 0), (1, 65_535), (65_535, 1)] {
            let tune = (channel_max, frame_max, heartbeat);
            for until in [Phase::Open, Phase::Publish] {
                let name = format!("tune {tune:?}");
                scripts.push(Script { name, tune, until, says: vec![], end: End::Close });
            }
        }
    }
    scripts
}

/// Plays a broker up to a point, then says what it should not, waits a moment, and ends.
pub(super) fn play(stream: &mut TcpStream, script: &Script) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.set_write_timeout(Some(Duration::from_secs(2)))?;
    stream.read_exact(&mut [0; 8])?;
    let start = [&[0, 9][..], &0_u32.to_be_bytes(), &long(b"PLAIN"), &long(b"en_US")].concat();
    let (channels, frame_max, heartbeat) = script.tune;
    let tune = [&channels.to_be_bytes()[..], &frame_max.to_be_bytes(), &heartbeat.to_be_bytes()].concat();
    // What is said at the beginning of each phase, and what is awaited before it.
    let phases = [
        (Phase::Greeting, None, method(0, (10, 10), &start)),
        (Phase::Login, Some((10, 11)), method(0, (10, 30), &tune)),
        (Phase::Open, Some((10, 40)), method(0, (10, 41), &[0])),
        (Phase::Channel, Some((20, 10)), method(1, (20, 11), &long(b""))),
        (Phase::Confirm, Some((85, 10)), method(1, (85, 11), &[])),
        (Phase::Publish, Some((60, 40)), vec![]),
    ];
    for (phase, awaited, answer) in phases {
        if let Some(awaited) = awaited {
            await_method(stream, awaited)?;
        }
        if phase == script.until {
            break;
        }
        stream.write_all(&answer)?;
    }
    stream.write_all(&script.says)?;
    std::thread::sleep(Duration::from_millis(30));
    if script.end == End::Reset {
        socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO))?;
    }
    Ok(())
}

fn await_method(stream: &mut TcpStream, wanted: (u16, u16)) -> io::Result<()> {
    loop {
        let mut head = [0; 7];
        stream.read_exact(&mut head)?;
        let mut payload = vec![0; u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize + 1];
        stream.read_exact(&mut payload)?;
        let is_it = |p: &[u8]| (u16::from_be_bytes([p[0], p[1]]), u16::from_be_bytes([p[2], p[3]])) == wanted;
        if head[0] == 1 && payload.len() > 4 && is_it(&payload) {
            return Ok(());
        }
    }
}

fn run_child(name: &str) {
    let node = shared_node();
    Tap::connect(&node.url()).queue(name, &[]);
    let folder = tempfile::tempdir().unwrap();
    let argument = format!("{} {name} {}", node.port(), node.url());
    let output = child(&format!("matrix::hostile::child_{name}"), folder.path(), argument).output().unwrap();
    let shown =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && shown.contains("all well"), "{shown}");
    eprintln!("{}", shown.lines().filter(|line| line.starts_with("reported")).collect::<Vec<_>>().join("\n"));
}

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Every panic of any thread is counted, and shown as always.
fn count_panics() {
    let shown = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        shown(info);
    }));
}

fn assert_all_well() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < RESIDENT_KIB_MAX, "{peak} KiB resident at the peak");
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "a thread panicked");
}

/// Goal: whatever a peer says, in whatever phase, is an outage: no panic, no memory, no event charged, and in the end everything
/// arrives at a good broker. Frames that are too small are a fault of configuration. Method: 21 lies in each of six phases, 27 tunes
/// in two; then the way leads to a real broker. Each tune with small frames meets a relay of its own.
#[test]
fn b21_hostile_peers() {
    run_child("hostile_peers");
}

#[test]
fn child_hostile_peers() {
    let Some((_, argument)) = task() else { return };
    let [port, queue, url] = argument.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
    count_panics();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let hostile_port = listener.local_addr().unwrap().port();
    let proxy = ChaosProxy::to(hostile_port);
    let publisher = rabbit(&format!("amqp://127.0.0.1:{}", proxy.port()))
        .reconnect_backoff(Duration::from_millis(1), Duration::from_millis(2));
    let mut line = Line::with(queue, |relay| relay, publisher);
    line.append_many(20);
    let began = Instant::now();
    let (refused, scripts): (Vec<_>, Vec<_>) = scripts().into_iter().partition(Script::is_refused_for_good);
    for script in &refused {
        let own = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut line = Line::to(&format!("amqp://{}", own.local_addr().unwrap()), queue);
        line.append("k");
        let _ = play(&mut own.accept().unwrap().0, script);
        let fault = line.until_down();
        assert_eq!(fault.class, FaultClass::Config, "{:?} {}: {fault}", script.until, script.name);
        assert_eq!(
            line.store.stats().unwrap().relays["rabbit"].quarantined,
            0,
            "charged for {}",
            script.name
        );
    }
    for script in &scripts {
        let (mut stream, _) = listener.accept().unwrap();
        // It fails where the client was first to go, which is what is wanted.
        let played = play(&mut stream, script);
        drop(stream);
        let fault = line.relay.status().last_fault;
        println!("{:?} {}: {played:?} {fault:?}", script.until, script.name);
        let stats = line.store.stats().unwrap();
        assert_eq!(
            stats.relays["rabbit"].quarantined,
            0,
            "charged for {:?} {}: {:?}",
            script.until,
            script.name,
            line.store.quarantine("rabbit").unwrap().list(None, 1)
        );
    }
    println!("reported: {} scripts in {:?}", refused.len() + scripts.len(), began.elapsed());
    assert_all_well();
    // From here on the connections lead to the real broker.
    let port = port.parse().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            splice(stream.unwrap(), port);
        }
    });
    line.assert_all_arrived(&Tap::connect(url));
    assert_all_well();
    println!("all well");
}

/// Carries one connection to the real broker.
fn splice(client: TcpStream, port: u16) {
    let broker = TcpStream::connect(("127.0.0.1", port)).unwrap();
    for (from, to) in [(&client, &broker), (&broker, &client)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut from, &mut to));
    }
}

/// Goal: a line that cuts or garbles what a good broker says, at any byte of login, set-up and publishing, costs a reconnect and nothing
/// else. Method: cuts by FIN, by RST and one flipped bit, at every few bytes of both ways.
#[test]
fn b21_cut_and_garbled_lines() {
    run_child("garbled_lines");
}

#[test]
fn child_garbled_lines() {
    let Some((_, argument)) = task() else { return };
    let [port, queue, url] = argument.splitn(3, ' ').collect::<Vec<_>>().try_into().unwrap();
    count_panics();
    let proxy = ChaosProxy::to(port.parse().unwrap());
    let publisher =
        rabbit(&proxy.url(url)).reconnect_backoff(Duration::from_millis(1), Duration::from_millis(2));
    let mut line = Line::with(queue, |relay| relay, publisher);
    line.append_many(20);
    line.until_empty();
    let began = Instant::now();
    let mut tried = 0;
    for way in [Way::Down, Way::Up] {
        // Login and set-up take some 600 bytes down and 400 up. One-sided damage upwards in a payload would be the payload's own, so
        // upwards only the set-up is garbled.
        let (reach, garbled) = if way == Way::Down { (700, 700) } else { (500, 250) };
        for at in (0..reach).step_by(13) {
            for (n, end) in [Some(End::Close), Some(End::Reset), None].into_iter().enumerate() {
                if end.is_none() && at >= garbled {
                    continue;
                }
                let before = proxy.accepted();
                // The rule counts from the new connection's first byte.
                until("the old connection gone", || {
                    let gone = proxy.live() == 0 || proxy.accepted() > before;
                    if !gone {
                        // One that was accepted just now may not have heard it.
                        proxy.end_all(End::Reset);
                    }
                    gone
                });
                match end {
                    Some(end) => proxy.end_after(way, at + n as u64, end),
                    None => proxy.corrupt_after(way, at),
                }
                line.append("k0");
                tried += 1;
                // What is garbled may leave both sides waiting for more; that has its own deadline, and is not waited for here.
                let deadline = Instant::now() + Duration::from_millis(60);
                while Instant::now() < deadline && proxy.accepted() < before + 2 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                assert_eq!(
                    line.store.stats().unwrap().relays["rabbit"].quarantined,
                    0,
                    "charged at {way:?} {at} {end:?}: {:?}",
                    line.store.quarantine("rabbit").unwrap().list(None, 1)
                );
            }
        }
    }
    println!("reported: {tried} cuts in {:?}", began.elapsed());
    proxy.end_all(End::Reset);
    line.assert_all_arrived(&Tap::connect(url));
    assert_all_well();
    println!("all well");
}
