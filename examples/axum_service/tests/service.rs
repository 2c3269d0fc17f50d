//! The service, from outside: over HTTP, on a free port of the loopback address.

use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use onewrite::Store;
use onewrite::broker::MemoryBroker;
use onewrite::redb::TableDefinition;
use onewrite_axum_service::{QUEUE, Service};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

type TestResult = Result<(), Box<dyn Error>>;

const ACCOUNTS: TableDefinition<&str, u64> = TableDefinition::new("accounts");

/// Goal: clients do not notice that the broker is away. Method: change balances while the in-memory
/// broker is down, look at both checks, let the broker come back, and stop.
#[test]
fn changes_are_taken_while_the_broker_is_away() -> TestResult {
    let folder = tempfile::tempdir()?;
    let broker = MemoryBroker::new();
    broker.declare_queue(QUEUE, Default::default());
    broker.go_down();
    let runtime = tokio::runtime::Runtime::new()?;
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
    let address = listener.local_addr()?;
    let service = Service::open(folder.path().join("accounts.redb"), broker.publisher())?;
    let (stop, stopped) = oneshot::channel::<()>();
    let served = runtime.spawn(service.serve(listener, async { drop(stopped.await) }));

    assert_eq!(
        post(address, "/accounts/alice", r#"{"cents": 500}"#)?,
        (201, r#"{"cents":500}"#.into())
    );
    assert_eq!(post(address, "/accounts/alice", r#"{"cents": -100}"#)?.0, 201);
    assert_eq!(post(address, "/accounts/alice", r#"{"cents": -900}"#)?.0, 409);
    assert_eq!(post(address, "/accounts/alice", "{}")?.0, 422);
    assert_eq!(get(address, "/accounts/alice")?, (200, r#"{"cents":400}"#.into()));
    assert_eq!(get(address, "/healthz")?.0, 200);
    let (status, body) = get(address, "/readyz")?;
    assert_eq!(status, 200);
    assert!(body.contains(r#""backlog_events":2,"#), "{body}");

    broker.come_up();
    wait_until_drained(address)?;
    assert_eq!(broker.queue_len(QUEUE), 2);
    stop.send(()).map_err(|()| "the service has ended already")?;
    let report = runtime.block_on(served)?.map_err(|error| error.to_string())?;
    assert_eq!((report.clean, report.confirmed, report.backlog_events), (true, 2, 0));
    assert!(get(address, "/healthz").is_err(), "nothing listens any more");
    Ok(())
}

/// Goal: SIGTERM ends the process in good order. Method: run the program with the broker of
/// `AMQP_URL` or its own, change a balance, send the signal, and open the store that is left.
#[cfg(unix)]
#[test]
fn sigterm_closes_the_store() -> TestResult {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("accounts.redb");
    let mut program = Command::new(env!("CARGO_BIN_EXE_axum_service"))
        .env("STORE", &path)
        .env("LISTEN", "127.0.0.1:0")
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(program.stdout.take().ok_or("its output is a pipe")?);
    let mut lines = lines.lines();
    let first = lines.next().ok_or("the program said nothing")??;
    let address = first.strip_prefix("listening on ").ok_or(first.clone())?.parse()?;

    assert_eq!(post(address, "/accounts/bob", r#"{"cents": 700}"#)?.0, 201);
    wait_until_drained(address)?;
    let killed = Command::new("kill").args(["-TERM", &program.id().to_string()]).status()?;
    assert!(killed.success());
    assert_eq!(lines.next().transpose()?.as_deref(), Some("stopped: 1 confirmed, 0 wait"));
    assert!(program.wait()?.success());

    let store = Store::open(&path)?;
    assert!(!store.stats()?.verified_at_open, "the end was clean");
    let accounts = store.read()?.open_table(ACCOUNTS)?;
    assert_eq!(accounts.get("bob")?.map(|row| row.value()), Some(700));
    Ok(())
}

/// Waits until the broker has confirmed everything, as `/readyz` tells.
fn wait_until_drained(address: SocketAddr) -> TestResult {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let (status, body) = get(address, "/readyz")?;
        assert_eq!(status, 200, "{body}");
        if body.contains(r#""relay":"Connected","backlog_events":0,"#) {
            return Ok(());
        }
        assert!(Instant::now() < end, "{body}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn get(address: SocketAddr, path: &str) -> Result<(u16, String), Box<dyn Error>> {
    request(address, &format!("GET {path} HTTP/1.1\r\n"), "")
}

fn post(address: SocketAddr, path: &str, body: &str) -> Result<(u16, String), Box<dyn Error>> {
    request(address, &format!("POST {path} HTTP/1.1\r\ncontent-type: application/json\r\n"), body)
}

/// One request over one connection: the status and the body of the answer.
fn request(address: SocketAddr, head: &str, body: &str) -> Result<(u16, String), Box<dyn Error>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let length = body.len();
    write!(stream, "{head}host: test\r\nconnection: close\r\n")?;
    write!(stream, "content-length: {length}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no end of the headers")?;
    let status = head.split(' ').nth(1).ok_or("no status")?;
    Ok((status.parse()?, body.to_owned()))
}
