//! Who judges order: from what arrived on the broker alone, never from our own records.

use std::collections::{BTreeMap, HashMap, HashSet};

use onewrite::wire;

use crate::support::tap::Raw;

/// The payload of the `number`th event of a key.
pub(super) fn payload(key: &str, number: u64) -> Vec<u8> {
    format!("{key}:{number}").into_bytes()
}

/// Takes arrivals in their order. **Rule:** the first arrivals of a key ascend without a gap; a later arrival of the same event has
/// the same id, and all but one of an event's arrivals are marked as resends. The one that is not may be the last: what a dead link
/// still held comes when the link is back.
#[derive(Debug, Default)]
pub(super) struct Judge {
    next: BTreeMap<String, u64>,
    ids: HashMap<Vec<u8>, String>,
    unmarked: HashSet<Vec<u8>>,
    pub(super) repeats: u64,
}

impl Judge {
    pub(super) fn of(raw: &[Raw]) -> Result<Self, String> {
        let mut judge = Self::default();
        raw.iter().try_for_each(|raw| judge.raw(raw))?;
        Ok(judge)
    }

    pub(super) fn raw(&mut self, raw: &Raw) -> Result<(), String> {
        let resend =
            raw.properties.headers().as_ref().is_some_and(|headers| headers.contains_key(wire::RESEND));
        self.arrived(&raw.body, raw.id(), resend)
    }

    fn arrived(&mut self, body: &[u8], id: &str, resend: bool) -> Result<(), String> {
        let text = String::from_utf8_lossy(body);
        let parsed = text.rsplit_once(':').and_then(|(key, number)| Some((key, number.parse::<u64>().ok()?)));
        let (key, number) = parsed.ok_or_else(|| format!("no such event was appended: {text:?}"))?;
        if !resend && !self.unmarked.insert(body.to_vec()) {
            return Err(format!("{text} came again and neither is marked as a resend"));
        }
        let next = self.next.entry(key.to_owned()).or_default();
        if number > *next {
            return Err(format!("{text} came before {key}:{next}"));
        }
        if number == *next {
            *next += 1;
            if let Some(before) = self.ids.insert(body.to_vec(), id.to_owned()) {
                return Err(format!("{text} came for the first time twice, as {before}"));
            }
            return Ok(());
        }
        self.repeats += 1;
        match self.ids.get(body) {
            Some(first) if first == id => Ok(()),
            Some(first) => Err(format!("{text} came as {first} and again as {id}")),
            None => Err(format!("{text} is new and comes after its place")),
        }
    }

    /// Everything that was appended has arrived.
    pub(super) fn complete(&self, appended: &BTreeMap<String, u64>) -> Result<(), String> {
        if self.next == *appended {
            Ok(())
        } else {
            Err(format!("arrived {:?}, appended {appended:?}", self.next))
        }
    }
}

/// Goal: the judge can say no. Method: histories that break one rule each, and one that breaks none.
#[test]
fn the_judge_condemns_bad_histories() {
    let judge = |history: &[(&str, &str, bool)]| {
        let mut judge = Judge::default();
        history.iter().try_for_each(|(body, id, resend)| judge.arrived(body.as_bytes(), id, *resend))?;
        judge.complete(&BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]))
    };
    let good = [("a:0", "i", false), ("b:0", "k", false), ("a:1", "j", false), ("a:0", "i", true)];
    assert_eq!(judge(&good), Ok(()));
    // The first sending of `a:0` arrives last.
    assert_eq!(judge(&[("a:0", "i", true), good[1], good[2], good[0]]), Ok(()));
    let bad = [
        ("came before", vec![good[2], good[0], good[1]]),
        ("arrived", good[..2].to_vec()),
        ("again as", vec![good[0], ("a:0", "other", true)]),
        ("neither is marked as a resend", vec![good[0], good[0]]),
        ("no such event", vec![("c", "x", false)]),
        ("arrived", [&good[..], &[("c:0", "x", false)]].concat()),
    ];
    for (reason, history) in bad {
        let word = judge(&history).unwrap_err();
        assert!(word.contains(reason), "{word}");
    }
}
