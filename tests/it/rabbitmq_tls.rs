//! TLS (B17): against real brokers with certificates made here, and against peers that misbehave. Nothing is asked of the
//! machine's own certificates.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onewrite::broker::{Publisher, PublisherEvents, RabbitMq, RabbitMqSource, Tls, Topology};
use onewrite::redb::{ReadableTable, ReadableTableMetadata, TableDefinition};
use onewrite::{Event, Fault, FaultClass, Outcome, RelayState, Store};

use crate::support::certs::Certs;
use crate::support::rabbit::{RabbitNode, Supervised, free_port};
use crate::support::rig::{Rig, message, outgoing};
use crate::support::tap::Tap;

/// A refusal is reported at once: the handshake takes milliseconds, a loaded machine gets more.
const AT_ONCE: Duration = Duration::from_secs(3);

/// A broker with a TLS port that lets in only clients with a certificate of `ca`, and what it takes to be one.
struct Strict {
    certs: Certs,
    node: RabbitNode,
    tls_port: u16,
}

impl Strict {
    fn shared() -> &'static Self {
        static STRICT: OnceLock<Strict> = OnceLock::new();
        STRICT.get_or_init(|| {
            let (certs, tls_port) = (Certs::new(), free_port());
            certs.authority("other");
            certs.issue("other", "stranger", "DNS:ledger", 30);
            let node = RabbitNode::start_with(&certs.listener(tls_port, true));
            Self { certs, node, tls_port }
        })
    }

    fn url(&self) -> String {
        format!("amqps://guest:guest@127.0.0.1:{}", self.tls_port)
    }

    /// Trusts `authority`, and shows the certificate `client`.
    fn tls(&self, authority: &str, client: &str) -> Tls {
        trusting(&self.certs, authority)
            .client_certificate_pem(
                self.certs.read(&format!("{client}.pem")),
                self.certs.read(&format!("{client}.key")),
            )
            .unwrap()
    }
}

fn trusting(certs: &Certs, authority: &str) -> Tls {
    Tls::new().ca_pem(certs.read(&format!("{authority}.pem"))).unwrap()
}

/// What becomes of an attempt, at once.
fn refused(url: &str, tls: Option<Tls>) -> Fault {
    let publisher = RabbitMq::new(url).unwrap();
    let began = Instant::now();
    let mut rig = Rig::start(match tls {
        Some(tls) => publisher.tls(tls),
        None => publisher,
    });
    let fault = rig.wait_down();
    assert!(began.elapsed() < AT_ONCE, "reported after {:?}: {fault}", began.elapsed());
    rig.publisher.stop(Duration::from_secs(5));
    fault
}

fn assert_config(fault: &Fault, word: &str) {
    assert!(fault.class == FaultClass::Config && fault.text.contains(word), "{fault}");
    assert!(
        fault.text.contains("127.0.0.1") || fault.text.contains("localhost"),
        "no broker is named: {fault}"
    );
}

/// Goal: with its own authority and the client certificate that the broker demands, what is confirmed is in the queue.
/// Method: by address and by name; from bytes and from files; larger messages than a TLS record; read back in plain text.
#[test]
fn b17_a_private_authority_and_a_client_certificate() {
    let strict = Strict::shared();
    let tap = Tap::connect(&strict.node.url());
    tap.queue("tls.q", &[]);
    let from_files = Tls::new()
        .ca_file(strict.certs.path("ca.pem"))
        .unwrap()
        .client_certificate_files(strict.certs.path("client.pem"), strict.certs.path("client.key"))
        .unwrap();
    let by_name = strict.url().replace("127.0.0.1", "localhost");
    for (url, tls) in [(strict.url(), strict.tls("ca", "client")), (by_name, from_files)] {
        let mut rig = Rig::start(RabbitMq::new(&url).unwrap().tls(tls));
        rig.wait_up();
        for n in 0..500_u32 {
            let payload = vec![n as u8; if n.is_multiple_of(100) { 300 << 10 } else { n as usize }];
            rig.publish(outgoing(n.into(), "", "tls.q", message(&format!("{n}"), &payload)));
        }
        for n in 0..500 {
            assert_eq!(rig.wait_outcome(n), Outcome::Confirmed);
        }
        let raw = tap.drain("tls.q");
        assert_eq!(raw.len(), 500);
        for (n, raw) in raw.iter().enumerate() {
            assert!(raw.id() == n.to_string() && raw.body.iter().all(|byte| *byte == n as u8), "{n}");
        }
        rig.publisher.stop(Duration::from_secs(5));
    }
    // Several authorities: any of them will do.
    let both = trusting(&strict.certs, "other").ca_pem(strict.certs.read("ca.pem")).unwrap();
    let client = [strict.certs.path("client.pem"), strict.certs.path("client.key")];
    let [chain, key] = client;
    let mut rig = Rig::start(
        RabbitMq::new(&strict.url()).unwrap().tls(both.client_certificate_files(chain, key).unwrap()),
    );
    rig.wait_up();
    rig.publisher.stop(Duration::from_secs(5));
}

/// Goal: whoever is not who it should be, on either side, is refused at once, as a matter of configuration. Method: a real
/// broker; one thing wrong at a time.
#[test]
fn b17_a_peer_that_cannot_be_trusted_is_refused() {
    let strict = Strict::shared();
    let good = || strict.tls("ca", "client");
    let fault = refused(&strict.url(), Some(strict.tls("other", "client")));
    assert_config(&fault, "UnknownIssuer");
    // Nor is the machine's own list of authorities any help to it, or to us.
    let no_authority = refused(&strict.url(), None);
    assert_eq!(no_authority.class, FaultClass::Config, "{no_authority}");
    let fault = refused(&strict.url(), Some(good().server_name("rabbit.example").unwrap()));
    assert_config(&fault, "not valid for name");
    let fault = refused(&strict.url(), Some(trusting(&strict.certs, "ca")));
    assert_config(&fault, "CertificateRequired");
    let fault = refused(&strict.url(), Some(strict.tls("ca", "stranger")));
    assert_config(&fault, "alert");
    // The right certificate does not stand in for the password.
    let fault = refused(&strict.url().replace("guest:guest", "guest:wrong"), Some(good()));
    assert_eq!((fault.class, fault.code), (FaultClass::Config, Some(403)), "{fault}");
}

/// Goal: never a downgrade, in neither direction. Method: TLS to the plain-text port, plain text to the TLS port.
#[test]
fn b17_plain_text_and_tls_do_not_mix() {
    let strict = Strict::shared();
    let fault = refused(&strict.node.url().replace("amqp://", "amqps://"), Some(strict.tls("ca", "client")));
    assert_config(&fault, "TLS");
    let fault = refused(&strict.url().replace("amqps://", "amqp://"), None);
    assert_config(&fault, "amqps://");
}

/// `openssl s_server` with these arguments.
struct Server {
    port: u16,
    _process: Supervised,
}

impl Server {
    fn start(certs: &Certs, name: &str, arguments: &[&str]) -> Self {
        let port = free_port();
        let mut command = Command::new("openssl");
        command.args(["s_server", "-quiet", "-naccept", "50", "-accept", &format!("127.0.0.1:{port}")]);
        command.arg("-cert").arg(certs.path(&format!("{name}.pem")));
        command.arg("-key").arg(certs.path(&format!("{name}.key")));
        command.args(arguments);
        let log = certs.path(&format!("{name}.{port}.out"));
        let process = Supervised::start(&command, &log);
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let said = || std::fs::read_to_string(&log).unwrap_or_default();
            assert!(began.elapsed() < Duration::from_secs(20), "openssl s_server is not up: {}", said());
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { port, _process: process }
    }

    fn url(&self) -> String {
        format!("amqps://guest:guest@127.0.0.1:{}", self.port)
    }
}

/// Goal: an expired certificate, one for another name, and a server that speaks nothing newer than TLS 1.1 are refused.
/// Method: `openssl s_server`; for each what is wrong, and the same without it, which gets past the handshake.
#[test]
fn b17_expired_misnamed_and_outdated_servers() {
    let certs = Certs::new();
    certs.issue("ca", "expired", "IP:127.0.0.1", -1);
    certs.issue("ca", "misnamed", "DNS:rabbit.example,IP:127.0.0.2", 30);
    let attempt = |name: &str, arguments: &[&str]| {
        refused(&Server::start(&certs, name, arguments).url(), Some(trusting(&certs, "ca")))
    };
    assert_config(&attempt("expired", &[]), "Expired");
    assert_config(&attempt("misnamed", &[]), "not valid for name");
    let old = attempt("server", &["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]);
    assert_config(&old, "TLS");
    for version in ["-tls1_2", "-tls1_3"] {
        let server = Server::start(&certs, "server", &[version, "-www"]);
        let mut rig = Rig::start(RabbitMq::new(&server.url()).unwrap().tls(trusting(&certs, "ca")));
        // It waits for a line of HTTP: the attempt stays where it is, past TLS, until its deadline.
        let event = rig.next(Duration::from_secs(2));
        assert!(event.is_none(), "{version}: {event:?}");
        rig.publisher.stop(Duration::from_secs(5));
    }
}

/// Takes connections, one after the other, and does the same to each once the client has said hello.
struct Peer {
    url: String,
    _thread: JoinHandle<()>,
}

impl Peer {
    fn new(act: impl Fn(&mut TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("amqps://guest:guest@127.0.0.1:{}", listener.local_addr().unwrap().port());
        let thread = std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                act(&mut stream);
            }
        });
        Self { url, _thread: thread }
    }
}

/// Goal: what the network does to a handshake is an outage; what a peer says in it that is not TLS 1.2 or 1.3 is a
/// refusal. Method: scripted peers.
#[test]
fn b17_cut_and_hostile_handshakes() {
    let certs = Certs::new();
    let tls = || Some(trusting(&certs, "ca"));
    // Closing with the hello unread sends a RST.
    let reset = Peer::new(|stream| {
        stream.peek(&mut [0]).unwrap();
    });
    let fault = refused(&reset.url, tls());
    assert_eq!(fault.class, FaultClass::Outage, "{fault}");
    let read_hello = |stream: &mut TcpStream| {
        let mut head = [0; 5];
        stream.read_exact(&mut head).unwrap();
        let mut hello = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
        stream.read_exact(&mut hello).unwrap();
    };
    let cut = Peer::new(move |stream| read_hello(stream));
    let fault = refused(&cut.url, tls());
    assert_eq!(fault.class, FaultClass::Outage, "{fault}");
    // A hello of the server: TLS 1.1, 32 random bytes, no session, a cipher of that time, no compression.
    let body = [&[3, 2][..], &[7; 32], &[0, 0xc0, 0x13, 0]].concat();
    let hello = [&[0x16, 3, 2, 0, body.len() as u8 + 4, 2, 0, 0, body.len() as u8][..], &body].concat();
    for (what, bytes) in [
        ("TLS 1.1", hello),
        ("the alert that it knows no such version", vec![0x15, 3, 1, 0, 2, 2, 70]),
        ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("AMQP", b"AMQP\0\0\x09\x01".to_vec()),
        ("a record that is too long", vec![0x16, 3, 3, 0xff, 0xff, 2, 0, 0]),
    ] {
        let peer = Peer::new(move |stream| {
            read_hello(stream);
            stream.write_all(&bytes).unwrap();
            // Until the client has gone.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let fault = refused(&peer.url, tls());
        assert_eq!(fault.class, FaultClass::Config, "{what}: {fault}");
    }
}

/// Goal: a peer that is silent in the handshake is given up by the connect deadline, reports an outage, and stop does not wait for it.
#[test]
fn b17_a_silent_handshake_meets_the_connect_deadline() {
    let certs = Certs::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("amqps://127.0.0.1:{}", listener.local_addr().unwrap().port());
    let mut rig = Rig::start(RabbitMq::new(&url).unwrap().tls(trusting(&certs, "ca")));
    let began = Instant::now();
    let fault = rig.wait_down();
    assert!(fault.class == FaultClass::Outage && fault.text.contains("did not answer"), "{fault}");
    assert!(began.elapsed() >= Duration::from_secs(9) && began.elapsed() < Duration::from_secs(15));
    std::thread::sleep(Duration::from_millis(700));
    let began = Instant::now();
    rig.publisher.stop(Duration::from_secs(5));
    assert!(began.elapsed() < Duration::from_secs(2), "stop took {:?}", began.elapsed());
}

/// Goal: what is wrong with the settings is reported where they are made, by name, and shows nothing of what is in a file.
/// Method: every PEM in every wrong place.
#[test]
fn b17_wrong_settings_are_named_and_show_nothing() {
    let certs = Certs::new();
    certs.issue("ca", "second", "DNS:second", 30);
    let [ca, pem, key, other_key] =
        ["ca.pem", "client.pem", "client.key", "second.key"].map(|file| certs.read(file));
    let cut = &key[..key.len() / 2];
    let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let not_der = pem_of("CERTIFICATE", "bm8gY2VydGlmaWNhdGU=");
    std::fs::write(certs.path("cut.key"), cut).unwrap();
    let tls = Tls::new;
    for (setting, result) in [
        ("tls ca", tls().ca_pem("")),
        ("tls ca", tls().ca_pem(key.as_str())),
        ("tls ca", tls().ca_pem(not_der.as_str())),
        ("tls ca", tls().ca_pem(&ca.as_bytes()[..ca.len() / 2])),
        ("tls ca", tls().ca_file(certs.path("nowhere"))),
        ("tls client certificate", tls().client_certificate_pem(key.as_str(), pem.as_str())),
        ("tls client certificate", tls().client_certificate_pem(not_der.as_str(), key.as_str())),
        ("tls client key", tls().client_certificate_pem(pem.as_str(), pem.as_str())),
        ("tls client key", tls().client_certificate_pem(pem.as_str(), cut)),
        ("tls client key", tls().client_certificate_pem(pem.as_str(), encrypted.as_str())),
        ("tls client key", tls().client_certificate_pem(pem.as_str(), other_key.as_str())),
        ("tls client key", tls().client_certificate_files(certs.path("client.pem"), certs.path("cut.key"))),
        ("tls client key", tls().client_certificate_files(certs.path("client.pem"), "/dev/zero")),
        ("tls server name", tls().server_name("no name")),
    ] {
        let error = result.expect_err(setting);
        assert_eq!(error.setting, setting, "{error}");
        assert_no_key(&format!("{error} {error:?}"), &[&key, &other_key]);
    }
    let error = tls().ca_file(certs.path("nowhere")).unwrap_err();
    assert!(error.reason.contains("nowhere"), "{error}");
    let good = tls().client_certificate_pem(pem, key.as_str()).unwrap();
    assert_no_key(
        &format!("{good:?} {:?}", RabbitMq::new("amqps://localhost").unwrap().tls(good.clone())),
        &[&key],
    );
    // Settings of TLS, and no TLS.
    let (sender, _events) = PublisherEvents::channel();
    let error = RabbitMq::new("amqp://localhost").unwrap().tls(good).start(sender).unwrap_err();
    assert_eq!(error.setting, "tls", "{error}");
}

fn pem_of(kind: &str, base64: &str) -> String {
    format!("-----BEGIN {kind}-----\n{base64}\n-----END {kind}-----\n")
}

/// No line of the keys is in `shown`, and no stretch of what their base64 stands for, as a list of bytes.
fn assert_no_key(shown: &str, keys: &[&str]) {
    for line in keys.iter().flat_map(|key| key.lines()).filter(|line| !line.starts_with("---")) {
        assert!(!shown.contains(line), "a line of a private key is shown");
        let bytes = format!("{:?}", &line.as_bytes()[..16]);
        assert!(!shown.contains(bytes.trim_matches(['[', ']'])), "a line of a private key is shown as bytes");
    }
}

/// Set in the process that logs everything it does to its standard error.
const LOUD_CHILD: &str = "ONEWRITE_TEST_LOUD_TLS_CHILD";
const CANARY: &str = "c4n4ry-0f-TLS";

/// Goal: no text anywhere shows the password or the private key. And the system's authorities are trusted where none is named, and no
/// longer where one is. Method: canaries through success and failures over TLS, with every log line of every thread at TRACE, in a process
/// of its own; to that process the broker's authority is the system's.
#[test]
fn b17_no_secret_is_shown() {
    if std::env::var_os(LOUD_CHILD).is_some() {
        return loud_child();
    }
    let strict = Strict::shared();
    strict.node.ctl(&["add_user", "spy", CANARY]);
    strict.node.ctl(&["set_permissions", "-p", "/", "spy", "", ".*", ".*"]);
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "rabbitmq_tls::b17_no_secret_is_shown", "--nocapture"])
        .env(LOUD_CHILD, strict.certs.path(""))
        .env("PORT", strict.tls_port.to_string())
        .env("SSL_CERT_FILE", strict.certs.path("ca.pem"))
        .env_remove("SSL_CERT_DIR")
        .output()
        .unwrap();
    let shown =
        format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    let bytes = format!("{:?}", CANARY.as_bytes());
    assert!(!shown.contains(CANARY), "the password is shown in letters");
    assert!(!shown.contains(bytes.trim_matches(['[', ']'])), "the password is shown as bytes");
    assert_no_key(&shown, &[&strict.certs.read("client.key"), &strict.certs.read("stranger.key")]);
    assert!(child.status.success(), "{shown}");
    for expected in ["publisher refused by the broker", "publisher connected", "TRACE"] {
        assert!(shown.contains(expected), "the log lacks {expected:?}, so it proves nothing");
    }
}

fn loud_child() {
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    let folder = std::path::PathBuf::from(std::env::var_os(LOUD_CHILD).unwrap());
    let port = std::env::var("PORT").unwrap();
    let url = |password: &str| format!("amqps://spy:{password}@127.0.0.1:{port}");
    let tls = |authority: &str, client: &str| {
        let [ca, pem, key] = [format!("{authority}.pem"), format!("{client}.pem"), format!("{client}.key")]
            .map(|file| folder.join(file));
        Tls::new().ca_file(ca).unwrap().client_certificate_files(pem, key).unwrap()
    };
    for (password, tls) in [
        (format!("{CANARY}-wrong"), tls("ca", "client")),
        (CANARY.to_owned(), tls("other", "client")),
        (CANARY.to_owned(), tls("ca", "stranger")),
        (CANARY.to_owned(), tls("ca", "client").server_name("rabbit.example").unwrap()),
    ] {
        eprintln!("{tls:?}");
        let fault = refused(&url(&password), Some(tls));
        eprintln!("{fault} {fault:?}");
        assert_eq!(fault.class, FaultClass::Config);
    }
    // A key that is damaged after the start is reported at the next attempt.
    let copy = folder.join("copy.key");
    std::fs::copy(folder.join("client.key"), &copy).unwrap();
    let settings = Tls::new().ca_file(folder.join("ca.pem")).unwrap();
    let settings = settings.client_certificate_files(folder.join("client.pem"), &copy).unwrap();
    let key = std::fs::read_to_string(&copy).unwrap();
    std::fs::write(&copy, &key[..key.len() - 40]).unwrap();
    let fault = refused(&url(CANARY), Some(settings));
    eprintln!("{fault} {fault:?}");
    assert!(fault.class == FaultClass::Config && fault.text.contains("copy.key"), "{fault}");
    let system = Tls::new();
    let system =
        system.client_certificate_files(folder.join("client.pem"), folder.join("client.key")).unwrap();
    let mut rig = Rig::start(RabbitMq::new(&url(CANARY)).unwrap().tls(system));
    rig.wait_up();
    rig.publisher.stop(Duration::from_secs(5));
    let mut rig = Rig::start(RabbitMq::new(&url(CANARY)).unwrap().tls(tls("ca", "client")));
    rig.wait_up();
    eprintln!("{:?}", rig.publisher);
    rig.publish(outgoing(0, "", "nowhere", message("m", b"x")));
    assert!(matches!(rig.wait_outcome(0), Outcome::Returned(_)));
    rig.publisher.stop(Duration::from_secs(5));
}

const SEEN: TableDefinition<'_, &str, u64> = TableDefinition::new("seen");

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited a minute for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// P3 to P6 over TLS. Goal: store, relay, TLS, broker, TLS, consumer: nothing is lost or doubled in effect when the broker is
/// killed under way, and when it comes back with a certificate of a new authority that was put where the old one's file is.
/// Method: writers go on through both; the consumer's own table is the evidence.
#[test]
fn b17_end_to_end_across_a_kill_and_a_new_authority() {
    let (certs, tls_port) = (Certs::new(), free_port());
    let mut node = RabbitNode::start_with(&certs.listener(tls_port, false));
    let url = format!("amqps://guest:guest@localhost:{tls_port}");
    let tls = || Tls::new().ca_file(certs.path("ca.pem")).unwrap();
    let backoff = (Duration::from_millis(100), Duration::from_millis(500));
    let topology = || Topology::new().queue("tls.e2e");
    let folder = tempfile::tempdir().unwrap();
    let [store, credit] = ["a.redb", "b.redb"].map(|name| Store::open(folder.path().join(name)).unwrap());
    let publisher =
        RabbitMq::new(&url).unwrap().tls(tls()).declare(topology()).reconnect_backoff(backoff.0, backoff.1);
    let relay = store.relay("rabbit").attempts(1).spawn(publisher).unwrap();
    let source = RabbitMqSource::new(&url, "tls.e2e").unwrap().tls(tls()).declare(topology());
    let consumer = credit
        .consumer("credit")
        .spawn(source.reconnect_backoff(backoff.0, backoff.1), |delivery, tx| {
            let text = String::from_utf8_lossy(&delivery.message.payload);
            let mut seen = tx.open_table(SEEN)?;
            let times = seen.get(&*text)?.map_or(0, |row| row.value());
            seen.insert(&*text, times + 1)?;
            Ok(())
        })
        .unwrap();
    let count = 3000_u64;
    let writer = std::thread::spawn({
        let store = store.clone();
        move || {
            for n in 0..count {
                let event =
                    Event::bytes("paid", format!("{n}")).key(format!("k{}", n % 20)).to("", "tls.e2e");
                store.write(move |tx| tx.append(event.clone())).unwrap();
            }
        }
    });
    for (confirmed, renewed) in [(300, false), (1500, true)] {
        until("confirms", || relay.status().confirmed >= confirmed);
        node.settle_declarations();
        node.kill9();
        until("the outage seen", || matches!(relay.status().state, RelayState::Disconnected(_)));
        if renewed {
            certs.authority("ca");
            certs.issue("ca", "server", "DNS:localhost", 30);
        }
        node.restart();
    }
    writer.join().unwrap();
    until("an empty backlog", || store.stats().unwrap().backlog_events == 0);
    until("all effects", || consumer.status().applied >= count);
    assert_eq!(consumer.stop(Duration::from_secs(10)).rejected, 0);
    let snapshot = credit.read().unwrap();
    let seen = snapshot.open_table(SEEN).unwrap();
    assert_eq!(seen.len().unwrap(), count);
    assert!(seen.iter().unwrap().all(|row| row.unwrap().1.value() == 1));
    assert!(relay.stop(Duration::from_secs(10)).clean);
}

/// Goal: without TLS in the URI of *any* remote broker of a list, nothing is sent. Method: the settings alone.
#[test]
fn b17_each_broker_of_a_list_must_be_secured() {
    let start = |mut publisher: RabbitMq| {
        let (sender, _events) = PublisherEvents::channel();
        let result = publisher.start(sender);
        publisher.stop(Duration::from_secs(1));
        result
    };
    let list = |urls: [&str; 3]| RabbitMq::with_brokers(urls).unwrap();
    let mixed = ["amqps://a:secret@192.0.2.1", "amqp://a:secret@127.0.0.1:1", "amqp://a:secret@192.0.2.2"];
    let error = start(list(mixed)).unwrap_err();
    assert!(error.to_string().contains("192.0.2.2") && !error.to_string().contains("secret"), "{error}");
    assert_eq!(start(list(mixed).allow_plaintext_credentials()), Ok(()));
    let secured = ["amqps://a:secret@192.0.2.1", "amqp://a:secret@127.0.0.1:1", "amqps://a:secret@192.0.2.2"];
    assert_eq!(start(list(secured)), Ok(()));
}
