//! The judge is judged: a good run is clean, and each way of spoiling it is noticed, as what it is.

mod files;
mod world;

use onewrite_torture_checker::formats::{Line, payload};
use onewrite_torture_checker::verdict::Violation::{self, AppliedTwice, Disordered, Lost, Phantom};

use self::world::{World, planned};

/// Goal: the judge accuses nobody without cause. Method: a run with everything in it that is allowed: a retry, a resend, a refused
/// batch, a killed writer's batch that was committed and one that was not, a quarantined event, a stream, keyless events.
#[test]
fn a_good_run_is_clean() {
    let verdict = World::good().judged();
    assert_eq!(verdict.sentences, [""; 0]);
    assert!(verdict.is_clean());
    assert_eq!((verdict.events, verdict.repeats), (13, 1));
}

/// Goal: a log that is trimmed is judged by what the tap and the answers say. Method: leave out the oldest records.
#[test]
fn a_trimmed_log_is_clean() {
    let mut world = World::good();
    world.trimmed = true;
    let kept = world.records.split_off(5);
    world.records = kept;
    // Encoded alone, end offsets would begin anew; only differences are judged.
    let verdict = spoiled_only_by_offsets(&world);
    assert!(verdict.is_empty(), "{verdict:?}");
}

/// Leaves out what follows from encoding a part of the records by themselves: other end offsets, so other checksums.
fn spoiled_only_by_offsets(world: &World) -> Vec<String> {
    let sentences = world.judged().sentences;
    sentences.into_iter().filter(|sentence| !sentence.contains("checksum than its record")).collect()
}

type Spoil = fn(&mut World);

/// What is done to the good run, and what the judge must call it.
const SPOILED: &[(&str, Violation, Spoil)] = &[
    ("a message never came to the tap", Lost, |w| drop_tapped(w, "a0-3")),
    ("the only message of a key never came", Lost, |w| drop_tapped(w, "a0-2")),
    ("an event of a killed writer is in the log and never came", Lost, |w| drop_tapped(w, "a0-8")),
    ("an acknowledged event is gone from log, tap and effects", Lost, |w| {
        w.records.retain(|(_, record)| record.id != "a0-12");
        drop_tapped(w, "a0-12");
        w.effects.remove(&("a0".into(), 12));
        w.balances.remove(&("a0".into(), String::new()));
    }),
    ("an event was never applied", Lost, |w| {
        w.effects.remove(&("a0".into(), 4));
        subtract(w, 4, "k1");
    }),
    ("a delivery is left in the consumer's quarantine", Lost, |w| w.rejected.push("a0-4".into())),
    ("the row of an acknowledged batch is gone", Lost, |w| _ = w.rows.remove(&("a0".into(), 0))),
    ("the row of a killed writer's batch is gone, its event is there", Lost, |w| {
        _ = w.rows.remove(&("a0".into(), 4))
    }),
    ("half of a batch is there", Lost, |w| {
        w.records.retain(|(_, record)| record.id != "a1-1");
        drop_tapped(w, "a1-1");
        w.histories.retain(|(app, line)| app != "a1" || !matches!(line, Line::Ok { .. }));
        w.effects.remove(&("a1".into(), 1));
        w.balances.insert(("a1".into(), "k1".into()), (1, sum("a1", 0)));
    }),
    ("a batch was given too few numbers", Lost, |w| answer(w, "a1", vec![0])),
    ("a batch was given another's numbers", Lost, |w| answer(w, "a1", vec![1, 0])),
    ("a batch was given numbers that nobody has", Lost, |w| answer(w, "a1", vec![7, 8])),
    ("what cannot be published is in quarantine without a reason", Lost, |w| {
        w.quarantined.values_mut().for_each(String::clear);
    }),
    ("what cannot be published is nowhere", Lost, |w| w.quarantined.clear()),
    ("what can be published is left in quarantine", Lost, |w| {
        w.quarantined.insert(("a0".into(), 3), "505: out of place".into());
        drop_tapped(w, "a0-3");
        w.effects.remove(&("a0".into(), 3));
        subtract(w, 3, "k1");
    }),
    ("a published event is gone from a log that keeps all", Lost, |w| {
        w.records.retain(|(_, record)| record.id != "a0-12")
    }),
    ("a bit of a record has flipped", Lost, |w| w.records[3].1.flip = Some(60)),
    ("a bit of a record's lane number has flipped", Lost, |w| w.records[3].1.flip = Some(32)),
    ("a record's end offset does not follow", Lost, |w| w.records[3].1.offset_off = 1),
    ("effects without a balance", Lost, |w| _ = w.balances.remove(&("a1".into(), "k1".into()))),
    ("a byte of a message is another", Phantom, |w| w.tap[0].body[20] ^= 1),
    ("a message is cut", Phantom, |w| _ = w.tap[0].body.pop()),
    ("a resend has another byte", Phantom, |w| w.tap.last_mut().unwrap().body[20] ^= 1),
    ("a resend has another id", Phantom, |w| w.tap.last_mut().unwrap().message_id.push('x')),
    ("a resend has another lane number", Phantom, |w| w.tap.last_mut().unwrap().lane_number += 1),
    ("a resend has another sequence number", Phantom, |w| w.tap.last_mut().unwrap().sequence += 100),
    ("a resend names another store", Phantom, |w| w.tap.last_mut().unwrap().store.push('x')),
    ("a message has a wrong lane number", Phantom, |w| w.tap[3].lane_number = 7),
    ("a message has a wrong checksum", Phantom, |w| w.tap[3].crc ^= 1),
    ("a message has no key any more", Phantom, |w| w.tap[0].key = None),
    ("a message came by another exchange", Phantom, |w| w.tap[0].exchange = "x.2".into()),
    ("two events have one id", Phantom, |w| {
        let id = w.tap[0].message_id.clone();
        w.tap[2].message_id = id;
    }),
    ("a message of nobody", Phantom, |w| w.tap[2].body = b"hello, world".to_vec()),
    ("a message that nobody meant", Phantom, |w| w.tap[2].body = payload("a0", 99, 50)),
    ("a refused event came to the tap", Phantom, |w| {
        let mut message = w.tap[0].clone();
        (message.body, message.message_id, message.sequence) = (payload("a0", 5, 50), "a0-5".into(), 200);
        w.tap.push(message);
    }),
    ("a refused event is in the log", Phantom, |w| {
        let (app, mut record) = w.records[8].clone();
        (record.payload, record.id, record.seq) = (payload("a0", 5, 50), "a0-5".into(), 11);
        (record.key, record.to, record.lane, record.lane_number) = (Some("k1".into()), 0, 0, 3);
        w.records.insert(11, (app, record));
    }),
    ("a refused batch left its row", Phantom, |w| _ = w.rows.insert(("a0".into(), 2), 1)),
    ("a row counts other events", Phantom, |w| _ = w.rows.insert(("a0".into(), 0), 2)),
    ("a row of a batch without one", Phantom, |w| _ = w.rows.insert(("a0".into(), 1), 2)),
    ("a row of nobody", Phantom, |w| _ = w.rows.insert(("a0".into(), 77), 1)),
    ("an event is in the log twice", Phantom, |w| {
        let (app, mut record) = w.records[0].clone();
        (record.seq, record.lane_number) = (11, 3);
        w.records.insert(11, (app, record));
    }),
    ("a record has another key than was meant", Phantom, |w| w.records[0].1.key = Some("k2".into())),
    ("a record has another destination than was meant", Phantom, |w| w.records[0].1.to = 2),
    ("a record is in another's lane", Phantom, |w| w.records[4].1.lane = 0),
    ("two keys share a lane", Phantom, |w| {
        let (lane, key) = (w.records[0].1.lane, w.records[0].1.key.clone());
        for (at, number) in [(0, 0), (1, 1), (3, 2), (8, 3), (10, 4)] {
            (w.records[at].1.lane, w.records[at].1.lane_number) = (lane, number);
        }
        assert_ne!(w.records[1].1.key, key);
        for message in w.tap.iter_mut().filter(|message| message.store.ends_with("-a0")) {
            let record =
                w.records.iter().find(|(app, record)| app == "a0" && record.seq == message.sequence).unwrap();
            (message.lane, message.lane_number) = (record.1.lane, record.1.lane_number);
        }
    }),
    ("a lane is not numbered from 0", Phantom, |w| {
        w.records[2].1.lane_number = 1;
        w.tap[2].lane_number = 1;
    }),
    ("a record of a stream is of none", Phantom, |w| {
        w.records[5].1.stream = None;
        w.records[5].1.revision = None;
    }),
    ("an effect of a refused event", Phantom, |w| _ = w.effects.insert(("a0".into(), 5), 1)),
    ("an effect of an event that was never committed", Phantom, |w| {
        _ = w.effects.insert(("a0".into(), 9), 1)
    }),
    ("an effect of nobody", Phantom, |w| _ = w.effects.insert(("a0".into(), 99), 1)),
    ("an effect of what cannot be published", Phantom, |w| _ = w.effects.insert(("a0".into(), 10), 1)),
    ("a batch was both written and refused", Phantom, |w| {
        w.histories.push(("a0".into(), Line::No { batch: 0, why: "late".into() }));
    }),
    ("a retry was given other numbers", Phantom, |w| {
        w.histories.push(("a0".into(), Line::Ok { batch: 1, seqs: vec![0, 1] }));
    }),
    ("a retry asked for something else", Phantom, |w| {
        w.intend("a0", 1, false, None, vec![planned("a0", 3, Some("k1"), 0)]);
    }),
    ("an answer to nobody", Phantom, |w| {
        w.histories.push(("a0".into(), Line::Ok { batch: 50, seqs: vec![] }))
    }),
    ("two events of a key are swapped", Disordered, |w| w.tap.swap(0, 3)),
    ("a later event of a key comes first, by another exchange", Disordered, |w| {
        let late = w.tap.remove(3);
        w.tap.push(late);
    }),
    ("two events of a stream are swapped", Disordered, |w| w.tap.swap(5, 6)),
    ("a resend of the later comes before the earlier", Disordered, |w| {
        let later = w.tap[3].clone();
        w.tap.insert(0, later);
    }),
    ("a revision is left out", Disordered, |w| w.records[6].1.revision = Some(2)),
    ("an event was applied twice", AppliedTwice, |w| {
        w.effects.insert(("a0".into(), 3), 2);
        add(w, 3, "k1");
    }),
    ("an event was applied twice, its row once", AppliedTwice, |w| add(w, 3, "k1")),
    ("a balance is of other events", AppliedTwice, |w| {
        w.balances.get_mut(&("a0".into(), "k1".into())).unwrap().1 ^= 1
    }),
    ("a balance of nobody", AppliedTwice, |w| _ = w.balances.insert(("a0".into(), "k99".into()), (1, 7))),
];

/// Goal: no violation is passed over, and each is called what it is. Method: the good run, spoiled in one way at a time.
#[test]
fn each_spoiled_run_is_flagged_as_what_it_is() {
    assert!(SPOILED.len() >= 25);
    let mut wrong = Vec::new();
    for (name, violation, spoil) in SPOILED {
        let mut world = World::good();
        spoil(&mut world);
        let verdict = world.judged();
        if verdict.count(*violation) == 0 {
            wrong.push(format!("{name}: not flagged as {violation}; {:?}", verdict.sentences));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn drop_tapped(world: &mut World, id: &str) {
    world.tap.retain(|message| message.message_id != id);
}

fn sum(app: &str, n: u64) -> u64 {
    u64::from(crc32fast::hash(&payload(app, n, 50)))
}

fn add(world: &mut World, n: u64, key: &str) {
    let balance = world.balances.get_mut(&("a0".into(), key.into())).unwrap();
    *balance = (balance.0 + 1, balance.1 + sum("a0", n));
}

fn subtract(world: &mut World, n: u64, key: &str) {
    let balance = world.balances.get_mut(&("a0".into(), key.into())).unwrap();
    *balance = (balance.0 - 1, balance.1 - sum("a0", n));
}

/// The application's only batch was given these numbers.
fn answer(world: &mut World, app: &str, reported: Vec<u64>) {
    for (of, line) in &mut world.histories {
        if of == app
            && let Line::Ok { seqs, .. } = line
        {
            seqs.clone_from(&reported);
        }
    }
}
