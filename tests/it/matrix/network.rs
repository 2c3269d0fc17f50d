//! What only a network of one's own can show: a link that goes half-open, a blackhole, names that are unknown, change or hang.
//! Each runs in namespaces of its own (see `support::netns`).

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use super::{Line, rabbit, until};
use crate::scratch::task;
use crate::support::netns::{Cable, FAR, enter, run};
use crate::support::rabbit::{Place, RabbitNode};
use crate::support::standstill::Standstill;
use crate::support::tap::Tap;

/// B7. Goal: a link that dies without a word is noticed within two heartbeats and a second, as an outage, and costs nobody anything; when it
/// is back everything arrives. Method: broker and relay in two namespaces, the cable between them pulled at the far end; once with
/// nothing to send, once with a window in flight.
#[test]
fn b07_half_open_link() {
    let folder = tempfile::tempdir().unwrap();
    println!("{}", enter("matrix::network::child_half_open_link", folder.path(), ""));
}

#[test]
fn child_half_open_link() {
    if task().is_none() {
        return;
    }
    let cable = Cable::lay();
    let place = Place { address: FAR.parse().unwrap(), namespace_of: Some(cable.far_pid()) };
    let node = RabbitNode::start_at(place);
    Tap::connect(&node.url()).queue("b07", &[]);
    let mut line = Line::to(&node.url(), "b07");
    line.append_many(50);
    line.until_empty();
    for busy in [false, true] {
        let standstill = Standstill::watch();
        cable.pull();
        let began = Instant::now();
        if busy {
            line.append_at_once(200);
        }
        let fault = line.until_outage();
        let took = began.elapsed();
        let stood = standstill.so_far();
        println!("busy {busy}: {fault} after {took:?}, of which the machine stood still for {stood:?}");
        // The heartbeat is a second. What was heard last may be up to one heartbeat old.
        assert!(
            took > Duration::from_millis(500) && took <= Duration::from_secs(3) + stood,
            "noticed after {took:?}, of which the machine stood still for {stood:?}: {fault}"
        );
        line.append_many(20);
        cable.plug();
        // An attempt that was made meanwhile waits for TCP's own resend, up to its deadline of ten seconds.
        line.until_connected();
        line.until_empty();
    }
    line.assert_all_arrived(&Tap::connect(&node.url()));
    assert!(line.relay.status().reconnects >= 2);
    line.stop();
    println!("all well");
}

/// B11, the other half: packets vanish before there is any connection. Goal: the attempt is given up after ten seconds, as an outage, and a
/// stop does not wait for it. Method: the address of a neighbour whose cable is pulled.
#[test]
fn b11_blackhole() {
    let folder = tempfile::tempdir().unwrap();
    println!("{}", enter("matrix::network::child_blackhole", folder.path(), ""));
}

#[test]
fn child_blackhole() {
    if task().is_none() {
        return;
    }
    let cable = Cable::lay();
    cable.pull();
    let mut line = Line::to(&format!("amqp://{FAR}/"), "b11");
    let began = Instant::now();
    line.append_many(10);
    let fault = line.until_outage();
    let took = began.elapsed();
    println!("{fault} after {took:?}");
    assert!(fault.text.contains("did not answer within 10 s"), "{fault}");
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(13), "reported after {took:?}");
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    assert_eq!(line.relay.stop(Duration::from_secs(5)).backlog_events, 10);
    assert!(began.elapsed() < Duration::from_secs(2), "stop took {:?}", began.elapsed());
    println!("all well");
}

/// B18. Goal: a name that is unknown is an outage at once, and is asked for anew each time, so that it heals; a name server that never answers
/// is given up by the same ten seconds, and a stop does not wait for it. Method: `/etc/hosts` and `/etc/resolv.conf` of a mount
/// namespace; a name server that listens and says nothing.
#[test]
fn b18_names() {
    let folder = tempfile::tempdir().unwrap();
    println!("{}", enter("matrix::network::child_names", folder.path(), ""));
}

#[test]
fn child_names() {
    let Some((folder, _)) = task() else { return };
    run("ip link set lo up");
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let hosts = file("hosts", "127.0.0.1 localhost\n");
    let resolv = file("resolv.conf", "nameserver 127.0.0.1\noptions timeout:30 attempts:1\n");
    let nsswitch = file("nsswitch.conf", "hosts: files dns\n");
    for path in [&hosts, &resolv, &nsswitch] {
        let name = path.file_name().unwrap().to_str().unwrap();
        run(&format!("mount --bind {} /etc/{name}", path.display()));
    }
    let node = RabbitNode::start();
    let tap = Tap::connect(&node.url());
    tap.queue("b18", &[]);
    // Nobody listens on port 53: the lookup fails at once.
    let url = format!("amqp://guest:guest@broker.test:{}/%2f", node.port());
    let began = Instant::now();
    let mut line = Line::to(&url, "b18");
    let fault = line.until_outage();
    println!("{fault} after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(3), "reported after {:?}", began.elapsed());
    line.append_many(20);
    // In place: the mount is of this very file.
    std::fs::write(&hosts, "127.0.0.1 localhost broker.test\n").unwrap();
    line.assert_all_arrived(&tap);
    line.stop();

    let silent = UdpSocket::bind("127.0.0.1:53").unwrap();
    let mut line = Line::with("b18", |relay| relay, rabbit("amqp://other.test/"));
    let began = Instant::now();
    line.append_many(10);
    let fault = line.until_outage();
    let took = began.elapsed();
    println!("{fault} after {took:?}");
    assert!(fault.text.contains("did not answer within 10 s"), "{fault}");
    assert!(took > Duration::from_secs(9) && took < Duration::from_secs(13), "reported after {took:?}");
    let mut question = [0; 512];
    assert!(silent.recv(&mut question).unwrap() > 0, "it was asked");
    // The next lookup hangs as well.
    until("the next question", || silent.recv(&mut question).is_ok());
    let began = Instant::now();
    assert_eq!(line.relay.stop(Duration::from_secs(5)).backlog_events, 10);
    assert!(began.elapsed() < Duration::from_secs(2), "stop took {:?}", began.elapsed());
    println!("all well");
}
