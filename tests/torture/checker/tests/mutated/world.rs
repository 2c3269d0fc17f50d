//! A small run, made up: two applications, nine batches, a tap, a consumer. Everything in it is right, until a test changes it.

use std::collections::BTreeMap;

use onewrite_torture_checker::formats::{Line, Planned, ROUTING_KEY, TapMessage, exchange, payload};
use onewrite_torture_checker::judge::Judge;
use onewrite_torture_checker::verdict::Verdict;

pub(crate) const STORE: &str = "0190163d-8694-739b-aea5-966c26f8ad91";

/// What the judge is fed.
#[derive(Debug, Clone, Default)]
pub(crate) struct World {
    pub(crate) histories: Vec<(String, Line)>,
    pub(crate) records: Vec<(String, Record)>,
    pub(crate) rows: BTreeMap<(String, u64), u64>,
    pub(crate) quarantined: BTreeMap<(String, u64), String>,
    pub(crate) tap: Vec<TapMessage>,
    pub(crate) effects: BTreeMap<(String, u64), u64>,
    pub(crate) balances: BTreeMap<(String, String), (u64, u64)>,
    pub(crate) rejected: Vec<String>,
    /// The log has been trimmed.
    pub(crate) trimmed: bool,
}

/// A record before it is bytes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Record {
    pub(crate) seq: u64,
    pub(crate) lane: u64,
    pub(crate) lane_number: u64,
    pub(crate) revision: Option<u64>,
    pub(crate) id: String,
    pub(crate) stream: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) to: u8,
    pub(crate) payload: Vec<u8>,
    /// Bytes that are changed after the checksum was made.
    pub(crate) flip: Option<usize>,
    /// Bytes that the end offset is wrong by.
    pub(crate) offset_off: u64,
}

impl Record {
    /// Written from docs/file-format.md, "A record", a second time.
    pub(crate) fn encode(&self, end_before: u64) -> Vec<u8> {
        let mut body = Vec::new();
        let flags = 1 << 2 | u16::from(self.key.is_some()) << 1 | u16::from(self.stream.is_some()) << 11;
        body.extend_from_slice(&flags.to_le_bytes());
        let exchange = exchange(self.to);
        let texts = [Some(self.id.as_str()), Some("torture"), self.stream.as_deref(), self.key.as_deref()];
        for text in texts.into_iter().chain([Some(exchange.as_str()), Some(ROUTING_KEY)]).flatten() {
            body.push(text.len() as u8);
            body.extend_from_slice(text.as_bytes());
        }
        body.extend_from_slice(&self.payload);
        let revision = self.revision.map(u64::to_le_bytes);
        let len = 44 + body.len() as u64 + if revision.is_some() { 8 } else { 0 };
        let mut checked = Vec::new();
        for number in [end_before + len + self.offset_off, 1_700_000_000_000, self.lane, self.lane_number] {
            checked.extend_from_slice(&number.to_le_bytes());
        }
        checked.extend_from_slice(&(body.len() as u32).to_le_bytes());
        checked.extend(revision.into_iter().flatten());
        checked.extend_from_slice(&body);
        let crc = crc32fast::hash(&[&self.seq.to_le_bytes()[..], &checked].concat());
        let mut bytes =
            [&b"OW\x01"[..], &[u8::from(self.revision.is_some())], &crc.to_le_bytes(), &checked].concat();
        if let Some(at) = self.flip {
            bytes[at] ^= 1;
        }
        bytes
    }

    fn crc(&self, end_before: u64) -> u64 {
        u64::from(u32::from_le_bytes(self.encode(end_before)[4..8].try_into().unwrap()))
    }
}

/// One batch of the good run.
struct Written<'a> {
    app: &'a str,
    batch: u64,
    row: bool,
    stream: Option<&'a str>,
    events: &'a [(u64, Option<&'a str>, u8)],
    answered: bool,
}

impl World {
    /// The good run.
    pub(crate) fn good() -> Self {
        let mut world = Self::default();
        let written =
            |batch, row, events| Written { app: "a0", batch, row, stream: None, events, answered: true };
        world.write(&written(0, true, &[(0, Some("k1"), 0), (1, Some("k2"), 0), (2, None, 1)]));
        world.write(&written(1, false, &[(3, Some("k1"), 0), (4, Some("k1"), 1)]));
        world.refuse(2, 5);
        world.write(&Written {
            stream: Some("s"),
            ..written(3, true, &[(6, Some("s"), 2), (7, Some("s"), 2)])
        });
        // Killed after the commit, and before it.
        world.write(&Written { answered: false, ..written(4, true, &[(8, Some("k2"), 0)]) });
        world.intend("a0", 5, false, None, vec![planned("a0", 9, Some("k1"), 0)]);
        world.poison(6, 10);
        world.write(&written(7, true, &[(11, Some("k1"), 0), (12, None, 1)]));
        world.write(&Written { app: "a1", ..written(0, true, &[(0, Some("k1"), 0), (1, Some("k1"), 0)]) });
        // A retry of a write whose answer was lost, and its answer.
        world.histories.extend([world.histories[2].clone(), world.histories[3].clone()]);
        // A resend.
        world.tap.push(TapMessage { resend: true, ..world.tap[1].clone() });
        world
    }

    pub(crate) fn intend(
        &mut self,
        app: &str,
        batch: u64,
        row: bool,
        stream: Option<&str>,
        events: Vec<Planned>,
    ) {
        let (kind, stream) = ("Write".to_owned(), stream.map(str::to_owned));
        self.histories.push((app.to_owned(), Line::Intent { batch, kind, row, stream, events }));
    }

    fn refuse(&mut self, batch: u64, n: u64) {
        self.intend("a0", batch, true, None, vec![planned("a0", n, Some("k1"), 0)]);
        self.histories.push(("a0".to_owned(), Line::No { batch, why: "on purpose".to_owned() }));
    }

    fn poison(&mut self, batch: u64, n: u64) {
        let event = Planned { poison: true, ..planned("a0", n, None, 2) };
        self.intend("a0", batch, false, None, vec![event]);
        let seq = self.append("a0", n, None, 2, None);
        self.histories.push(("a0".to_owned(), Line::Ok { batch, seqs: vec![seq] }));
        self.quarantined.insert(("a0".to_owned(), seq), "406: too large".to_owned());
    }

    fn write(&mut self, written: &Written<'_>) {
        let Written { app, batch, row, stream, events, answered } = *written;
        let plans = events.iter().map(|(n, key, to)| planned(app, *n, *key, *to)).collect();
        self.intend(app, batch, row, stream, plans);
        let seqs: Vec<_> =
            events.iter().map(|(n, key, to)| self.append(app, *n, *key, *to, stream)).collect();
        if answered {
            self.histories.push((app.to_owned(), Line::Ok { batch, seqs }));
        }
        if row {
            self.rows.insert((app.to_owned(), batch), events.len() as u64);
        }
        for (n, key, _) in events {
            let record = self
                .records
                .iter()
                .rposition(|(of, record)| of == app && record.payload == payload(app, *n, 50));
            self.deliver(record.unwrap());
            self.effects.insert((app.to_owned(), *n), 1);
            let balance =
                self.balances.entry((app.to_owned(), key.unwrap_or_default().to_owned())).or_default();
            balance.0 += 1;
            balance.1 += u64::from(crc32fast::hash(&payload(app, *n, 50)));
        }
    }

    fn append(&mut self, app: &str, n: u64, key: Option<&str>, to: u8, stream: Option<&str>) -> u64 {
        let own = || self.records.iter().filter(|(of, _)| of == app).map(|(_, record)| record);
        let seq = own().count() as u64;
        let of_lane = own().filter(|record| (record.key.as_deref(), record.to) == (key, to));
        let (lane_number, lane) = (of_lane.clone().count() as u64, of_lane.map(|record| record.lane).next());
        let revision = stream
            .map(|stream| own().filter(|record| record.stream.as_deref() == Some(stream)).count() as u64);
        let record = Record {
            seq,
            lane: lane.unwrap_or(seq),
            lane_number,
            revision,
            id: format!("{app}-{n}"),
            stream: stream.map(str::to_owned),
            key: key.map(str::to_owned),
            to,
            payload: payload(app, n, 50),
            flip: None,
            offset_off: 0,
        };
        self.records.push((app.to_owned(), record));
        seq
    }

    /// The record comes to the tap.
    pub(crate) fn deliver(&mut self, at: usize) {
        let (app, record) = self.records[at].clone();
        let end_before = self.ends()[at].1;
        self.tap.push(TapMessage {
            exchange: exchange(record.to),
            routing_key: ROUTING_KEY.to_owned(),
            message_id: record.id.clone(),
            store: format!("{STORE}-{app}"),
            epoch: 0,
            lane: record.lane,
            lane_number: record.lane_number,
            crc: record.crc(end_before),
            sequence: record.seq,
            key: record.key.clone(),
            resend: false,
            redelivered: false,
            body: record.payload,
        });
    }

    /// Each record's bytes, and where the one before it ends.
    fn ends(&self) -> Vec<(Vec<u8>, u64)> {
        let mut ends: BTreeMap<&str, u64> = BTreeMap::new();
        let encode = |(app, record): &'_ (String, Record), ends: &mut BTreeMap<_, u64>| {
            let before = ends.get(app.as_str()).copied().unwrap_or_default();
            (record.encode(before), before)
        };
        let mut all = Vec::new();
        for entry in &self.records {
            let (bytes, before) = encode(entry, &mut ends);
            ends.insert(&entry.0, before + bytes.len() as u64);
            all.push((bytes, before));
        }
        all
    }

    pub(crate) fn judged(&self) -> Verdict {
        let mut judge = Judge::new(["a0", "a1"]);
        if !self.trimmed {
            judge.keeps_log("a0");
        }
        for (app, line) in &self.histories {
            judge.history(app, line.clone());
        }
        for ((app, record), (bytes, _)) in self.records.iter().zip(self.ends()) {
            judge.record(app, record.seq, &bytes);
        }
        self.rows.iter().for_each(|((app, batch), events)| judge.row(app, *batch, *events));
        for ((app, seq), reason) in &self.quarantined {
            judge.quarantined(app, *seq, reason.clone());
        }
        self.tap.iter().for_each(|message| judge.tapped(message));
        self.effects.iter().for_each(|((app, n), times)| judge.effect(app, *n, *times));
        for ((app, key), (effects, sum)) in &self.balances {
            judge.balance(app, key, *effects, *sum);
        }
        self.rejected.iter().for_each(|what| judge.rejected(what));
        judge.finish()
    }
}

pub(crate) fn planned(app: &str, n: u64, key: Option<&str>, to: u8) -> Planned {
    let bytes = payload(app, n, 50);
    let (len, crc) = (bytes.len() as u32, crc32fast::hash(&bytes));
    Planned { n, key: key.map(str::to_owned), to, len, crc, poison: false }
}
