//! Text of others on a person's terminal: what a message, a broker or a handler says can forge no log line, and speak to no
//! terminal.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use onewrite::broker::{MemoryBroker, QueueOptions, Rule, Verdict};
use onewrite::{Error, Event, Message, Store};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::scratch::{child, task};

/// Ends the line, clears the screen in two ways, and turns the direction of writing.
const HOSTILE: &str = "x\nERROR all is lost\u{1b}[2J\u{9b}2J\r\u{202e}txt\u{2028}\0";

fn is_safe(text: &str) -> bool {
    !text.chars().any(|char| char.is_control() || matches!(char, '\u{202e}' | '\u{2028}'))
}

/// All fields of the library's log, as a plain format writes them.
#[derive(Debug, Clone, Default)]
struct Fields(Arc<Mutex<Vec<String>>>);

impl tracing::field::Visit for Fields {
    fn record_str(&mut self, field: &tracing::field::Field, value: &str) {
        self.0.lock().unwrap().push(format!("{field}={value}"));
    }

    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn Debug) {
        self.0.lock().unwrap().push(format!("{field}={value:?}"));
    }
}

impl<S: tracing::Subscriber> Layer<S> for Fields {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("onewrite") {
            event.record(&mut self.clone());
        }
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what} does not come");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Goal: control characters are escaped where they come in: in reasons, faults, errors and log lines. Method: a process that
/// collects what it logs; hostile ids, a handler that repeats them, a broker that speaks so, an id with two contents.
#[test]
fn text_of_others_is_escaped_where_it_comes_in() {
    let folder = tempfile::tempdir().unwrap();
    let output = child("escaping::child_with_hostile_texts", folder.path(), "").output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("all well"), "{out}{err}");
}

#[test]
fn child_with_hostile_texts() {
    let Some((folder, _)) = task() else { return };
    let lines = Fields::default();
    tracing_subscriber::registry().with(lines.clone()).init();
    let store = Store::open(folder.join("a.redb")).unwrap();
    let broker = MemoryBroker::new();
    broker.declare_queue("q", QueueOptions::default());
    let consumer = store
        .consumer("c")
        .attempts(1)
        .spawn(broker.source("q"), |delivery, _| {
            let id = delivery.message.message_id.as_deref().unwrap_or_default();
            if delivery.message.payload == b"fine" {
                Ok(())
            } else {
                Err(Error::app(format!("no account {id}")))
            }
        })
        .unwrap();
    for payload in ["refused", "fine", "other"] {
        let id = if payload == "refused" { format!("1{HOSTILE}") } else { format!("2{HOSTILE}") };
        let message = Message {
            message_id: Some(id.into()),
            payload: payload.as_bytes().to_vec(),
            ..Message::default()
        };
        broker.publish("", "q", message).unwrap();
    }
    let rejected = store.rejected("c");
    until("the rejections", || rejected.list(None, 9).unwrap().len() == 2);
    let reasons: Vec<_> =
        rejected.list(None, 9).unwrap().into_iter().map(|rejected| rejected.reason).collect();
    assert!(reasons.iter().all(|reason| is_safe(reason)), "{reasons:?}");
    assert!(reasons[0].contains("x\\u{a}ERROR all is lost\\u{1b}[2J"), "{reasons:?}");
    consumer.stop(Duration::from_secs(9));

    broker.script(Rule::any().then(Verdict::Return { code: 312, text: HOSTILE.to_owned() }));
    let relay = store.relay("r").destination_attempts(1).spawn(broker.publisher()).unwrap();
    store.write(|tx| tx.append(Event::bytes("paid", "1").to("", "q"))).unwrap();
    let quarantine = store.quarantine("r").unwrap();
    until("the quarantine", || quarantine.list(None, 9).unwrap().len() == 1);
    let fault = quarantine.list(None, 9).unwrap().remove(0).fault;
    assert!(is_safe(&fault.text) && is_safe(&fault.to_string()), "{fault:?}");
    relay.stop(Duration::from_secs(9));

    let tx = store.begin().unwrap();
    assert!(tx.first_time_with("s", HOSTILE, b"1").unwrap());
    let conflict = tx.first_time_with("s", HOSTILE, b"2").unwrap_err().to_string();
    assert!(is_safe(&conflict), "{conflict:?}");
    drop(tx);

    let lines = lines.0.lock().unwrap();
    assert!(lines.iter().any(|line| line.contains("x\\u{a}ERROR all is lost")), "{lines:?}");
    let raw: Vec<_> = lines.iter().filter(|line| !is_safe(line)).collect();
    assert!(raw.is_empty(), "{raw:?}");
    println!("all well");
}
