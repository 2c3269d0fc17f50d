//! A caller whose answer was lost tries again: what stands already is recognised at every door and under every expectation, and what
//! does not stand as it should is reported in true words.

use onewrite::{
    Aggregate, Error, Event, ExpectedRevision, RecordedEvent, Result, Stands, Store, Transaction,
};

use crate::scratch::crash_copy;

/// A command's id, and what it adds.
type Added = (String, u64);

#[derive(Debug, Default, PartialEq)]
struct Account {
    total: u64,
    events: u64,
}

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    const SNAPSHOT_EVERY: u64 = 3;
    type Event = Added;

    fn encode((id, by): &Added) -> Result<Event> {
        Ok(Event::bytes("deposited", by.to_le_bytes()).id(id.clone()))
    }

    fn decode(recorded: &RecordedEvent) -> Result<Added> {
        let by = recorded.payload().try_into().map_err(Error::app)?;
        Ok((recorded.id().to_owned(), u64::from_le_bytes(by)))
    }

    fn apply(&mut self, (_, by): &Added) {
        self.total += by;
        self.events += 1;
    }

    fn save(&self) -> Option<Vec<u8>> {
        Some([self.total.to_le_bytes(), self.events.to_le_bytes()].concat())
    }

    fn restore(snapshot: &[u8]) -> Option<Self> {
        let (total, events) = snapshot.split_first_chunk::<8>()?;
        Some(Self { total: u64::from_le_bytes(*total), events: u64::from_le_bytes(events.try_into().ok()?) })
    }
}

fn open() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("a.redb")).unwrap();
    (folder, store)
}

fn added(command: u64, events: u64) -> Vec<Added> {
    (0..events).map(|n| (format!("command-{command}-{n}"), command + 1)).collect()
}

/// Goal: each command takes effect once, however often it is executed: at once, after others, after a crash; the receipt names its
/// events, and its state is the true one. Method: 12 commands of 1 to 3 events, all earlier ones again after each.
#[test]
fn a_command_is_executed_again() {
    let (folder, mut store) = open();
    let (mut truth, mut seqs) = (Account::default(), Vec::new());
    for command in 0..12 {
        let events = added(command, command % 3 + 1);
        let first = store.aggregate::<Account>("7").execute(|_| Ok(events.clone())).unwrap();
        events.iter().for_each(|event| truth.apply(event));
        assert_eq!(first.value().state, truth);
        seqs.push(first.seqs().to_vec());
        if command % 4 == 3 {
            store = Store::open(crash_copy(&store, folder.path())).unwrap();
        }
        for (earlier, seqs) in seqs.iter().enumerate() {
            let earlier = earlier as u64;
            let events = added(earlier, earlier % 3 + 1);
            let again = store.aggregate::<Account>("7").execute(|_| Ok(events.clone())).unwrap();
            assert_eq!(again.seqs(), seqs, "command {earlier} after {command}");
            assert_eq!(again.value().state, truth, "applied twice");
            assert_eq!(again.value().revision, Some(truth.events - 1));
        }
        assert_eq!(store.aggregate::<Account>("7").load().unwrap().state, truth);
    }
    assert!(store.verify().unwrap().is_whole());
}

/// Goal: the same command executed by many at once takes effect once. Method: 8 threads, the same 20 commands.
#[test]
fn a_command_is_executed_by_many() {
    let (_folder, store) = open();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for command in 0..20 {
                    let executed =
                        store.aggregate::<Account>("7").execute(|_| Ok(added(command, 2))).unwrap();
                    assert_eq!(executed.seqs().len(), 2);
                }
            });
        }
    });
    let loaded = store.aggregate::<Account>("7").load().unwrap();
    assert_eq!(loaded.state, Account { total: (1..=20).sum::<u64>() * 2, events: 40 });
}

fn event(n: u64) -> Event {
    Event::bytes("t", n.to_string()).id(format!("id-{n}"))
}

/// Goal: an append that is tried again is recognised under every expectation, true or not. Method: two events at the beginning, two
/// behind others; each pair under every expectation there is.
#[test]
fn an_append_is_recognised_under_every_expectation() {
    let (_folder, store) = open();
    let append = |pair: u64, expected| {
        let events = move || [event(pair * 2), event(pair * 2 + 1)];
        store.write(move |tx| tx.stream("a").append(events(), expected)).map(onewrite::Receipt::into_value)
    };
    for pair in 0..3 {
        append(pair, ExpectedRevision::Any).unwrap();
    }
    let expectations = (0..8).map(ExpectedRevision::Exact);
    let others = [ExpectedRevision::Any, ExpectedRevision::NoStream, ExpectedRevision::StreamExists];
    for expected in expectations.chain(others) {
        for pair in 0..3 {
            let there = append(pair, expected).unwrap();
            assert_eq!(there.revisions, pair * 2..pair * 2 + 2, "{expected:?}");
            assert_eq!(there.seqs, [pair * 2, pair * 2 + 1], "{expected:?}");
            assert!(there.repeated, "{expected:?}");
        }
    }
    assert_eq!(store.stats().unwrap().next_seq, 6);
}

/// Goal: "the same, elsewhere" and "the same id, other content" are distinguished, in words that name id, number, stream and revision.
/// Method: one event in a stream and one in none; each again in another stream, in none, at another position, with other content.
#[test]
fn what_stands_elsewhere_is_reported_in_true_words() {
    let (_folder, store) = open();
    let append = |stream: &'static str, events: Vec<Event>| {
        let write = move |tx: &Transaction| tx.stream(stream).append(events.clone(), ExpectedRevision::Any);
        store.write(write).map(drop)
    };
    let plain = |event: Event| store.write(move |tx| tx.append(event.clone())).map(drop);
    append("a", vec![event(0), event(1)]).unwrap();
    append("other", vec![event(7)]).unwrap();
    append("a", vec![event(2)]).unwrap();
    plain(event(9).to("", "q")).unwrap();
    let stands = |reported: Result<()>| match reported {
        Err(Error::IdElsewhere { id, seq, stands }) => (id, seq, stands),
        other => panic!("{other:?}"),
    };
    let in_a = |revision| Stands::InStream { stream: "a".into(), revision };
    assert_eq!(stands(append("b", vec![event(1)])), ("id-1".into(), 1, in_a(1)));
    assert_eq!(stands(append("a", vec![event(1), event(0)])), ("id-1".into(), 1, in_a(1)));
    assert_eq!(stands(append("a", vec![event(1), event(2), event(3)])), ("id-1".into(), 1, in_a(1)));
    assert_eq!(stands(append("a", vec![event(4), event(0)])), ("id-0".into(), 0, in_a(0)));
    assert_eq!(stands(plain(event(2).to("", "q"))), ("id-2".into(), 3, in_a(2)));
    assert_eq!(stands(append("a", vec![event(9)])), ("id-9".into(), 4, Stands::InNoStream));
    let words = append("b", vec![event(2)]).unwrap_err().to_string();
    assert_eq!(
        words,
        "event id `id-2` was appended before with the same content, as sequence number 3, but elsewhere: it is revision 2 \
         of stream `a`"
    );
    for other in [event(1).key("k"), event(1).version(1).subject("s"), Event::bytes("t", "other").id("id-1")]
    {
        let reported = append("a", vec![other.clone()]);
        assert!(matches!(reported, Err(Error::Conflict { seq: 1, .. })), "{reported:?}");
    }
    let reported = append("b", vec![Event::bytes("t", "other").id("id-1")]).unwrap_err();
    assert_eq!(
        reported.to_string(),
        "event id `id-1` was appended before, as sequence number 1, with other content"
    );
    // What is truncated is known by its checksum, and not repeated.
    store.write(|tx| tx.stream("a").truncate_before(2)).unwrap();
    assert!(matches!(stands(append("a", vec![event(0)])).2, Stands::InStream { .. } | Stands::Gone));
    let loaded = store.read().unwrap();
    assert_eq!(loaded.stream("a").unwrap().revision(), Some(2), "nothing was appended");
    assert_eq!(loaded.stream("b").unwrap().revision(), None);
    // With other content a command is no retry.
    let account = store.aggregate::<Account>("7");
    account.execute(|_| Ok(vec![("c".into(), 1)])).unwrap();
    let other = account.execute(|_| Ok(vec![("c".into(), 2)]));
    assert!(matches!(other, Err(Error::Conflict { .. })), "{other:?}");
    assert_eq!(account.load().unwrap().state.total, 1);
}
