//! The library logs each key once, each event once, and nothing at the rate of the messages.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Keys that the usual log formats write themselves, beside the fields or among them.
const FORMATS_OWN: [&str; 11] = [
    "name",
    "message",
    "target",
    "level",
    "timestamp",
    "span",
    "spans",
    "fields",
    "filename",
    "line_number",
    "threadName",
];

const MACROS: [&str; 12] = [
    "trace!(",
    "debug!(",
    "info!(",
    "warn!(",
    "error!(",
    "event!(",
    "span!(",
    "trace_span!(",
    "debug_span!(",
    "info_span!(",
    "warn_span!(",
    "error_span!(",
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.extension() {
            _ if path.is_dir() => sources(&path, found),
            Some(extension) if extension == "rs" => found.push(path),
            _ => {}
        }
    }
}

/// Splits the arguments of a macro call at its commas, but for commas within brackets or texts.
fn arguments(call: &str) -> Vec<String> {
    let (mut depth, mut quoted, mut escaped) = (0, false, false);
    let mut all = vec![String::new()];
    for char in call.chars() {
        match char {
            '"' if !escaped => quoted = !quoted,
            '(' | '[' | '{' if !quoted => depth += 1,
            ')' | ']' | '}' if !quoted && depth == 0 => break,
            ')' | ']' | '}' if !quoted => depth -= 1,
            ',' if !quoted && depth == 0 => {
                all.push(String::new());
                continue;
            }
            _ => {}
        }
        escaped = quoted && char == '\\' && !escaped;
        all.last_mut().unwrap().push(char);
    }
    all.iter().map(|argument| argument.trim().to_owned()).filter(|argument| !argument.is_empty()).collect()
}

/// The fields that a call of a macro names; the text of an event is its field `message`.
fn fields(call: &str) -> Vec<String> {
    let field = |argument: String| {
        if argument.starts_with('"') {
            return "its own text".to_owned();
        }
        let name = argument.split_once('=').map_or(&*argument, |(name, _)| name);
        let name = name.trim().trim_start_matches(['%', '?']);
        // `self.scope` is the field `self.scope`: the formats write it as it stands.
        name.to_owned()
    };
    arguments(call).into_iter().map(field).collect()
}

/// Goal: no span and no event has a field twice. None has a key that a log format writes itself: in JSON, `name` is the span's name.
/// Method: every macro call in `src`.
#[test]
fn no_field_is_there_twice_or_is_the_formats_own() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let mut calls = 0;
    for file in files {
        let source = fs::read_to_string(&file).unwrap();
        let code: Vec<_> = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        let code = code.join("\n");
        for name in MACROS {
            for (at, _) in code.match_indices(name) {
                if code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') {
                    continue;
                }
                calls += 1;
                let fields = fields(&code[at + name.len()..]);
                let place = format!("{}: {name}{}", file.display(), fields.join(", "));
                let once: BTreeSet<_> = fields.iter().collect();
                assert_eq!(once.len(), fields.len(), "a field twice in {place}");
                let own = fields.iter().find(|field| FORMATS_OWN.contains(&&***field));
                assert_eq!(own, None, "the format's own key in {place}");
            }
        }
    }
    assert!(calls > 50, "only {calls} calls were found: the test no longer finds them");
}

#[test]
fn the_fields_of_a_call_are_found() {
    let call = r#"%target, epoch = number, "a, \"b\" (c)", fault = %of(1, 2)); other(name = 1)"#;
    assert_eq!(fields(call), ["target", "epoch", "its own text", "fault"]);
}

#[cfg(unix)]
pub(crate) mod at_run_time {
    use std::collections::BTreeMap;
    use std::fmt::Debug;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use crate::support::tuning::LOG_BURST_MAX;
    use onewrite::broker::{MemoryBroker, QueueOptions};
    use onewrite::{Error, Event, Store};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
    use tracing_subscriber::registry::LookupSpan;
    use tracing_subscriber::util::SubscriberInitExt;

    use super::FORMATS_OWN;
    use crate::scratch::{child, task};

    /// One event, with the spans around it.
    #[derive(Debug, Clone)]
    pub(crate) struct Line {
        level: tracing::Level,
        pub(crate) fields: BTreeMap<String, String>,
        spans: Vec<(String, BTreeMap<String, String>)>,
    }

    impl Line {
        pub(crate) fn text(&self) -> &str {
            self.fields.get("message").map_or("", |text| text)
        }

        fn span_field(&self, span: &str, field: &str) -> Option<&str> {
            let (_, fields) = self.spans.iter().find(|(name, _)| name == span)?;
            fields.get(field).map(|value| &**value)
        }
    }

    #[derive(Debug, Clone, Default)]
    pub(crate) struct Lines(Arc<Mutex<Vec<Line>>>);

    impl Lines {
        pub(crate) fn install() -> Self {
            let lines = Self::default();
            tracing_subscriber::registry().with(lines.clone()).init();
            lines
        }

        pub(crate) fn loud(&self) -> Vec<Line> {
            let all = self.0.lock().unwrap();
            all.iter().filter(|line| line.level <= tracing::Level::WARN).cloned().collect()
        }
    }

    /// Panics on a field that is there twice.
    #[derive(Default)]
    struct Fields(BTreeMap<String, String>);

    impl tracing::field::Visit for Fields {
        fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn Debug) {
            let earlier = self.0.insert(field.name().to_owned(), format!("{value:?}"));
            assert!(earlier.is_none(), "field `{field}` is there twice");
        }
    }

    impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
        fn on_new_span(
            &self,
            new: &tracing::span::Attributes<'_>,
            id: &tracing::Id,
            context: Context<'_, S>,
        ) {
            let mut fields = Fields::default();
            new.record(&mut fields);
            if new.metadata().target().starts_with("onewrite") {
                let own = fields.0.keys().find(|field| FORMATS_OWN.contains(&&***field));
                assert_eq!(own, None, "span `{}` has a key of the format's", new.metadata().name());
            }
            context.span(id).unwrap().extensions_mut().insert(fields.0);
        }

        fn on_event(&self, event: &tracing::Event<'_>, context: Context<'_, S>) {
            if !event.metadata().target().starts_with("onewrite") {
                return;
            }
            let mut fields = Fields::default();
            event.record(&mut fields);
            let spans = context.event_scope(event).into_iter().flatten();
            let spans = spans.map(|span| {
                let fields = span.extensions().get::<BTreeMap<String, String>>().cloned();
                (span.name().to_owned(), fields.unwrap_or_default())
            });
            let level = *event.metadata().level();
            let line = Line { level, fields: fields.0, spans: spans.collect() };
            self.0.lock().unwrap().push(line);
        }
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what} does not come");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The other process logs into memory: a subscriber for all threads is for the whole process.
    pub(crate) fn run(task: &str) {
        let folder = tempfile::tempdir().unwrap();
        let output = child(task, folder.path(), "").output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && out.contains("all well"), "{out}{err}");
    }

    /// Goal: what happens once is logged once at WARN or above, and names the relay, projection or consumer by its span. Method: a
    /// process that collects what it logs; a broker that goes away, a broker that blocks, a quarantine, a rejected delivery, a
    /// projection that fails.
    #[test]
    fn what_happens_once_is_logged_once() {
        run("logs::at_run_time::child_to_which_things_happen_once");
    }

    #[test]
    fn child_to_which_things_happen_once() {
        let Some((folder, _)) = task() else { return };
        let lines = Lines::install();
        let store = Store::open(folder.join("a.redb")).unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", QueueOptions::default());
        let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher()).unwrap();
        let consumer = store
            .consumer("credit")
            .spawn(broker.source("q"), |_, _| Err(Error::reject("no such account")))
            .unwrap();
        let projection = store.projection("balances").spawn(|_, _| Err(Error::app("no"))).unwrap();
        let send = |to: &'static str| {
            store.write(move |tx| tx.append(Event::bytes("paid", "1").to("", to))).unwrap();
        };
        until("the connections", || {
            relay.status().state == onewrite::RelayState::Connected && consumer.status().connections == 1
        });
        broker.go_down();
        until("the outage", || {
            relay.status().last_fault.is_some() && consumer.status().disconnected.is_some()
        });
        broker.come_up();
        until("the end of the outage", || consumer.status().connections == 2);
        send("missing");
        send("q");
        until("the quarantines", || relay.status().quarantined == 1 && consumer.status().quarantined == 1);
        until("the projection's try", || projection.status().failed_tries > 0);
        let loud = lines.loud();
        let reported = |text: &str, span: &str, field: &str, value: &str| {
            let of: Vec<_> = loud.iter().filter(|line| line.text().contains(text)).collect();
            assert!(of.iter().all(|line| line.span_field(span, field) == Some(value)), "{of:?}");
            of.len()
        };
        assert_eq!(reported("disconnected", "relay", "relay", "rabbit"), 1, "{loud:#?}");
        assert_eq!(reported("not consuming", "consumer", "consumer", "credit"), 1, "{loud:#?}");
        assert_eq!(reported("goes to quarantine", "relay", "relay", "rabbit"), 1, "{loud:#?}");
        assert_eq!(reported("a delivery is rejected", "consumer", "consumer", "credit"), 1, "{loud:#?}");
        assert!(reported("tried again later", "projection", "projection", "balances") > 0, "{loud:#?}");
        println!("all well");
    }

    /// Goal: thousands of events with one cause do not make thousands of warnings. Method: a process
    /// that collects what it logs; 2,000 events for a queue that does not exist, and a handler that rejects 2,000 deliveries.
    #[test]
    fn a_flood_is_logged_at_a_bounded_rate() {
        run("logs::at_run_time::child_that_is_flooded");
    }

    #[test]
    fn child_that_is_flooded() {
        const FLOOD: u64 = 2_000;
        let Some((folder, _)) = task() else { return };
        let lines = Lines::install();
        let store = Store::open(folder.join("a.redb")).unwrap();
        let broker = MemoryBroker::new();
        broker.declare_queue("q", QueueOptions::default());
        let began = Instant::now();
        let relay = store.relay("rabbit").destination_attempts(1).spawn(broker.publisher()).unwrap();
        let consumer = store
            .consumer("credit")
            .spawn(broker.source("q"), |_, _| Err(Error::reject("no such account")))
            .unwrap();
        for to in ["missing", "q"] {
            let fill = move |tx: &onewrite::Transaction| {
                (0..FLOOD).try_for_each(|_| tx.append(Event::bytes("paid", "1").to("", to)).map(drop))
            };
            store.write(fill).unwrap();
        }
        until("the quarantines", || {
            relay.status().quarantined == FLOOD && consumer.status().quarantined == FLOOD
        });
        // Whole windows that may have begun meanwhile, for each of the two.
        let windows = began.elapsed().as_millis() / u128::from(crate::support::tuning::LOG_WINDOW_MS) + 2;
        let loud = lines.loud();
        for text in ["goes to quarantine", "a delivery is rejected"] {
            let reported = loud.iter().filter(|line| line.text().contains(text)).count();
            let bound = usize::try_from(windows).unwrap() * LOG_BURST_MAX as usize;
            assert!((1..=bound).contains(&reported), "{reported} of {text:?}, at most {bound} were expected");
        }
        println!("all well");
    }

    /// Goal: a connection to RabbitMQ that fails is one warning, as the relay's; the AMQP thread's own lines name the relay too.
    /// Method: a process that collects what it logs, and a closed port.
    #[test]
    #[cfg(feature = "rabbitmq")]
    fn a_failed_connection_is_logged_once() {
        run("logs::at_run_time::child_that_cannot_connect");
    }

    #[test]
    #[cfg(feature = "rabbitmq")]
    fn child_that_cannot_connect() {
        use onewrite::broker::{RabbitMq, RabbitMqSource};
        let Some((folder, _)) = task() else { return };
        let lines = Lines::install();
        let store = Store::open(folder.join("a.redb")).unwrap();
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("amqp://guest:guest@{}/%2f", nobody.local_addr().unwrap());
        drop(nobody);
        let relay = store.relay("rabbit").spawn(RabbitMq::new(&url).unwrap()).unwrap();
        let consumer =
            store.consumer("credit").spawn(RabbitMqSource::new(&url, "q").unwrap(), |_, _| Ok(())).unwrap();
        let count = |text: &str| {
            let all = lines.0.lock().unwrap();
            all.iter().filter(|line| line.text().contains(text)).count()
        };
        until("three attempts of each", || count("next connection attempt") >= 6);
        let _ = (relay.stop(Duration::from_secs(5)), consumer.stop(Duration::from_secs(5)));
        for (own, span, text) in
            [("publisher", "relay", "disconnected"), ("source", "consumer", "not consuming")]
        {
            let all = lines.0.lock().unwrap().clone();
            let of_amqp: Vec<_> = all.iter().filter(|line| line.text().starts_with(own)).collect();
            assert!(of_amqp.iter().all(|line| line.level > tracing::Level::WARN), "{of_amqp:#?}");
            assert!(of_amqp.iter().all(|line| line.span_field(span, span).is_some()), "{of_amqp:#?}");
            let loud: Vec<_> = lines
                .loud()
                .into_iter()
                .filter(|line| line.span_field(span, span).is_some() && line.fields.contains_key("fault"))
                .collect();
            assert!(!loud.is_empty() && loud.len() <= of_amqp.len(), "{loud:#?} {of_amqp:#?}");
            assert!(loud.iter().all(|line| line.text() == text), "{loud:#?}");
        }
        println!("all well");
    }
}
